"""CPU benchmark: SmolLM2 beside transformers and llama.cpp, sparse against dense.

    python -m benchmarks.cpu                        ours alone
    python -m benchmarks.cpu --peer-python PYTHON   beside transformers + torch
    python -m benchmarks.cpu --llama-python PYTHON  beside llama.cpp
    python -m benchmarks.cpu --parts context        one part; all by default

Parts: `peer` has 2,048 tokens, dense beside transformers, the same with weights of 8
bits, and infllm_v2; `context` has sparda, dense and infllm_v2 at 8,064 tokens, sparda
with weights of 8 bits, too, and infllm_v2 at 1,024; `llama` has sparda at 8,064 tokens,
with weights of 8 bits, too, beside llama.cpp, each with 96 tokens behind the prompt
(nothing without `--llama-python`); `start` times `sparda generate` to its first token,
without and with compiled code kept from before.

A peer runs in a process of its own and may be another interpreter, one for both
(`pip install "sparda-jax[bench]"` puts transformers and torch into this one;
`llama-cpp-python` builds llama.cpp for this machine, `xllamacpp` has it built for any).
transformers has SmolLM2's shape and random weights, which cost the same; llama.cpp
reads the 4-bit file that our weights are widened from. All get two threads, and all but
llama.cpp float32. Every round runs all ways: a figure is the median of `--repeats`
rounds (of half as many in `context`) with the spread (least … most), and a ratio is the
median of the rounds' ratios. Timings on a CPU are ratios: compare within one run only.
`work` is the processor time of a whole call, over all threads, which
other work on the same cores lengthens less.
"""

import argparse
import contextlib
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.cpu_peers import Timing, llama_peer, transformers_peer
from benchmarks.parsers import benchmark_parser
from sparda_jax.checks import ConfigError, integer
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import add_file_option, add_option

if TYPE_CHECKING:
    import numpy as np

    import sparda_jax as sj

THREADS = 2
PROMPT = 2048
SHORT, LONG = 1024, 8064
# One of them is of the prompt.
NEW, NEW_LLAMA = 33, 97
PARTS = ("peer", "context", "llama", "start")


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("cpu", __doc__)
    add_option(
        parser,
        "--repeats",
        integer(1),
        default=5,
        metavar="N",
        help="rounds of timed runs",
    )
    parser.add_argument(
        "--peer-python",
        metavar="PYTHON",
        help="interpreter that has torch and transformers; without it no peer is run",
    )
    parser.add_argument(
        "--llama-python",
        metavar="PYTHON",
        help="interpreter that has llama_cpp or xllamacpp; without it no such peer",
    )
    add_file_option(parser)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to run"
    )
    return parser


def _show(
    name: str, seconds: list[float], unit: float = 1.0, suffix: str = "s"
) -> None:
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    print(
        f"{name:46} {middle * unit:9.2f} {suffix:2} "
        f"({low * unit:.2f} … {high * unit:.2f})",
        flush=True,
    )


class _Way(NamedTuple):
    """A way to run a prompt of some length, and what its rounds took."""

    name: str
    run: Callable[[int, int], Timing]
    length: int

    @property
    def label(self) -> str:
        return f"{self.name}, {self.length} tokens"


def _ours(lm: "sj.LanguageModel", ids: "np.ndarray") -> Callable[[int, int], Timing]:
    import sparda_jax as sj

    def run(length: int, new: int) -> Timing:
        work = time.process_time()
        stats = sj.generate(
            lm, [ids[:length]], max_new_tokens=new, ignore_eos=True
        ).stats
        work = time.process_time() - work
        assert stats.prefill_seconds is not None
        assert stats.decode_seconds is not None
        return Timing(stats.prefill_seconds, stats.decode_seconds / (new - 1), work)

    return run


