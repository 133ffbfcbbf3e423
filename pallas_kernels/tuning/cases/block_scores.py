"""Scores of blocks and the choice: cases for the tuner."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.block_scores import pallas_triton as triton
from pallas_kernels.block_scores.api import block_scores, select_blocks
from pallas_kernels.block_scores.operands import Scoring
from pallas_kernels.block_scores.rule import Rule
from pallas_kernels.tuning.case import Case


def _operands(query, compressed, start, rule: Rule) -> Scoring:
    """Of one row, whose windows are all complete."""
    return Scoring(
        query=query,
        compressed_keys=compressed[None],
        q_start=start,
        num_windows=jnp.full((1,), compressed.shape[2], jnp.int32),
        layer=jnp.int32(0),
        rule=rule,
    )


def cases(small: bool) -> Iterator[Case]:
    """Forecast and own queries of the 8B shape, scores and choice."""
    tokens, budget = (512, 4) if small else (16384, 96)
    blocks, windows = tokens // 64, (tokens - 32) // 16 + 1
    keys = jax.random.split(jax.random.key(2))
    compressed = jax.random.normal(keys[0], (1, 2, windows, 128), jnp.bfloat16)
    compared = min(tokens, 1024)
    for heads in (2, 32):
        query = jax.random.normal(keys[1], (1, tokens, heads, 128), jnp.bfloat16)
        softmax = heads > 2
        rule = Rule(
            blocks, 64, 32, 16, 1, 33, softmax, True, 128**-0.5 if softmax else 1.0
        )

        def run(name, config, query, compressed, rule=rule):
            start = jnp.zeros((1,), jnp.int32)
            if name == "triton":
                operands = _operands(query, compressed, start, rule)
                return triton.select_blocks_triton(
                    operands, budget=budget, config=config, lse=False
                )[0]
            return select_blocks(
                query,
                compressed,
                q_start=start,
                blocks=blocks,
                budget=budget,
                softmax=rule.softmax,
                implementation=name,
            )

        def check(name, config, query, compressed, rule=rule):
            """Scores of the last tokens: near ties make lists differ, not scores."""
            query = query[:, -compared:]
            start = jnp.full((1,), tokens - compared, jnp.int32)
            if name == "triton":
                operands = _operands(query, compressed, start, rule)
                return triton.block_scores_triton(operands, config=config)
            return block_scores(
                query,
                compressed,
                q_start=start,
                blocks=blocks,
                softmax=rule.softmax,
                return_lse=True,
                implementation=name,
            )

        shapes = ((64, 64), (128, 64), (64, 128))
        yield Case(
            {"G": heads // 2, "H": 128},
            (query, compressed),
            run,
            {
                "triton": [
                    triton.Config(*shape, warps) for shape in shapes for warps in (4, 8)
                ],
                "mosaic_gpu": [None],
            },
            order={"softmax": softmax},
            check=check,
        )
