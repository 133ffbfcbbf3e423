"""Experts: three forms of one sum, and what each of them reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.models import experts as moe

EXPERTS, WIDTH, INNER, USED = 16, 8, 4, 2


def _weights(experts: int = EXPERTS, width: int = WIDTH, inner: int = INNER):
    rng = np.random.default_rng(0)
    shapes = ((width, experts), (experts, width, 2 * inner), (experts, inner, width))
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def _oracle(x, router, gate_up, down, normalize):
    out = np.zeros_like(x)
    for token, row in enumerate(x):
        p = np.exp(row @ router - (row @ router).max())
        p /= p.sum()
        best = np.argsort(-p, kind="stable")[:USED]
        for expert in best:
            gate, up = np.split(row @ gate_up[expert], 2)
            inner = gate / (1 + np.exp(-gate)) * up
            scale = p[best].sum() if normalize else 1
            out[token] += p[expert] / scale * (inner @ down[expert])
    return out


@pytest.mark.parametrize("normalize", [True, False])
def test_every_form_gives_the_oracles_sum(normalize):
    weights = _weights()
    wide = [np.asarray(w, np.float64) for w in weights]
    x = np.random.default_rng(1).standard_normal((50, WIDTH))
    wanted = _oracle(x, *wide, normalize)
    rows = jnp.asarray(x, jnp.float32)
    routes = moe.route(rows, weights[0], USED, normalize=normalize)
    together = functools.partial(moe.tiled_mlp, together=3)
    pieces = functools.partial(moe.in_pieces, tokens=16)
    for form in (moe.chosen_mlp, moe.grouped_mlp, moe.tiled_mlp, together, pieces):
        got = jax.jit(form)(rows, routes, *weights[1:])
        np.testing.assert_allclose(got, wanted, atol=2e-5, rtol=1e-5)


def test_tiles_hold_whatever_the_router_does():
    _, gate_up, down = _weights()
    x = jax.random.normal(jax.random.key(0), (300, WIDTH))
    rng = np.random.default_rng(2)
    lists = [
        np.broadcast_to([5, 9], (300, USED)),  # Two experts have all tokens.
        np.argsort(rng.random((300, EXPERTS)))[:, :USED],
        np.where(np.arange(300)[:, None] == 7, [15, 0], [3, 4]),  # One has one.
    ]
    ways = [jax.jit(form) for form in (moe.chosen_mlp, moe.tiled_mlp)]
    for experts in lists:
        routes = moe.Routes(jnp.asarray(experts, jnp.int32), jnp.ones((300, USED)) / 2)
        wanted, got = (way(x, routes, gate_up, down) for way in ways)
        np.testing.assert_allclose(got, wanted, atol=2e-5, rtol=1e-5)


def _products(form, tokens: int) -> list[int]:
    """Elements of the largest operand of every product."""
    _, gate_up, down = _weights(64, 32, 16)
    x, picks = jnp.ones((tokens, 32)), jnp.zeros((tokens, USED), jnp.int32)
    routes = moe.Routes(picks, jnp.ones((tokens, USED)))
    jaxpr = jax.make_jaxpr(form)(x, routes, gate_up, down)
    return [
        max(value.aval.size for value in equation.invars)
        for equation in jaxpr.eqns
        if equation.primitive.name in ("dot_general", "ragged_dot_general")
    ]


def test_a_decode_step_of_few_tokens_multiplies_its_experts_alone():
    a_pick = 32 * 2 * 16
    assert max(_products(moe.routed_mlp, 1)) == USED * a_pick
    assert max(_products(moe.routed_mlp, 3)) == 3 * USED * a_pick
    assert max(_products(moe.grouped_mlp, 1)) == 64 * a_pick


def test_what_is_not_in_use_is_not_read_by_tiles():
    _, gate_up, down = _weights()
    x = jax.random.normal(jax.random.key(0), (20, WIDTH))
    routes = moe.Routes(jnp.full((20, USED), 3), jnp.ones((20, USED)) / 2)
    others = jnp.arange(EXPERTS)[:, None, None] != 3
    spoiled = [jnp.where(others, jnp.nan, weights) for weights in (gate_up, down)]
    wanted = jax.jit(moe.tiled_mlp)(x, routes, gate_up, down)
    np.testing.assert_array_equal(jax.jit(moe.tiled_mlp)(x, routes, *spoiled), wanted)


@pytest.mark.parametrize(("tokens", "form"), [(4, "chosen"), (5, "pieces")])
def test_a_gpu_takes_the_form_that_is_faster_there(monkeypatch, tokens, form):
    """Weights of up to half as many picks as experts are gathered."""
    _, gate_up, down = _weights()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(moe, "_COPIES", 3 * EXPERTS * USED * WIDTH * 4)
    x, picks = jnp.ones((tokens, WIDTH)), jnp.zeros((tokens, USED), jnp.int32)
    routes = moe.Routes(picks, jnp.ones((tokens, USED)))
    text = str(jax.make_jaxpr(moe.routed_mlp)(x, routes, gate_up, down))
    assert ("ragged_dot" in text) == ("scan" in text) == (form == "pieces")
