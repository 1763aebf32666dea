"""What is done for each query before and after the backward kernel? Plain Triton: memory bounds these passes."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))
PANEL = tl.constexpr(32)  # columns of the matrix as which the sums of dQ lie in memory


class Strided(NamedTuple):
    """A (batch, seqlen, heads, dim) tensor: its pointer and strides; the stride along dim is 1."""

    ptr: object
    batch: object
    row: object
    head: object


@triton.jit
def place(call, BLOCK_M: tl.constexpr):
    """(block, head, batch) of a program: the blocks of BLOCK_M queries of one head are neighbours."""
    num_blocks = tl.cdiv(call.seqlen_q, BLOCK_M)
    block = tl.program_id(0) % num_blocks
    matrix = tl.program_id(0) // num_blocks
    return block, matrix % call.heads_q, matrix // call.heads_q


@triton.jit
def load_rows(tensor, batch, head, start_m, call, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = start_m + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    origin = tensor.ptr + batch * tensor.batch + head * tensor.head
    pointers = origin + rows.to(tl.int64)[:, None] * tensor.row + dims[None, :]
    return tl.load(pointers, mask=(rows < call.seqlen_q)[:, None] & (dims < DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def attention_bwd_rows(out, dout, lse, dlse, bias, rows, dq_sums, call, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Two numbers a query: lse in units of log 2, and -delta = dlse - rowsum(dout * out). And zeros where dQ is summed.

    A query that sees no key, or does not exist, has lse = +inf: all its probabilities become 0. A bias of one number a
    query is taken from lse, since exp(scores + bias - lse) = exp(scores - (lse - bias)).
    Grid: one program for each block of BLOCK_M queries of each head of each batch entry.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    block, head, batch = place(call, BLOCK_M)
    start_m = block * BLOCK_M
    o = load_rows(out, batch, head, start_m, call, SPEC.HEAD_DIM_V, BLOCK_M, SPEC.BLOCK_DV)
    do = load_rows(dout, batch, head, start_m, call, SPEC.HEAD_DIM_V, BLOCK_M, SPEC.BLOCK_DV)
    negative_delta = -tl.sum(o * do, 1)
    matrix = (batch * call.heads_q + head).to(tl.int64)
    numbers = start_m + tl.arange(0, BLOCK_M)
    exists = numbers < call.seqlen_q
    if dlse is not None:
        negative_delta += tl.load(dlse + matrix * call.seqlen_q + numbers, mask=exists, other=0.0)
    lse_rows = tl.load(lse + matrix * call.seqlen_q + numbers, mask=exists, other=-INFINITY)
    empty = lse_rows == -INFINITY
    if bias is not None:
        pointers = bias.ptr + batch * bias.batch + head * bias.head + numbers.to(tl.int64) * bias.row
        lse_rows -= tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
    num_blocks = tl.cdiv(call.seqlen_q, BLOCK_M)
    target = rows + matrix * 2 * num_blocks * BLOCK_M + numbers
    tl.store(target, tl.where(empty, INFINITY, lse_rows * LOG2_E))
    tl.store(target + num_blocks * BLOCK_M, negative_delta)
    if dq_sums is not None:
        SUMS: tl.constexpr = BLOCK_M * SPEC.BLOCK_D
        tl.store(dq_sums + tl.program_id(0).to(tl.int64) * SUMS + tl.arange(0, SUMS), tl.zeros([SUMS], tl.float32))


@triton.jit
def attention_bwd_dq(dq_sums, dq, call, SPEC: tl.constexpr, TILE: tl.constexpr):
    """dQ = softmax_scale times its sums, which lie in the order in which the threads of a warpgroup hold them.

    Grid: as `attention_bwd_rows`.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_D: tl.constexpr = SPEC.BLOCK_D
    COLUMNS: tl.constexpr = TILE.DQ_COLUMNS
    block, head, batch = place(call, BLOCK_M)
    sums = tl.load(dq_sums + tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_D) + tl.arange(0, BLOCK_M * BLOCK_D))
    # (piece, 64 rows, 8 columns, warp, row of 8, column of 8 / 2, row + 8, column of 2)
    sums = sums.reshape([BLOCK_D // COLUMNS, BLOCK_M // 64, COLUMNS // 8, 4, 8, 4, 2, 2])
    sums = sums.permute((1, 3, 6, 4, 0, 2, 5, 7)).reshape([BLOCK_M, BLOCK_D]) * call.softmax_scale
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    pointers = dq.ptr + batch * dq.batch + head * dq.head + rows.to(tl.int64)[:, None] * dq.row + dims[None, :]
    inside = (rows < call.seqlen_q)[:, None] & (dims < SPEC.HEAD_DIM)[None, :]
    tl.store(pointers, sums.to(dq.ptr.dtype.element_ty), mask=inside)
