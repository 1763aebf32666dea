"""What is done for each query before and after the backward kernel? Plain Triton: memory bounds these passes."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from triton_attention import blocks
from triton_attention.kernel import jit_plain
from triton_attention.packed import boundary, sequence_of

first_tile = jit_plain(blocks.first_tile)
not_below = jit_plain(blocks.not_below)

LOG2_E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))
PANEL = tl.constexpr(32)  # columns of the matrix as which the sums of dQ lie in memory


class Strided(NamedTuple):
    """A (batch, seqlen, heads, dim) tensor: its pointer and strides; the stride along dim is 1.

    Of packed sequences the stride of the batch is that of a row, and a sequence's index there its first row.
    """

    ptr: object
    batch: object
    row: object
    head: object


@triton.jit
def place(num_blocks, call):
    """(block, head, batch) of a program: the blocks of BLOCK_M queries of one head are neighbours."""
    block = tl.program_id(0) % num_blocks
    matrix = tl.program_id(0) // num_blocks
    return block, matrix % call.heads_q, matrix // call.heads_q


@triton.jit
def queries_of(tile, call, WITH_UNUSED: tl.constexpr, BLOCK_M: tl.constexpr):
    """(first row, length, block in it) of the packed sequence of a tile; without the rows that none has, its length
    there is 0."""
    packing = call.packing
    sequence, block = sequence_of(tile, packing.cu_seqlens_q, call.batch, packing.total_q, BLOCK_M)
    begin = boundary(packing.cu_seqlens_q, sequence, packing.total_q)
    end = boundary(packing.cu_seqlens_q, tl.minimum(sequence + 1, call.batch), packing.total_q)
    if WITH_UNUSED:
        end = tl.where(sequence == call.batch, packing.total_q, end)
    return begin, tl.maximum(end - begin, 0), block


@triton.jit
def load_rows(tensor, batch, head, start_m, seqlen, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = start_m + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    origin = tensor.ptr + batch * tensor.batch + head * tensor.head
    pointers = origin + rows.to(tl.int64)[:, None] * tensor.row + dims[None, :]
    return tl.load(pointers, mask=(rows < seqlen)[:, None] & (dims < DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def zero_sums(sums, SIZE: tl.constexpr):
    tl.store(sums + tl.arange(0, SIZE), tl.zeros([SIZE], tl.float32))


@triton.jit
def attention_bwd_rows(
    out, dout, lse, dlse, bias, rows, dq_sums, counter, call, SPEC: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Two numbers a query: lse in units of log 2, and -delta = dlse - rowsum(dout * out). And zeros, where dQ is summed
    and where the programs of the next kernel count blocks.

    With dropout, whose factor c is 1 / (1 - p), dS = P (c D dP - delta) for D = 0 or 1, and dV = (c D P)^T dO. With c P
    for P that is c P (D dP - delta / c) and (D c P)^T dO: so lse - log(c) and -delta / c, and no factor elsewhere.
    A query that sees no key, or does not exist, has lse = +inf: all its probabilities become 0. A bias of one number a
    query is taken from lse, since exp(scores + bias - lse) = exp(scores - (lse - bias)); one that is False hides all
    keys, which lse does not say where there is a sink.
    `rows` is (batch, heads_q, 2, seqlen_q padded), and of packed sequences (1, heads_q, 2, total_q padded): each is
    padded for itself, so that its numbers begin with those of its first tile.
    Grid: one program for each block of BLOCK_M queries of each head of each batch entry.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    if SPEC.VARLEN:
        num_blocks = first_tile(call.packing.total_q, call.batch, BLOCK_M) + 1
        tile, head, _one = place(num_blocks, call)
        batch, seqlen_q, block = queries_of(tile, call, False, BLOCK_M)
    else:
        num_blocks = tl.cdiv(call.seqlen_q, BLOCK_M)
        tile, head, batch = place(num_blocks, call)
        seqlen_q, block = call.seqlen_q, tile
    start_m = block * BLOCK_M
    o = load_rows(out, batch, head, start_m, seqlen_q, SPEC.HEAD_DIM_V, BLOCK_M, SPEC.BLOCK_DV)
    do = load_rows(dout, batch, head, start_m, seqlen_q, SPEC.HEAD_DIM_V, BLOCK_M, SPEC.BLOCK_DV)
    negative_delta = -tl.sum(o * do, 1)
    if SPEC.VARLEN:
        matrix = head.to(tl.int64)
        origin = matrix * call.packing.total_q + batch
    else:
        matrix = (batch * call.heads_q + head).to(tl.int64)
        origin = matrix * seqlen_q
    numbers = start_m + tl.arange(0, BLOCK_M)
    exists = numbers < seqlen_q
    if dlse is not None:
        negative_delta += tl.load(dlse + origin + numbers, mask=exists, other=0.0)
    lse_rows = tl.load(lse + origin + numbers, mask=exists, other=-INFINITY)
    empty = lse_rows == -INFINITY
    if SPEC.DROPOUT:
        negative_delta /= call.extras.kept_factor
        lse_rows -= tl.log(call.extras.kept_factor)
    if bias is not None:
        pointers = bias.ptr + batch * bias.batch + head * bias.head + numbers.to(tl.int64) * bias.row
        values = tl.load(pointers, mask=exists, other=0)
        if bias.ptr.dtype.element_ty == tl.uint8:
            empty |= values == 0
        else:
            lse_rows -= values.to(tl.float32)
    target = rows + matrix * 2 * num_blocks * BLOCK_M + numbers
    if SPEC.VARLEN:
        target += (tile - block) * BLOCK_M  # the numbers of the sequences before
    tl.store(target, tl.where(empty, INFINITY, not_below(lse_rows * LOG2_E)))
    tl.store(target + num_blocks * BLOCK_M, negative_delta)
    if dq_sums is not None:
        sums = dq_sums + tl.program_id(0).to(tl.int64) * (BLOCK_M * (SPEC.BLOCK_D + SPEC.TAIL_D))
        zero_sums(sums, BLOCK_M * SPEC.BLOCK_D)
        if SPEC.TAIL_D > 0:
            zero_sums(sums + BLOCK_M * SPEC.BLOCK_D, BLOCK_M * SPEC.TAIL_D)
    if counter is not None:
        tl.store(counter, 0, mask=tl.program_id(0) == 0)


@triton.jit
def store_sums(
    sums, dq, pointers, exists, used, first, call, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Store the columns [first, first + WIDTH) of dQ, whose sums lie in pieces of some COLUMNS; 0 in rows not used."""
    sums = tl.load(sums + tl.arange(0, BLOCK_M * WIDTH))
    # (piece, 64 rows, 8 columns, warp, row of 8, column of 8 / 2, row + 8, column of 2)
    sums = sums.reshape([WIDTH // COLUMNS, BLOCK_M // 64, COLUMNS // 8, 4, 8, 4, 2, 2])
    sums = sums.permute((1, 3, 6, 4, 0, 2, 5, 7)).reshape([BLOCK_M, WIDTH]) * call.softmax_scale
    sums = tl.where(used[:, None], sums, 0.0)
    dims = first + tl.arange(0, WIDTH)
    inside = exists[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers[:, None] + dims[None, :], sums.to(dq.ptr.dtype.element_ty), mask=inside)


@triton.jit
def attention_bwd_dq(dq_sums, dq, call, SPEC: tl.constexpr, TILE: tl.constexpr):
    """dQ = softmax_scale times its sums, which lie in the order in which the threads of a warpgroup hold them.

    Rows that no packed sequence has become 0. Grid: as `attention_bwd_rows`.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_D: tl.constexpr = SPEC.BLOCK_D
    TAIL_D: tl.constexpr = SPEC.TAIL_D
    if SPEC.VARLEN:
        tile, head, _one = place(first_tile(call.packing.total_q, call.batch, BLOCK_M) + 1, call)
        batch, seqlen_q, block = queries_of(tile, call, True, BLOCK_M)
        num_used = boundary(call.packing.cu_seqlens_q, call.batch, call.packing.total_q) - batch
    else:
        block, head, batch = place(tl.cdiv(call.seqlen_q, BLOCK_M), call)
        seqlen_q = call.seqlen_q
        num_used = seqlen_q
    sums = dq_sums + tl.program_id(0).to(tl.int64) * (BLOCK_M * (BLOCK_D + TAIL_D))
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < seqlen_q
    used = rows < num_used
    pointers = dq.ptr + batch * dq.batch + head * dq.head + rows.to(tl.int64) * dq.row
    store_sums(sums, dq, pointers, exists, used, 0, call, BLOCK_M, BLOCK_D, TILE.DQ_COLUMNS, SPEC.HEAD_DIM)
    if TAIL_D > 0:
        sums += BLOCK_M * BLOCK_D
        store_sums(sums, dq, pointers, exists, used, BLOCK_D, call, BLOCK_M, TAIL_D, TAIL_D, SPEC.HEAD_DIM)
