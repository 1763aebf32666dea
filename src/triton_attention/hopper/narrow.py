"""How are float32 numbers and their products rounded to 16 bits? Two at once, by inline PTX; each function says why."""

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
