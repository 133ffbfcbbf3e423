"""Full causal attention."""

import dataclasses

from sparda_jax.sparse.selector import Selector


@dataclasses.dataclass(frozen=True)
class Dense(Selector):
    """Attends to everything and keeps no index."""

    name = "dense"
    summary = "full causal attention"
    dense = True


SELECTOR = Dense()
