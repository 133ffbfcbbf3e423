"""One training step: the frozen backbone once, each layer's gradient on the way.

The backbone runs in one scan over its layers and is never differentiated. A layer's
loss needs its own queries and keys and one Forecast matrix, W, that reads the input of
the layer before: the loss gives d phi, and d W = xᵀ · RoPE⁻¹(d phi) is one product. So
nothing is kept from one layer to the next but the hidden states and that input
(specification §5.6; §8.24 for what the reference computes twice).

Only Forecast matrices have optimizer state, and they are float32 whatever the model's
type is (§8.22). Devices share the batch; with `fsdp` each holds a part of the frozen
weights and gathers a layer's when that layer runs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.block_scores import api as block_scores
from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.dispatch import candidates
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.models.block import after_attention, before_attention
from sparda_jax.models.decoder import Decoder, DecoderLayer, embed
from sparda_jax.models.forecast import project_forecast
from sparda_jax.models.rope import Rotation, apply_rope, model_rope, rotation
from sparda_jax.models.weights import from_query_heads
from train.config import LossConfig, OptimizerConfig
from train.loss import (
    Documents,
    Kernels,
    attend_listed,
    distill_layer,
    head_scores,
    join_tiles,
    num_blocks,
    padded_heads,
    stream_tiles,
    tile_queries,
    tile_size,
)

AXIS = "data"
# Rows of hidden states that pass through the MLP together: its inner width times this
# is the largest intermediate of a layer.
_MLP_ROWS = 4096


class Batch(NamedTuple):
    """Token ids and the documents they belong to; leading axes may come before B."""

    tokens: Int[Array, "*A B T"]
    documents: Documents


class TrainState(NamedTuple):
    """What training changes.

    Attributes:
      heads: Forecast matrices by consuming layer, float32 (`models.forecast`).
      optimizer: State of the optax transformation.
      step: Steps taken, skipped ones among them.
      skipped: Steps that were skipped because something was not finite.
      bad_in_a_row: How many of the latest steps were skipped.
    """

    heads: Float[Array, "L D KH"]
    optimizer: Any
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    bad_in_a_row: Int[Array, ""]


class StepMetrics(NamedTuple):
    """Figures of one step.

    Attributes:
      loss: By layer.
      gradient_norm: Of all heads together, before clipping.
      skipped, bad_in_a_row: As in `TrainState`, after the step.
    """

    loss: Float[Array, " L"]
    gradient_norm: Float[Array, ""]
    skipped: Int[Array, ""]
    bad_in_a_row: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed at trace time.

    Attributes:
      config: The model.
      sparse: Block geometry and budget.
      loss: Variant of the loss.
      implementation: Attention kernels.
      masked_attention: Attend by masking all keys instead of visiting the listed
        blocks: the faster one where contexts are short.
      whole_rows: Every row is one document without padding, which lets a kernel make
        the teacher.
    """

    config: ModelConfig
    sparse: SparseConfig
    loss: LossConfig
    implementation: Literal["mosaic_gpu", "triton", "xla"] | None = None
    masked_attention: bool = False
    whole_rows: bool = False

    @property
    def teacher_kernels(self) -> Kernels:
        """Kernels for `distill_layer`: none where rows hold several documents.

        Unless one is named, those recorded for this device, in their order where
        softmaxes are summed. Without any of them tiles in XLA are the better form.
        """
        if not self.whole_rows:
            return ()
        known = candidates(block_scores.OP, self.implementation, {"softmax": True})
        return cast(Kernels, tuple(name for name in known if name != "xla"))


