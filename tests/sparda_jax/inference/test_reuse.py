"""`reuse` against a decoder in plain NumPy that knows nothing of ours.

Layer l + 1 must list what the queries of layer l choose of the keys of layer l, and
attend to that. With four layers this is told apart from passing on the list that layer
l itself attended to, and from every layer choosing for itself.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.models.weights import build_decoder, random_tensors

LAYERS, STEPS = 4, 3
IDS = np.random.default_rng(5).integers(2, 128, 470).tolist()
BLOCK, WINDOW, STRIDE = 64, 32, 16  # tokens
FIRST, LOCAL, BUDGET = 1, 1, 5  # blocks: forced are the first, and the last two


def _norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _rotated(x, theta):
    """Rotary embedding of [T, heads, H], the halves of a head turning together."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


def _lists(q, k):
    """What each token's queries choose: bool [K, T, blocks].

    Args:
      q: Queries [K, T, G, H].
      k: Keys [K, T, H].
    """
    kv_heads, length, _, dim = q.shape
    starts = np.arange(0, length - WINDOW + 1, STRIDE)
    means = np.stack([k[:, s : s + WINDOW].mean(1) for s in starts], axis=1)
    chosen = np.zeros((kv_heads, length, -(-length // BLOCK)), bool)
    for head in range(kv_heads):
        for token in range(length):
            past = starts + WINDOW - 1 <= token
            score = np.zeros(len(starts))
            if past.any():
                logits = q[head, token] @ means[head, past].T * dim**-0.5
                score[past] = _softmax(logits).sum(0)
            own = token // BLOCK
            forced = {*range(FIRST), *range(own - LOCAL, own + 1)} & {*range(own + 1)}
            # A block's score is that of the best window which touches it.
            rank = {}
            for block in {*range(own + 1)} - forced:
                first, end = block * BLOCK, (block + 1) * BLOCK
                touches = (starts < end) & (starts + WINDOW > first)
                rank[block] = score[touches].max()
            best = sorted(rank, key=lambda b: (-rank[b], b))[: BUDGET - len(forced)]
            chosen[head, token, [*forced, *best]] = True
    return chosen


def _decoder(tensors, config, ids):
    """Logits [T, V], the lists that layers attended to, and those of their own."""
    weights = {name: load().astype(float) for name, load in tensors.items()}
    kv_heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
    length, dim, eps = len(ids), config.head_dim, config.rms_norm_eps
    h = weights["model.embed_tokens.weight"][ids]
    handed, attended, own = None, [], []
    for layer in range(config.num_layers):
        w = {
            name.split(f"layers.{layer}.")[1].removesuffix(".weight"): value
            for name, value in weights.items()
            if f"layers.{layer}." in name
        }
        x = _norm(h, w["input_layernorm"], eps)
        q = (x @ w["self_attn.q_proj"].T).reshape(length, -1, dim)
        k = (x @ w["self_attn.k_proj"].T).reshape(length, -1, dim)
        v = (x @ w["self_attn.v_proj"].T).reshape(length, -1, dim)
        q, k = _rotated(q, config.rope.theta), _rotated(k, config.rope.theta)
        q = q.reshape(length, kv_heads, group, dim).swapaxes(0, 1)
        k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
        own.append(_lists(q, k))
        lists = own[0] if handed is None else handed
        handed = own[-1]
        attended.append(lists)
        read = np.repeat(lists, BLOCK, axis=-1)[..., :length]
        read &= np.tri(length, dtype=bool)
        logits = np.einsum("ktgh,ksh->ktgs", q, k) * dim**-0.5
        mixed = _softmax(np.where(read[:, :, None], logits, -np.inf))
        mixed = np.einsum("ktgs,ksh->tkgh", mixed, v).reshape(length, -1)
        h = h + mixed @ w["self_attn.o_proj"].T
        x = _norm(h, w["post_attention_layernorm"], eps)
        gate = x @ w["mlp.gate_proj"].T
        gate = gate / (1 + np.exp(-gate)) * (x @ w["mlp.up_proj"].T)
        h = h + gate @ w["mlp.down_proj"].T
    logits = _norm(h, weights["model.norm.weight"], eps)
    logits = logits @ weights["model.embed_tokens.weight"].T
    return logits, np.stack(attended), np.stack(own)


def _sets(lists):
    """Block lists [L, K, T, P] as bool [L, K, T, blocks]."""
    blocks = -(-(len(IDS) + STEPS) // BLOCK)
    return (np.asarray(lists)[..., None] == np.arange(blocks)).any(-2)


@pytest.mark.slow
def test_lists_and_logits_are_those_of_the_layer_before(runner):
    run = runner("reuse", local_blocks=LOCAL, block_budget=BUDGET)
    config = dataclasses.replace(run.settings.config, num_layers=LAYERS)
    tensors = random_tensors(config, seed=2, scale=0.15)
    model = build_decoder(config, tensors, dtype=jnp.float32, storage="stacked")
    settings = dataclasses.replace(run.settings, config=config)
    run = dataclasses.replace(run, model=model, settings=settings)
    ids = [*IDS, *range(7, 7 + STEPS)]
    logits, attended, own = _decoder(tensors, config, ids)
    # The case tells the possible mistakes apart.
    assert all((attended[1:] != other).any() for other in (own[1:], attended[:-1]))
    out = run.prefill(run.empty(1), [IDS], [0])
    lists, seen = [out.blocks[:, 0, :, : len(IDS)]], [out.logits[0, : len(IDS)]]
    for step in range(STEPS):
        out = run.decode(out.cache, ids[len(IDS) + step :][:1], [len(IDS) + step])
        lists.append(out.blocks[:, 0])
        seen.append(out.logits[0])
    got = np.concatenate([_sets(part) for part in lists], axis=2)
    np.testing.assert_array_equal(got, attended)
    np.testing.assert_allclose(np.concatenate(seen), logits, atol=2e-3)
