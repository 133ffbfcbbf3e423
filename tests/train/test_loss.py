"""The distillation loss against the reference's rows, lists, losses and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparda_jax as sj
import train.loss
import train.tiles
from pallas_kernels.lowering import cuda_lowering_text
from sparda_jax.config import SparseConfig
from sparda_jax.sparse.selection import sorted_blocks
from train.config import LossConfig
from train.loss import distillation_loss
from train.objectives import forecast_logits, partition_kl, recall_loss
from train.teacher import LayerKeys, kernel_cells, layer_keys, teach, teacher_cells
from train.tiles import Documents, Queries

distill_layer = jax.jit(
    train.loss.distill_layer,
    static_argnames=("sparse", "loss", "with_gradient", "kernels"),
)

MINICPM = SparseConfig(local_blocks=2, block_budget=8, query_blocks=0)
# The reference's lists may hold blocks after the query's own (docs/algorithm.md §7.2).
LITERAL = dataclasses.replace(MINICPM, mask_future_blocks=False)
GRIDS = {
    "k2s1max": LossConfig(),
    "k2s1mean": LossConfig(align="mean"),
    "k32s16": LossConfig(teacher="deployed"),
}


SLOW, LONG = pytest.mark.slow, pytest.mark.long
LONGER = [SLOW, LONG]
# One pair by default; in CI documents are packed by what differs from it in both too.
PAIRS = [
    ("fine", "cells"),
    pytest.param("deployed", "blocks", marks=LONGER),
    pytest.param("fine", "blocks", marks=LONGER),
    pytest.param("deployed", "cells", marks=LONGER),
]


@pytest.fixture(scope="module")
def layer1(golden):
    """q, k, forecast of layer 1 of the golden MiniCPM, one row of 700 tokens."""
    arrays = golden("distill_tiny")
    names = ("layer1_q", "layer1_k", "layer1_phi")
    return tuple(jnp.asarray(arrays[f"minicpm/k2s1max/{n}"])[None] for n in names)


def _queries(q, forecast, documents, rows) -> Queries:
    return Queries(
        q[:, rows],
        forecast[:, rows],
        rows,
        documents.start[:, rows],
        documents.end[:, rows],
    )


def _keys(k, documents, loss, sparse=LITERAL) -> LayerKeys:
    return layer_keys(k, documents, None, sparse=sparse, loss=loss)


# The fixture holds no layer-1 q and k of k2s1mean; the whole model tests cover it.
@pytest.mark.parametrize("variant", ["k2s1max", "k32s16"])
def test_rows_equal_reference(golden, layer1, variant):
    arrays = golden("distill_tiny")
    q, k, forecast = layer1
    if variant == "k32s16":
        q, k = (jnp.asarray(arrays[f"minicpm/k32s16/layer1_{n}"])[None] for n in "qk")
    loss = GRIDS[variant]
    documents = Documents.whole_rows(1, 700)
    rows = jnp.asarray(arrays["rows"])
    queries = _queries(q, forecast, documents, rows)

    @jax.jit
    def score(k, queries):
        keys = _keys(k, documents, loss)
        cells = teacher_cells(queries, keys, sparse=LITERAL, loss=loss)
        logits = forecast_logits(queries, keys, sparse=LITERAL, finished_only=False)
        return cells[0, :, :, :42], logits

    cells, logits = score(k, queries)
    expected = arrays[f"minicpm/{variant}/teacher"][1]
    np.testing.assert_allclose(cells, expected, atol=1e-5)
    student = jax.nn.softmax(logits, axis=-1)[0, :, :, :42]
    np.testing.assert_allclose(
        student, arrays[f"minicpm/{variant}/student"][1], atol=1e-5
    )


@pytest.mark.parametrize(
    ("variant", "tile"),
    # Of other tiles: `test_tiles_and_segments_change_nothing`.
    [("k32s16", 352), *(pytest.param("k2s1max", n, marks=LONGER) for n in (352, 96))],
)
def test_layer_loss_and_lists_equal_reference(golden, layer1, variant, tile):
    arrays = golden("distill_tiny")
    q, k, forecast = layer1
    if variant == "k32s16":
        q, k = (jnp.asarray(arrays[f"minicpm/k32s16/layer1_{n}"])[None] for n in "qk")
    out = distill_layer(
        q,
        k,
        forecast,
        Documents.whole_rows(1, 700),
        sparse=LITERAL,
        loss=dataclasses.replace(GRIDS[variant], tile=tile),
        with_gradient=True,
    )
    expected = arrays[f"minicpm/{variant}/loss"][1]
    assert abs(out.total / out.weight - expected) < 2e-6
    np.testing.assert_array_equal(
        sorted_blocks(out.routing[0]), arrays[f"minicpm/{variant}/topk_idx"][1]
    )


@pytest.mark.slow
def test_kernel_makes_the_same_teacher(golden, layer1):
    """Block scores of windows of 2 keys are the fine teacher, tile by tile."""
    q, k, forecast = layer1
    documents, rows = Documents.whole_rows(1, 700), jnp.arange(256, 512)
    queries = _queries(q, forecast, documents, rows)

    @jax.jit
    def score(k, queries):
        keys = _keys(k, documents, LossConfig())
        cells = teacher_cells(queries, keys, sparse=LITERAL, loss=LossConfig())
        return cells, kernel_cells(queries, keys, sparse=LITERAL, kernels=("xla",))

    expected, cells = score(k, queries)
    assert float(expected.max()) > 0.1
    np.testing.assert_allclose(cells, expected, atol=1e-6)
    outs = [
        distill_layer(
            q,
            k,
            forecast,
            documents,
            sparse=LITERAL,
            loss=LossConfig(tile=352),
            with_gradient=True,
            kernels=kernels,
        )
        for kernels in ((), ("xla",))
    ]
    reference = golden("distill_tiny")["minicpm/k2s1max/loss"][1]
    for out in outs:
        assert abs(out.total / out.weight - reference) < 2e-6
    np.testing.assert_array_equal(
        sorted_blocks(outs[0].routing), sorted_blocks(outs[1].routing)
    )
    np.testing.assert_allclose(outs[0].d_forecast, outs[1].d_forecast, atol=1e-6)


def _wide(dtype, tokens: int) -> tuple[jax.Array, ...]:
    """q, k, forecast with 16 heads a group of 128, as the 8B shapes have."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((32, 128), (2, 128), (2, 128))
    return tuple(
        jax.random.normal(key, (1, tokens, *size)).astype(dtype)
        for key, size in zip(keys, sizes, strict=True)
    )


