"""One row of a cache in its place: as a cache of one row, without a copy.

Arrays have the axes [layers, rows, …]. Seen as [layers · rows, 1, …] they are a stack
of caches of one row each, in which row r of layer l is number l · rows + r. So what
works on a layer of a stack works on one row, in place, and touches no other.
"""

import jax
from jaxtyping import Array, Int


def as_one_row[Tree](
    tree: Tree, layer: int | Int[Array, ""], row: Int[Array, ""]
) -> tuple[Tree, int | Int[Array, ""]]:
    """Arrays [layers, B, …] as [layers · B, 1, …], and where the row of a layer is."""
    rows = jax.tree.leaves(tree)[0].shape[1]
    flat = jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), tree)
    return flat, layer * rows + row


def as_all_rows[Tree](tree: Tree, rows: int) -> Tree:
    """`as_one_row` undone."""
    return jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[2:]), tree)


def layer_at[Layer](
    layers: tuple[Layer, ...], index: int | Int[Array, ""], row: Int[Array, ""] | None
) -> tuple[Layer, int | Int[Array, ""]]:
    """The stack that holds a layer, and where in it; as one row if one is named.

    Args:
      layers: One stack of all layers, or a stack of one for each.
      index: The layer.
      row: The row; None for all rows.
    """
    if len(layers) == 1:
        layer, place = layers[0], index
    else:
        layer, place = layers[index], 0  # pyrefly: ignore[bad-index]
    return (layer, place) if row is None else as_one_row(layer, place, row)


def with_layer[Layer](
    layers: tuple[Layer, ...], index: int | Int[Array, ""], layer: Layer
) -> tuple[Layer, ...]:
    """The stacks, of which `layer` holds layer `index`."""
    if len(layers) == 1:
        return (layer,)
    assert isinstance(index, int)
    return (*layers[:index], layer, *layers[index + 1 :])
