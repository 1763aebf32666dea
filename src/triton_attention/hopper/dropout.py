"""Which weights of a block does dropout keep? Those that `philox.dropout_mask` names, whatever the tile.

What is decided on a tile travels as bits, so that it can be drawn before the tile is there: a thread has four words of
them for the 32 weights that it has of a 64 x 64 tile.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention import philox
from triton_attention.hopper.layouts import WARPGROUP_ROWS, accumulator_layout
from triton_attention.hopper.softmax import opaque_zero

ROUNDS = gl.constexpr(philox.ROUNDS)


@gluon.constexpr_function
def eights_layout(columns):
    """A (64, columns / 8) tile whose element (i, j) stands for the columns [8 j, 8 j + 8) of row i of an accumulator.

    There, four threads share sixteen columns of two rows; here each of them has eight of one of the rows.
    """
    registers = [[0, 2 << bit] for bit in range((columns // 16).bit_length() - 1)]
    lanes = [[8, 0], [0, 1], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns // 8])


@gluon.constexpr_function
def row_eights_layout(columns):
    """An (8, columns) tile whose element (i, j) stands for the rows [8 i, 8 i + 8) of column j of an accumulator.

    There, eight threads share sixteen rows of four columns; here each of them has eight of one of the columns.
    """
    registers = [[0, 16 << bit] for bit in range((columns // 16).bit_length() - 1)]
    lanes = [[0, 2], [0, 4], [0, 1], [1, 0], [0, 8]]
    return gl.DistributedLinearLayout(registers, lanes, [[2, 0], [4, 0]], [], [8, columns])


def philox_words(c0, c1, c2, c3, seed):
    """The four words of `philox.philox_4x32` for a counter of 32-bit numbers that broadcast and a 64-bit seed.

    In the names of plain Triton, whose interpreter can run it. Both halves of a product come from one multiplication of
    64 bits, where `tl.philox` takes two of 32. What depends on the queries or the keys alone stays a row or a
    column for two rounds.
    """
    seed = seed.to(tl.uint64)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        product0, product1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0, (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


_philox_words = gluon.jit(philox_words)


@gluon.jit
def left_out(first, second, drop_below):
    """Four bits for the halves of two words, low before high: 1 where one is below `drop_below`."""
    bits = ((first & 0xFFFF) < drop_below).to(gl.uint32) | (first < drop_below << 16).to(gl.uint32) << 1
    return bits | ((second & 0xFFFF) < drop_below).to(gl.uint32) << 2 | (second < drop_below << 16).to(gl.uint32) << 3


@gluon.jit
def draw(seed, matrix, start_m, start_n, call, SPEC: gl.constexpr, COLUMNS: gl.constexpr, TRANSPOSED: gl.constexpr):
    """What dropout leaves out of a (64, COLUMNS) tile of weights, (queries, keys) or if TRANSPOSED (keys, queries).

    Element (i, 8 w + c) of the result is for row i and the columns 64 w + 8 j + c: its bit 4 j is 1 where one is left
    out. `matrix` is the number of a query head among those of all batch entries, and start_n a multiple of 8.
    """
    if SPEC.DROPOUT:
        WORDS: gl.constexpr = COLUMNS // 64 if COLUMNS > 64 else 1
        EIGHTS: gl.constexpr = COLUMNS // WORDS // 8
        # What is made with a zero that the compiler does not know is made anew for each tile, and waits in no register.
        if TRANSPOSED:
            LAYOUT: gl.constexpr = row_eights_layout(COLUMNS)
            rows = gl.arange(0, WARPGROUP_ROWS // 8, layout=gl.SliceLayout(1, LAYOUT)) + opaque_zero()
            columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
            eight = columns // 8  # which one of columns
            eights = (start_n // 8 + rows).to(gl.uint32)[:, None]
            queries = (start_m + columns).to(gl.uint32)[None, :]
        else:
            LAYOUT: gl.constexpr = eights_layout(COLUMNS)
            rows = gl.arange(0, WARPGROUP_ROWS, layout=gl.SliceLayout(1, LAYOUT)) + opaque_zero()
            eight = gl.arange(0, COLUMNS // 8, layout=gl.SliceLayout(0, LAYOUT))
            eights = (start_n // 8 + eight).to(gl.uint32)[None, :]
            queries = (start_m + rows).to(gl.uint32)[:, None]
        number = gl.to_tensor(matrix).to(gl.uint32)
        zero = gl.to_tensor(0).to(gl.uint32)
        first, second, third, fourth = _philox_words(eights, queries, number, zero, seed + opaque_zero())
        drop_below = call.extras.drop_below
        place = (eight % EIGHTS * 4).to(gl.uint32)[None, :]
        bits = left_out(first, second, drop_below) << place
        bits = gl.join(bits, left_out(third, fourth, drop_below) << place)
        if TRANSPOSED:
            bits = gl.sum(bits.reshape([WARPGROUP_ROWS // 8, WORDS, EIGHTS, 8, 2]), 2)
        else:
            bits = gl.sum(bits.reshape([WARPGROUP_ROWS, WORDS, EIGHTS, 2]), 2)
        bits = gl.join(gl.join(bits, bits >> 2), gl.join(bits >> 1, bits >> 3))  # the four keys of half an eight
        if TRANSPOSED:
            bits = bits.permute((0, 3, 4, 5, 1, 2))
        bits = gl.convert_layout(bits.reshape([WARPGROUP_ROWS, WORDS * 8]), accumulator_layout(WORDS * 8))
    else:
        bits = 0
    return bits


@gluon.jit
def spread(bits, COLUMNS: gl.constexpr):
    """(64, COLUMNS) numbers of what was drawn, one for each weight: odd where it is left out."""
    WORDS: gl.constexpr = bits.shape[1] // 8
    bits = bits.reshape([WARPGROUP_ROWS, WORDS, 8])
    bits = gl.join(bits, bits >> 4)
    bits = gl.join(bits, bits >> 8)
    bits = gl.join(bits, bits >> 16).permute((0, 1, 5, 4, 3, 2)) if COLUMNS > 32 else bits.permute((0, 1, 4, 3, 2))
    return gl.convert_layout(bits.reshape([WARPGROUP_ROWS, COLUMNS]), accumulator_layout(COLUMNS))


@gluon.jit
def drop(tile, bits, SPEC: gl.constexpr):
    """The numbers of a (64, COLUMNS) tile with 0 where dropout leaves one out."""
    if SPEC.DROPOUT:
        tile = gl.where(spread(bits, tile.shape[1]) & 1 == 0, tile, 0.0)
    return tile


@gluon.jit
def mark(weights, bits, SPEC: gl.constexpr):
    """Weights with a minus where dropout leaves one out: one number tells the weight, and whether it is kept.

    By their bits: comparisons would be kept, each in a register, from one barrier to the next.
    """
    if SPEC.DROPOUT:
        signs = spread(bits, weights.shape[1]) << 31
        weights = (weights.to(gl.uint32, bitcast=True) | signs).to(gl.float32, bitcast=True)
    return weights
