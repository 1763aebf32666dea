"""The forward kernel: softmax(scores) v and the log-sum-exp, in one pass over the keys."""

from __future__ import annotations

import triton
import triton.language as tl

from triton_attention.portable.bias import load_bias
from triton_attention.portable.dropout import kept_tile
from triton_attention.portable.heads import load_sink, query_head
from triton_attention.portable.schedule import call_of, own_block
from triton_attention.portable.softmax import score_tile, softmax_begin, softmax_end, softmax_update
from triton_attention.portable.tiles import key_range, load_tile, rows_origin, store_rows, store_tile


@triton.jit
def attend(
    state, q, k, v, bias, head, start_m, begin, end, call, SPEC: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys [begin, end) into the softmax state of a block of queries."""
    head_kv = head.index // call.group
    for start_n in range(begin, end, TILE.BLOCK_N):
        k_tile = load_tile(  # what lies beyond the keys makes scores that are masked
            k, head.rows_k, head_kv, start_n, call.seqlen_k, TILE.BLOCK_N, SPEC.HEAD_DIM, SPEC.BLOCK_D, TILE.TMA,
            TILE.TMA or not MASKED, SPEC.VARLEN,
        )  # fmt: skip
        bias_tile = load_bias(bias, head.batch, head.index, start_m, start_n, call, SPEC, TILE)
        scores, _slope = score_tile(
            q, k_tile, bias_tile, head, start_m, start_n, call, SPEC, TILE, MASKED, TRANSPOSED=False
        )
        v_tile = load_tile(
            v, head.rows_k, head_kv, start_n, call.seqlen_k, TILE.BLOCK_N, SPEC.HEAD_DIM_V, SPEC.BLOCK_DV, TILE.TMA,
            not MASKED, SPEC.VARLEN,
        )  # fmt: skip
        kept = kept_tile(head, start_m, start_n, call, SPEC, TILE, TRANSPOSED=False)
        state = softmax_update(state, scores, call.scale_log2 if SPEC.RAW_SCORES else 1.0, kept, v_tile, SPEC)
    return state


@triton.jit
def attention_fwd(q, k, v, bias, extras, out, lse, call, SPEC: tl.constexpr, TILE: tl.constexpr):
    """out = dropout(softmax(scores)) v and lse = log sum exp of the scores, with the sink in it: see `score_tile`.

    Grid: one program for each block of BLOCK_M queries of each head of each batch entry. It owns these rows of
    `out` (batch, seqlen_q, heads_q, head_dim_v) and `lse` (batch, heads_q, seqlen_q), or of packed sequences
    (total_q, heads_q, head_dim_v) and (heads_q, total_q), and visits the keys they see.
    """
    start_m, index, entry = own_block(extras, call, call.heads_q, False, SPEC.HAS_UPPER, SPEC, TILE.BLOCK_M)
    if SPEC.VARLEN:
        call = call_of(entry, call)
    begin, full_begin, full_end, end = key_range(start_m, call, SPEC, TILE)
    head = query_head(extras, entry, index, call, SPEC)
    q_tile = load_tile(
        q, head.rows_q, index, start_m, call.seqlen_q, TILE.BLOCK_M, SPEC.HEAD_DIM, SPEC.BLOCK_D, TILE.TMA, TILE.TMA,
        SPEC.VARLEN,
    )  # fmt: skip
    state = softmax_begin(load_sink(extras, head, call, SPEC), SPEC, TILE)
    if SPEC.HAS_LOWER:
        state = attend(state, q_tile, k, v, bias, head, start_m, begin, full_begin, call, SPEC, TILE, True)
    state = attend(state, q_tile, k, v, bias, head, start_m, full_begin, full_end, call, SPEC, TILE, False)
    state = attend(state, q_tile, k, v, bias, head, start_m, full_end, end, call, SPEC, TILE, True)
    out_tile, lse_rows = softmax_end(state, extras, SPEC)
    store_tile(out, out_tile, head.rows_q, index, start_m, call.seqlen_q, SPEC.HEAD_DIM_V)
    store_rows(lse, lse_rows, rows_origin(head, call, SPEC), start_m, call.seqlen_q)