class LayerView(NamedTuple):
    """What a layer shows to a loss or a metric.

    Attributes:
      q, k: Queries and keys after RoPE.
      v: Values.
      key_bias: NOSA's c per token, or None.
      source: Normalised input that this layer is forecast from.
      head: Its Forecast matrix, or several of them.
      turn: Rotation of all tokens.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    key_bias: Float[Array, "B T K"] | None
    source: Float[Array, "B T D"]
    head: Float[Array, "*V D KH"]
    turn: Rotation

    @property
    def phi(self) -> Float[Array, "B T K H"]:
        """Forecasts for this layer; of the first head, if there are several."""
        head = self.head.reshape(-1, *self.head.shape[-2:])[0]
        return project_forecast(self.source, head, self.turn)


def head_gradient(
    source: Float[Array, "B T D"],
    d_phi: Float[Array, "B T K H"],
    turn: Rotation,
) -> Float[Array, "D KH"]:
    """Gradient of a Forecast matrix from that of its forecasts, float32.

    The transpose of a rotation turns the other way.
    """
    d_plain = apply_rope(d_phi, Rotation(turn.cos, -turn.sin))
    d_plain = d_plain.reshape(*d_phi.shape[:2], -1)
    # In float32 the sum over all tokens would not be rounded, but on accelerators the
    # product of two bfloat16 arrays is summed in float32 as well.
    return jnp.einsum(
        "btd,bte->de",
        source,
        d_plain.astype(source.dtype),
        preferred_element_type=jnp.float32,
    )


def _attend_masked(
    view: LayerView, lists: Int[Array, "B K T P"], settings: Settings
) -> Float[Array, "B T N H"]:
    """The same attention, scoring all keys and masking those not listed.

    Where a context is only a few times the budget this is faster than visiting lists,
    as its products are few and large.
    """
    sparse = settings.sparse
    batch, tokens, heads, _ = view.q.shape
    size = settings.loss.tile
    size = size or tile_size(batch, tokens, heads, jax.default_backend())
    documents = Documents.whole_rows(batch, tokens)
    tiles, cut = tile_queries(view.q, view.phi, documents, size)
    lists = jnp.pad(
        lists, ((0, 0), (0, 0), (0, tiles * size - tokens), (0, 0)), constant_values=-1
    )
    k, v = padded_heads(view.k, sparse), padded_heads(view.v, sparse)
    bias = None if view.key_bias is None else padded_heads(view.key_bias, sparse)

    def one_tile(index: Int[Array, ""], reach: int) -> Float[Array, "B t N H"]:
        queries = cut(index)
        part = jax.lax.dynamic_slice_in_dim(lists, index * size, size, axis=2)
        scores = head_scores(queries.q, k[:, :, :reach])
        if bias is not None:
            scores = scores + bias[:, :, None, None, :reach]
        return attend_listed(scores, v[:, :, :reach], part, queries, sparse)

    out = stream_tiles(one_tile, tokens=tokens, size=size, sparse=sparse)
    return join_tiles(out, 1, tokens)


def attend(
    view: LayerView, lists: Int[Array, "B K T P"] | None, settings: Settings
) -> Float[Array, "B T N H"]:
    """Attention of whole rows over their block lists; None for all causal blocks."""
    if settings.masked_attention and lists is not None:
        return _attend_masked(view, lists, settings)
    sparse = settings.sparse
    batch, tokens, kv_heads, dim = view.v.shape
    blocks = num_blocks(tokens, sparse)
    pad = blocks * sparse.block_size - tokens
    kv = jnp.moveaxis(jnp.stack((view.k, view.v), axis=3), 1, 2)
    kv = jnp.pad(kv, ((0, 0), (0, 0), (0, pad), (0, 0), (0, 0)))
    bias = None
    if view.key_bias is not None:
        bias = jnp.swapaxes(view.key_bias, 1, 2)
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, pad)))
        bias = bias.reshape(batch, kv_heads, blocks, -1)
    return block_sparse_attention(
        view.q,
        kv.reshape(batch, kv_heads, blocks, sparse.block_size, 2, dim),
        q_start=jnp.zeros((batch,), jnp.int32),
        block_indices=lists,
        key_bias=bias,
        implementation=settings.implementation,
    )


def _finish_layer(
    layer: DecoderLayer,
    config: ModelConfig,
    h: Float[Array, "B T D"],
    attended: Float[Array, "B T NH"],
) -> Float[Array, "B T D"]:
    """Output projection and MLP, some rows at a time."""

    def rows(inputs: tuple[Array, Array]) -> Array:
        return after_attention(layer, config, *inputs)

    count = h.shape[0] * h.shape[1]
    parts = max(1, count // _MLP_ROWS)
    while count % parts:
        parts += 1
    flat = (
        h.reshape(parts, count // parts, -1),
        attended.reshape(parts, count // parts, -1),
    )
    if parts == 1:
        out = rows((flat[0][0], flat[1][0]))
    else:
        out = jax.lax.map(rows, flat)
    return out.reshape(h.shape)


def run_backbone[Out](
    model: Decoder,
    heads: Float[Array, "L *V D KH"],
    batch: Batch,
    settings: Settings,
    on_layer: Callable[[LayerView], tuple[Float[Array, "B T N H"], Out]],
    gather: Callable[[DecoderLayer], DecoderLayer] = lambda layer: layer,
) -> tuple[Float[Array, "B T D"], Out]:
    """Runs the frozen layers; what `on_layer` returns is stacked over them.

    Args:
      model: Stacked weights.
      heads: Forecast matrices by consuming layer.
      batch: Whole rows.
      settings: Model and geometry.
      on_layer: Returns what the layer's attention gives (`attend`), and anything else.
      gather: Makes a layer's weights whole where devices hold parts of them.

    Returns:
      The last hidden states, before the final norm, and the stacked outputs.
    """
    config = settings.config
    h = embed(model, batch.tokens, model.embedding[...].dtype)
    rope = model_rope(config, batch.tokens.shape[1])
    turn = rotation(rope, jnp.maximum(batch.documents.positions(), 0))

    def body(
        carry: tuple[Array, Array], xs: tuple[DecoderLayer, Array, Array]
    ) -> tuple[tuple[Array, Array], Out]:
        (h, before), (layer, head, index) = carry, xs
        layer = gather(layer)
        x, q, k, v, key_bias = before_attention(layer, config, h, turn)
        # Layer 0 forecasts for itself, the others are forecast by the layer before.
        source = jnp.where(index == 0, x, before)
        view = LayerView(
            q=q,
            k=k,
            v=v,
            key_bias=key_bias,
            source=source,
            head=head,
            turn=turn,
        )
        attended, out = on_layer(view)
        attended = attended.reshape(*h.shape[:2], -1)
        return (_finish_layer(layer, config, h, attended), x), out

    assert isinstance(model.layers, DecoderLayer), "weights must be stacked"
    index = jnp.arange(config.num_layers)
    carry, out = jax.lax.scan(body, (h, h), (model.layers, heads, index))
    return carry[0], out


def heads_gradient(
    model: Decoder,
    heads: Float[Array, "L D KH"],
    batch: Batch,
    settings: Settings,
    gather: Callable[[DecoderLayer], DecoderLayer] = lambda layer: layer,
) -> tuple[Float[Array, "L D KH"], Float[Array, " L"], Float[Array, ""]]:
    """Gradient of each layer's summed loss, the sums, and the sum of the row weights.

    Dividing the first two by the third gives means: what is summed can be added up over
    micro batches and devices before.
    """

    def on_layer(view: LayerView) -> tuple[Array, tuple[Array, Array, Array]]:
        # With masked attention one product of queries and keys serves both.
        out = distill_layer(
            view.q,
            view.k,
            view.phi,
            batch.documents,
            view.key_bias,
            sparse=settings.sparse,
            loss=settings.loss,
            with_gradient=True,
            v=view.v if settings.masked_attention else None,
            kernels=settings.teacher_kernels,
        )
        assert out.d_phi is not None
        gradient = head_gradient(view.source, out.d_phi, view.turn)
        attended = out.attended
        if attended is None:
            attended = attend(view, out.routing, settings)
        return attended, (gradient, out.total, out.weight)

    _, (gradient, total, weight) = run_backbone(
        model, heads, batch, settings, on_layer, gather
    )
    return gradient, total, weight[0]


def initial_heads(model: Decoder, how: str, seed: int) -> Float[Array, "L D KH"]:
    """Float32 heads before training: `kaiming` (§4.1), else `from_query`."""
    config = model.config
    if how != "kaiming":
        return jnp.stack([x.astype(jnp.float32) for x in from_query_heads(model)])
    shape = (
        config.num_layers,
        config.hidden_size,
        config.num_kv_heads * config.head_dim,
    )
    bound = config.hidden_size**-0.5
    key = jax.random.key(seed)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Linear warm-up of at most a tenth of the steps, then the schedule."""
    warmup = min(config.warmup_steps, config.steps // 10)
    rest = max(1, config.steps - warmup)
    end = config.lr * config.final_fraction
    after = {
        "constant": optax.constant_schedule(config.lr),
        "cosine": optax.cosine_decay_schedule(config.lr, rest, config.final_fraction),
        "linear": optax.linear_schedule(config.lr, end, rest),
    }[config.schedule]
    if warmup == 0:
        return after
    # Step 0 already moves: the ramp ends at the peak after `warmup` steps.
    ramp = optax.linear_schedule(config.lr / warmup, config.lr, max(1, warmup - 1))
    return optax.join_schedules((ramp, after), (warmup,))


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW behind one clip over the gradient of all heads (§5.6)."""
    adamw = optax.adamw(
        learning_rate(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if config.clip == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def initial_state(
    heads: Float[Array, "L D KH"], optimizer: optax.GradientTransformation
) -> TrainState:
    """State before the first step."""

    def zero() -> Array:
        return jnp.zeros((), jnp.int32)

    return TrainState(heads, optimizer.init(heads), zero(), zero(), zero())


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh of one axis over that many devices, or all."""
    found = jax.devices()
    return Mesh(np.asarray(found[: devices or len(found)]), (AXIS,))


def _split_axis(shape: tuple[int, ...], parts: int) -> int | None:
    """Which axis of a stacked weight devices divide; None for small ones."""
    if parts > 1 and len(shape) > 2:
        for axis in range(1, len(shape)):
            if shape[axis] % parts == 0:
                return axis
    return None


def layer_specs(model: Decoder, parts: int) -> DecoderLayer:
    """Partition of every stacked layer weight over `parts` devices."""

    def spec(x: Array) -> PartitionSpec:
        axis = _split_axis(x.shape, parts)
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)

    return jax.tree.map(spec, model.layers)


