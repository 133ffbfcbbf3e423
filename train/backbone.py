"""The frozen backbone: run once, each layer's gradient on the way.

The backbone runs in one scan over its layers and is never differentiated. A layer's
loss needs its own queries and keys and one Forecast matrix, W, that reads the input of
the layer before: the loss gives d forecast, and d W = xᵀ · RoPE⁻¹(d forecast) is one
product. So nothing is kept from one layer to the next but the hidden states and that
input (docs/algorithm.md §5.6; §7.9 for what the reference computes twice).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_scores import api as block_scores
from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.dispatch import candidates
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.models.block import add_attention, add_mlp, before_attention
from sparda_jax.models.decoder import Decoder, DecoderLayer, embed
from sparda_jax.models.forecast import project_forecast
from sparda_jax.models.rope import RopeCosSin, apply_rope, model_rope, rope_cos_sin_at
from train.config import LossConfig
from train.loss import LayerLoss, distill_layer
from train.teacher import Kernels
from train.tiles import (
    Documents,
    attend_listed,
    head_scores,
    join_tiles,
    num_blocks,
    padded_heads,
    stream_tiles,
    tile_queries,
    tile_size,
)

# Rows of hidden states that pass through the MLP together: its inner width times this
# is the largest intermediate of a layer.
_MLP_ROWS = 4096


class Batch(NamedTuple):
    """Token ids and the documents they belong to; leading axes may come before B."""

    tokens: Int[Array, "*A B T"]
    documents: Documents


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed at trace time.

    Attributes:
      config: The model.
      sparse: Block geometry and budget.
      loss: Variant of the loss.
      implementation: Attention kernels.
      masked_attention: Attend by masking all keys instead of visiting the listed
        blocks: the faster one where contexts are short.
      whole_rows: Every row is one document without padding, which lets a kernel make
        the teacher.
    """

    config: ModelConfig
    sparse: SparseConfig
    loss: LossConfig
    implementation: Literal["mosaic_gpu", "triton", "xla"] | None = None
    masked_attention: bool = False
    whole_rows: bool = False

    @property
    def teacher_kernels(self) -> Kernels:
        """Kernels for `distill_layer`: none where rows hold several documents.

        Unless one is named, those recorded for this device, in their order where
        softmaxes are summed. Without any of them tiles in XLA are the better form.
        """
        if not self.whole_rows:
            return ()
        known = candidates(block_scores.OP, self.implementation, {"softmax": True})
        return cast(Kernels, tuple(name for name in known if name != "xla"))


