"""Decode on one device and on several, beside each other: KV heads over the devices.

    python -m benchmarks.mesh --context 131072 --batch 4 --devices 1 2 4
    python -m benchmarks.mesh --devices 1 2 2 --batch 16 16 32 --codec int8
    python -m benchmarks.mesh --model llama-3.1-70b --layers 40 --devices 4
    python -m benchmarks.mesh --mode sparda sparda-scheduled --devices 2

Weights are random, drawn by every device for itself, and KV blocks are arbitrary
bytes: nothing is prefilled. Which blocks a step asks for is imposed, from the lists
that a real model chose (`benchmarks.traced`), beside the scoring that is really done.
Modes are those of `benchmarks.offload`, and `sparda-scheduled`: `sparda` compiled with
XLA's latency hiding scheduler, which the engine leaves out. Every offloaded mode also
runs with lists that stand still, which fetch nothing: `hidden` is the part of the time
that `sparse` waits for its fetches which `sparda` does not,

    1 - (sparda - sparda standing) / (sparse - sparse standing).

`link` is what a device fetches in a second of whole steps. `sums` are the all-reduces
of a step (two a layer) alone, one after the other, and their share of the step.

Programs of all meshes compile while host memory is pinned. Phases are printed with
their seconds as they end, so that a run which is cut tells where it was.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import json_lines
from benchmarks.offload import (
    CHUNK,
    add_size_options,
    add_steps_option,
    decode_request,
    imposed_choice,
    mode_settings,
    time_steps,
)
from benchmarks.parsers import benchmark_parser
from benchmarks.sums import measured_sums
from benchmarks.traced import (
    DEFAULT_TRACE,
    TracedLists,
    begin_rows,
    install,
    standing,
)
from sparda_jax.checks import integer, number, require
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import add_file_option, add_option

_SCHEDULED = "-scheduled"
MODES = (
    *("sparda", "sparse", "resident", "sparda-none", "sparda-2", "sparda-verify"),
    f"sparda{_SCHEDULED}",
)
# What every mesh of a run may have of its own.
_OWN = ("model", "layers", "context", "batch", "codec")
_BEGUN = time.perf_counter()


def _xla_option(field: str, value: object) -> tuple[str, str | int | bool]:
    """Name and value, of the type that XLA wants."""
    name, equals, text = str(value).partition("=")
    require(bool(name and equals), field, value, "NAME=VALUE")
    if text in ("true", "false"):
        return name, text == "true"
    return name, int(text) if text.isdecimal() else text


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("mesh", __doc__)
    parser.add_argument(
        "--model",
        nargs="+",
        default=["llama-3.1-8b"],
        help="preset; one, or one a mesh",
    )
    count = integer(1)
    add_size_options(parser, many=True)
    add_option(
        parser,
        "--context",
        count,
        many=True,
        metavar="N",
        default=[32768],
        help="tokens a row holds; one, or one a mesh",
    )
    add_option(
        parser,
        "--batch",
        count,
        many=True,
        metavar="B",
        default=[4],
        help="rows; one, or one a mesh",
    )
    parser.add_argument(
        "--mode", nargs="+", default=["sparda", "sparse", "resident"], choices=MODES
    )
    add_option(
        parser,
        "--devices",
        count,
        many=True,
        metavar="D",
        default=[1, 2],
        help="of every run",
    )
    parser.add_argument(
        "--trace", type=pathlib.Path, default=DEFAULT_TRACE, help="whose lists to take"
    )
    slots, text = number(above=0), "of a device, in budgets"
    add_option(parser, "--slots", slots, metavar="C", default=1.0, help=text)
    parser.add_argument(
        "--codec",
        nargs="+",
        default=["exact"],
        choices=["exact", "int8"],
        help="of host blocks; one, or one a mesh",
    )
    parser.add_argument("--route", default="auto")
    add_steps_option(parser)
    add_file_option(parser, "--out", help="also write JSON lines here")
    add_option(
        parser,
        "--option",
        _xla_option,
        many=True,
        default=[],
        metavar="NAME=VALUE",
        help="XLA's options to compile with, beside those of the engine",
    )
    parser.add_argument("--profile", type=pathlib.Path, help="folder for traces")
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="stop there: a later run finds the programs in JAX's compilation cache",
    )
    parser.set_defaults(miss=None, layer0="resident")
    return parser


def _of_meshes(arguments: argparse.Namespace) -> list[tuple[int, argparse.Namespace]]:
    """Every mesh's devices, and the arguments with what is its own."""
    meshes = arguments.devices
    own = {}
    for name in _OWN:
        given = getattr(arguments, name)
        own[name] = given * len(meshes) if len(given) == 1 else given
        allowed = "one, or one for each of --devices"
        require(len(own[name]) == len(meshes), f"--{name}", given, allowed)
    found = []
    for index, devices in enumerate(meshes):
        profile = arguments.profile and arguments.profile / str(index)
        one = {name: values[index] for name, values in own.items()}
        one["profile"] = profile
        found.append((devices, argparse.Namespace(**vars(arguments) | one)))
    return found


