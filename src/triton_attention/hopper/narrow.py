"""How are 16-bit numbers made, multiplied and widened? Two at once, by inline PTX; each function says why."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def pair_type(dtype):
    """PTX's name for two 16-bit numbers in one register."""
    return "bf16x2" if dtype == gl.bfloat16 else "f16x2"


@gluon.constexpr_function
def widening(dtype, pair, low, high):
    """PTX that makes two float32 numbers of a pair. A bfloat16 number is the upper half of its float32 one."""
    if dtype == gl.bfloat16:
        return f"shl.b32 {low}, {pair}, 16; and.b32 {high}, {pair}, 0xffff0000;"
    return f"{{.reg .b16 a, b; mov.b32 {{a, b}}, {pair}; cvt.f32.f16 {low}, a; cvt.f32.f16 {high}, b;}}"


@gluon.constexpr_function
def widened(dtype, operation):
    """PTX that makes a pair $0 of what `operation` leaves in `low` and `high`, where it finds the pair $1 widened."""
    begin = "{.reg .b32 low, high; " + widening(dtype, "$1", "low", "high")
    return begin + operation + f"cvt.rn.{pair_type(dtype)}.f32 $0, high, low;}}"


@gluon.jit
def narrow(values, DTYPE: gl.constexpr):
    """float32 numbers as 16-bit ones, two at once. The compiler, which sees them used again one by one, would convert
    them one by one, at a quarter of the rate."""
    return gl.inline_asm_elementwise(
        "cvt.rn." + pair_type(DTYPE) + ".f32 $0, $2, $1;", "=r,r,r", [values], dtype=DTYPE.value, is_pure=True, pack=2
    )


@gluon.jit
def unmarked(weights, SPEC: gl.constexpr):
    """16-bit weights that `dropout.mark` marked, two at once, with 0 for those with a minus."""
    if SPEC.DROPOUT:
        weights = gl.inline_asm_elementwise(
            "{.reg .b32 zero; mov.b32 zero, 0; max.NaN." + pair_type(weights.dtype) + " $0, $1, zero;}", "=r,r",
            [weights], dtype=weights.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    return weights


@gluon.jit
def widen(weights, SPEC: gl.constexpr):
    """16-bit weights in float32. At one place, as in `multiply_narrow`, where more than a bias changes scores or
    weights: other kernels have registers enough."""
    if SPEC.SOFTCAP or SPEC.ALIBI or SPEC.DROPOUT:
        weights = gl.inline_asm_elementwise(
            widening(weights.dtype, "$2", "$0", "$1"), "=&r,=&r,r", [weights], dtype=gl.float32, is_pure=False, pack=2
        )
    else:
        weights = weights.to(gl.float32)
    return weights


@gluon.jit
def multiply_narrow(weights, factors):
    """16-bit weights times float32 factors, in 16 bits. At one place, or the compiler widens the weights early, and has
    no registers for them."""
    MULTIPLY: gl.constexpr = "mul.f32 low, low, $2; mul.f32 high, high, $3;"
    return gl.inline_asm_elementwise(
        widened(weights.dtype, MULTIPLY), "=r,r,r,r", [weights, factors],
        dtype=weights.dtype, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def multiply_marked(weights, factors, addends):
    """As `multiply_narrow` for weights that `dropout.mark` marked: |weights| addends, and of those without a minus
    weights factors more."""
    MULTIPLY: gl.constexpr = """
        .reg .f32 one, two, kept;
        abs.f32 one, low;
        abs.f32 two, high;
        mul.f32 one, one, $4;
        mul.f32 two, two, $5;
        max.NaN.f32 kept, low, 0f00000000;
        fma.rn.f32 low, kept, $2, one;
        max.NaN.f32 kept, high, 0f00000000;
        fma.rn.f32 high, kept, $3, two;
        """
    addends, _ = gl.broadcast(addends, factors)
    return gl.inline_asm_elementwise(
        widened(weights.dtype, MULTIPLY), "=r,r,r,r,r,r", [weights, factors, addends],
        dtype=weights.dtype, is_pure=False, pack=2,
    )  # fmt: skip
