"""How are scores of a block of keys turned into weights, and how do the sums of a row accumulate?

Row maxima are kept in units of log 2, since the hardware's exponential is exp2: exp(x) = exp2(x log2(e)).
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention.hopper.correction import Correction, any_of_warp
from triton_attention.hopper.layouts import WARPGROUP_ROWS, columns_layout, rows_layout

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
INFINITY = gl.constexpr(float("inf"))
LAG = gl.constexpr(8.0)
ROUNDING = gl.constexpr(2.0**-22)


class Rows(NamedTuple):
    """Of the keys seen so far: each row's largest score, or up to LAG less, and sum of exponentials."""

    maximum: object  # (64,)
    total: object  # (64,)


@gluon.jit
def new_rows(sink, SPEC: gl.constexpr, BLOCK_N: gl.constexpr):
    """Nothing but the sink, in units of log 2, has been seen; a sink of -inf is none."""
    maximum = gl.full([WARPGROUP_ROWS], -INFINITY, gl.float32, rows_layout(BLOCK_N))
    total = gl.full([WARPGROUP_ROWS], 0.0, gl.float32, rows_layout(BLOCK_N))
    if SPEC.SINK:
        maximum = gl.maximum(maximum, sink)
        total = gl.where(maximum == -INFINITY, 0.0, 1.0)
    return Rows(maximum, total)


@gluon.jit
def tanh(x):
    """One instruction, right to 5e-4 of its value: about what two roundings of plain attention in float16 add."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def distances(start_m, start_n, BLOCK_N: gl.constexpr):
    """|i - j| of the queries [start_m, start_m + 64) and the keys [start_n, start_n + BLOCK_N), as float32.

    A thread has two neighbours of every eight keys. What they are within their eight is subtracted once a row, and the
    start of the eight is a number that the compiler knows: one subtraction each, and no register holds a key.
    """
    rows = start_m - start_n + gl.arange(0, WARPGROUP_ROWS, layout=rows_layout(BLOCK_N))
    cols = gl.arange(0, BLOCK_N, layout=columns_layout(BLOCK_N))
    from_eight = rows.to(gl.float32)[:, None] - (cols & 7).to(gl.float32)[None, :]
    return gl.abs(from_eight - (cols & ~7).to(gl.float32)[None, :])


@gluon.jit
def scale_scores(scores, values, head, start_m, start_n, call, SPEC: gl.constexpr):
    """(scores, scale): the scores of a block from its q k^T and bias, which times `scale` > 0 are in units of log 2."""
    scale = LOG2_E
    if SPEC.RAW_SCORES:
        scale = call.scale
    else:
        scores = scores * call.scale
    if SPEC.SOFTCAP:
        scores = tanh(scores)
        if SPEC.ALIBI or SPEC.BIAS == "added":
            scores = scores * call.extras.softcap
        else:
            scale = call.extras.softcap * LOG2_E
    if SPEC.ALIBI:
        scores -= head.slope * distances(start_m + head.diagonal, start_n, scores.shape[1])
    if SPEC.BIAS == "added":
        scores += values.to(gl.float32)
    if SPEC.BIAS == "mask":
        scores = gl.where(values != 0, scores, -INFINITY)
    return scores, scale


@gluon.jit
def opaque_zero():
    """0, which the compiler does not know: what is made with it is not kept in registers from one loop to the next."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def cap_scores(scores, call, SPEC: gl.constexpr):
    """(scores in units of log 2, the derivative of their cap) from q k^T, for the backward."""
    scores = scores * call.scale
    derivative = 1.0
    if SPEC.SOFTCAP:
        ratio = tanh(scores)
        scores = ratio * (call.extras.softcap * LOG2_E)
        derivative = 1.0 - ratio * ratio
    return scores, derivative


@gluon.jit
def add_bias(exponents, values, SPEC: gl.constexpr):
    """Exponents, in units of log 2, with a bias added, or a mask's -inf, for the backward."""
    if SPEC.BIAS == "mask":
        exponents = gl.where(values != 0, exponents, -INFINITY)
    else:
        exponents += values.to(gl.float32) * LOG2_E
    return exponents


@gluon.jit
def weigh(rows, scores, scale, SPEC: gl.constexpr):
    """(rows, weights, correction) with a block of scores taken in, which times `scale` > 0 are in units of log 2.

    The maximum of a row rises only by more than LAG at once: weights are 2**LAG at most, and hardly a block changes it.
    A row that has seen no visible key keeps maximum = -inf and is shifted by 0, so that -inf - -inf never appears.
    A bias may hide keys by a large negative number. So that no weight is too large by the rounding of the maximum,
    which the product below does not have, that of such a row is a little more than its scores.
    """
    largest = gl.max(scores, 1) * scale
    if SPEC.BIAS == "added":
        largest = gl.maximum(largest * (1.0 - ROUNDING), largest * (1.0 + ROUNDING))
    raised = largest > rows.maximum + LAG
    maximum = gl.where(raised, largest, rows.maximum)
    shift = gl.where(maximum == -INFINITY, 0.0, maximum)
    weights = gl.exp2(scores * scale - shift[:, None])
    factor = gl.exp2(rows.maximum - shift)
    correction = Correction(factor, any_of_warp(raised))
    return Rows(maximum, rows.total * factor + gl.sum(weights, 1)), weights, correction


@gluon.jit
def finish(rows, call, SPEC: gl.constexpr):
    """(factor of the accumulator, log-sum-exp): rows that saw no key give 0 and -inf."""
    empty = rows.total == 0.0
    factor = 1.0 / gl.where(empty, 1.0, rows.total)
    if SPEC.DROPOUT:
        factor *= call.extras.kept_factor
    return factor, gl.where(empty, -INFINITY, (rows.maximum + gl.log2(rows.total)) * LN_2)