class LayerView(NamedTuple):
    """What a layer shows to a loss or a metric.

    Attributes:
      q, k: Queries and keys after RoPE.
      v: Values.
      key_bias: NOSA's c per token, or None.
      source: What this layer is forecast from: the normalised input of the layer
        before, or what its MLP read (`ModelConfig.forecast_reads`).
      head: Its Forecast matrix, or several of them.
      rope_cos_sin: cos and sin of all tokens.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    key_bias: Float[Array, "B T K"] | None
    source: Float[Array, "B T D"]
    head: Float[Array, "*V D KRH"]
    rope_cos_sin: RopeCosSin

    @property
    def forecast(self) -> Float[Array, "B T KR H"]:
        """Forecasts for this layer; of the first head, if there are several."""
        head = self.head.reshape(-1, *self.head.shape[-2:])[0]
        return project_forecast(self.source, head, self.rope_cos_sin)


def head_gradient(
    source: Float[Array, "B T D"],
    d_forecast: Float[Array, "B T KR H"],
    rope_cos_sin: RopeCosSin,
) -> Float[Array, "D KRH"]:
    """Gradient of a Forecast matrix from that of its forecasts, float32.

    The transpose of a rotation turns the other way.
    """
    d_plain = apply_rope(d_forecast, RopeCosSin(rope_cos_sin.cos, -rope_cos_sin.sin))
    d_plain = d_plain.reshape(*d_forecast.shape[:2], -1)
    # In float32 the sum over all tokens would not be rounded, but on accelerators the
    # product of two bfloat16 arrays is summed in float32 as well.
    return jnp.einsum(
        "btd,bte->de",
        source,
        d_plain.astype(source.dtype),
        preferred_element_type=jnp.float32,
    )


def _attend_masked(
    view: LayerView, lists: Int[Array, "B K T P"], settings: Settings
) -> Float[Array, "B T N H"]:
    """The same attention, scoring all keys and masking those not listed.

    Where a context is only a few times the budget this is faster than visiting lists,
    as its products are few and large.
    """
    sparse = settings.sparse
    batch, tokens, heads, _ = view.q.shape
    size = settings.loss.tile
    size = size or tile_size(batch, tokens, heads, jax.default_backend())
    documents = Documents.whole_rows(batch, tokens)
    tiles, cut = tile_queries(view.q, view.forecast, documents, size)
    lists = jnp.pad(
        lists, ((0, 0), (0, 0), (0, tiles * size - tokens), (0, 0)), constant_values=-1
    )
    k, v = padded_heads(view.k, sparse), padded_heads(view.v, sparse)
    bias = None if view.key_bias is None else padded_heads(view.key_bias, sparse)

    def one_tile(index: Int[Array, ""], reach: int) -> Float[Array, "B t N H"]:
        queries = cut(index)
        part = jax.lax.dynamic_slice_in_dim(lists, index * size, size, axis=2)
        scores = head_scores(queries.q, k[:, :, :reach])
        if bias is not None:
            scores = scores + bias[:, :, None, None, :reach]
        return attend_listed(scores, v[:, :, :reach], part, queries, sparse)

    out = stream_tiles(one_tile, tokens=tokens, size=size, sparse=sparse)
    return join_tiles(out, 1, tokens)


def attend(
    view: LayerView, lists: Int[Array, "B K T P"] | None, settings: Settings
) -> Float[Array, "B T N H"]:
    """Attention of whole rows over their block lists; None for all causal blocks."""
    if settings.masked_attention and lists is not None:
        return _attend_masked(view, lists, settings)
    sparse = settings.sparse
    batch, tokens, kv_heads, dim = view.v.shape
    blocks = num_blocks(tokens, sparse)
    pad = blocks * sparse.block_size - tokens
    kv = jnp.moveaxis(jnp.stack((view.k, view.v), axis=3), 1, 2)
    kv = jnp.pad(kv, ((0, 0), (0, 0), (0, pad), (0, 0), (0, 0)))
    bias = None
    if view.key_bias is not None:
        bias = jnp.swapaxes(view.key_bias, 1, 2)
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, pad)))
        bias = bias.reshape(batch, kv_heads, blocks, -1)
    return block_sparse_attention(
        view.q,
        kv.reshape(batch, kv_heads, blocks, sparse.block_size, 2, dim),
        q_start=jnp.zeros((batch,), jnp.int32),
        block_indices=lists,
        key_bias=bias,
        implementation=settings.implementation,
    )


def _finish_layer(
    layer: DecoderLayer,
    config: ModelConfig,
    h: Float[Array, "B T D"],
    attended: Float[Array, "B T NH"],
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Output projection and MLP, some rows at a time; and what the MLP reads."""

    def rows(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        middle, read = add_attention(layer, config, *inputs)
        return add_mlp(layer, config, middle, read), read

    count = h.shape[0] * h.shape[1]
    parts = max(1, count // _MLP_ROWS)
    while count % parts:
        parts += 1
    flat = (
        h.reshape(parts, count // parts, -1),
        attended.reshape(parts, count // parts, -1),
    )
    if parts == 1:
        out, read = rows((flat[0][0], flat[1][0]))
    else:
        out, read = jax.lax.map(rows, flat)
    return out.reshape(h.shape), read.reshape(h.shape)


def run_backbone[Out](
    model: Decoder,
    heads: Float[Array, "L *V D KRH"],
    batch: Batch,
    settings: Settings,
    on_layer: Callable[[LayerView], tuple[Float[Array, "B T N H"], Out]],
    gather: Callable[[DecoderLayer], DecoderLayer] = lambda layer: layer,
) -> tuple[Float[Array, "B T D"], Out]:
    """Runs the frozen layers; what `on_layer` returns is stacked over them.

    Args:
      model: Stacked weights.
      heads: Forecast matrices by consuming layer.
      batch: Whole rows.
      settings: Model and geometry.
      on_layer: Returns what the layer's attention gives (`attend`), and anything else.
      gather: Makes a layer's weights whole where devices hold parts of them.

    Returns:
      The last hidden states, before the final norm, and the stacked outputs.
    """
    config = settings.config
    h = embed(model, batch.tokens, model.embedding[...].dtype)
    rope = model_rope(config, batch.tokens.shape[1])
    rope_cos_sin = rope_cos_sin_at(rope, jnp.maximum(batch.documents.positions(), 0))

    def body(
        carry: tuple[Array, Array], xs: tuple[DecoderLayer, Array, Array]
    ) -> tuple[tuple[Array, Array], Out]:
        (h, before), (layer, head, index) = carry, xs
        layer = gather(layer)
        x, q, k, v, key_bias = before_attention(layer, config, h, rope_cos_sin)
        # Layer 0 forecasts for itself, the others are forecast by the layer before.
        source = jnp.where(index == 0, x, before)
        view = LayerView(
            q=q,
            k=k,
            v=v,
            key_bias=key_bias,
            source=source,
            head=head,
            rope_cos_sin=rope_cos_sin,
        )
        attended, out = on_layer(view)
        attended = attended.reshape(*h.shape[:2], -1)
        h, read = _finish_layer(layer, config, h, attended)
        return (h, read if config.forecast_reads == "attended" else x), out

    assert isinstance(model.layers, DecoderLayer), "weights must be stacked"
    index = jnp.arange(config.num_layers)
    carry, out = jax.lax.scan(body, (h, h), (model.layers, heads, index))
    return carry[0], out


def teach_layer(
    view: LayerView,
    documents: Documents,
    settings: Settings,
    *,
    with_gradient: bool = False,
    kernels: Kernels = (),
) -> LayerLoss:
    """`distill_layer` of one layer, as a run's settings say."""
    return distill_layer(
        view.q,
        view.k,
        view.forecast,
        documents,
        view.key_bias,
        sparse=settings.sparse,
        loss=settings.loss,
        with_gradient=with_gradient,
        # With masked attention one product of queries and keys serves both.
        v=view.v if with_gradient and settings.masked_attention else None,
        kernels=kernels,
    )


def heads_gradient(
    model: Decoder,
    heads: Float[Array, "L D KRH"],
    batch: Batch,
    settings: Settings,
    gather: Callable[[DecoderLayer], DecoderLayer] = lambda layer: layer,
) -> tuple[Float[Array, "L D KRH"], Float[Array, " L"], Float[Array, ""]]:
    """Gradient of each layer's summed loss, the sums, and the sum of the row weights.

    Dividing the first two by the third gives means: what is summed can be added up over
    micro batches and devices before.
    """

    def on_layer(view: LayerView) -> tuple[Array, tuple[Array, Array, Array]]:
        out = teach_layer(
            view,
            batch.documents,
            settings,
            with_gradient=True,
            kernels=settings.teacher_kernels,
        )
        assert out.d_forecast is not None
        gradient = head_gradient(view.source, out.d_forecast, view.rope_cos_sin)
        attended = out.attended
        if attended is None:
            attended = attend(view, out.routing, settings)
        return attended, (gradient, out.total, out.weight)

    _, (gradient, total, weight) = run_backbone(
        model, heads, batch, settings, on_layer, gather
    )
    return gradient, total, weight[0]