def model_specs(model: Decoder, mesh: Mesh, *, fsdp: bool) -> Decoder:
    """Partition of every weight: layers are divided with `fsdp`, the rest is whole."""
    specs = jax.tree.map(lambda _: PartitionSpec(), model)
    if fsdp:
        specs.layers = layer_specs(model, mesh.size)
    return specs


def place(x: Array | np.ndarray, mesh: Mesh, spec: PartitionSpec) -> Array:
    """An array laid out over the mesh; every process must hold all of it."""
    sharding = NamedSharding(mesh, spec)
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda at: whole[at])


def shard_model(model: Decoder, mesh: Mesh, *, fsdp: bool) -> Decoder:
    """The model with its weights laid out over the mesh."""
    specs = model_specs(model, mesh, fsdp=fsdp)
    return jax.tree.map(lambda x, spec: place(x, mesh, spec), model, specs)


def make_gather(
    model: Decoder, mesh: Mesh, *, fsdp: bool
) -> Callable[[DecoderLayer], DecoderLayer]:
    """Makes one layer's weights whole inside `shard_map`."""
    if not fsdp or mesh.size == 1:
        return lambda layer: layer
    axes = [_split_axis(x.shape, mesh.size) for x in jax.tree.leaves(model.layers)]

    def gather(layer: DecoderLayer) -> DecoderLayer:
        leaves, tree = jax.tree.flatten(layer)
        whole = []
        for x, axis in zip(leaves, axes, strict=True):
            if axis is not None:
                # One axis less than in the stack: the scan took the layers' one.
                x = jax.lax.all_gather(x, AXIS, axis=axis - 1, tiled=True)
            whole.append(x)
        return jax.tree.unflatten(tree, whole)

    return gather


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array of a `Batch` with a leading axis of micro batches."""
    return NamedSharding(mesh, PartitionSpec(None, AXIS))


Gradients = Callable[[Decoder, Array, Batch], tuple[Array, Array, Array]]


def make_gradients(
    model: Decoder, settings: Settings, mesh: Mesh, *, fsdp: bool = False
) -> Gradients:
    """`heads_gradient` of a batch [A, B, T] over the mesh, summed; not jitted.

    The A micro batches are accumulated; B is shared by the devices.
    """
    gather = make_gather(model, mesh, fsdp=fsdp)
    specs = model_specs(model, mesh, fsdp=fsdp)

    def gradients(
        model: Decoder, heads: Array, batch: Batch
    ) -> tuple[Array, Array, Array]:
        def micro(sums: tuple, batch: Batch) -> tuple[tuple, None]:
            new = heads_gradient(model, heads, batch, settings, gather)
            return jax.tree.map(jnp.add, sums, new), None

        zeros = (
            jnp.zeros(heads.shape, jnp.float32),
            jnp.zeros(heads.shape[:1], jnp.float32),
            jnp.zeros((), jnp.float32),
        )
        if batch.tokens.shape[0] == 1:
            sums = heads_gradient(
                model, heads, jax.tree.map(lambda x: x[0], batch), settings, gather
            )
        else:
            sums = jax.lax.scan(micro, zeros, batch)[0]
        return jax.lax.psum(sums, AXIS) if mesh.size > 1 else sums

    return jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(specs, PartitionSpec(), PartitionSpec(None, AXIS)),
        out_specs=PartitionSpec(),
        # Nothing is differentiated through a collective, and the kernels inside carry
        # no annotations of what varies over the mesh.
        check_vma=False,
    )


Step = Callable[[Decoder, TrainState, Batch], tuple[TrainState, StepMetrics]]


def make_step(
    model: Decoder,
    settings: Settings,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    fsdp: bool = False,
) -> Step:
    """The jitted step: (model, state, batch [A, B, T]) → (state, metrics).

    The A micro batches are accumulated; B is shared by the devices. The state is
    donated. A step whose loss or gradient is not finite leaves heads and optimizer as
    they were.

    Args:
      model: Only its shapes are used.
      settings: Model, geometry and loss.
      optimizer: For the heads.
      mesh: Of `make_mesh`.
      fsdp: The layers' weights are divided over the mesh.
    """
    spread = make_gradients(model, settings, mesh, fsdp=fsdp)

    def step(
        model: Decoder, state: TrainState, batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        gradient, total, weight = spread(model, state.heads, batch)
        weight = jnp.maximum(weight, 1.0)
        gradient, loss = gradient / weight, total / weight
        norm = jnp.sqrt(jnp.sum(jnp.square(gradient)))
        finite = jnp.isfinite(norm) & jnp.all(jnp.isfinite(loss))
        updates, moments = optimizer.update(gradient, state.optimizer, state.heads)
        heads = optax.apply_updates(state.heads, updates)

        def kept(new: Any, old: Any) -> Array:
            return jnp.where(finite, new, old)

        bad = (~finite).astype(jnp.int32)
        after = TrainState(
            heads=kept(heads, state.heads),
            optimizer=jax.tree.map(kept, moments, state.optimizer),
            step=state.step + 1,
            skipped=state.skipped + bad,
            bad_in_a_row=(state.bad_in_a_row + bad) * bad,
        )
        metrics = StepMetrics(loss, norm, after.skipped, after.bad_in_a_row)
        return after, metrics

    return jax.jit(step, donate_argnums=1)
