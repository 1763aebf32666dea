"""Which weights of a block does dropout keep? Those that `philox.dropout_mask` names, whatever the tile."""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention.hopper.layouts import WARPGROUP_ROWS, accumulator_layout

ROUNDS = gl.constexpr(10)


@gluon.constexpr_function
def quads_layout(columns):
    """A (64, columns / 4) tile whose element (i, j) stands for the columns [4 j, 4 j + 4) of row i of an accumulator.

    There, two threads share four columns of two rows; here each of them has one of the rows.
    """
    registers = [[0, 2 << bit] for bit in range((columns // 8).bit_length() - 1)]
    lanes = [[8, 0], [0, 1], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns // 4])


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
def drop(weights, head, start_m, start_n, call, SPEC: gl.constexpr):
    """The weights (64, keys) with 0 where dropout does not keep one."""
    if SPEC.DROPOUT:
        BLOCK_N: gl.constexpr = weights.shape[1]
        LAYOUT: gl.constexpr = quads_layout(BLOCK_N)
        queries = (start_m + gl.arange(0, WARPGROUP_ROWS, layout=gl.SliceLayout(1, LAYOUT))).to(gl.uint32)
        quads = (start_n // 4 + gl.arange(0, BLOCK_N // 4, layout=gl.SliceLayout(0, LAYOUT))).to(gl.uint32)
        number = gl.to_tensor(head.number).to(gl.uint32)
        zero = gl.to_tensor(0).to(gl.uint32)
        first, second, third, fourth = _philox_words(quads[None, :], queries[:, None], number, zero, head.seed)
        words = gl.join(gl.join(first, third), gl.join(second, fourth)).reshape([WARPGROUP_ROWS, BLOCK_N])
        words = gl.convert_layout(words, accumulator_layout(BLOCK_N))
        weights = gl.where(words >= call.extras.drop_below, weights, 0.0)
    return weights