WIDE = SparseConfig(local_blocks=4, block_budget=12)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["mosaic_gpu", "triton"])
def test_native_kernel_makes_the_same_teacher(kernel):
    q, k, forecast = _wide(jnp.bfloat16, 2048)
    outs = [
        distill_layer(
            q,
            k,
            forecast,
            Documents.whole_rows(1, 2048),
            sparse=WIDE,
            loss=LossConfig(),
            with_gradient=True,
            kernels=kernels,
        )
        for kernels in ((), (kernel,))
    ]
    # Both take products of bfloat16, summed in float32; 1e-3 of the rows of scores
    # lie close enough together for sums in another order to choose another block.
    lists = [np.asarray(sorted_blocks(out.routing)) for out in outs]
    assert np.mean(np.any(lists[0] != lists[1], axis=-1)) < 1e-3
    np.testing.assert_allclose(outs[0].total, outs[1].total, rtol=1e-4)
    error = np.linalg.norm(outs[0].d_forecast - outs[1].d_forecast)
    assert error < 1e-2 * np.linalg.norm(outs[0].d_forecast)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "mark"),
    [
        ("triton", "__gpu$xla.gpu.triton"),
        pytest.param("mosaic_gpu", "mosaic_gpu", marks=SLOW),
    ],
)
def test_layer_with_a_kernel_lowers_for_a_gpu(kernel, mark):
    def layer(q, k, forecast, documents):
        return train.loss.distill_layer(
            q,
            k,
            forecast,
            documents,
            sparse=WIDE,
            loss=LossConfig(),
            with_gradient=True,
            kernels=(kernel,),
        )

    rows = Documents.whole_rows(1, 8192)
    text = cuda_lowering_text(layer, *_wide(jnp.bfloat16, 8192), rows)
    calls = [line for line in text.splitlines() if f"custom_call @{mark}" in line]
    # Both passes of the softmax, once in each of two segments; who chooses the blocks
    # is the device's record.
    scores = [call for call in calls if "choose_blocks" not in call]
    assert len(scores) == 4, calls


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_gradient_by_finite_differences(layer1, teacher, student):
    q, k, forecast = (x[:, :448] for x in layer1)
    loss = LossConfig(teacher=teacher, student=student, tile=128)
    # A direction that is the gradient itself plus noise: every row takes part.
    documents = Documents.whole_rows(1, 448)
    sparse = dataclasses.replace(MINICPM, block_budget=5)

    @jax.jit
    def value(forecast):
        return distillation_loss(forecast, q, k, documents, sparse=sparse, loss=loss)

    gradient = jax.grad(value)(forecast)
    assert float(jnp.linalg.norm(gradient)) > 0
    noise = jax.random.normal(jax.random.key(0), forecast.shape)
    unit = gradient / jnp.linalg.norm(gradient)
    direction = unit + 0.3 * noise / jnp.linalg.norm(noise)
    step = 0.3
    # Richardson: the error of the central difference falls to the fourth order.
    near = (value(forecast + step * direction) - value(forecast - step * direction)) / (
        2 * step
    )
    wide = value(forecast + 2 * step * direction) - value(
        forecast - 2 * step * direction
    )
    numeric = (4 * near - wide / (4 * step)) / 3
    exact = jnp.vdot(gradient, direction)
    np.testing.assert_allclose(numeric, exact, rtol=2e-3)


