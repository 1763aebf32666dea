"""The backward kernels: the gradients of q, k, v and the bias, each element owned by one program.

With P the probabilities and dP = dO V^T, the gradient of the scores is dS = P (dP - delta), where
delta = rowsum(dO O) - dLSE, and that of the products A = softmax_scale Q K^T is dA, which is dS without a softcap.
Then dQ = softmax_scale dA K, dK = softmax_scale dA^T Q, dV = P^T dO, and the gradient of the bias is dS, summed over
the axes along which it is broadcast. Dropout leaves some of dP, and of P in dV. Nothing is summed across programs:
there are no atomics, and the order of every addition is fixed.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from triton_attention.portable.bias import load_bias, store_dbias, store_dbias_sums
from triton_attention.portable.dropout import kept_tile
from triton_attention.portable.heads import query_head
from triton_attention.portable.schedule import Entry, call_of, first_tile, own_block, sequence
from triton_attention.portable.softmax import INFINITY, LOG2_E, not_below, score_tile
from triton_attention.portable.tiles import (
    key_range,
    load_rows,
    load_tile,
    query_range,
    rows_origin,
    store_tile,
    tile_order,
)

ROW_PADDING = tl.constexpr(128)  # a multiple of every BLOCK_M


class Saved(NamedTuple):
    """What every backward kernel reads: the inputs, the gradient of the output, and two numbers a query."""

    q: object
    k: object
    v: object
    bias: object
    extras: object
    dout: object
    lse: object  # (batch, heads_q, seqlen_q padded), in units of log 2; see `padded_rows`
    delta: object


class Queries(NamedTuple):
    """A block of queries: tiles (BLOCK_M, BLOCK_D) and rows (BLOCK_M,); lse is in units of log 2."""

    q: object
    dout: object
    lse: object
    delta: object
    start: object


class Keys(NamedTuple):
    """A block of keys: tiles (BLOCK_N, BLOCK_D)."""

    k: object
    v: object
    start: object


@triton.jit
def padded_rows(head, start, call, SPEC: tl.constexpr, BLOCK_M: tl.constexpr):
    """Offsets into a (batch, heads_q, seqlen_q) tensor whose rows are padded, so that no block needs a mask.

    Packed sequences are padded one by one: each begins at the number of its first tile, see `sequence_of`.
    """
    if SPEC.VARLEN:
        packing = call.packing
        padded = (first_tile(packing.total_q, packing.batch, ROW_PADDING) + 1) * ROW_PADDING
        begin = (head.rows_q // ROW_PADDING + head.batch) * ROW_PADDING
        origin = tl.cast(head.index, tl.int64) * padded + begin + start
    else:
        padded = tl.cdiv(call.seqlen_q, ROW_PADDING) * ROW_PADDING
        origin = tl.cast(head.batch * call.heads_q + head.index, tl.int64) * padded + start
    return origin + tl.arange(0, BLOCK_M)


@triton.jit
def load_queries(saved, head, start, call, SPEC: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr):
    seqlen = call.seqlen_q
    rows, index = head.rows_q, head.index
    q = load_tile(
        saved.q, rows, index, start, seqlen, TILE.BLOCK_M, SPEC.HEAD_DIM, SPEC.BLOCK_D, TILE.TMA, FULL, SPEC.VARLEN
    )
    dout = load_tile(
        saved.dout, rows, index, start, seqlen, TILE.BLOCK_M, SPEC.HEAD_DIM_V, SPEC.BLOCK_DV, TILE.TMA, FULL,
        SPEC.VARLEN,
    )  # fmt: skip
    padded = padded_rows(head, start, call, SPEC, TILE.BLOCK_M)
    return Queries(q, dout, tl.load(saved.lse + padded), tl.load(saved.delta + padded), start)


@triton.jit
def load_keys(saved, rows, head_kv, start, call, SPEC: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr):
    seqlen = call.seqlen_k
    k = load_tile(
        saved.k, rows, head_kv, start, seqlen, TILE.BLOCK_N, SPEC.HEAD_DIM, SPEC.BLOCK_D, TILE.TMA, FULL, SPEC.VARLEN
    )
    v = load_tile(
        saved.v, rows, head_kv, start, seqlen, TILE.BLOCK_N, SPEC.HEAD_DIM_V, SPEC.BLOCK_DV, TILE.TMA, FULL,
        SPEC.VARLEN,
    )  # fmt: skip
    return Keys(k, v, start)


@triton.jit
def score_gradient(
    queries, keys, bias, head, extras, call, SPEC: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(P, dS, dA) of a tile, float32 (BLOCK_M, BLOCK_N), or their transposes. Dropped probabilities are 0 in P."""
    scores, slope = score_tile(
        queries.q, keys.k, bias, head, queries.start, keys.start, call, SPEC, TILE, MASKED, TRANSPOSED
    )
    if SPEC.RAW_SCORES:
        scores *= call.scale_log2
    if TRANSPOSED:
        lse, delta = queries.lse[None, :], queries.delta[None, :]
        dweights = tl.dot(keys.v, tl.trans(queries.dout), input_precision=SPEC.PRECISION)
    else:
        lse, delta = queries.lse[:, None], queries.delta[:, None]
        dweights = tl.dot(queries.dout, tl.trans(keys.v), input_precision=SPEC.PRECISION)
    weights = tl.exp2(scores - lse)
    if SPEC.DROPOUT:
        kept = kept_tile(head, queries.start, keys.start, call, SPEC, TILE, TRANSPOSED)
        dscores = weights * (tl.where(kept, dweights * extras.kept_factor, 0.0) - delta)
        weights = tl.where(kept, weights, 0.0)
    else:
        dscores = weights * (dweights - delta)
    dproducts = dscores
    if SPEC.SOFTCAP:
        dproducts *= slope
    return weights, dscores, dproducts


