"""How are 16-bit numbers made, multiplied and widened? Two at once, by inline PTX; each function says why."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def narrow(values, DTYPE: gl.constexpr):
    """float32 numbers as 16-bit ones, two at once. The compiler, which sees them used again one by one, would convert
    them one by one, at a quarter of the rate."""
    if gl.bfloat16 == DTYPE:
        narrowed = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [values], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        narrowed = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [values], dtype=gl.float16, is_pure=True, pack=2
        )
    return narrowed


@gluon.jit
def unmarked(weights, SPEC: gl.constexpr):
    """16-bit weights that `dropout.mark` marked, two at once, with 0 for those with a minus."""
    if SPEC.DROPOUT:
        PAIR: gl.constexpr = "bf16x2" if weights.dtype == gl.bfloat16 else "f16x2"
        weights = gl.inline_asm_elementwise(
            "{.reg .b32 zero; mov.b32 zero, 0; max.NaN." + PAIR + " $0, $1, zero;}", "=r,r", [weights],
            dtype=weights.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    return weights


@gluon.jit
def widen(weights, SPEC: gl.constexpr):
    """16-bit weights in float32. At one place, as in `multiply_narrow`, where more than a bias changes scores or
    weights: other kernels have registers enough."""
    if not (SPEC.SOFTCAP or SPEC.ALIBI or SPEC.DROPOUT):
        widened = weights.to(gl.float32)
    elif weights.dtype == gl.bfloat16:
        widened = gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=&r,r", [weights],
            dtype=gl.float32, is_pure=False, pack=2,
        )  # fmt: skip
    else:
        widened = gl.inline_asm_elementwise(
            "{.reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;}", "=&r,=&r,r", [weights],
            dtype=gl.float32, is_pure=False, pack=2,
        )  # fmt: skip
    return widened


@gluon.jit
def multiply_marked(weights, factors, addends):
    """As `multiply_narrow` for weights that `dropout.mark` marked: |weights| addends, and of those without a minus
    weights factors more."""
    addends, _ = gl.broadcast(addends, factors)
    if weights.dtype == gl.bfloat16:
        product = gl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            .reg .f32 one, two, kept;
            shl.b32 low, $1, 16;
            and.b32 high, $1, 0xffff0000;
            abs.f32 one, low;
            abs.f32 two, high;
            mul.f32 one, one, $4;
            mul.f32 two, two, $5;
            max.NaN.f32 kept, low, 0f00000000;
            fma.rn.f32 one, kept, $2, one;
            max.NaN.f32 kept, high, 0f00000000;
            fma.rn.f32 two, kept, $3, two;
            cvt.rn.bf16x2.f32 $0, two, one;
            }""",
            "=r,r,r,r,r,r",
            [weights, factors, addends],
            dtype=gl.bfloat16,
            is_pure=False,
            pack=2,
        )
    else:
        product = gl.inline_asm_elementwise(
            """{
            .reg .b16 a, b;
            .reg .f32 low, high, one, two, kept;
            mov.b32 {a, b}, $1;
            cvt.f32.f16 low, a;
            cvt.f32.f16 high, b;
            abs.f32 one, low;
            abs.f32 two, high;
            mul.f32 one, one, $4;
            mul.f32 two, two, $5;
            max.NaN.f32 kept, low, 0f00000000;
            fma.rn.f32 one, kept, $2, one;
            max.NaN.f32 kept, high, 0f00000000;
            fma.rn.f32 two, kept, $3, two;
            cvt.rn.f16x2.f32 $0, two, one;
            }""",
            "=r,r,r,r,r,r",
            [weights, factors, addends],
            dtype=gl.float16,
            is_pure=False,
            pack=2,
        )
    return product


@gluon.jit
def multiply_narrow(weights, factors):
    """16-bit weights times float32 factors, in 16 bits. At one place, or the compiler widens the weights early, and has
    no registers for them."""
    if weights.dtype == gl.bfloat16:
        product = gl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            shl.b32 low, $1, 16;
            and.b32 high, $1, 0xffff0000;
            mul.f32 low, low, $2;
            mul.f32 high, high, $3;
            cvt.rn.bf16x2.f32 $0, high, low;
            }""",
            "=r,r,r,r",
            [weights, factors],
            dtype=gl.bfloat16,
            is_pure=False,
            pack=2,
        )
    else:
        product = gl.inline_asm_elementwise(
            """{
            .reg .b16 a, b;
            .reg .f32 low, high;
            mov.b32 {a, b}, $1;
            cvt.f32.f16 low, a;
            cvt.f32.f16 high, b;
            mul.f32 low, low, $2;
            mul.f32 high, high, $3;
            cvt.rn.f16x2.f32 $0, high, low;
            }""",
            "=r,r,r,r",
            [weights, factors],
            dtype=gl.float16,
            is_pure=False,
            pack=2,
        )
    return product
