"""First Forecast heads; by least squares where `init="regression"` asks for them.

A query head of layer l is a linear map of l's normalised input, and a forecast is one
of the input of layer l − 1. So the best linear guess at each query head, from what the
forecast may read, is a least-squares problem with a closed form: two products of
activations, summed over tokens. `from_query` is the guess that the layer in between
adds nothing.

A group of G query heads has R forecasts, one as a rule. The group's choice sums their
softmaxes, in which a head that is sure counts for more than one that is not; the mean
of the heads ignores that. So each forecast is a weighted sum of its group's guesses,
and the weights, G·R a group, are fitted by the loss of the run, beginning with means of
runs of heads; with R = G the guesses are the heads. From there training moves all of
the matrix.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float
from tqdm import tqdm

from sparda_jax.models.by_layer import by_layer
from sparda_jax.models.decoder import Decoder
from sparda_jax.models.forecast import query_sets
from sparda_jax.models.rope import RopeCosSin, apply_rope
from sparda_jax.models.spec import forecast_shape
from sparda_jax.models.weights import from_query_heads
from train.backbone import (
    Batch,
    LayerView,
    Settings,
    attend,
    run_backbone,
    teach_layer,
)
from train.sharding import AXIS, make_gather, model_specs
from train.step import make_gradients

# Of the mean eigenvalue: directions that the inputs never take stay at rest.
_RIDGE = 1e-4
# A rate at which a matrix would not survive.
_WEIGHT_RATE = 0.05


def initial_heads(
    model: Decoder, how: str, seed: int, queries: int = 1
) -> Float[Array, "L D KRH"]:
    """Float32 heads before training: `kaiming`, else `from_query`.

    Source: docs/algorithm.md §4.1.
    """
    config = dataclasses.replace(model.config, forecast_queries=queries)
    if how != "kaiming":
        heads = from_query_heads(model, queries)
        return jnp.stack([x.astype(jnp.float32) for x in heads])
    shape = (config.num_layers, *forecast_shape(config))
    bound = config.hidden_size**-0.5
    key = jax.random.key(seed)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def query_moments(
    model: Decoder,
    heads: Float[Array, "L D KRH"],
    batch: Batch,
    settings: Settings,
    gather=lambda layer: layer,
) -> tuple[Float[Array, "L D D"], Float[Array, "L D NH"]]:
    """Xᵀ·X and Xᵀ·Q of every layer, summed over the tokens of documents.

    X is what the layer is forecast from, Q its queries before their rotation. Layers
    attend to the blocks that the teacher chooses.

    Args:
      model: Stacked weights.
      heads: Any; only their shape counts.
      batch: Whole rows.
      settings: Model and geometry.
      gather: As for `run_backbone`.
    """

    def on_layer(view: LayerView) -> tuple[Array, tuple[Array, Array]]:
        lists = teach_layer(view, batch.documents, settings).routing
        rows, tokens = view.q.shape[:2]
        turn_back = RopeCosSin(view.rope_cos_sin.cos, -view.rope_cos_sin.sin)
        plain = apply_rope(view.q.astype(jnp.float32), turn_back)
        inside = jnp.arange(tokens) < batch.documents.end
        x = jnp.where(inside[..., None], view.source, 0)
        dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        square = dot("btd,bte->de", x, x)
        product = dot("btd,bte->de", x, plain.reshape(rows, tokens, -1).astype(x.dtype))
        return attend(view, lists, settings), (square, product)

    return run_backbone(model, heads, batch, settings, on_layer, gather)[1]


def predictors(
    square: Float[np.ndarray, "L D D"],
    product: Float[np.ndarray, "L D NH"],
    *,
    progress: bool = False,
) -> Float[np.ndarray, "L D NH"]:
    """The least-squares guesses at all query heads, from summed moments."""

    def guess(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        ridge = _RIDGE * np.trace(a) / len(a) + 1e-12
        return np.linalg.solve(a + ridge * np.eye(len(a)), b).astype(np.float32)

    what = "guesses at heads"
    return np.stack(by_layer(guess, square, product, what=what, progress=progress))


def combine(
    guesses: Float[Array, "L D K G H"], weights: Float[Array, "L K G R"]
) -> Float[Array, "L D KRH"]:
    """Heads whose queries are weighted sums of their group's guesses."""
    heads = jnp.einsum("ldkgh,lkgr->ldkrh", guesses, weights)
    return heads.reshape(*heads.shape[:2], -1)