@triton.jit
def attention_bwd_rows(out, dout, lse, dlse, extras, lse_log2, delta, call, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The two numbers a query that the other kernels read: delta = rowsum(dout * out) - dlse, and lse / log(2).

    A query without visible keys, or in the padding, gets lse = +inf: all its probabilities become 0.
    Grid: one program for each block of BLOCK_M padded queries of each head of each batch entry.
    """
    if SPEC.VARLEN:
        start, index, entry = own_block(extras, call, call.heads_q, False, False, SPEC, TILE.BLOCK_M)
        call = call_of(entry, call)
    else:
        num_blocks = tl.cdiv(call.seqlen_q, ROW_PADDING) * (ROW_PADDING // TILE.BLOCK_M)
        block, index, batch = tile_order(tl.program_id(0), num_blocks, call.heads_q, False)
        start = block * TILE.BLOCK_M
        entry = Entry(batch, batch, batch, call.seqlen_q, call.seqlen_k)
    seqlen = call.seqlen_q
    head = query_head(extras, entry, index, call, SPEC)
    rows = head.rows_q
    o = load_tile(
        out, rows, index, start, seqlen, TILE.BLOCK_M, SPEC.HEAD_DIM_V, SPEC.BLOCK_DV, False, False, SPEC.VARLEN
    )
    do = load_tile(
        dout, rows, index, start, seqlen, TILE.BLOCK_M, SPEC.HEAD_DIM_V, SPEC.BLOCK_DV, False, False, SPEC.VARLEN
    )
    delta_rows = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    origin = rows_origin(head, call, SPEC)
    if dlse is not None:
        delta_rows -= load_rows(dlse, origin, start, seqlen, 0.0, TILE.BLOCK_M)
    lse_rows = load_rows(lse, origin, start, seqlen, -INFINITY, TILE.BLOCK_M) * LOG2_E
    padded = padded_rows(head, start, call, SPEC, TILE.BLOCK_M)
    tl.store(delta + padded, delta_rows)
    tl.store(lse_log2 + padded, tl.where(lse_rows == -INFINITY, INFINITY, not_below(lse_rows)))


class KeyGradients(NamedTuple):
    """What a program accumulates for its block of keys, float32."""

    dk: object  # (BLOCK_N, BLOCK_D), to be multiplied by softmax_scale
    dv: object  # (BLOCK_N, BLOCK_DV)
    dbias: object  # (BLOCK_N,): dS summed over the queries of one head


@triton.jit
def visit_queries(
    grads, keys, saved, head, begin, end, call, SPEC: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr
):
    """Add what the queries [begin, end) of one head contribute to a block of keys."""
    for start_m in range(begin, end, TILE.BLOCK_M):
        queries = load_queries(saved, head, start_m, call, SPEC, TILE, not MASKED)
        bias = load_bias(saved.bias, head.batch, head.index, start_m, keys.start, call, SPEC, TILE)
        weights, dscores, dproducts = score_gradient(
            queries, keys, bias, head, saved.extras, call, SPEC, TILE, MASKED, TRANSPOSED=True
        )
        dv = tl.dot(weights.to(queries.dout.dtype), queries.dout, grads.dv, input_precision=SPEC.PRECISION)
        dk = tl.dot(dproducts.to(queries.q.dtype), queries.q, grads.dk, input_precision=SPEC.PRECISION)
        dbias = grads.dbias
        if SPEC.DBIAS == "cols":
            dbias += tl.sum(dscores, 1)
        grads = KeyGradients(dk, dv, dbias)
    return grads


@triton.jit
def attention_bwd_dkdv(
    q, k, v, bias, extras, dout, lse, delta, dk, dv, dbias, call, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """dK = softmax_scale dA^T Q and dV = P^T dO, summed over the query heads that share a key head.

    Grid: one program for each block of BLOCK_N keys of each key head of each batch entry. It owns these rows of `dk`
    and `dv`, and with SPEC.DBIAS == "cols" the sums of dS over the queries, `dbias` (batch, heads_q, seqlen_k).
    """
    saved = Saved(q, k, v, bias, extras, dout, lse, delta)
    heads_kv = call.heads_q // call.group
    start_n, head_kv, entry = own_block(extras, call, heads_kv, True, False, SPEC, TILE.BLOCK_N)
    if SPEC.VARLEN:
        call = call_of(entry, call)
    begin, full_begin, full_end, end = query_range(start_n, call, SPEC, TILE)
    keys = load_keys(saved, entry.rows_k, head_kv, start_n, call, SPEC, TILE, TILE.TMA)
    dk_tile = tl.full([TILE.BLOCK_N, SPEC.BLOCK_D], 0.0, tl.float32)
    dv_tile = tl.full([TILE.BLOCK_N, SPEC.BLOCK_DV], 0.0, tl.float32)
    for index in range(head_kv * call.group, (head_kv + 1) * call.group):
        head = query_head(extras, entry, index, call, SPEC)
        grads = KeyGradients(dk_tile, dv_tile, tl.full([TILE.BLOCK_N], 0.0, tl.float32))
        if SPEC.HAS_UPPER:
            grads = visit_queries(grads, keys, saved, head, begin, full_begin, call, SPEC, TILE, True)
        grads = visit_queries(grads, keys, saved, head, full_begin, full_end, call, SPEC, TILE, False)
        grads = visit_queries(grads, keys, saved, head, full_end, end, call, SPEC, TILE, True)
        if SPEC.DBIAS == "cols":
            store_dbias_sums(dbias, grads.dbias, head, start_n, call, True, SPEC)
        dk_tile, dv_tile = grads.dk, grads.dv
    store_tile(dk, dk_tile * call.softmax_scale, entry.rows_k, head_kv, start_n, call.seqlen_k, SPEC.HEAD_DIM)
    if SPEC.DROPOUT:
        dv_tile *= extras.kept_factor
    store_tile(dv, dv_tile, entry.rows_k, head_kv, start_n, call.seqlen_k, SPEC.HEAD_DIM_V)


class QueryGradients(NamedTuple):
    """What a program accumulates for its block of queries, float32."""

    dq: object  # (BLOCK_M, BLOCK_D), to be multiplied by softmax_scale
    dbias: object  # (BLOCK_M,): dS summed over the keys


@triton.jit
def visit_keys(
    grads, queries, saved, dbias, head, begin, end, call, SPEC: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr
):
    """Add what the keys [begin, end) contribute to a block of queries."""
    for start_n in range(begin, end, TILE.BLOCK_N):
        keys = load_keys(saved, head.rows_k, head.index // call.group, start_n, call, SPEC, TILE, not MASKED)
        bias = load_bias(saved.bias, head.batch, head.index, queries.start, start_n, call, SPEC, TILE)
        _weights, dscores, dproducts = score_gradient(
            queries, keys, bias, head, saved.extras, call, SPEC, TILE, MASKED, TRANSPOSED=False
        )
        dq = tl.dot(dproducts.to(keys.k.dtype), keys.k, grads.dq, input_precision=SPEC.PRECISION)
        row_sums = grads.dbias
        if SPEC.DBIAS == "rows":
            row_sums += tl.sum(dscores, 1)
        if SPEC.DBIAS == "tile":
            store_dbias(dbias, dscores, head.batch, head.index, queries.start, start_n, call, SPEC, TILE)
        grads = QueryGradients(dq, row_sums)
    return grads


@triton.jit
def attention_bwd_dq(q, k, v, bias, extras, dout, lse, delta, dq, dbias, call, SPEC: tl.constexpr, TILE: tl.constexpr):
    """dQ = softmax_scale dA K.

    Grid: one program for each block of BLOCK_M queries of each head of each batch entry. It owns these rows of `dq`.
    With SPEC.DBIAS == "tile" it owns the same rows of `dbias`, the gradient of a bias that no axis broadcasts, and
    writes where a key is visible; with "rows" the sums of dS over the keys, `dbias` (batch, heads_q, seqlen_q).
    """
    saved = Saved(q, k, v, bias, extras, dout, lse, delta)
    start_m, index, entry = own_block(extras, call, call.heads_q, False, SPEC.HAS_UPPER, SPEC, TILE.BLOCK_M)
    if SPEC.VARLEN:
        call = call_of(entry, call)
    begin, full_begin, full_end, end = key_range(start_m, call, SPEC, TILE)
    head = query_head(extras, entry, index, call, SPEC)
    queries = load_queries(saved, head, start_m, call, SPEC, TILE, TILE.TMA)
    grads = QueryGradients(
        tl.full([TILE.BLOCK_M, SPEC.BLOCK_D], 0.0, tl.float32), tl.full([TILE.BLOCK_M], 0.0, tl.float32)
    )
    if SPEC.HAS_LOWER:
        grads = visit_keys(grads, queries, saved, dbias, head, begin, full_begin, call, SPEC, TILE, True)
    grads = visit_keys(grads, queries, saved, dbias, head, full_begin, full_end, call, SPEC, TILE, False)
    grads = visit_keys(grads, queries, saved, dbias, head, full_end, end, call, SPEC, TILE, True)
    store_tile(dq, grads.dq * call.softmax_scale, head.rows_q, index, start_m, call.seqlen_q, SPEC.HEAD_DIM)
    if SPEC.DBIAS == "rows":
        store_dbias_sums(dbias, grads.dbias, head, start_m, call, False, SPEC)


class Sharing(NamedTuple):
    """How a bias is shared: it has `heads` matrices for each of its batch entries, and each of them serves
    `shared_batches` batch entries and `shared_heads` heads."""

    heads: object
    shared_batches: object
    shared_heads: object


@triton.jit
def visit_sharers(
    grad, bias, saved, first_batch, first_head, start_m, start_n, begin, end, sharing, call, SPEC: tl.constexpr,
    TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add dS of the sharers [begin, end) of a matrix, whose first batch entry and head are given, to a tile of it."""
    for i in range(begin, end):
        batch = first_batch + i // sharing.shared_heads
        index = first_head + i % sharing.shared_heads
        entry = Entry(batch, batch, batch, call.seqlen_q, call.seqlen_k)
        head = query_head(saved.extras, entry, index, call, SPEC)
        queries = load_queries(saved, head, start_m, call, SPEC, TILE, not MASKED)
        keys = load_keys(saved, batch, index // call.group, start_n, call, SPEC, TILE, not MASKED)
        _weights, dscores, _dproducts = score_gradient(
            queries, keys, bias, head, saved.extras, call, SPEC, TILE, MASKED, TRANSPOSED=False
        )
        grad += dscores
    return grad


@triton.jit
def visit_sequences(
    grad, saved, first_batch, first_head, start_m, start_n, sharing, packed, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """The same where sequences are packed: each sharer has lengths of its own, and may not reach the tile."""
    for i in range(0, sharing.shared_batches * sharing.shared_heads):
        entry = sequence(saved.extras, first_batch + i // sharing.shared_heads, packed)
        call = call_of(entry, packed)
        begin, _full_begin, _full_end, end = key_range(start_m, call, SPEC, TILE)
        if (start_m < call.seqlen_q) & (start_n < end) & (start_n + TILE.BLOCK_N > begin):
            head = query_head(saved.extras, entry, first_head + i % sharing.shared_heads, call, SPEC)
            bias = load_bias(saved.bias, first_batch, first_head, start_m, start_n, call, SPEC, TILE)
            queries = load_queries(saved, head, start_m, call, SPEC, TILE, False)
            keys = load_keys(saved, head.rows_k, head.index // call.group, start_n, call, SPEC, TILE, False)
            _weights, dscores, _dproducts = score_gradient(
                queries, keys, bias, head, saved.extras, call, SPEC, TILE, MASKED=True, TRANSPOSED=False
            )
            grad += dscores
    return grad


@triton.jit
def attention_bwd_dbias(
    q, k, v, bias, extras, dout, lse, delta, dbias, sharing, call, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """The gradient of a bias that varies along queries and keys and is broadcast over the batch, the heads or both.

    Grid: one program for each (BLOCK_M, BLOCK_N) tile of each matrix of `dbias`. It owns this tile: it sums dS over
    the batch entries and heads that share it, and writes once, zeros where the mask hides everything.
    """
    saved = Saved(q, k, v, bias, extras, dout, lse, delta)
    blocks_n = tl.cdiv(call.seqlen_k, TILE.BLOCK_N)
    num_blocks = tl.cdiv(call.seqlen_q, TILE.BLOCK_M) * blocks_n
    block, head, batch = tile_order(tl.program_id(0), num_blocks, sharing.heads, False)
    start_m = block // blocks_n * TILE.BLOCK_M
    start_n = block % blocks_n * TILE.BLOCK_N
    grad = tl.full([TILE.BLOCK_M, TILE.BLOCK_N], 0.0, tl.float32)
    if SPEC.VARLEN:
        grad = visit_sequences(grad, saved, batch, head, start_m, start_n, sharing, call, SPEC, TILE)
    else:
        begin, full_begin, full_end, end = key_range(start_m, call, SPEC, TILE)
        sharers = sharing.shared_batches * sharing.shared_heads
        seen = tl.where((start_n < end) & (start_n + TILE.BLOCK_N > begin), sharers, 0)
        full_rows = start_m + TILE.BLOCK_M <= call.seqlen_q
        full = tl.where((start_n >= full_begin) & (start_n + TILE.BLOCK_N <= full_end) & full_rows, seen, 0)
        bias_tile = load_bias(bias, batch, head, start_m, start_n, call, SPEC, TILE)
        grad = visit_sharers(
            grad, bias_tile, saved, batch, head, start_m, start_n, 0, full, sharing, call, SPEC, TILE, False
        )
        grad = visit_sharers(
            grad, bias_tile, saved, batch, head, start_m, start_n, full, seen, sharing, call, SPEC, TILE, True
        )
    store_dbias(dbias, grad, batch, head, start_m, start_n, call, SPEC, TILE)
