"""Attention kernels for block-sparse models with a paged key-value cache.

A leaf package: it needs JAX, NumPy and jaxtyping, and nothing of the model code
beside it. ``docs/kernels.md`` says what each operation does and how to read one.

Letters of shapes: B rows (sequences), T query positions, N query heads, K kv heads, H
numbers a head, M blocks, P blocks of a list, C slots, W windows of keys, L layers.

Every operation has one public function (block scoring has two) with the same last
argument, ``implementation``:

* ``"mosaic_gpu"``: Pallas, Hopper and newer;
* ``"triton"``: Pallas, compute capability 8.0 and newer, while JAX keeps it;
* ``"xla"``: tiled XLA, every device, the one that serves CPUs;
* ``None``: a Pallas form where its numerics and speed were recorded for this
  device kind (``tuned/<device>/<op>.json``); on a GPU without a record what serves the
  nearest recorded one, once it has proved its numerics here (``dispatch.py``,
  ``proof.py``); otherwise ``"xla"``. ``device.describe()`` tells which, and why.
"""

from pallas_kernels.block_scores.api import block_scores, select_blocks
from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.choose_blocks.api import choose_blocks
from pallas_kernels.commit_blocks.api import commit_blocks
from pallas_kernels.compress_keys.api import compress_keys
from pallas_kernels.host_gather.api import host_gather
from pallas_kernels.paged_decode_attention.api import paged_decode_attention
from pallas_kernels.plan_slots.api import plan_slots

__all__ = [
    "block_scores",
    "block_sparse_attention",
    "choose_blocks",
    "commit_blocks",
    "compress_keys",
    "host_gather",
    "paged_decode_attention",
    "plan_slots",
    "select_blocks",
]
