"""What are the scores of a tile, and how does the softmax accumulate over blocks of keys?

Scores are kept in units of log 2, since the hardware's exponential is exp2: exp(x) = exp2(x log2(e)).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from triton_attention import blocks
from triton_attention.kernel import jit_plain

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))

allowed = jit_plain(blocks.allowed)
not_below = jit_plain(blocks.not_below)


@triton.jit
def tanh(x):
    """Within 4e-7 of it, relatively too: an odd rational function, which asks less of the hardware than exponentials.

    Source: Eigen's `ptanh_float`. Beyond the clamp it is 1 in float32.
    """
    x = tl.clamp(x, -7.90531110763549805, 7.90531110763549805, propagate_nan=tl.PropagateNan.ALL)
    square = x * x
    top = 2.00018790482477e-13 - 2.76076847742355e-16 * square
    top = -8.60467152213735e-11 + top * square
    top = 5.12229709037114e-08 + top * square
    top = 1.48572235717979e-05 + top * square
    top = 6.37261928875436e-04 + top * square
    top = 4.89352455891786e-03 + top * square
    bottom = 1.18534705686654e-04 + 1.19825839466702e-06 * square
    bottom = 2.26843463243900e-03 + bottom * square
    bottom = 4.89352518554385e-03 + bottom * square
    return x * top / bottom


@triton.jit
def score_tile(
    q, k, bias, head, start_m, start_n, call, SPEC: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(scores, slope): softmax_scale q k^T, capped, - ALiBi + bias, masked with -inf, in units of log 2, and the
    derivative of the cap, 1 without one. Each is (BLOCK_M, BLOCK_N) or its transpose.

    q is (BLOCK_M, BLOCK_D), k is (BLOCK_N, BLOCK_D). With SPEC.RAW_SCORES nothing is done to q k^T, and the factor
    `call.scale_log2` > 0 is left to the caller, who folds it into the exponent.
    """
    rows = start_m + tl.arange(0, TILE.BLOCK_M)
    cols = start_n + tl.arange(0, TILE.BLOCK_N)
    if TRANSPOSED:
        scores = tl.dot(k, tl.trans(q), input_precision=SPEC.PRECISION)
        rows, cols, bias = rows[None, :], cols[:, None], tl.trans(bias)
    else:
        scores = tl.dot(q, tl.trans(k), input_precision=SPEC.PRECISION)
        rows, cols = rows[:, None], cols[None, :]
    slope = 1.0
    if not SPEC.RAW_SCORES:
        scores *= call.scale_log2
    if SPEC.SOFTCAP:
        ratio = tanh(scores * (1.0 / head.softcap))
        scores = ratio * head.softcap
        slope = 1.0 - ratio * ratio
    if SPEC.ALIBI:  # distances within a block and between blocks apart: few conversions, and exact near the diagonal
        queries = (rows + (head.diagonal - start_n)).to(tl.float32)
        scores -= head.slope * tl.abs(queries - (cols - start_n).to(tl.float32))
    if SPEC.BIAS == "added":
        scores += bias.to(tl.float32) * LOG2_E
    if SPEC.BIAS == "mask":
        scores = tl.where(bias != 0, scores, -INFINITY)
    if MASKED:
        visible = allowed(rows, cols, call.seqlen_k, call.lower, call.upper, SPEC.HAS_LOWER, SPEC.HAS_UPPER)
        scores = tl.where(visible, scores, -INFINITY)
    return scores, slope


class SoftmaxState(NamedTuple):
    """Of the keys seen so far: each row's largest score, sum of exponentials and weighted sum of values."""

    row_max: object  # (BLOCK_M,)
    row_sum: object  # (BLOCK_M,)
    acc: object  # (BLOCK_M, BLOCK_DV)


@triton.jit
def softmax_begin(sink, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Nothing but the sink, in units of log 2, has been seen; a sink of -inf is none."""
    row_max = tl.full([TILE.BLOCK_M], -INFINITY, tl.float32)
    row_sum = tl.full([TILE.BLOCK_M], 0.0, tl.float32)
    if SPEC.SINK:
        row_max = tl.maximum(row_max, sink)
        row_sum = tl.where(row_max == -INFINITY, 0.0, 1.0)
    return SoftmaxState(row_max, row_sum, tl.full([TILE.BLOCK_M, SPEC.BLOCK_DV], 0.0, tl.float32))


@triton.jit
def softmax_update(state, scores, scale, kept, v, SPEC: tl.constexpr):
    """Take in a block of keys whose scores, times `scale` > 0, are in units of log 2.

    Dropout decides which weights count for the values; all of them count for the sum. A row that has seen no visible
    key keeps row_max = -inf and is shifted by 0, so that -inf - -inf never appears.
    """
    row_max = tl.maximum(state.row_max, tl.max(scores, 1) * scale)
    shift = tl.where(row_max == -INFINITY, 0.0, row_max)
    weights = tl.exp2(scores * scale - shift[:, None])  # (BLOCK_M, BLOCK_N)
    correction = tl.exp2(state.row_max - shift)
    row_sum = state.row_sum * correction + tl.sum(weights, 1)
    if SPEC.DROPOUT:
        weights = tl.where(kept, weights, 0.0)
    acc = tl.dot(weights.to(v.dtype), v, state.acc * correction[:, None], input_precision=SPEC.PRECISION)
    return SoftmaxState(row_max, row_sum, acc)


@triton.jit
def softmax_end(state, extras, SPEC: tl.constexpr):
    """(output tile, log-sum-exp): rows that saw no key give 0 and -inf."""
    empty = state.row_sum == 0.0
    out = state.acc / tl.where(empty, 1.0, state.row_sum)[:, None]
    if SPEC.DROPOUT:
        out *= extras.kept_factor
    lse = (state.row_max + tl.log2(state.row_sum)) * LN_2
    return out, tl.where(empty, -INFINITY, lse)
