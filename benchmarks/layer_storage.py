"""How layers' weights are stored and what a decode step's products pay for it.

The products of a decoder (queries to values, output, MLP) run over all layers for a few
rows, in four forms that give the same result:

  per_layer  an array per layer, the loop over layers unrolled
  slices     one stacked array per weight, unrolled, with static slices
  scan       one stacked array per weight, `lax.scan`
  indexed    the same scan, with a Triton product that reads its layer's part of the
             stack in place (CUDA only)

  python -m benchmarks.layer_storage                     # 8B shape on a GPU
  python -m benchmarks.layer_storage --model smollm2-135m --layers 8 --batch 1

Prints the median over calls with the least and the most, and the weights' bytes over
it.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from benchmarks.parsers import benchmark_parser
from pallas_kernels.lowering import silence_triton_deprecation
from sparda_jax.checks import integer
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import add_option
from sparda_jax.config import ModelConfig
from sparda_jax.models.layers import matmul
from sparda_jax.models.presets import get_preset
from sparda_jax.models.weights import random_decoder

FORMS = ("per_layer", "slices", "scan", "indexed")
Weights = dict[str, Float[Array, "*L D F"]]


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of the indexed product: a program's columns and a step's rows."""

    columns: int = 32
    depth: int = 128


def indexed_matmul(
    x: Float[Array, "B D"],
    stack: Float[Array, "L D F"],
    layer: Int[Array, ""],
    *,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "B F"]:
    """x @ stack[layer] without a copy of the layer; D and F are multiples of a tile."""
    tile = tile or Tile()
    (batch, depth), width = x.shape, stack.shape[2]
    # Tensor cores want at least 16 rows.
    rows = max(16, 1 << (batch - 1).bit_length())
    padded = jnp.pad(x, ((0, rows - batch), (0, 0)))

    def kernel(x_ref, stack_ref, layer_ref, out_ref):
        columns = pl.ds(pl.program_id(0) * tile.columns, tile.columns)
        index = layer_ref[0]

        def step(i, acc):
            part = pl.ds(i * tile.depth, tile.depth)
            return acc + lax.dot_general(
                x_ref[:, part],
                stack_ref[index, part, columns],
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )

        acc = jnp.zeros((rows, tile.columns), jnp.float32)
        acc = lax.fori_loop(0, depth // tile.depth, step, acc)
        out_ref[:, columns] = acc.astype(out_ref.dtype)

    silence_triton_deprecation()
    out = pl.pallas_call(
        kernel,
        grid=(width // tile.columns,),
        out_shape=jax.ShapeDtypeStruct((rows, width), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="indexed_matmul",
    )(padded, stack, layer.reshape(1))
    return out[:batch]


def _layer(x: Array, product) -> Array:
    """One layer's products; `product(x, name)` multiplies by the named weight."""
    heads = product(x, "qkv")
    attended = heads[:, : x.shape[1]]
    x = x + product(attended, "out")
    gate, up = jnp.split(product(x, "gate_up"), 2, axis=1)
    x = x + product(jax.nn.silu(gate) * up, "down")
    return x / jnp.sqrt(1 + jnp.mean(jnp.square(x), axis=1, keepdims=True))


def _unrolled(x: Array, layers: list[Weights]) -> Array:
    for weights in layers:
        x = _layer(x, lambda x, name, w=weights: matmul(x, w[name]))
    return x


def _sliced(x: Array, stack: Weights) -> Array:
    count = stack["qkv"].shape[0]
    return _unrolled(x, [{k: w[i] for k, w in stack.items()} for i in range(count)])


def _scanned(x: Array, stack: Weights) -> Array:
    def body(x: Array, weights: Weights) -> tuple[Array, None]:
        return _layer(x, lambda x, name: matmul(x, weights[name])), None

    return lax.scan(body, x, stack)[0]


def _indexed(x: Array, stack: Weights) -> Array:
    def body(x: Array, index: Array) -> tuple[Array, None]:
        def product(x: Array, name: str) -> Array:
            return indexed_matmul(x, stack[name], index)

        return _layer(x, product), None

    return lax.scan(body, x, jnp.arange(stack["qkv"].shape[0]))[0]


def _draw(config: ModelConfig, dtype: DTypeLike) -> Weights:
    """The products' weights of a random model, a stack each."""
    layers = random_decoder(config, dtype, storage="stacked").layers
    names = ("qkv", "out", "gate_up", "down")
    return {name: getattr(layers, name)[...] for name in names}


def main() -> None:
    """Runs the comparison."""
    parser = benchmark_parser("layer_storage", __doc__)
    parser.add_argument("--model", default="minicpm4.1-8b", help="preset")
    for name, default, about in (
        ("--layers", None, "fewer layers than the preset has"),
        ("--batch", 16, "rows"),
        ("--calls", 30, "timed calls"),
    ):
        add_option(parser, name, integer(1), metavar="N", default=default, help=about)
    parser.add_argument("--form", nargs="+", choices=FORMS)
    arguments = parser.parse_args()
    cpu = jax.default_backend() == "cpu"
    config = get_preset(arguments.model).model
    layers = arguments.layers or config.num_layers
    config = dataclasses.replace(config, num_layers=layers)
    stack = _draw(config, jnp.float32 if cpu else jnp.bfloat16)
    size = sum(w.nbytes for w in stack.values())
    x = jax.random.normal(jax.random.key(1), (arguments.batch, config.hidden_size))
    x = x.astype(stack["qkv"].dtype)
    print(
        f"{arguments.model}, {layers} layers, {size / 1e9:.2f} GB of weights, batch "
        f"{arguments.batch}, {jax.devices()[0].device_kind}, JAX {jax.__version__}"
    )
    forms = arguments.form or (FORMS[:-1] if cpu else FORMS)
    functions = {"slices": _sliced, "scan": _scanned, "indexed": _indexed}
    wanted = None
    for form in forms:
        weights = stack
        if form == "per_layer":
            weights = [{k: w[i] + 0 for k, w in stack.items()} for i in range(layers)]
        call = jax.jit(functions.get(form, _unrolled))
        begun = time.perf_counter()
        compiled = call.lower(x, weights).compile()
        compiling = time.perf_counter() - begun
        jax.block_until_ready(compiled(x, weights))
        seconds = []
        for _ in range(arguments.calls):
            begun = time.perf_counter()
            jax.block_until_ready(compiled(x, weights))
            seconds.append(time.perf_counter() - begun)
        analysis = compiled.memory_analysis()
        scratch = 0 if analysis is None else analysis.temp_size_in_bytes / 1e6
        # One layer: over many, a rounding grows until two results share nothing.
        if isinstance(weights, list):
            first = weights[:1]
        else:
            first = {name: w[:1] for name, w in weights.items()}
        out = jax.jit(functions.get(form, _unrolled))(x, first)
        wanted = out if wanted is None else wanted
        error = float(jnp.max(jnp.abs((out - wanted).astype(jnp.float32))))
        median = statistics.median(seconds)
        print(
            f"{form:10} {median * 1e3:8.2f} ms ({min(seconds) * 1e3:.2f} … "
            f"{max(seconds) * 1e3:.2f})  {size / median / 1e9:6.0f} GB/s, scratch "
            f"{scratch:.0f} MB, compiled in {compiling:.1f} s, a layer off by "
            f"{error:.1e}",
            flush=True,
        )
        del weights


if __name__ == "__main__":
    raise SystemExit(run_command(main))
