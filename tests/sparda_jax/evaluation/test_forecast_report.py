"""The Forecast report: sums against loops, figures, thresholds, budgets by layer."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_cases import FINE

import sparda_jax as sj
from sparda_jax.checks import ConfigError
from sparda_jax.cli.main import main
from sparda_jax.evaluation.documents import DataError, token_rows
from sparda_jax.evaluation.forecast_measure import (
    LayerSums,
    Measured,
    make_plan,
    tile_sums,
)
from sparda_jax.evaluation.forecast_pages import markdown, write_pages
from sparda_jax.evaluation.forecast_report import Thresholds, figures, verdict
from sparda_jax.evaluation.layer_budgets import (
    captured_mass,
    choose_layer_budgets,
    compare_budgets,
    read_layer_budgets,
    write_layer_budgets,
)

TOKENS = 48


@pytest.fixture(scope="module")
def lm(fine_lm):
    return fine_lm


@pytest.fixture(scope="module")
def plan(lm):
    return make_plan(lm, TOKENS, buckets=3)


def _by_loops(rankings, mass, plan, tokens):
    """The sums as their words say them."""
    kv_heads = len(rankings[0])
    heads, group = len(mass), len(mass) // kv_heads
    buckets, at = len(plan.edges) - 1, plan.at
    shape = (len(plan.budgets), kv_heads, buckets)
    of_heads = (len(plan.budgets), heads, buckets)
    far = (kv_heads, len(plan.distances) - 1, buckets)
    rows, hits, wanted = np.zeros(buckets), np.zeros(shape), np.zeros(shape)
    masses = [np.zeros(of_heads) for _ in range(3)]
    missed, distance = np.zeros(far), np.zeros(far)
    for token in range(tokens):
        own = token // FINE.block_size
        if own + 1 <= plan.budget:
            continue
        bucket = np.searchsorted(plan.edges, token, "right") - 1
        rows[bucket] += 1
        forced = {0, own, own - 1}
        for head in range(kv_heads):
            true = mass[head * group : (head + 1) * group, token].mean(0)
            order = [
                sorted(range(own + 1), key=lambda b, x=x: (b not in forced, -x[b], b))
                for x in (rankings[0][head, token], rankings[1][head, token], true)
            ]
            for index, budget in enumerate(plan.budgets):
                lists = [set(x[:budget]) for x in order]
                chosen = lists[1] - forced
                wanted[index, head, bucket] += len(chosen)
                hits[index, head, bucket] += len(chosen & lists[0])
                for kind, held in zip(masses, lists, strict=True):
                    for n in range(head * group, (head + 1) * group):
                        kind[index, n, bucket] += mass[n, token][sorted(held)].sum()
                if index == at:
                    for block in chosen:
                        place = np.searchsorted(plan.distances, own - block, "right")
                        distance[head, place - 1, bucket] += 1
                        missed[head, place - 1, bucket] += block not in lists[0]
    return LayerSums(rows, hits, wanted, *masses, missed, distance)


def test_sums_are_what_their_words_say(lm, plan):
    rng = np.random.default_rng(0)
    blocks, config = TOKENS // FINE.block_size, lm.config
    own = np.arange(TOKENS) // FINE.block_size
    past = np.arange(blocks) <= own[:, None]
    mass = rng.random((config.num_heads, TOKENS, blocks), np.float32) ** 4 * past
    mass /= mass.sum(-1, keepdims=True)
    rankings = []
    for _ in range(2):
        shape = (config.num_kv_heads, TOKENS, blocks)
        # Whole numbers: ties must go to the lowest block.
        scores = rng.integers(0, 6, shape).astype(np.float32)
        block = np.arange(blocks)
        local = (block == 0) | ((block >= own[:, None] - 1) & past)
        scores = np.where(local & past, np.inf, np.where(past, scores, -np.inf))
        rankings.append(scores)
    found, listed = tile_sums(
        (jnp.asarray(rankings[0]), jnp.asarray(rankings[1])),
        jnp.asarray(mass),
        jnp.arange(TOKENS),
        lm.settings,
        plan,
        TOKENS,
    )
    expected = _by_loops(rankings, mass, plan, TOKENS)
    for name, value in found._asdict().items():
        np.testing.assert_allclose(
            value, getattr(expected, name), rtol=1e-5, atol=1e-5, err_msg=name
        )
    assert (
        np.asarray(listed)[:, :, -1].sum(-1).tolist() == [[FINE.block_budget] * 2] * 2
    )


def _measured(lm, plan, recall: float) -> Measured:
    """Sums of a text in which every layer has about that recall."""
    layers, kv = lm.config.num_layers, lm.config.num_kv_heads
    heads, buckets, at = lm.config.num_heads, len(plan.edges) - 1, len(plan.budgets)
    rows = np.full((layers, buckets), 10.0)
    chosen = np.array(plan.budgets) - FINE.forced_blocks
    wanted = np.broadcast_to(
        10.0 * chosen[None, :, None, None], (layers, at, kv, buckets)
    )
    # Later layers need more blocks for their mass.
    need = np.array([0.3, 0.9, 1.5])[:layers, None]
    curve = 1 - np.exp(-np.array(plan.budgets)[None] / FINE.block_budget / need)
    mass = 10 * np.broadcast_to(
        curve[:, :, None, None], (layers, at, heads, buckets)
    ).astype(np.float64)
    far = np.ones((layers, kv, len(plan.distances) - 1, buckets))
    sums = LayerSums(
        rows, recall * wanted, wanted, mass, mass * 1.01, mass * 1.02, far / 10, far
    )
    return Measured(
        rows=1,
        tokens=TOKENS,
        sums=sums,
        overlap=np.full((2, layers), 0.8),
        misses=np.ones((2, layers, 5)) * np.arange(5, 0, -1),
    )


@pytest.fixture(scope="module")
def report(lm, plan):
    found = {
        "model": "tiny",
        "dtype": "float32",
        "device": "cpu",
        "jax": jax.__version__,
        "sparse": dataclasses.asdict(lm.sparse),
        "domains": {
            "code": figures(_measured(lm, plan, 0.95), plan, lm),
            "prose": figures(_measured(lm, plan, 0.8), plan, lm),
        },
    }
    return json.loads(json.dumps(found, allow_nan=False))


def test_figures_are_ratios_of_the_sums(report, lm, plan):
    code = report["domains"]["code"]
    assert code["means"]["recall"] == pytest.approx(0.95)
    scored = FINE.block_budget - FINE.forced_blocks
    at_budget = (0.95 * scored + FINE.forced_blocks) / FINE.block_budget
    assert code["means"]["recall_at_budget"] == pytest.approx(at_budget)
    assert code["means"]["lost"] == pytest.approx(
        code["means"]["forecast_mass"] * 0.01, abs=1e-6
    )
    assert np.shape(code["heads"]["forecast_mass"]) == (3, lm.config.num_heads)
    assert np.shape(code["positions"]["recall"]) == (3, 3)
    assert np.shape(code["budgets"]["own_mass"]) == (3, len(plan.budgets))
    assert code["distances"]["missed"][0][0] == [0.1] * (len(plan.distances) - 1)
    kv_bytes = 2 * FINE.block_size * lm.config.head_dim * 4
    assert code["misses"]["bytes_per_step"]["forecast"][0] == (
        5 * lm.config.num_layers * lm.config.num_kv_heads * kv_bytes
    )


def test_thresholds_are_judged_in_every_text(report):
    found = verdict(report, Thresholds(min_recall=0.9, max_lost=0.02))
    assert [(x["domain"], x["figure"], x["passed"]) for x in found] == [
        ("code", "recall", True),
        ("code", "lost", True),
        ("prose", "recall", False),
        ("prose", "lost", True),
    ]
    assert verdict(report, Thresholds()) == []
    with pytest.raises(ConfigError, match=r"Thresholds.min_mass=1.5 is not allowed"):
        Thresholds(min_mass=1.5)


def test_blocks_go_where_they_capture_most(report):
    budgets = choose_layer_budgets(report)
    flat = report["sparse"]["block_budget"]
    assert sum(budgets) == flat * len(budgets)
    assert budgets[0] == min(budgets) < max(budgets)
    best = compare_budgets(report, budgets)
    assert best["blocks_read"] == flat and best["mass"] > best["flat_mass"]
    # No block can be moved from one layer to another and capture more.
    for source in range(3):
        for target in range(3):
            moved = list(budgets)
            moved[source] -= 1
            moved[target] += 1
            if min(moved) >= FINE.forced_blocks + 1:
                assert captured_mass(report, moved) <= best["mass"] + 1e-6
    with pytest.raises(ConfigError, match="at least 4, measured"):
        captured_mass(report, (3, 5, 7))
    with pytest.raises(ConfigError, match="one a layer"):
        captured_mass(report, (4, 4))


def test_budgets_keep_their_file(tmp_path):
    path = tmp_path / "budgets.json"
    write_layer_budgets(path, (4, 5, 6))
    assert read_layer_budgets(path) == (4, 5, 6)
    path.write_text('{"block_budget": [4, 0]}')
    with pytest.raises(ConfigError, match=r"block_budget\[1\]=0"):
        read_layer_budgets(path)
    with pytest.raises(sj.CheckpointError, match="holds no budgets by layer"):
        read_layer_budgets(tmp_path / "none.json")


def test_pages_say_what_the_report_says(report, tmp_path):
    full = {
        **report,
        "verdict": verdict(report, Thresholds(min_recall=0.9)),
        "layer_budgets": compare_budgets(report, choose_layer_budgets(report)),
    }
    page = markdown(full)
    assert "| prose | 1 × 48 | 0.800 |" in page
    assert "Thresholds: 1 of 2 met" in page and "**NOT MET**" in page
    assert "## Budget by layer" in page
    losing = page.split("query heads that lose most mass")[1].split("##")[0]
    code, prose = (x["heads"] for x in full["domains"].values())
    lost = np.mean(
        [np.subtract(x["own_mass"], x["forecast_mass"]) for x in (code, prose)], 0
    )
    worst = np.unravel_index(np.argmax(lost), lost.shape)
    assert f"| {worst[0]} | {worst[1]} |" in losing and f"{lost.max():.3f}" in losing
    assert "| layer 0 | 10 % of" in page  # missed at every distance
    assert "| lost to the oracle |" in page
    files = write_pages(full, tmp_path)
    pictures = {"worst-layers.png", "misses.png", "lost-by-head.png"}
    assert {"report.md", *pictures} <= set(files)
    assert all((tmp_path / name).stat().st_size for name in files)


def test_rows_come_from_all_of_a_text(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("".join(chr(65 + i // 10) for i in range(100)))
    rows = token_rows(str(source), lambda s: list(s.encode()), tokens=10, count=3)
    assert rows[:, 0].tolist() == [65, 69, 74] and rows.shape == (3, 10)
    with pytest.raises(DataError, match="give 100 tokens, less than one row of 101"):
        token_rows(str(source), lambda s: list(s.encode()), tokens=101, count=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--text"),
        (["--text", "a=pydoc", "--text", "a=stdlib"], "not yet taken"),
        (["--text", "=pydoc"], "NAME=SOURCE"),
        (["--text", "pydoc", "--min-recall", "2"], "--min-recall"),
        (
            ["--text", "pydoc", "--model", "tiny", "--forecast", "from_query"],
            "tokenizer",
        ),
    ],
)
def test_a_wrong_call_is_one_line(options, said, tmp_path, capsys):
    out = ["--out", str(tmp_path), "--no-compilation-cache"]
    assert main(["forecast-report", *options, *out]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and error.startswith("sparda: ")


def test_short_rows_choose_nothing(lm):
    with pytest.raises(ConfigError, match="above the 20 that the budget holds"):
        make_plan(lm, 20)