@pytest.mark.slow
def test_tiles_and_segments_change_nothing(layer1, monkeypatch):
    monkeypatch.setattr(train.tiles, "_SEGMENT_TOKENS", 200)
    q, k, forecast = layer1
    documents = Documents.whole_rows(1, 700)
    results = [
        distill_layer(
            q,
            k,
            forecast,
            documents,
            sparse=MINICPM,
            loss=LossConfig(tile=tile),
            with_gradient=True,
        )
        for tile in (704, 48)
    ]
    for other in results[1:]:
        np.testing.assert_allclose(other.total, results[0].total, rtol=2e-6)
        np.testing.assert_array_equal(other.routing, results[0].routing)
        np.testing.assert_allclose(other.d_forecast, results[0].d_forecast, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "student", "nosa"),
    [
        ("fine", "cells", True),
        ("deployed", "blocks", False),
        pytest.param("fine", "cells", False, marks=LONG),
        pytest.param("fine", "blocks", False, marks=LONG),
        pytest.param("fine", "blocks", True, marks=LONG),
        pytest.param("deployed", "cells", False, marks=LONG),
        pytest.param("deployed", "cells", True, marks=LONG),
        pytest.param("deployed", "blocks", True, marks=LONG),
    ],
)
def test_packed_documents_equal_documents_alone(layer1, teacher, student, nosa):
    """Losses add up, gradients and lists are the documents' own."""
    q, k, forecast = layer1
    lengths, places = (300, 350), (0, 320)
    loss = LossConfig(teacher=teacher, student=student, tile=352, mask_short_rows=True)
    sparse = SparseConfig(local_blocks=1, block_budget=5, query_blocks=2)
    start = np.zeros((1, 700), np.int32)
    end = np.zeros((1, 700), np.int32)
    for length, place in zip(lengths, places, strict=True):
        start[:, place : place + length] = place
        end[:, place : place + length] = place + length
    start[:, 300:320], end[:, 300:320] = 0, 300
    start[:, 670:], end[:, 670:] = 320, 670
    key_bias = jax.random.normal(jax.random.key(1), k.shape[:3]) if nosa else None
    packed = distill_layer(
        q,
        k,
        forecast,
        Documents(jnp.asarray(start), jnp.asarray(end)),
        key_bias,
        sparse=sparse,
        loss=loss,
        with_gradient=True,
    )
    total = weight = 0.0
    for length, place in zip(lengths, places, strict=True):
        part = slice(place, place + length)
        alone = distill_layer(
            q[:, part],
            k[:, part],
            forecast[:, part],
            Documents.whole_rows(1, length),
            None if key_bias is None else key_bias[:, part],
            sparse=sparse,
            loss=loss,
            with_gradient=True,
        )
        total, weight = total + alone.total, weight + alone.weight
        lists = np.asarray(sorted_blocks(packed.routing[:, :, part]))
        shifted = np.where(lists >= 0, lists - place // 64, -1)
        np.testing.assert_array_equal(shifted, sorted_blocks(alone.routing))
        np.testing.assert_allclose(
            packed.d_forecast[:, part], alone.d_forecast, atol=2e-6
        )
    assert float(weight) > 0 and float(total) > 0.01
    np.testing.assert_allclose(packed.weight, weight)
    np.testing.assert_allclose(packed.total, total, rtol=1e-5)


@pytest.mark.slow
def test_options_weigh_rows(layer1):
    q, k, forecast = layer1
    documents = Documents.whole_rows(1, 700)

    def weight(**options):
        out = distill_layer(
            q,
            k,
            forecast,
            documents,
            sparse=MINICPM,
            loss=LossConfig(tile=704, **options),
            with_gradient=False,
        )
        assert out.d_forecast is None
        return float(out.weight) / 2

    assert weight() == 700
    # Rows of block 8 on have more than 8 blocks.
    assert weight(mask_short_rows=True) == 700 - 512
    shares = [max(0.0, 1 - 8 / (i // 64 + 1)) for i in range(700)]
    np.testing.assert_allclose(
        weight(position_weight="context"), sum(shares), rtol=1e-5
    )


@pytest.mark.slow
def test_on_policy_routes_as_inference_selects(layer1):
    """The lists are those of the `sparda` selector."""
    from sparda_jax.models.presets import get_preset
    from sparda_jax.sparse.compression import CompressedKeys
    from sparda_jax.sparse.selection import SelectionTile
    from sparda_jax.sparse.selectors import get_selector

    q, k, forecast = layer1
    documents = Documents.whole_rows(1, 700)
    loss = LossConfig(on_policy=True, tile=176)
    out = distill_layer(
        q, k, forecast, documents, sparse=MINICPM, loss=loss, with_gradient=False
    )
    windows = _keys(k, documents, loss).windows
    tile = SelectionTile(
        q=q,
        forecast=forecast,
        positions=jnp.arange(700)[None],
        length=jnp.full((1,), 700),
        index={"key_means": CompressedKeys(windows, windows[:, :, :2])},
        num_blocks=windows.shape[2] // MINICPM.windows_per_block,
        decoding=False,
    )
    expected = get_selector("sparda").select(tile, get_preset("tiny").model, MINICPM)
    np.testing.assert_array_equal(
        sorted_blocks(out.routing), sorted_blocks(jnp.asarray(expected))
    )


def test_recall_loss_counts_misplaced_blocks():
    chosen = jnp.asarray([[True, True, False, False, False]] * 4)
    optional = jnp.asarray(
        [[True, True, True, True, False]] * 3 + [[True] * 2 + [False] * 3]
    )
    scores = jnp.asarray(
        [
            [9.0, 8.0, 1.0, 0.0, 99.0],  # as the teacher
            [9.0, 1.0, 8.0, 0.0, 99.0],  # one in, one out
            [0.0, 1.0, 8.0, 9.0, 99.0],  # the other way round
            [9.0, 8.0, 1.0, 0.0, 0.0],  # nothing to choose
        ]
    )
    loss = recall_loss(scores, chosen, optional)
    np.testing.assert_allclose(loss, [0.0, 1.0, 2.0, 0.0], atol=0.01)
    # Selection knows no scale, and neither does the loss.
    np.testing.assert_allclose(
        recall_loss(3 * scores, chosen, optional), loss, atol=1e-4
    )

    def total(scores):
        return recall_loss(scores, chosen, optional).sum()

    close = scores + jnp.asarray([0.0, 0.0, 6.5, 0.0, 0.0])
    slope = jax.grad(total)(close)
    assert np.all(np.isfinite(slope)) and np.all(slope[3] == 0)
    assert slope[0, 1] < 0 < slope[0, 2]
    # A real gradient: small steps along it agree with finite differences.
    way = jax.random.normal(jax.random.key(0), close.shape)
    step = 1e-2
    rise = (total(close + step * way) - total(close - step * way)) / (2 * step)
    np.testing.assert_allclose(rise, jnp.sum(slope * way), rtol=2e-2)


@pytest.mark.slow
def test_floor_of_zero_keeps_the_gradient_of_impossible_bins():
    target = jnp.asarray([[0.5, 0.3, 0.2]])
    logits = jnp.asarray([[-40.0, 0.0, 0.0]])
    resolved = jnp.asarray([[True, True, False]])

    def kl(logits, floor):
        return partition_kl(target, logits, resolved, slots=2, floor=floor)[0]

    assert float(jax.grad(kl)(logits, 1e-8)[0, 0]) > -1e-6
    np.testing.assert_allclose(jax.grad(kl)(logits, 0.0)[0, 0], -0.5, rtol=1e-5)
    student = jax.nn.log_softmax(logits)[0]
    exact = jnp.sum(target[0] * (jnp.log(target[0]) - student))
    np.testing.assert_allclose(kl(logits, 0.0), exact, rtol=1e-6)
    # A row without a teacher teaches nothing.
    assert partition_kl(0 * target, logits, resolved, slots=2, floor=0.0)[0] == 0


def test_the_oracle_lists_what_holds_the_most_attention(layer1):
    q, k, forecast = layer1
    documents, rows = Documents.whole_rows(1, 700), jnp.asarray([520, 600, 699])
    loss = LossConfig(teacher="oracle", student="blocks", target="recall")
    queries = _queries(q, forecast, documents, rows)
    keys = _keys(k, documents, loss, MINICPM)
    lists = np.asarray(teach(queries, keys, sparse=MINICPM, loss=loss).partition[0])
    q, k = np.asarray(q[0]), np.asarray(k[0])
    groups = q.shape[1] // k.shape[1]
    for number, t in enumerate(rows):
        own = int(t) // 64
        for head, listed in enumerate(lists[:, number]):
            part = q[t, head * groups : (head + 1) * groups]
            logits = part @ k[: t + 1, head].T * q.shape[-1] ** -0.5
            weights = np.exp(logits - logits.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            mass = np.zeros(12)
            np.add.at(mass, np.arange(t + 1) // 64, weights.sum(0))
            block = np.arange(12)
            forced = (block == 0) | ((block >= own - 2) & (block <= own))
            mass = np.where(forced, np.inf, np.where(block > own, -np.inf, mass))
            wanted = np.argsort(-mass, kind="stable")[: min(8, own + 1)]
            np.testing.assert_array_equal(np.sort(listed[listed >= 0]), np.sort(wanted))
    with pytest.raises(
        sj.ConfigError, match=r"LossConfig\.target='mass' is not allowed"
    ):
        LossConfig(teacher="oracle")


def test_a_sharp_line_counts_misplaced_blocks():
    """As the softness falls, the loss becomes the share of blocks on the wrong side."""
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.standard_normal((5, 40)), jnp.float32)
    chosen = np.zeros((5, 40), bool)
    chosen[:, :10] = True
    optional = jnp.ones((5, 40), bool)
    picked = np.argsort(-np.asarray(scores), axis=1)[:, :10]
    # A block that is missed lets another one in.
    wanted = 2 * (picked >= 10).sum(1) / 10
    sharp = recall_loss(scores, jnp.asarray(chosen), optional, 1e-4)
    np.testing.assert_allclose(sharp, wanted, atol=1e-2)
    soft = recall_loss(scores, jnp.asarray(chosen), optional)
    assert np.all(np.abs(np.asarray(soft) - wanted) > 1e-3)
