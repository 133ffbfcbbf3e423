"""The textbook decoder in float64 NumPy, written for the tests alone."""

import math
from collections.abc import Mapping

import numpy as np

from sparda_jax.config import ModelConfig
from sparda_jax.models.rope import rope_frequencies


def textbook_logits(
    config: ModelConfig, tensors: Mapping[str, np.ndarray], ids: np.ndarray
) -> np.ndarray:
    """Logits [T, V] of dense attention.

    Args:
      config: The model; the multiplier of cos and sin is left out.
      tensors: Weights by Hugging Face name.
      ids: Tokens of one sequence.
    """
    w = {name: array.astype(np.float64) for name, array in tensors.items()}

    def norm(x, weight):
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps)
        return x / scale * weight

    inv_freq, _ = rope_frequencies(config.rope, config.head_dim, len(ids))
    angle = np.arange(len(ids))[:, None] * inv_freq.astype(np.float64)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rope(x):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)

    h = w["model.embed_tokens.weight"][ids] * config.embed_scale
    causal = np.tril(np.ones((len(ids), len(ids)), bool))
    for index in range(config.num_layers):
        layer = f"model.layers.{index}."
        x = norm(h, w[layer + "input_layernorm.weight"])

        def heads(part, layer=layer, x=x):
            name = f"{layer}self_attn.{part}_proj."
            y = x @ w[name + "weight"].T
            if config.attention_bias:
                y = y + w[name + "bias"]
            y = y.reshape(len(ids), -1, config.head_dim)
            if config.qk_norm and part != "v":
                y = norm(y, w[f"{layer}self_attn.{part}_norm.weight"])
            return y

        q, k, v = rope(heads("q")), rope(heads("k")), heads("v")
        k, v = (np.repeat(y, config.group_size, axis=1) for y in (k, v))
        scores = np.einsum("tnh,snh->nts", q, k) / math.sqrt(config.head_dim)
        if config.key_bias:
            flat = heads("v").reshape(len(ids), -1)
            gate = np.log1p(np.exp(flat @ w[layer + "self_attn.delta.weight"].T))
            bias = w[layer + "self_attn.A"] * gate
            scores += np.repeat(bias, config.group_size, axis=1).T[:, None]
        scores = np.where(causal, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out = np.einsum("nts,snh->tnh", p, v).reshape(len(ids), -1)
        out = out @ w[layer + "self_attn.o_proj.weight"].T
        if config.output_bias:
            out = out + w[layer + "self_attn.o_proj.bias"]
        h = h + config.residual_scale * out
        x = norm(h, w[layer + "post_attention_layernorm.weight"])
        mlp = _experts if config.num_experts else _mlp
        h = h + config.residual_scale * mlp(config, w, layer + "mlp.", x)
    x = norm(h, w["model.norm.weight"]) / config.logits_divisor
    head = "model.embed_tokens" if config.tie_embeddings else "lm_head"
    return x @ w[head + ".weight"].T


def _mlp(config, w, name, x):
    gate = x @ w[name + "gate_proj.weight"].T
    up = x @ w[name + "up_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ w[name + "down_proj.weight"].T


def _experts(config, w, name, x):
    scores = x @ w[name + "gate.weight"].T
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.zeros_like(x)
    for token, chances in enumerate(p):
        best = np.argsort(-chances, kind="stable")[: config.experts_per_token]
        total = chances[best].sum() if config.normalize_router else 1
        for expert in best:
            parts = ("gate_proj", "up_proj", "down_proj")
            own = {
                f"{part}.weight": w[f"{name}experts.{part}.weight"][expert]
                for part in parts
            }
            out[token] += chances[expert] / total * _mlp(config, own, "", x[token])
    if config.shared_ffn_size:
        gate = 1 / (1 + np.exp(-x @ w[name + "shared_expert_gate.weight"].T))
        out += gate * _mlp(config, w, name + "shared_expert.", x)
    return out
