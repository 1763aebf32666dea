"""Which pairs of a block may not see each other? The band of `blocks.allowed`, in bits.

Of a row of a block a thread has two neighbours of every eight columns, 32 at most: one word says which of them count,
and the assembler moves seven bits at a time into predicates. Comparisons, one a pair, it makes ahead, of 128 columns
more than there are predicates for, and moves them through registers: three times as many instructions.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention.hopper.layouts import WARPGROUP_ROWS, columns_layout, rows_layout
from triton_attention.hopper.softmax import opaque_zero


@gluon.jit
def columns_below(end, COLUMNS: gl.constexpr):
    """(64, COLUMNS) words, one a row for each thread: a bit for each of its columns, set below the row's `end`."""
    cols = gl.arange(0, COLUMNS, layout=columns_layout(COLUMNS))
    end = end[:, None] - (cols & 6)[None, :]
    count = gl.maximum((end >> 3) * 2 + gl.minimum(end & 7, 2), 0)
    return gl.inline_asm_elementwise("bmsk.clamp.b32 $0, 0, $1;", "=r,r", [count], dtype=gl.int32, is_pure=True, pack=1)


@gluon.constexpr_function
def choice(rest):
    """PTX that takes the number $1 where the words $2 and $3 have a bit in common, and elsewhere `rest`, 0 or -inf."""
    bits = "0f00000000" if rest == 0.0 else "0fFF800000"
    return (
        "{ .reg .b32 both; .reg .pred seen; and.b32 both, $2, $3; setp.ne.b32 seen, both, 0;"
        f" selp.f32 $0, $1, {bits}, seen; }}"
    )


@gluon.jit
def only(values, seen, REST: gl.constexpr):
    """The values whose bits are set in the words of `columns_below`, and REST elsewhere."""
    COLUMNS: gl.constexpr = values.shape[1]
    gl.static_assert(COLUMNS <= 128, "a thread has one word for a row")
    cols = gl.arange(0, COLUMNS, layout=columns_layout(COLUMNS))
    bit = (1 << ((cols >> 3) * 2 + (cols & 1)))[None, :].broadcast_to([WARPGROUP_ROWS, COLUMNS])
    return gl.inline_asm_elementwise(
        choice(REST), "=f,f,r,r", [values, seen, bit], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def mask_queries(values, start_m, start_n, limits, SPEC: gl.constexpr, REST: gl.constexpr):
    """The values of 64 queries and a block of keys, and REST where a query may not see a key."""
    COLUMNS: gl.constexpr = values.shape[1]
    end = limits.seqlen_k - start_n
    if SPEC.HAS_LOWER or SPEC.HAS_UPPER:
        queries = start_m - start_n + gl.arange(0, WARPGROUP_ROWS, layout=rows_layout(COLUMNS))
        seen = columns_below(gl.full_like(queries, 0) + end, COLUMNS)
        if SPEC.HAS_UPPER:
            seen &= columns_below(queries + limits.upper + 1, COLUMNS)
        if SPEC.HAS_LOWER:
            seen &= ~columns_below(queries + limits.lower, COLUMNS)
        values = only(values, seen, REST)
    else:  # all queries see the same keys: few comparisons
        keys = gl.arange(0, COLUMNS, layout=columns_layout(COLUMNS)) + opaque_zero()
        values = gl.where((keys < end)[None, :], values, REST)
    return values


@gluon.jit
def mask_keys(values, start_m, start_n, limits, SPEC: gl.constexpr, REST: gl.constexpr):
    """The same transposed: the values of 64 keys and a block of queries."""
    COLUMNS: gl.constexpr = values.shape[1]
    keys = start_n - start_m + gl.arange(0, WARPGROUP_ROWS, layout=rows_layout(COLUMNS))
    exists = keys < limits.seqlen_k - start_m
    if SPEC.HAS_LOWER or SPEC.HAS_UPPER:
        seen = ~columns_below(gl.where(exists, 0, COLUMNS), COLUMNS)
        if SPEC.HAS_UPPER:
            seen &= ~columns_below(keys - limits.upper, COLUMNS)
        if SPEC.HAS_LOWER:
            seen &= columns_below(keys - limits.lower + 1, COLUMNS)
        values = only(values, seen, REST)
    else:
        values = gl.where(exists[:, None], values, REST)
    return values
