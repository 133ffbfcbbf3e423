"""The cases of every operation, a file an operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pallas_kernels.tuning.case import Case
from pallas_kernels.tuning.cases import (
    block_scores,
    block_sparse_attention,
    choose_blocks,
    commit_blocks,
    compress_keys,
    host_gather,
    paged_decode_attention,
    plan_slots,
)

CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "block_scores": block_scores.cases,
    "block_sparse_attention": block_sparse_attention.cases,
    "choose_blocks": choose_blocks.cases,
    "commit_blocks": commit_blocks.cases,
    "compress_keys": compress_keys.cases,
    "host_gather": host_gather.cases,
    "paged_decode_attention": paged_decode_attention.cases,
    "plan_slots": plan_slots.cases,
}