@dataclasses.dataclass(frozen=True)
class Regression:
    """What the least squares are over.

    Args:
      model: Laid out over the mesh.
      heads: Any; only their shape counts.
      data: Batches [A, B, T] over the mesh; each of the sums takes `batches` of them.
      settings: Model, geometry and loss.
      mesh: Of `make_mesh`.
      batches: For the moments, and again for the weights if R < G.
      fsdp: The layers' weights are divided over the mesh.
      progress: Show a bar: on a CPU this takes minutes.
    """

    model: Decoder
    heads: Float[Array, "L D KRH"]
    data: Iterator[Batch]
    settings: Settings
    mesh: Mesh
    batches: int
    fsdp: bool = False
    progress: bool = False

    def taken(self, what: str) -> Iterator[Batch]:
        """The next batches, with a bar of that name."""
        silent = None if self.progress else True
        for _ in tqdm(range(self.batches), desc=what, disable=silent):
            yield next(self.data)


def sum_moments(
    over: Regression,
) -> tuple[Float[np.ndarray, "L D D"], Float[np.ndarray, "L D NH"]]:
    """`query_moments` of batches, in float64."""
    model, mesh, settings = over.model, over.mesh, over.settings
    config = model.config
    gather = make_gather(model, mesh, fsdp=over.fsdp)

    def sums(model: Decoder, heads: Array, batch: Batch) -> tuple[Array, Array]:
        def micro(total: tuple, part: Batch) -> tuple[tuple, None]:
            new = query_moments(model, heads, part, settings, gather)
            return jax.tree.map(jnp.add, total, new), None

        if batch.tokens.shape[0] == 1:
            # Nothing to add up: the moments of a large model are gigabytes.
            alone = jax.tree.map(lambda x: x[0], batch)
            total = query_moments(model, heads, alone, settings, gather)
            return jax.lax.psum(total, AXIS) if mesh.size > 1 else total
        layers, hidden = config.num_layers, config.hidden_size
        queries = config.num_heads * config.head_dim
        zeros = (
            jnp.zeros((layers, hidden, hidden), jnp.float32),
            jnp.zeros((layers, hidden, queries), jnp.float32),
        )
        total = jax.lax.scan(micro, zeros, batch)[0]
        return jax.lax.psum(total, AXIS) if mesh.size > 1 else total

    specs = (
        model_specs(model, mesh, fsdp=over.fsdp),
        PartitionSpec(),
        PartitionSpec(None, AXIS),
    )
    moments = jax.jit(
        jax.shard_map(
            sums, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
        )
    )
    total: tuple[np.ndarray, ...] | None = None
    for batch in over.taken("least squares"):
        new = jax.device_get(moments(model, over.heads, batch))
        if total is None:
            total = tuple(x.astype(np.float64) for x in new)
        else:
            for whole, part in zip(total, new, strict=True):
                whole += part
        del new  # gigabytes of a large model, before the next ones are made
    assert total is not None
    return total[0], total[1]


def regression_heads(
    over: Regression, moments: tuple[np.ndarray, np.ndarray] | None = None
) -> Float[Array, "L D KRH"]:
    """Heads for the first step; see the module's text.

    Args:
      over: Model, batches and settings.
      moments: Of `sum_moments`, where they are known; else they are summed first.
    """
    config = over.model.config
    if moments is None:
        moments = sum_moments(over)
    groups = (config.num_kv_heads, config.group_size, config.head_dim)
    guesses = predictors(*moments, progress=over.progress)
    guesses = jnp.asarray(guesses.reshape(*guesses.shape[:2], *groups))

    gradients = make_gradients(over.model, over.settings, over.mesh, fsdp=over.fsdp)
    rate = optax.cosine_decay_schedule(_WEIGHT_RATE, over.batches, 0.05)
    optimizer = optax.adam(rate)

    @jax.jit
    def step(model: Decoder, guesses: Array, weights: Array, moments, batch: Batch):
        heads, back = jax.vjp(lambda w: combine(guesses, w), weights)
        total, _, count = gradients(model, heads, batch)
        gradient = back(total / jnp.maximum(count, 1.0))[0]
        updates, moments = optimizer.update(gradient, moments, weights)
        return optax.apply_updates(weights, updates), moments

    queries = over.heads.shape[-1] // (groups[0] * groups[2])
    if queries == groups[1]:
        return guesses.reshape(*guesses.shape[:2], -1)  # nothing stands for another
    means = np.zeros((groups[1], queries), np.float32)
    for index, one in enumerate(query_sets(groups[1], queries)):
        means[one, index] = 1 / (one.stop - one.start)
    weights = jnp.broadcast_to(means, (len(guesses), groups[0], *means.shape))
    state = optimizer.init(weights)
    for batch in over.taken("weights of heads"):
        weights, state = step(over.model, guesses, weights, state, batch)
    return jax.jit(combine)(guesses, weights)
