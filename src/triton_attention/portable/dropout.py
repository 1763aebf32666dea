"""Which probabilities of a tile does dropout keep? Those that `philox.dropout_mask` names, whatever the tile."""

from __future__ import annotations

import triton
import triton.language as tl

from triton_attention import philox

ROUNDS = tl.constexpr(philox.ROUNDS)


@triton.jit
def halves(words):
    """The low half of each word, and its high half."""
    return tl.interleave(words & 0xFFFF, words >> 16)


@triton.jit
def kept_tile(head, start_m, start_n, call, SPEC: tl.constexpr, TILE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """True where a probability is kept: (BLOCK_M, BLOCK_N) or its transpose; without dropout one True for all.

    One evaluation of Philox makes the numbers of sixteen neighbouring keys: a tile takes BLOCK_M * BLOCK_N / 16.
    `start_n` is a multiple of 16.
    """
    if SPEC.DROPOUT:
        queries = (start_m + tl.arange(0, TILE.BLOCK_M))[:, None]
        key_blocks = (start_n // 16 + tl.arange(0, TILE.BLOCK_N // 16))[None, :]
        first, second, third, fourth = tl.philox(
            head.seed, key_blocks, queries, tl.cast(head.batch * call.heads_q + head.index, tl.int32), 0, ROUNDS
        )
        even, odd = tl.interleave(halves(first), halves(third)), tl.interleave(halves(second), halves(fourth))
        pairs = tl.interleave(even, odd)  # (BLOCK_M, BLOCK_N / 2)
        kept = tl.interleave(pairs & 0xFF, pairs >> 8) >= head.drop_below
        if TRANSPOSED:
            kept = tl.trans(kept)
    else:
        kept = tl.full([1, 1], True, tl.int1)
    return kept