def _run_rounds(
    ways: list[_Way], rounds: int, results: dict[str, list[float]], new: int = NEW
) -> None:
    """Runs all ways in every round, the other way round in every second one."""
    for way in ways:
        # Half a minute or more each at 8,064 tokens: there the first one counts.
        # Compiling never does, but in `work`.
        if way.length != LONG:
            way.run(way.length, 2)
    for number in range(rounds):
        for way in ways if number % 2 == 0 else ways[::-1]:
            for half, value in way.run(way.length, new)._asdict().items():
                results.setdefault(f"{way.label} {half}", []).append(value)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    for way in ways:
        _show(f"{way.label}, prefill", results[f"{way.label} prefill"])
        _show(f"{way.label}, a token", results[f"{way.label} decode"], 1e3, "ms")
        if way.length != LONG:
            _show(f"{way.label}, work", results[f"{way.label} work"])


def _first_token(cache: pathlib.Path) -> float:
    """Seconds from starting `sparda generate` to its first output byte."""
    command = [
        *(sys.executable, "-m", "sparda_jax.cli", "generate"),
        *("--prompt", "The capital of France is", "--max-new-tokens", "8"),
    ]
    environment = {**os.environ, "SPARDA_CACHE": str(cache)}
    begun = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - begun
        process.stdout.read()
    if not first or process.returncode:
        raise ConfigError(f"sparda generate failed with status {process.returncode}")
    return seconds


