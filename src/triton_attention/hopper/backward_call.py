"""What are the numbers of a backward call, and which block of keys or queries has which number?"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention.hopper.heads import Extras
from triton_attention.hopper.layouts import WARPGROUP_ROWS
from triton_attention.hopper.schedule import first_tile, limits_of, load_sequence, place_in_section, sequence_of


class BackwardCall(NamedTuple):
    """The numbers of one call. The mask's band: key j is visible to query i iff lower <= j - i <= upper."""

    seqlen_q: object
    seqlen_k: object
    heads_q: object
    group: object  # query heads per key head
    batch: object
    section: object  # matrices (a key head of a batch entry) whose blocks are interleaved: see `place`
    last_section: object  # and of the last section, at least
    lower: object
    upper: object
    softmax_scale: object
    scale: object  # of q k^T: softmax_scale * log2(e), or if SPEC.SOFTCAP softmax_scale / softcap
    padded_q: object  # queries that have numbers, see `attention_bwd_rows`: of a matrix, or of all packed sequences
    extras: object = None  # what few calls have, a heads.Extras
    packing: object = None  # of packed sequences, a schedule.Packing
    own: object = None  # and of one of their blocks an `OwnBlock`; see `call_of_block`


class OwnBlock(NamedTuple):
    """A block of queries or keys of a packed sequence."""

    start: object
    head: object
    batch: object  # the number of the sequence
    sequence: object  # a schedule.Sequence
    numbers: object  # where those of its queries begin, see `attention_bwd_rows`


@gluon.jit
def place(number, call, ALONG_KEYS: gl.constexpr, BLOCK: gl.constexpr, SPEC: gl.constexpr):
    """(block, head, batch) of a number, of the blocks of keys or of queries; packed sequences are one batch entry.

    They are ordered by sections of matrices, of which what passes fits in L2 together; within a section by block, under
    a causal mask the longest first; and then by matrix. The last section is so large that it ends in short blocks for
    all programs.
    """
    if ALONG_KEYS:
        heads, section, last_section = call.heads_q // call.group, call.section, call.last_section
    else:
        heads, section, last_section = call.heads_q, call.section * call.group, call.last_section * call.group
    if SPEC.VARLEN:
        matrices = heads
        num_blocks = first_tile(call.packing.total_k if ALONG_KEYS else call.packing.total_q, call.batch, BLOCK) + 1
    else:
        matrices = heads * call.batch
        num_blocks = gl.cdiv(call.seqlen_k if ALONG_KEYS else call.seqlen_q, BLOCK)
    block, matrix = place_in_section(number, num_blocks, matrices, section, last_section)
    if SPEC.HAS_UPPER and not ALONG_KEYS:
        block = num_blocks - 1 - block
    if SPEC.VARLEN:
        head, batch = matrix, 0
    else:
        batch = matrix // heads
        head = matrix - batch * heads
    return block, head, batch


@gluon.jit
def block_of_number(number, call, ALONG_KEYS: gl.constexpr, BLOCK: gl.constexpr, SPEC: gl.constexpr):
    """(first row, head, batch, sequence) of a number; of packed sequences that whose call it is."""
    sequence = 0
    if SPEC.VARLEN:
        start, head, batch, sequence = call.own.start, call.own.head, call.own.batch, call.own.sequence
    else:
        block, head, batch = place(number, call, ALONG_KEYS, BLOCK, SPEC)
        start = block * BLOCK
    return start, head, batch, sequence


@gluon.jit
def call_of_block(number, call, ALONG_KEYS: gl.constexpr, BLOCK: gl.constexpr, SPEC: gl.constexpr):
    """The call of packed sequences for the one that a block belongs to: its lengths, band and diagonal.

    There are as many numbers as there can be blocks. Where a sequence ends before the block, and in the rows that none
    has, nothing is visible: zeros are written where there are rows.
    """
    packing = call.packing
    if ALONG_KEYS:
        cu_seqlens, total = packing.cu_seqlens_k, packing.total_k
    else:
        cu_seqlens, total = packing.cu_seqlens_q, packing.total_q
    tile, head, _ = place(number, call, ALONG_KEYS, BLOCK, SPEC)
    batch, block = sequence_of(tile, cu_seqlens, total, call, BLOCK)
    start = block * BLOCK
    sequence = load_sequence(batch, call, ALONG_KEYS)
    numbers = first_tile(sequence.end_q - sequence.seqlen_q, batch, WARPGROUP_ROWS) * WARPGROUP_ROWS
    limits = limits_of(sequence, call, SPEC)
    if ALONG_KEYS:
        seqlen_q, seqlen_k = gl.where(start < limits.seqlen_k, limits.seqlen_q, 0), limits.seqlen_k
    else:
        seqlen_q, seqlen_k = limits.seqlen_q, gl.where(start < limits.seqlen_q, limits.seqlen_k, 0)
    softcap, slopes, diagonal, seed, drop_below = 0.0, 0, 0, 0, 0
    if SPEC.SOFTCAP:
        softcap = call.extras.softcap
    if SPEC.ALIBI:
        slopes = call.extras.slopes
        diagonal = (limits.seqlen_k - limits.seqlen_q) * packing.bottom_right
    if SPEC.DROPOUT:
        seed, drop_below = call.extras.seed, call.extras.drop_below
    return BackwardCall(
        seqlen_q, seqlen_k, call.heads_q, call.group, call.batch, call.section, call.last_section, limits.lower,
        limits.upper, call.softmax_scale, call.scale, call.padded_q,
        Extras(softcap, slopes, diagonal, 0, seed, drop_below, 0), packing,
        OwnBlock(start, head, batch, sequence, numbers),
    )  # fmt: skip
