"""Checks what docs/determinism.md promises, on this machine; exit status 1 if not.

python scripts/check_determinism.py [--model tiny] [--tokens 24]
"""

import dataclasses

import numpy as np

import sparda_jax as sj
from sparda_jax.checks import integer
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import HelpFormatter, Parser, add_option


def results(lm: sj.LanguageModel, tokens: int) -> dict[str, bool]:
    """Each promise, and whether it holds."""
    rng = np.random.default_rng(0)
    vocab = lm.config.vocab_size
    prompts = [rng.integers(0, vocab, n).tolist() for n in (90, 7, 33)]
    how = {"max_new_tokens": tokens, "temperature": 0.9, "ignore_eos": True}
    seeds = [5, 6, 7]
    want = sj.generate(lm, prompts, seed=seeds, **how).tokens
    again = sj.generate(lm, prompts, seed=seeds, **how).tokens
    pairs = zip(prompts, seeds, strict=True)
    alone = [sj.generate(lm, [p], seed=s, **how).tokens[0] for p, s in pairs]
    streamed: list[list[int]] = [[] for _ in prompts]
    for event in sj.stream(lm, prompts, seed=seeds, **how):
        streamed[event.index].append(event.token)
    host = dataclasses.replace(
        lm, cache=sj.CacheConfig(kind="offload", device_blocks=None)
    )
    return {
        "equal calls give equal tokens": again == want,
        "a row alone is the row in a batch": alone == want,
        "a stream is one call": streamed == want,
        "a cache in host memory is a resident one": (
            sj.generate(host, prompts, seed=seeds, **how).tokens == want
        ),
    }


def main() -> None:
    """Runs the checks and prints them."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--attention", default="infllm_v2")
    add_option(
        parser, "--tokens", integer(1), metavar="N", default=24, help="output tokens"
    )
    arguments = parser.parse_args()
    sj.configure_offload()  # Before JAX computes anything.
    lm = sj.load(arguments.model, attention=arguments.attention, storage="stacked")
    found = results(lm, arguments.tokens)
    for promise, holds in found.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD':14} {promise}")
    if not all(found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
