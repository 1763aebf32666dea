"""How are scores of a block of keys turned into weights, and how do the sums of a row accumulate?

Row maxima are kept in units of log 2, since the hardware's exponential is exp2: exp(x) = exp2(x log2(e)).
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention import blocks
from triton_attention.hopper.layouts import WARPGROUP_ROWS, columns_layout, rows_layout

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
INFINITY = gl.constexpr(float("inf"))

allowed = gluon.jit(blocks.allowed)


class Rows(NamedTuple):
    """Of the keys seen so far: each row's largest score and sum of exponentials."""

    maximum: object  # (64,)
    total: object  # (64,)


@gluon.jit
def new_rows(BLOCK_N: gl.constexpr):
    return Rows(
        gl.full([WARPGROUP_ROWS], -INFINITY, gl.float32, rows_layout(BLOCK_N)),
        gl.full([WARPGROUP_ROWS], 0.0, gl.float32, rows_layout(BLOCK_N)),
    )


@gluon.jit
def opaque_zero():
    """0, which the compiler does not know: what is made with it is not kept in registers from one loop to the next."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def mask_scores(scores, start_m, start_n, call, SPEC: gl.constexpr):
    """-inf where a query of [start_m, start_m + 64) may not see a key."""
    BLOCK_N: gl.constexpr = scores.shape[1]
    rows = start_m - start_n + gl.arange(0, WARPGROUP_ROWS, layout=rows_layout(BLOCK_N))
    cols = gl.arange(0, BLOCK_N, layout=columns_layout(BLOCK_N)) + opaque_zero()
    visible = allowed(
        rows[:, None], cols[None, :], call.seqlen_k - start_n, call.lower, call.upper, SPEC.HAS_LOWER, SPEC.HAS_UPPER
    )
    return gl.where(visible, scores, -INFINITY)


@gluon.jit
def weigh(rows, scores, scale):
    """(rows, weights, correction) with a block of scores taken in, which times `scale` > 0 are in units of log 2.

    A row that has seen no visible key keeps maximum = -inf and is shifted by 0, so that -inf - -inf never appears.
    """
    maximum = gl.maximum(rows.maximum, gl.max(scores, 1) * scale)
    shift = gl.where(maximum == -INFINITY, 0.0, maximum)
    weights = gl.exp2(scores * scale - shift[:, None])
    correction = gl.exp2(rows.maximum - shift)
    return Rows(maximum, rows.total * correction + gl.sum(weights, 1)), weights, correction


@gluon.jit
def finish(rows):
    """(factor of the accumulator, log-sum-exp): rows that saw no key give 0 and -inf."""
    empty = rows.total == 0.0
    factor = 1.0 / gl.where(empty, 1.0, rows.total)
    return factor, gl.where(empty, -INFINITY, (rows.maximum + gl.log2(rows.total)) * LN_2)
