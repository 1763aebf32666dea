"""How is an accumulator corrected when the largest score of a row has risen?

Each number times its row's factor, which is 1 for most rows of most blocks, since a maximum follows the scores at a
distance (`softmax.LAG`). So a warp whose rows all have 1 leaves the products out: half as many instructions as the
softmax of a block has, at head dim 256. Triton branches on what a whole warpgroup agrees on, through shared memory;
these branch by warp, in PTX. Source: FlashAttention-4's conditional rescaling.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention.hopper.layouts import WARPGROUP_ROWS, rows_layout


class Correction(NamedTuple):
    """Of what has been accumulated."""

    factor: object  # (64,)
    wanted: object  # (64,) int32: whether any row of the warp has a factor that is not 1


@gluon.jit
def any_of_warp(flags):
    """(64,) int32: whether a flag of any row that the warp has is set. A thread has two rows."""
    return gl.inline_asm_elementwise(
        """{
            .reg .pred any;
            setp.ne.s32 any, $2, 0;
            setp.ne.or.s32 any, $3, 0, any;
            vote.sync.any.pred any, any, 0xffffffff;
            selp.s32 $0, 1, 0, any;
            mov.s32 $1, $0;
        }""",
        "=r,=r,r,r",
        [flags.to(gl.int32)],
        dtype=gl.int32,
        is_pure=True,
        pack=2,
    )


@gluon.constexpr_function
def correction_text(count):
    """PTX that multiplies `count` numbers of a thread by as many factors, if wanted."""
    products = "".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count))
    return f"{{ .reg .pred wanted; setp.ne.s32 wanted, ${3 * count}, 0; @!wanted bra.uni DONE; {products} DONE: }}"


@gluon.constexpr_function
def correction_constraints(count):
    """The numbers are results too, in the same registers."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count + ["r"] * count)


@gluon.jit
def correct(acc, correction, COLUMNS: gl.constexpr):
    """A (64, COLUMNS) accumulator with each row times its factor."""
    COUNT: gl.constexpr = COLUMNS // 2  # of a thread
    factor = gl.convert_layout(correction.factor, rows_layout(COLUMNS))[:, None]
    wanted = gl.convert_layout(correction.wanted, rows_layout(COLUMNS))[:, None]
    return gl.inline_asm_elementwise(
        correction_text(COUNT),
        correction_constraints(COUNT),
        [acc, factor.broadcast_to([WARPGROUP_ROWS, COLUMNS]), wanted.broadcast_to([WARPGROUP_ROWS, COLUMNS])],
        dtype=gl.float32,
        is_pure=True,
        pack=COUNT,
    )