def _cold_start(repeats: int) -> dict[str, list[float]]:
    import shutil
    import tempfile

    from sparda_jax.checkpoint.fetch import fetch_default_model

    model = fetch_default_model()
    results: dict[str, list[float]] = {"cold start": [], "warm start": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            cache = pathlib.Path(folder)
            # The model is there already; only compiled code is missing.
            for file in model.parent.iterdir():
                if file.is_file():
                    shutil.copy2(file, cache / file.name)
            results["cold start"].append(_first_token(cache))
            results["warm start"].append(_first_token(cache))
    for name, seconds in results.items():
        _show(f"{name}, `sparda generate` to first token", seconds)
    return results


def _ratio(
    name: str, value: list[float], base: list[float], aim: float
) -> tuple[str, float]:
    ratios = [one / other for one, other in zip(value, base, strict=True)]
    ratio = statistics.median(ratios)
    verdict = "reached" if ratio <= aim else "NOT reached"
    spread = f"({min(ratios):.2f} … {max(ratios):.2f})"
    print(f"{name:50} {ratio:5.2f} {spread:15} aim ≤ {aim:.1f}: {verdict}")
    return name, ratio


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and prints medians, spreads and ratios."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


def _prompt(lm: "sj.LanguageModel") -> "np.ndarray":
    import numpy as np

    from sparda_jax.evaluation.texts import python_manual

    assert lm.tokenizer is not None
    ids = np.asarray(lm.tokenizer.encode(python_manual()[:60_000]))[:LONG]
    if len(ids) < LONG:
        raise ConfigError(f"the manual gave {len(ids)} tokens, {LONG} are needed")
    return ids


def _measured(
    arguments: argparse.Namespace, results: dict[str, list[float]], versions: list[str]
) -> list[tuple[str, str, str, float]]:
    """Runs the parts that generate; returns the ratios' names, figures and aims."""
    import sparda_jax as sj
    from sparda_jax.checkpoint.fetch import fetch_default_model

    dense = sj.load("smollm2-135m", dtype="float32")
    ids = _prompt(dense)
    own = sj.with_attention(dense, "infllm_v2")
    ahead = sj.with_attention(dense, "sparda")
    narrow = sj.load(
        "smollm2-135m", attention="sparda", dtype="float32", weights="int8"
    )
    ratios: list[tuple[str, str, str, float]] = []
    with contextlib.ExitStack() as stack:
        if "peer" in arguments.parts:
            ways = [
                _Way("dense", _ours(dense, ids), PROMPT),
                _Way(
                    "dense, int8 weights",
                    _ours(sj.with_attention(narrow, "dense"), ids),
                    PROMPT,
                ),
                _Way("infllm_v2", _ours(own, ids), PROMPT),
            ]
            if arguments.peer_python:
                peer = transformers_peer(arguments.peer_python, THREADS)
                stack.enter_context(peer)
                versions.append(peer.versions)
                ways.insert(1, _Way("transformers", peer.run, PROMPT))
                other = f"transformers, {PROMPT} tokens"
                for mine, half, aim in (
                    ("dense", "prefill", 1.0),
                    ("dense", "work", 1.0),
                    ("dense", "decode", 0.8),
                    ("dense, int8 weights", "decode", 0.8),
                ):
                    name = f"{half}, {mine} / transformers"
                    one = f"{mine}, {PROMPT} tokens {half}"
                    ratios.append((name, one, f"{other} {half}", aim))
            _run_rounds(ways, arguments.repeats, results)
        if "context" in arguments.parts:
            ways = [
                _Way("sparda", _ours(ahead, ids), LONG),
                _Way("dense", _ours(dense, ids), LONG),
                _Way("infllm_v2", _ours(own, ids), LONG),
                _Way("sparda, int8 weights", _ours(narrow, ids), LONG),
                _Way("infllm_v2", _ours(own, ids), SHORT),
            ]
            base = f"dense, {LONG} tokens prefill"
            for mine in ("sparda", "infllm_v2"):
                name = f"prefill of {LONG}, {mine} / dense"
                ratios.append((name, f"{mine}, {LONG} tokens prefill", base, 1.0))
            name = f"decode, infllm_v2 at {LONG} / at {SHORT}"
            at = [f"infllm_v2, {length} tokens decode" for length in (LONG, SHORT)]
            ratios.append((name, at[0], at[1], 1.3))
            _run_rounds(ways, max(1, arguments.repeats // 2), results)
        if "llama" in arguments.parts and arguments.llama_python:
            file = str(fetch_default_model())
            peer = llama_peer(arguments.llama_python, file, THREADS)
            stack.enter_context(peer)
            versions.append(peer.versions)
            ways = [
                _Way("sparda beside llama.cpp", _ours(ahead, ids), LONG),
                _Way("llama.cpp", peer.run, LONG),
                _Way(
                    "sparda with int8 weights beside llama.cpp",
                    _ours(narrow, ids),
                    LONG,
                ),
            ]
            for mine in (ways[0], ways[2]):
                name = f"decode at {LONG}, {mine.name.replace(' beside', ' /')}"
                other = f"{ways[1].label} decode"
                ratios.append((name, f"{mine.label} decode", other, 1.0))
            _run_rounds(ways, arguments.repeats, results, NEW_LLAMA)
    return ratios


def _run(arguments: argparse.Namespace) -> None:
    if set(arguments.parts) == {"llama"} and not arguments.llama_python:
        raise ConfigError("--parts llama has nothing to run without --llama-python")
    # Before JAX starts: as many cores as the peer has threads.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    import jax

    device = platform.processor() or platform.machine()
    print(f"JAX {jax.__version__}, {device}, {THREADS} threads, float32, SmolLM2-135M")
    results: dict[str, list[float]] = {}
    versions: list[str] = []
    figures: dict[str, object] = {"jax": jax.__version__, "seconds": results}
    figures["peers"] = versions
    ratios: list[tuple[str, str, str, float]] = []
    if set(arguments.parts) - {"start"}:
        ratios = _measured(arguments, results, versions)
        print(*versions, sep="\n")
    if "start" in arguments.parts:
        results |= _cold_start(max(1, arguments.repeats // 2))
    print()
    figures["ratios"] = dict(
        _ratio(name, results[one], results[other], aim)
        for name, one, other, aim in ratios
    )
    if arguments.json:
        from sparda_jax.checkpoint.atomic import write_json

        write_json(arguments.json, figures)


if __name__ == "__main__":
    sys.exit(main())
