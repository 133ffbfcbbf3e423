"""Quest-style with pages of 16 tokens, the size that Quest publishes.

A block has the bound of its best page; the index is four times that of `quest`, whose
page is a block of 64, and that of `sparda_bounds`.
"""

import dataclasses

from sparda_jax.sparse.selectors.quest import Quest


@dataclasses.dataclass(frozen=True)
class Quest16(Quest):
    """`Quest` with pages of 16."""

    page: int | None = 16

    name = "quest_16"
    title = "Quest-style, pages of 16"
    summary = "Quest-style, pages of 16: the same bounds, of pages of 16 tokens"


SELECTOR = Quest16()
