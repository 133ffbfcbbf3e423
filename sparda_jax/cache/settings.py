"""What a layer's cache is told: the settings of all layers, and where a tile stands."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation
from sparda_jax.cache.codecs import BlockCodec
from sparda_jax.cache.routes import FetchRoute
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.mesh import MODEL
from sparda_jax.models.rope import RopeCosSin
from sparda_jax.sparse.index import IndexState, Indices
from sparda_jax.sparse.selection import SelectionTile
from sparda_jax.sparse.selectors import Selector


@dataclasses.dataclass(frozen=True)
class OffloadSettings:
    """How an offloaded cache is decoded, resolved from a `CacheConfig`.

    Attributes:
      route: How blocks are fetched.
      lookahead: Layer l starts the fetch for layer l + `layers_ahead`.
      layers_ahead: How many layers before its use a list is made.
      verify: The layer's own queries have the last word.
      recall_every: Steps between comparisons of forecast and own queries; 0 never.
      codec: How blocks are kept in host memory.
    """

    route: FetchRoute
    lookahead: bool
    verify: bool = False
    recall_every: int = 0
    codec: BlockCodec = dataclasses.field(default_factory=BlockCodec)
    layers_ahead: int = 1

    @property
    def on_side_stream(self) -> bool:
        """Whether a look-ahead fetch gets a stream of its own."""
        return self.lookahead and self.route.overlaps


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """What is fixed at trace time, the same for every layer and step.

    Attributes:
      config: The model.
      sparse: Selection geometry.
      selector: How blocks are chosen.
      implementation: Kernels of attention and of prefill's block scores: None takes
        what is recorded as fastest for the device, a name is never replaced.
      offload: How an offloaded cache is decoded; None for a resident one.
      parts: Devices that divide every layer; `config` is then that of one of them.
      evict: A resident cache keeps what the answer can list (`cache.evict`).
    """

    config: ModelConfig
    sparse: SparseConfig
    selector: Selector
    implementation: Implementation | None = None
    offload: OffloadSettings | None = None
    parts: int = 1
    evict: bool = False

    @property
    def axis(self) -> str | None:
        """The mesh's axis over which a layer's sums are completed; None for none."""
        return MODEL if self.parts > 1 else None

    def layers_ahead(self, *, decoding: bool) -> int:
        """For which layer behind it a layer makes a forecast: 1 in prefill."""
        if self.offload is None or not decoding:
            return 1
        return self.offload.layers_ahead

    @property
    def indices(self) -> Indices:
        """The parts of the selector's index."""
        return self.selector.indices(self.config)

    @property
    def own_query(self) -> Selector:
        """The selector with the layer's own queries in place of the forecast."""
        return self.selector.by_own_query()

    def score_by_own_query(self, seen: SelectionTile) -> Float[Array, "B K T M"]:
        """Block scores of a tile by the layer's own queries."""
        implementation = None if seen.decoding else self.implementation
        return self.own_query.score(seen, self.config, self.sparse, implementation)

    @property
    def chooser(self) -> Selector:
        """Who has the last word: the own queries when a forecast is verified."""
        verify = self.offload is not None and self.offload.verify
        return self.own_query if verify else self.selector


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileState:
    """Where a tile stands in its rows.

    Attributes:
      start: Position of the tile's first token, per row [B].
      count: Valid tokens of the tile, per row [B]; the rest is padding.
      length: Keys of the row once the whole prompt or step is in [B].
      rope_cos_sin: cos and sin of the tile's tokens.
      num_blocks: M, blocks of capacity per row.
      decoding: The tile is one decode step.
      layer: The number of the layer that it is in.
    """

    start: Int[Array, " B"]
    count: Int[Array, " B"]
    length: Int[Array, " B"]
    rope_cos_sin: RopeCosSin
    num_blocks: int = dataclasses.field(metadata={"static": True})
    decoding: bool = dataclasses.field(metadata={"static": True})
    layer: int | Int[Array, ""] = 0

    def in_layer(self, number: int | Int[Array, ""]) -> "TileState":
        """The same tile in another layer."""
        return dataclasses.replace(self, layer=number)

    def positions(self, steps: int) -> Int[Array, "B T"]:
        """Positions of the tile's tokens."""
        return self.start[:, None] + jnp.arange(steps)

    def selection(
        self,
        index: IndexState,
        layer: int | Int[Array, ""],
        *,
        q: Float[Array, "B T N H"] | None = None,
        forecast: Float[Array, "B T heads F"] | None = None,
    ) -> SelectionTile:
        """What a selector sees of the tile.

        Args:
          index: The selector's index, of one layer or of all.
          layer: Index on its leading axis.
          q: The tile's queries; None one layer ahead.
          forecast: What the layer before made for this one, or None.
        """
        query = forecast if q is None else q
        steps = 1 if query is None else query.shape[1]
        return SelectionTile(
            q=q,
            forecast=forecast,
            positions=self.positions(steps),
            length=self.length,
            index=jax.tree.map(lambda x: x[layer], index),
            num_blocks=self.num_blocks,
            decoding=self.decoding,
            layer=self.layer,
        )
