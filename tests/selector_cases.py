"""What every selector must do, in one run of each way to decode."""

import numpy as np
from planning_cases import Case

import sparda_jax as sj

SPARSE = sj.SparseConfig(local_blocks=2, block_budget=6)


def check_everywhere(name: str) -> None:
    """Prefill, decode, offload, look-ahead, `verify` and the planner."""
    lm = sj.load("tiny", attention=name, sparse=SPARSE, storage="stacked")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 128, size).tolist() for size in (600, 70)]
    expected = sj.generate(lm, prompts, max_new_tokens=70, ignore_eos=True)
    # A decode step chooses what a prompt's row chooses.
    whole = sj.forward(lm, [*prompts[0], *expected.tokens[0][:-1]])
    greedy = np.argmax(np.asarray(whole)[len(prompts[0]) - 1 :], axis=1)
    assert greedy.tolist() == expected.tokens[0]
    cache = sj.CacheConfig(kind="offload", exactness="verify")
    offloaded = sj.with_attention(lm, name, cache=cache)
    out = sj.generate(offloaded, prompts, max_new_tokens=70, ignore_eos=True)
    assert out.tokens == expected.tokens
    stats = out.stats.offload
    assert stats is not None and stats.lookahead
    assert stats.hits > 0 and stats.repaired == 0
    plan = Case(kind="offload", attention=name).plan()
    assert plan.slots > 0 and plan.compressed_keys == 0
    assert name in sj.selector_names()