def _phase(text: str, begun: float) -> None:
    now = time.perf_counter()
    print(f"{now - _BEGUN:7.1f} s  {text}: {now - begun:.1f} s", flush=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """One mode on one mesh.

    Attributes:
      mode: Its name.
      devices: How many.
      settings: Of one device.
      layout: Of the state.
      program: OnMesh of the decode loop.
    """

    mode: str
    devices: int
    settings: Any
    layout: Any
    program: Any

    @property
    def offloaded(self) -> bool:
        """Whether KV is in host memory."""
        return self.settings.offload is not None


@dataclasses.dataclass(frozen=True)
class Mesh:
    """What is run on one mesh.

    Attributes:
      cases: Its modes.
      sparse: The selection.
      request: Of its rows.
      lists: The blocks that its steps ask for.
      arguments: The command's, with the mesh's own batch.
    """

    cases: list[Case]
    sparse: Any
    request: Any
    lists: TracedLists
    arguments: argparse.Namespace

    @property
    def devices(self) -> int:
        """How many."""
        return self.cases[0].devices


def _cases(devices: int, model, sparse, choice, new: int, arguments) -> list[Case]:
    """Every mode on one mesh; offloaded ones share a state, resident ones another."""
    import jax.numpy as jnp

    from sparda_jax.engine.on_mesh import OnMesh, StateLayout
    from sparda_jax.inference.generate import decode_loop
    from sparda_jax.inference.shapes import Shapes
    from sparda_jax.mesh import MeshConfig
    from sparda_jax.models.sharding import config_of_device

    mesh, own = MeshConfig(model=devices), config_of_device(model, devices)
    capacity = arguments.context + -(-new // sparse.block_size) * sparse.block_size
    ways = []
    for mode in arguments.mode:
        plain = mode.removesuffix(_SCHEDULED)
        cache, how = mode_settings(
            model, sparse, plain, choice, arguments.slots, arguments
        )
        ways.append((mode, cache, dataclasses.replace(how, config=own, parts=devices)))

    def ahead(way) -> int:
        offload = way[2].offload
        return offload.layers_ahead if offload.lookahead else 0

    cases = []
    for offloaded in (True, False):
        group = [way for way in ways if (way[2].offload is not None) == offloaded]
        if not group:
            continue
        # Whoever looks furthest ahead needs most staging areas.
        _, cache, how = max(group, key=ahead) if offloaded else group[0]
        layout = StateLayout(
            config=model,
            settings=how,
            mesh=mesh,
            rows=arguments.batch,
            shapes=Shapes(prompt=0, new=new, capacity=capacity, tile=1024),
            cache=cache,
            dtype=jnp.bfloat16,
            storage="per_layer",
        )
        for mode, _, settings in group:
            loop = functools.partial(decode_loop, settings=settings)
            program = OnMesh(loop, layout, model, own, mesh)
            cases.append(Case(mode, devices, settings, layout, program))
    return cases


def compiler_options(mode: str, own: dict, given: dict) -> dict:
    """What a mode is compiled with: the engine's own options, then those given."""
    scheduled = mode.endswith(_SCHEDULED)
    return (dict.fromkeys(own, True) if scheduled else own) | given


def _compile(case: Case, request, options: dict) -> tuple[Any, str]:
    """The program of a case, from types alone, and its seconds."""
    import jax

    from sparda_jax.engine.on_mesh import place_request
    from sparda_jax.mesh import laid_out
    from sparda_jax.models.sharding import model_specs
    from sparda_jax.models.weights import abstract_decoder

    begun = time.perf_counter()
    layout = case.layout
    request = place_request(request, layout)
    like = abstract_decoder(
        layout.config, layout.dtype, storage="per_layer", forecast=True
    )
    specs = model_specs(like, layout.config)
    model = laid_out(like, specs, layout.mesh.devices)
    call = jax.jit(case.program, donate_argnums=(1,))
    lowered = call.lower(model, layout.types(), request)
    traced = time.perf_counter()
    own = case.program.compiler_options
    program = lowered.compile(compiler_options(case.mode, own, options))
    compiled = time.perf_counter()
    return program, f"traced {traced - begun:.1f} s, compiled {compiled - traced:.1f} s"


def _figures(case: Case, seconds, fetched: float, sparse, arguments) -> dict:
    """What one run of a mode shows."""
    import jax.numpy as jnp

    config, batch = case.layout.config, arguments.batch
    median = statistics.median(seconds)
    stored = 0
    if case.offloaded:
        shape = (sparse.block_size, 2, config.head_dim)
        codec = case.settings.offload.codec
        stored = codec.bytes_per_block(shape, jnp.bfloat16)
    listed = batch * config.num_kv_heads * config.num_layers * sparse.largest_budget
    link = fetched * stored / median / case.devices
    return {
        "step_ms": median * 1e3,
        "least_ms": min(seconds) * 1e3,
        "most_ms": max(seconds) * 1e3,
        "tokens_per_second": batch / median,
        "fetched_share": fetched / listed,
        "fetched_mb": fetched * stored / 1e6,
        "link_gb_per_s_per_device": link / 1e9,
    }


def _fits(case: Case, arguments) -> bool:
    """Whether a resident cache and the weights have room on a device."""
    from sparda_jax.models.spec import num_parameters

    config = case.layout.config
    token = 4 * config.num_kv_heads * config.head_dim * config.num_layers
    held = num_parameters(config) * 2 + arguments.batch * arguments.context * token
    return case.offloaded or held / case.devices < arguments.limit * 1e9


def _measure_mesh(mesh: Mesh, programs: dict) -> Iterator[dict]:
    """Yields the figures of every mode on one mesh."""
    import jax

    from sparda_jax.engine.on_mesh import new_mesh_state, place_request
    from sparda_jax.models.sharding import random_on_mesh

    cases, arguments, devices = mesh.cases, mesh.arguments, mesh.devices
    layout = cases[0].layout
    request = place_request(mesh.request, layout)
    begun = time.perf_counter()
    model = random_on_mesh(layout.config, layout.mesh, layout.dtype)
    jax.block_until_ready(model)
    _phase(f"weights on {devices}", begun)
    sums = None
    for offloaded in (True, False):
        group = [case for case in cases if case.offloaded == offloaded]
        state = None
        for case in group:
            if not _fits(case, arguments):
                print(f"{case.mode} does not fit {devices} devices", flush=True)
                continue
            if state is None:
                begun = time.perf_counter()
                state = jax.block_until_ready(new_mesh_state(case.layout))
                _phase(f"state on {devices}", begun)
            # Kernels are chosen by timing them, which would disturb what is timed here.
            begun = time.perf_counter()
            concurrent.futures.wait(programs.values())
            call, times = programs[id(case)].result()
            _phase(f"waited for {case.mode} on {devices} ({times})", begun)
            if sums is None:
                begun = time.perf_counter()
                sums = measured_sums(layout.config, devices, arguments.batch)
                _phase(f"all-reduces on {devices}", begun)
            row: dict[str, Any] = {"mode": case.mode, "devices": devices}
            row["sums_ms"] = sums * 1e3
            for name, lists in (
                ("", mesh.lists),
                ("standing ", standing(mesh.lists)),
            ):
                if name and not offloaded:
                    continue
                begun = time.perf_counter()
                state = begin_rows(state, arguments.context)
                state = state._replace(cache=install(state.cache, lists))
                way = f"{name}{case.mode}".replace(" ", "-")
                seconds, fetched, state = time_steps(
                    call, case.settings, model, state, request, way, arguments
                )
                found = _figures(case, seconds, fetched, mesh.sparse, arguments)
                if name:
                    found = {"standing_ms": found["step_ms"]}
                row |= found
                _phase(f"{name}{case.mode} on {devices}", begun)
            row["sums_share"] = row["sums_ms"] / row["step_ms"]
            yield row
        del state


def hidden_share(rows: list[dict]) -> float | None:
    """What of the waiting of `sparse` is none of `sparda`; see the module."""
    by_mode = {row["mode"]: row for row in rows if "standing_ms" in row}
    if not {"sparse", "sparda"} <= by_mode.keys():
        return None
    waits = {
        mode: by_mode[mode]["step_ms"] - by_mode[mode]["standing_ms"]
        for mode in ("sparse", "sparda")
    }
    return 1 - waits["sparda"] / waits["sparse"] if waits["sparse"] > 0 else None


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


def _run(arguments: argparse.Namespace) -> None:
    from sparda_jax.runtime import configure_cache, configure_offload

    configure_offload()
    configure_cache()
    import jax

    from sparda_jax.models.presets import get_preset
    from sparda_jax.planning.traces import read_trace

    new, options = arguments.steps + 4 * CHUNK, dict(arguments.option)
    found = jax.devices()
    _phase(f"{len(found)} devices", _BEGUN)
    begun = time.perf_counter()
    trace = read_trace(arguments.trace)
    meshes: list[Mesh] = []
    for devices, own in _of_meshes(arguments):
        preset = get_preset(own.model)
        config = preset.shape(own.layers, 2 * own.context)
        sparse = preset.sparse
        choice = imposed_choice(own, trace, config, sparse, own.batch, new)
        assert choice.lists is not None
        request = decode_request(config, own.batch, own.context, new)
        cases = _cases(devices, config, sparse, choice, new, own)
        meshes.append(Mesh(cases, sparse, request, choice.lists, own))
    _phase("lists", begun)
    about = {
        "device": found[0].device_kind,
        "jax": jax.__version__,
        "slots": arguments.slots,
        "options": options,
        "lists": meshes[0].lists.source,
    }
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        programs = {
            id(case): pool.submit(_compile, case, mesh.request, options)
            for mesh in meshes
            for case in mesh.cases
            if _fits(case, mesh.arguments)
        }
        if arguments.compile_only:
            for program in concurrent.futures.as_completed(programs.values()):
                _phase(program.result()[1], _BEGUN)
            return
        for mesh in meshes:
            own = {name: getattr(mesh.arguments, name) for name in _OWN}
            own["layers"] = mesh.cases[0].layout.config.num_layers
            rows, shared = [], about | own
            for row in _measure_mesh(mesh, programs):
                rows.append(row)
                json_lines.say(shared | row, arguments.out)
            hidden = {"devices": mesh.devices, "hidden": hidden_share(rows)}
            json_lines.say(shared | hidden, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
