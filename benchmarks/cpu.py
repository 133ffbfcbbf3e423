"""CPU benchmark: SmolLM2 against transformers + torch, sparse against dense.

    python -m benchmarks.cpu                       ours alone
    python -m benchmarks.cpu --peer-python PYTHON  beside transformers + torch
    python -m benchmarks.cpu --parts context       one part; all by default

Parts: `peer` has 2,048 tokens, dense beside the peer, the same with weights of 8 bits,
and infllm_v2; `context` has sparda, dense and infllm_v2 at 8,064 tokens, sparda with
weights of 8 bits, too, and infllm_v2 at 1,024; `start` times `sparda generate`
to its first token, without and with compiled code kept from before.

The peer runs in a process of its own, so that the two never share a thread pool, and
may be another interpreter (`pip install "sparda-jax[bench]"` puts it into this one).
It has SmolLM2's shape and random weights, which cost the same. Both sides get float32
and two threads. Every figure is the median of `--repeats` runs with the spread (least …
most). Timings on a CPU are ratios: compare within one run only.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

from benchmarks.parsers import benchmark_parser
from sparda_jax.checks import ConfigError, integer
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import add_option

THREADS = 2
PROMPT = 2048
SHORT, LONG = 1024, 8064
NEW = 33
PARTS = ("peer", "context", "start")

_PEER = """
import json, sys, time
import torch
torch.set_num_threads({threads})
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
transformers.logging.set_verbosity_error()
config = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, head_dim=64,
    max_position_embeddings=8192, rope_theta=100000.0, rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(0, 49152, (1, {prompt}))
prefill, decode = [], []
with torch.inference_mode():
    for run in range({repeats} + 1):
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        cache, token = out.past_key_values, ids[:, :1]
        steps = []
        for _ in range({new} - 1):
            begun = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            steps.append(time.perf_counter() - begun)
        if run:
            prefill.append(middle - start)
            decode.append(sum(steps) / len(steps))
versions = f"transformers {{transformers.__version__}}, torch {{torch.__version__}}"
print(json.dumps(dict(prefill=prefill, decode=decode, versions=versions)))
"""


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("cpu", __doc__)
    add_option(
        parser,
        "--repeats",
        integer(1),
        default=5,
        metavar="N",
        help="timed runs of each",
    )
    parser.add_argument(
        "--peer-python",
        metavar="PYTHON",
        help="interpreter that has torch and transformers; without it no peer is run",
    )
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
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


def _ours(repeats: int, parts: list[str]) -> dict[str, list[float]]:
    import numpy as np

    import sparda_jax as sj
    from sparda_jax.evaluation.texts import python_manual

    results: dict[str, list[float]] = {}
    if not {"peer", "context"} & set(parts):
        return results
    lm = sj.load("smollm2-135m", dtype="float32")
    assert lm.tokenizer is not None
    text = python_manual()[:60_000]
    ids = np.asarray(lm.tokenizer.encode(text))[:LONG]
    if len(ids) < LONG:
        raise ConfigError(f"the manual gave {len(ids)} tokens, {LONG} are needed")
    sparse = sj.with_attention(lm, "infllm_v2")
    ahead = sj.load("smollm2-135m", attention="sparda", dtype="float32")
    narrow_ahead = sj.load(
        "smollm2-135m", attention="sparda", dtype="float32", weights="int8"
    )
    narrow = sj.with_attention(narrow_ahead, "dense")

    def timed(
        name: str, lm: sj.LanguageModel, length: int, runs: int, warm_up: int = 1
    ) -> None:
        prefill, decode = [], []
        for run in range(runs + warm_up):
            stats = sj.generate(
                lm, [ids[:length]], max_new_tokens=NEW, ignore_eos=True
            ).stats
            assert stats.prefill_seconds is not None
            assert stats.decode_seconds is not None
            if run >= warm_up:
                prefill.append(stats.prefill_seconds)
                decode.append(stats.decode_seconds / (NEW - 1))
        results[f"{name} prefill"], results[f"{name} decode"] = prefill, decode
        _show(f"{name}, prefill", prefill)
        _show(f"{name}, decode, a token", decode, 1e3, "ms")

    if "peer" in parts:
        timed(f"dense, {PROMPT} tokens", lm, PROMPT, repeats)
        timed(f"dense, int8 weights, {PROMPT} tokens", narrow, PROMPT, repeats)
        timed(f"infllm_v2, {PROMPT} tokens", sparse, PROMPT, repeats)
    if "context" in parts:
        few = max(1, repeats // 2)
        # Half a minute or more each: the first one counts. Compiling never does.
        for name, one in (
            ("sparda", ahead),
            ("dense", lm),
            ("infllm_v2", sparse),
            ("sparda, int8 weights", narrow_ahead),
        ):
            timed(f"{name}, {LONG} tokens", one, LONG, few, warm_up=0)
        timed(f"infllm_v2, {SHORT} tokens", sparse, SHORT, repeats)
    return results


def _peer(python: str, repeats: int) -> dict:
    script = _PEER.format(threads=THREADS, prompt=PROMPT, repeats=repeats, new=NEW)
    done = subprocess.run(
        [python, "-c", script], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"the peer failed: {done.stderr.strip()[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


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
    ratio = statistics.median(value) / statistics.median(base)
    verdict = "reached" if ratio <= aim else "NOT reached"
    print(f"{name:56} {ratio:5.2f}   aim ≤ {aim:.1f}: {verdict}")
    return name, ratio


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and prints medians, spreads and ratios."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


def _run(arguments: argparse.Namespace) -> None:
    # Before JAX starts: as many cores as the peer has threads.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    import jax

    device = platform.processor() or platform.machine()
    print(f"JAX {jax.__version__}, {device}, {THREADS} threads, float32, SmolLM2-135M")
    figures: dict[str, object] = {"jax": jax.__version__}
    ours = _ours(arguments.repeats, arguments.parts)
    figures["ours"] = ours
    ratios: list[tuple[str, list[float], list[float], float]] = []
    if arguments.peer_python and "peer" in arguments.parts:
        peer = _peer(arguments.peer_python, arguments.repeats)
        figures["peer"] = peer
        print(peer["versions"])
        _show(f"peer, dense, {PROMPT} tokens, prefill", peer["prefill"])
        _show(f"peer, dense, {PROMPT} tokens, decode", peer["decode"], 1e3, "ms")
        for half, aim in (("prefill", 1.0), ("decode", 0.8)):
            mine = ours[f"dense, {PROMPT} tokens {half}"]
            ratios.append((f"{half}, ours / transformers", mine, peer[half], aim))
        mine = ours[f"dense, int8 weights, {PROMPT} tokens decode"]
        name = "decode, int8 weights / transformers"
        ratios.append((name, mine, peer["decode"], 0.8))
    if "context" in arguments.parts:
        long, short = (ours[f"infllm_v2, {n} tokens decode"] for n in (LONG, SHORT))
        ratios.append((f"sparse decode at {LONG} / at {SHORT}", long, short, 1.3))
        dense = ours[f"dense, {LONG} tokens prefill"]
        for name in ("sparda", "infllm_v2"):
            sparse = ours[f"{name}, {LONG} tokens prefill"]
            ratios.append((f"prefill of {LONG}, {name} / dense", sparse, dense, 1.0))
    if "start" in arguments.parts:
        figures["start"] = _cold_start(max(1, arguments.repeats // 2))
    print()
    figures["ratios"] = dict(_ratio(*row) for row in ratios)
    if arguments.json:
        from sparda_jax.checkpoint.atomic import write_json

        write_json(arguments.json, figures)


if __name__ == "__main__":
    sys.exit(main())
