"""A few small calls of every operation, such as every implementation is made for.

Their sizes stand for the models that this package is written for: bfloat16, blocks of
64 keys, heads of 128 numbers, 16 query heads a kv head. What refuses one of these on a
device does not serve the operation there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_scores.api import block_scores, select_blocks
from pallas_kernels.block_scores.arg_specs import ArgSpec as ScoresSpec
from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.block_sparse_attention.arg_specs import ArgSpec as PrefillSpec
from pallas_kernels.choose_blocks.api import choose_blocks
from pallas_kernels.choose_blocks.arg_specs import ArgSpec as ChooseSpec
from pallas_kernels.commit_blocks.api import commit_blocks
from pallas_kernels.commit_blocks.arg_specs import ArgSpec as CommitSpec
from pallas_kernels.compress_keys.api import compress_keys
from pallas_kernels.compress_keys.arg_specs import ArgSpec as CompressSpec
from pallas_kernels.dispatch import Implementation
from pallas_kernels.host_gather.api import host_gather
from pallas_kernels.host_gather.arg_specs import ArgSpec as GatherSpec
from pallas_kernels.paged_decode_attention.api import paged_decode_attention
from pallas_kernels.paged_decode_attention.arg_specs import ArgSpec as DecodeSpec
from pallas_kernels.plan_slots.api import plan_slots
from pallas_kernels.plan_slots.arg_specs import ArgSpec as PlanSpec

DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Probe:
    """One call.

    Attributes:
      call: the operation.
      make: draws its keyword arguments.
      sizes: what a record may tell calls like this one apart by.
      lists: for integer results that are lists in no particular order, the share of
        them that may differ between implementations, where scores are nearly equal.
    """

    call: Callable[..., Any]
    make: Callable[[], dict[str, Any]]
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lists: float | None = None

    def bound(
        self, implementation: Implementation | None
    ) -> tuple[Callable[[dict[str, jax.Array]], Any], dict[str, jax.Array]]:
        """A function of the call's arrays, and the arrays."""
        arguments = self.make()
        arrays = {k: v for k, v in arguments.items() if isinstance(v, jax.Array)}
        fixed = {k: v for k, v in arguments.items() if k not in arrays}

        def call(arrays: dict[str, jax.Array]) -> Any:
            return self.call(**arrays, **fixed, implementation=implementation)

        return call, arrays

    def refusal(self, implementation: Implementation) -> str | None:
        """Why an implementation does not take the call here; None when it does."""
        try:
            jax.eval_shape(*self.bound(implementation))
        except NotImplementedError as error:
            return str(error)
        return None


def _scores(softmax: bool) -> dict[str, Any]:
    heads = 32 if softmax else 2
    spec = ScoresSpec("", 1, 40, heads, 2, 128, 90, 23, (1380,), softmax=softmax)
    return spec.make(DTYPE)


def _prefill() -> dict[str, Any]:
    spec = PrefillSpec("", 1, 70, 32, 2, 128, 64, 9, listed=5, local=2, start=(500,))
    return spec.make(DTYPE)


def _decode() -> dict[str, Any]:
    spec = DecodeSpec("", 2, 32, 2, 128, 64, 9, listed=6, lengths=(500, 130))
    return spec.make(DTYPE)


def _commit(int8: bool) -> dict[str, Any]:
    return CommitSpec("", 24, (64, 2, 128), 9, int8=int8).make(DTYPE)


PROBES: Mapping[str, tuple[Probe, ...]] = {
    "block_scores": tuple(
        probe
        for softmax in (False, True)
        for probe in (
            Probe(
                block_scores,
                lambda softmax=softmax: _scores(softmax),
                {"softmax": softmax},
            ),
            Probe(
                select_blocks,
                lambda softmax=softmax: _scores(softmax) | {"budget": 6},
                {"softmax": softmax},
                lists=0.1,
            ),
        )
    ),
    "block_sparse_attention": (Probe(block_sparse_attention, _prefill),),
    "choose_blocks": (
        Probe(choose_blocks, lambda: ChooseSpec("", (4, 2), 200, 24).make(), lists=0.0),
    ),
    "commit_blocks": tuple(
        Probe(commit_blocks, lambda int8=int8: _commit(int8), {"int8": int8})
        for int8 in (False, True)
    ),
    "compress_keys": (
        Probe(compress_keys, lambda: CompressSpec("", 1, 2, 150, 128).make(DTYPE)),
    ),
    "host_gather": (
        Probe(host_gather, lambda: GatherSpec("", 24, (64, 2, 128), 9).make(DTYPE)),
    ),
    "paged_decode_attention": (Probe(paged_decode_attention, _decode),),
    "plan_slots": (Probe(plan_slots, lambda: PlanSpec("", (4, 2), 24, 24, 60).make()),),
}
