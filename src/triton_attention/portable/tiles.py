"""Which blocks does a program visit, and how does it read and write tiles of tensors in global memory?

Offsets that depend on the batch, the head (whose strides are 64-bit) and the block are 64-bit scalars. Within a tile
they have the width of the stride along the sequence, which the host makes 64-bit only where a tile could pass 2^31
elements.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from triton_attention import blocks
from triton_attention.kernel import jit_plain

visible_range = jit_plain(blocks.visible_range)
tile_order = jit_plain(blocks.tile_order)


class Strided(NamedTuple):
    """A (batch, seqlen, heads, dim) tensor: its pointer and element strides; the stride along dim is 1."""

    ptr: object
    batch: object
    head: object
    seq: object


class Call(NamedTuple):
    """The numbers of one call. The mask's band: key j is visible to query i iff lower <= j - i <= upper.

    Where sequences are packed, the lengths are the largest and the band is counted from the diagonal, until a program
    knows its sequence (see schedule.py).
    """

    seqlen_q: object
    seqlen_k: object
    heads_q: object
    group: object  # query heads per key head
    lower: object
    upper: object
    softmax_scale: object
    scale_log2: object  # softmax_scale * log2(e): scores in units of log 2
    packing: object = None  # of packed sequences, a schedule.Packing


@triton.jit
def key_range(start_m, call, SPEC: tl.constexpr, TILE: tl.constexpr):
    """(begin, full_begin, full_end, end): the keys that a block of queries visits, see `blocks.visible_range`."""
    return visible_range(
        start_m, call.seqlen_q, call.seqlen_k, call.lower, call.upper, SPEC.HAS_LOWER, SPEC.HAS_UPPER,
        TILE.BLOCK_M, TILE.BLOCK_N,
    )  # fmt: skip


@triton.jit
def query_range(start_n, call, SPEC: tl.constexpr, TILE: tl.constexpr):
    """(begin, full_begin, full_end, end): the queries that visit a block of keys."""
    return visible_range(
        start_n, call.seqlen_k, call.seqlen_q, -call.upper, -call.lower, SPEC.HAS_UPPER, SPEC.HAS_LOWER,
        TILE.BLOCK_N, TILE.BLOCK_M,
    )  # fmt: skip


@triton.jit
def tile_pointers(tensor, batch, head, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    origin = batch * tensor.batch + head * tensor.head + tl.cast(start, tl.int64) * tensor.seq
    rows = tl.arange(0, BLOCK)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    return tensor.ptr + origin + (rows * tensor.seq + dims)  # (BLOCK, BLOCK_D)


@triton.jit
def tile_inside(start, seqlen, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of a tile exist."""
    inside = (start + tl.arange(0, BLOCK) < seqlen)[:, None]
    if DIM < BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D) < DIM)[None, :]
    return inside


@triton.jit
def load_tile(
    tensor, batch, head, start, seqlen, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, FULL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Rows [start, start + BLOCK) of one head, (BLOCK, BLOCK_D), zero beyond the sequence and beyond DIM.

    `tensor` is a `Strided`, or with TMA a tensor descriptor over (batch, heads, seqlen, dim), whose loads fill with
    zeros by themselves; but where sequences are packed, the next one follows, and it may hold NaN. FULL promises that
    all the rows exist, or with TMA that what lies beyond does not matter: each row of a program's own block makes a row
    of its results, and no other. `batch` is a batch entry, or with VARLEN the first row of a sequence.
    """
    if TMA and VARLEN:
        tile = tl.reshape(tensor.load([0, head, batch + start, 0]), [BLOCK, BLOCK_D])
        if not FULL:
            tile = tl.where((start + tl.arange(0, BLOCK) < seqlen)[:, None], tile, 0.0)
    elif TMA:
        tile = tl.reshape(tensor.load([batch, head, start, 0]), [BLOCK, BLOCK_D])
    else:
        pointers = tile_pointers(tensor, batch, head, start, BLOCK, BLOCK_D)
        if not FULL:
            tile = tl.load(pointers, mask=tile_inside(start, seqlen, BLOCK, DIM, BLOCK_D), other=0.0)
        elif DIM < BLOCK_D:
            tile = tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < DIM)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(tensor, tile, batch, head, start, seqlen, DIM: tl.constexpr):
    """Write a (BLOCK, BLOCK_D) tile to rows [start, start + BLOCK) of one head, where they exist."""
    BLOCK: tl.constexpr = tile.shape[0]
    BLOCK_D: tl.constexpr = tile.shape[1]
    pointers = tile_pointers(tensor, batch, head, start, BLOCK, BLOCK_D)
    inside = tile_inside(start, seqlen, BLOCK, DIM, BLOCK_D)
    tl.store(pointers, tile.to(tensor.ptr.dtype.element_ty), mask=inside)


@triton.jit
def rows_origin(head, call, SPEC: tl.constexpr):
    """Where the numbers of a head's queries begin in a contiguous (batch, heads_q, seqlen_q) or (heads_q, total_q)."""
    if SPEC.VARLEN:
        origin = tl.cast(head.index, tl.int64) * call.packing.total_q + head.rows_q
    else:
        origin = tl.cast(head.batch * call.heads_q + head.index, tl.int64) * call.seqlen_q
    return origin


@triton.jit
def load_rows(pointer, origin, start, seqlen, other, BLOCK: tl.constexpr):
    """One number a row."""
    pointers = pointer + (origin + start) + tl.arange(0, BLOCK)
    return tl.load(pointers, mask=start + tl.arange(0, BLOCK) < seqlen, other=other)


@triton.jit
def store_rows(pointer, values, origin, start, seqlen):
    BLOCK: tl.constexpr = values.shape[0]
    pointers = pointer + (origin + start) + tl.arange(0, BLOCK)
    tl.store(pointers, values, mask=start + tl.arange(0, BLOCK) < seqlen)
