"""Which packed sequence does a tile belong to?

In plain Triton. Gluon, where a range of numbers has a layout, has its own form in hopper/schedule.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_attention import blocks
from triton_attention.kernel import jit_plain

first_tile = jit_plain(blocks.first_tile)

SEARCHED_AT_ONCE = tl.constexpr(256)  # sequences


@triton.jit
def boundary(cu_seqlens, index, total):
    """Where a sequence begins; inside the tensors, whatever `cu_seqlens` says."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + index), 0), total)


@triton.jit
def sequence_of(tile, cu_seqlens, batch, total, BLOCK: tl.constexpr):
    """(sequence, block in it) of a tile: how many have begun there? Number `batch` is what no sequence has."""
    begun = 0
    for first in range(0, batch + 1, SEARCHED_AT_ONCE):
        index = first + tl.arange(0, SEARCHED_AT_ONCE)
        exists = index <= batch
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + index, mask=exists, other=0), 0), total)
        begun += tl.sum((exists & (first_tile(start, index, BLOCK) <= tile)).to(tl.int32), 0)
    sequence = tl.maximum(begun - 1, 0)
    return sequence, tl.maximum(tile - first_tile(boundary(cu_seqlens, sequence, total), sequence, BLOCK), 0)
