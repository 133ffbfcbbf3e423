"""Prefill with lists: TFLOP/s on the selected work beside dense causal attention.

Lists are made as a selector makes them: block 0, the token's own block and those
before it, then the best of random scores that tokens share in groups of ``drift``
(neighbouring tokens agree), with ``noise`` of their own. Peers in the same run: dense
causal attention by the same kernel and through ``jax.nn.dot_product_attention`` (cuDNN
on a GPU, else XLA), and torch's FlexAttention with the same block mask where torch is
installed.

On a CPU: the XLA form with the heads of SmolLM2 (9/3, H = 64), 8,192 tokens, 16 blocks.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._common.devices import current_platform
from pallas_kernels.benchmarks.harness import Report, Timing, arguments, measure
from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.block_sparse_attention.unions import tile_unions
from pallas_kernels.dispatch import Implementation


@functools.partial(jax.jit, static_argnames=("tokens", "kv_heads", "listed", "block"))
def selector_lists(tokens, kv_heads, listed, block, *, local, drift, noise=0.0, seed=0):
    """Draws ``block_indices`` [1, K, T, P] on the device, a slab of tokens at a time.

    Args:
      tokens: T, a multiple of 256.
      kv_heads: K.
      listed: P.
      block: tokens of a block.
      local: how many blocks up to the token's own are forced.
      drift: tokens that share their random scores.
      noise: weight of scores that a token does not share.
      seed: of the draw.
    """
    blocks = tokens // block
    key = jax.random.key(seed)

    def slab(first):
        t = first + jnp.arange(256)
        own = (t // block)[:, None]
        m = jnp.arange(blocks)

        def shared(group):
            return jax.random.uniform(
                jax.random.fold_in(key, group), (kv_heads, blocks)
            )

        scores = jax.vmap(shared)(t // drift)  # T K M
        mine = jax.random.uniform(jax.random.fold_in(key, -1 - first), scores.shape)
        scores = jnp.swapaxes(scores + noise * mine, 0, 1)
        forced = (m == 0) | ((m <= own) & (m > own - local))
        scores = jnp.where(forced, 1e9, jnp.where(m <= own, scores, -1e9))
        best, index = lax.top_k(scores, min(listed, blocks))
        return jnp.where(best < -1e8, -1, index).astype(jnp.int32)

    out = lax.map(slab, jnp.arange(0, tokens, 256))  # slabs K 256 P
    return jnp.moveaxis(out, 0, 1).reshape(1, kv_heads, tokens, -1)


def selected_flops(lists, heads, kv_heads, head_dim, block) -> float:
    """Operations of the two products over the listed keys (own block counted half)."""
    entries = float((lists >= 0).sum()) * (heads // kv_heads)
    return 4.0 * head_dim * block * entries


def flex_attention(q, kv, lists, block):
    """Torch's FlexAttention with the same lists, timed by CUDA events, in seconds."""
    import statistics

    import torch  # pyrefly: ignore[missing-import]
    from torch.nn.attention.flex_attention import (  # pyrefly: ignore[missing-import]
        BlockMask,
        flex_attention,
    )

    tokens, kv_heads = q.shape[1], kv.shape[1]
    groups, blocks = q.shape[2] // kv_heads, q.shape[1] // block
    # FlexAttention masks whole blocks of queries: every query block takes the list of
    # its last token, the block of its own masked by position, the others whole.
    last = torch.from_dlpack(lists[0, :, block - 1 :: block]).int()
    own = torch.arange(blocks, device="cuda", dtype=torch.int32)[None, :, None]
    earlier = torch.where((last < 0) | (last == own), blocks, last).sort(-1).values
    count = (earlier < blocks).sum(-1).int()
    full = torch.zeros(kv_heads, blocks, blocks, dtype=torch.int32, device="cuda")
    full[..., : last.shape[-1]] = earlier.clamp(max=blocks - 1)
    part = torch.zeros_like(full)
    part[..., 0] = own[..., 0]

    def by_head(x):
        return x.repeat_interleave(groups, 0)[None].contiguous()

    block_mask = BlockMask.from_kv_blocks(
        by_head(torch.ones_like(count)),
        by_head(part),
        by_head(count),
        by_head(full),
        BLOCK_SIZE=block,
        mask_mod=lambda b, h, i, j: j <= i,
        seq_lengths=(tokens, tokens),
    )
    query = torch.randn(1, q.shape[2], tokens, q.shape[3], device="cuda")
    query = query.bfloat16()
    key = torch.randn(1, kv_heads, tokens, q.shape[3], device="cuda").bfloat16()
    run = torch.compile(flex_attention)
    times = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(
            query,
            key,
            key,
            block_mask=block_mask,
            enable_gqa=True,
            kernel_options={"BLOCK_M": block, "BLOCK_N": block},
        )
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--flex", action="store_true", help="also time FlexAttention")
    parser.add_argument("--drift", type=int, nargs="+", help="tokens that agree")
    args = parser.parse_args()
    gpu = current_platform() == "cuda" and not args.small
    forms: tuple[Implementation, ...]
    if gpu:
        heads, kv_heads, head_dim, block, listed, local = 32, 2, 128, 64, 96, 33
        tokens, dtype = args.tokens or 131072, jnp.bfloat16
        forms, drifts = ("mosaic_gpu", "triton"), (64, 8, 1)
    else:
        heads, kv_heads, head_dim, block, listed, local = 9, 3, 64, 64, 16, 8
        tokens, dtype = args.tokens or 8192, jnp.float32
        forms, drifts = ("xla",), (64, 16, 1)
    keys = jax.random.split(jax.random.key(1))
    q = jax.random.normal(keys[0], (1, tokens, heads, head_dim), dtype)
    shape = (1, kv_heads, tokens // block, block, 2, head_dim)
    kv = jax.random.normal(keys[1], shape, dtype)
    start = jnp.zeros((1,), jnp.int32)
    drifts = tuple(args.drift or drifts)
    report = Report("block_sparse_attention", args)
    for drift in drifts:
        if not report.has_time(f"T={tokens} P={listed} drift {drift}"):
            continue
        lists = selector_lists(
            tokens, kv_heads, listed, block, local=local, drift=drift
        )
        flops = selected_flops(lists, heads, kv_heads, head_dim, block)

        def note(seconds, flops=flops):
            return f"{flops / seconds / 1e12:7.2f} TFLOP/s on the selected work"

        group_tokens = max(1, 128 // (heads // kv_heads))
        unions = functools.partial(
            tile_unions, blocks=kv.shape[2], block=block, tokens=min(16, group_tokens)
        )
        timing = measure(f"unions alone, drift {drift}", unions, lists, start)
        report.add(timing)
        mean = float(jax.jit(unions)(lists, start).count.mean())
        print(f"  mean union of a tile {mean:.1f} blocks", flush=True)
        for form in forms:

            def run(q, kv, start, lists, form: Implementation = form):
                return block_sparse_attention(
                    q, kv, q_start=start, block_indices=lists, implementation=form
                )

            name = f"{form} T={tokens} P={listed} drift {drift}"
            operands = (q, kv, start, lists)
            report.add(measure(name, run, *operands, repeats=5, note=note))
        if gpu and args.flex and drift == drifts[0]:
            try:
                seconds = flex_attention(q, kv, lists, block)
                name = f"torch FlexAttention drift {drift}"
                report.add(Timing(name, seconds, note=note(seconds)))
                print(f"{name} {seconds * 1e3:.2f} ms {note(seconds)}", flush=True)
            except Exception as error:
                print(
                    f"torch FlexAttention failed: {type(error).__name__}: {error}"[:500]
                )
    if not report.has_time(f"dense causal T={tokens}"):
        report.finish()
        return
    dense = 2.0 * tokens * tokens * heads * head_dim

    def dense_note(seconds):
        return f"{dense / seconds / 1e12:7.2f} TFLOP/s dense causal"

    for form in forms[:1] if gpu else forms:

        def run_dense(q, kv, start, form: Implementation = form):
            return block_sparse_attention(q, kv, q_start=start, implementation=form)

        name = f"{form} dense causal T={tokens}"
        operands = (q, kv, start)
        report.add(measure(name, run_dense, *operands, repeats=3, note=dense_note))
    flat = kv.reshape(1, kv_heads, tokens, 2, head_dim)
    k, v = (jnp.moveaxis(flat[..., i, :], 1, 2) for i in range(2))
    peer: Literal["cudnn", "xla"] = "cudnn" if gpu else "xla"

    def run_peer(q, k, v):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=peer
        )

    name = f"jax.nn, {peer}, dense causal T={tokens}"
    report.add(measure(name, run_peer, q, k, v, repeats=3, note=dense_note))
    report.finish()


if __name__ == "__main__":
    main()
