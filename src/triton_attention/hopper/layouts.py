"""Where do the elements of a tile live, in shared memory and across the threads of a warpgroup?"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

WARPGROUP_ROWS = gl.constexpr(64)  # queries of one consumer: the M of a warpgroup's matrix product


@gluon.constexpr_function
def accumulator_layout(columns):
    """A (64, columns) float32 tile that a warpgroup's matrix product accumulates; four threads share a row."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def operand_layout(columns):
    """A (64, keys) tile of weights, the left operand of a product that accumulates (64, columns)."""
    return gl.DotOperandLayout(operand_index=0, parent=accumulator_layout(columns), k_width=2)


@gluon.constexpr_function
def rows_layout(columns):
    """One number for each row of a (64, columns) accumulator."""
    return gl.SliceLayout(1, accumulator_layout(columns))


@gluon.constexpr_function
def columns_layout(columns):
    """One number for each column of a (64, columns) accumulator."""
    return gl.SliceLayout(0, accumulator_layout(columns))
