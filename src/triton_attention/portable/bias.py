"""How does a kernel read a tile of a bias or mask, and write a tile of its gradient?

A bias that does not vary along the queries or the keys is read as a single row or column and broadcast in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from triton_attention.portable.tiles import store_rows


class BiasTensor(NamedTuple):
    """A (batch, heads, seqlen_q, seqlen_k) tensor: its pointer and strides, 0 along an axis that is broadcast.

    The stride along the keys is 1, or the bias does not vary along them.
    """

    ptr: object
    batch: object
    head: object
    row: object


@triton.jit
def bias_pointers(tensor, batch, head, start_m, start_n, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Pointers to a tile: (BLOCK_M, BLOCK_N), or 1 along an axis on which the bias does not vary."""
    origin = batch * tensor.batch + head * tensor.head
    pointers = tensor.ptr + origin + tl.full([1, 1], 0, tl.int32)
    if SPEC.BIAS_ROWS:
        pointers += tl.cast(start_m, tl.int64) * tensor.row
        pointers += tl.arange(0, TILE.BLOCK_M)[:, None] * tensor.row
    if SPEC.BIAS_COLS:
        pointers += start_n + tl.arange(0, TILE.BLOCK_N)[None, :]
    return pointers


@triton.jit
def bias_length(call, ALONG_KEYS: tl.constexpr, SPEC: tl.constexpr):
    """How much of the queries or keys of a batch entry a bias covers; a packed sequence may claim to be longer."""
    seqlen = call.seqlen_k if ALONG_KEYS else call.seqlen_q
    if SPEC.VARLEN:
        seqlen = tl.minimum(seqlen, call.packing.max_seqlen_k if ALONG_KEYS else call.packing.max_seqlen_q)
    return seqlen


@triton.jit
def bias_inside(start_m, start_n, call, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Which elements of such a tile exist."""
    inside = tl.full([1, 1], True, tl.int1)
    if SPEC.BIAS_ROWS:
        inside = inside & (start_m + tl.arange(0, TILE.BLOCK_M) < bias_length(call, False, SPEC))[:, None]
    if SPEC.BIAS_COLS:
        inside = inside & (start_n + tl.arange(0, TILE.BLOCK_N) < bias_length(call, True, SPEC))[None, :]
    return inside


@triton.jit
def load_bias(bias, batch, head, start_m, start_n, call, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The bias of a tile of scores, in its own dtype, 0 where there are no scores; 0 without a bias."""
    if SPEC.BIAS == "none":
        tile = tl.full([1, 1], 0.0, tl.float32)
    elif TILE.TMA_BIAS:
        tile = tl.reshape(bias.load([batch, head, start_m, start_n]), [TILE.BLOCK_M, TILE.BLOCK_N])
    else:
        pointers = bias_pointers(bias, batch, head, start_m, start_n, SPEC, TILE)
        tile = tl.load(pointers, mask=bias_inside(start_m, start_n, call, SPEC, TILE), other=0)
    return tile


@triton.jit
def store_dbias(dbias, tile, batch, head, start_m, start_n, call, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Write a (BLOCK_M, BLOCK_N) tile of the gradient of a bias that varies along queries and keys."""
    pointers = bias_pointers(dbias, batch, head, start_m, start_n, SPEC, TILE)
    tl.store(pointers, tile.to(dbias.ptr.dtype.element_ty), mask=bias_inside(start_m, start_n, call, SPEC, TILE))


@triton.jit
def store_dbias_sums(dbias, sums, head, start, call, ALONG_KEYS: tl.constexpr, SPEC: tl.constexpr):
    """Write a block of the sums of dS over the queries (ALONG_KEYS) or the keys to `dbias` (batch, heads_q, seqlen)."""
    length = bias_length(call, ALONG_KEYS, SPEC)
    row = length
    if SPEC.VARLEN:
        row = call.packing.max_seqlen_k if ALONG_KEYS else call.packing.max_seqlen_q
        length = tl.where(head.batch < call.packing.batch, length, 0)  # rows that no sequence has, have no bias
    origin = tl.cast(head.batch * call.heads_q + head.index, tl.int64) * row
    store_rows(dbias, sums, origin, start, length)
