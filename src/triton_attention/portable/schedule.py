"""Which block does a program own, and of which batch entry is it?

A batch entry is an index into padded tensors, or a sequence of packed ones. Which sequence a block belongs to is found
on the device, from the lengths that are there: there are as many programs as blocks of tokens, and one more a sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from triton_attention import blocks
from triton_attention.kernel import jit_plain
from triton_attention.packed import boundary, sequence_of
from triton_attention.portable.tiles import Call, tile_order

first_tile = jit_plain(blocks.first_tile)


class Packing(NamedTuple):
    """The numbers of a batch of `batch` sequences, packed into tensors of `total` rows.

    `bottom_right` is 1 if the diagonal ends at the bottom right of each sequence, 0 if it begins at the top left.
    """

    batch: object
    total_q: object
    total_k: object
    max_seqlen_q: object
    max_seqlen_k: object
    bottom_right: object


class Entry(NamedTuple):
    """A batch entry: its index, what the batch strides of tensors along the queries and the keys are multiplied by, and
    its lengths. The second is the index too, or the first row of a packed sequence: then the stride is that of a row.
    """

    batch: object
    rows_q: object
    rows_k: object
    seqlen_q: object
    seqlen_k: object


@triton.jit
def call_of(entry, call):
    """The numbers of a packed sequence, whose band is counted from 0."""
    seqlen_q, seqlen_k = entry.seqlen_q, entry.seqlen_k
    diagonal = (seqlen_k - seqlen_q) * call.packing.bottom_right
    lower, upper = diagonal + call.lower, diagonal + call.upper
    return Call(
        seqlen_q, seqlen_k, call.heads_q, call.group, lower, upper, call.softmax_scale, call.scale_log2, call.packing
    )


@triton.jit
def sequence(extras, batch, call):
    """The entry of a packed sequence; number `call.packing.batch` is empty."""
    packing = call.packing
    after = tl.minimum(batch + 1, packing.batch)
    rows_q = boundary(extras.cu_seqlens_q, batch, packing.total_q)
    rows_k = boundary(extras.cu_seqlens_k, batch, packing.total_k)
    seqlen_q = tl.maximum(boundary(extras.cu_seqlens_q, after, packing.total_q) - rows_q, 0)
    seqlen_k = tl.maximum(boundary(extras.cu_seqlens_k, after, packing.total_k) - rows_k, 0)
    return Entry(batch, rows_q, rows_k, seqlen_q, seqlen_k)


@triton.jit
def own_block(
    extras, call, heads, ALONG_KEYS: tl.constexpr, REVERSED: tl.constexpr, SPEC: tl.constexpr, BLOCK: tl.constexpr
):
    """(start, head, entry): the block of queries or keys that a program owns.

    Where a packed sequence ends before the block, and in rows that no sequence has, nothing is visible: the program
    visits nothing, and writes zeros where there are rows. A program of packed sequences then asks `call_of`.
    """
    if SPEC.VARLEN:
        packing = call.packing
        total = packing.total_k if ALONG_KEYS else packing.total_q
        cu_seqlens = extras.cu_seqlens_k if ALONG_KEYS else extras.cu_seqlens_q
        num_blocks = first_tile(total, packing.batch, BLOCK) + 1
        tile, head, _one = tile_order(tl.program_id(0), num_blocks, heads, REVERSED)
        batch, block = sequence_of(tile, cu_seqlens, packing.batch, total, BLOCK)
        start = block * BLOCK
        entry = sequence(extras, batch, call)
        if ALONG_KEYS:
            seqlen_k = tl.where(batch == packing.batch, total - entry.rows_k, entry.seqlen_k)
            seqlen_q = tl.where(start < seqlen_k, entry.seqlen_q, 0)
        else:
            seqlen_q = tl.where(batch == packing.batch, total - entry.rows_q, entry.seqlen_q)
            seqlen_k = tl.where(start < seqlen_q, entry.seqlen_k, 0)
        entry = Entry(batch, entry.rows_q, entry.rows_k, seqlen_q, seqlen_k)
    else:
        num_blocks = tl.cdiv(call.seqlen_k if ALONG_KEYS else call.seqlen_q, BLOCK)
        block, head, batch = tile_order(tl.program_id(0), num_blocks, heads, REVERSED)
        start = block * BLOCK
        entry = Entry(batch, batch, batch, call.seqlen_q, call.seqlen_k)
    return start, head, entry
