"""Do the block ranges hold every visible key, and only whole blocks where no mask is used? By counting, key by key."""

from itertools import accumulate, product

import pytest

from triton_attention import blocks

BOUNDS = [None, *range(-9, 10)]


def visible(i, j, seqlen_k, lower, upper):
    """The rule itself, written once more by hand."""
    return j < seqlen_k and (lower is None or j - i >= lower) and (upper is None or j - i <= upper)


@pytest.mark.parametrize(("lower", "upper"), list(product(BOUNDS, BOUNDS)))
def test_visible_range_and_allowed(lower, upper):
    flags = lower is not None, upper is not None
    bounds = lower or 0, upper or 0
    for seqlen_q, seqlen_k, block_m, block_n in product((1, 5, 8), (1, 7, 12), (2, 4), (1, 4)):
        for start in range(0, seqlen_q, block_m):
            rows = range(start, min(start + block_m, seqlen_q))
            begin, full_begin, full_end, end = blocks.visible_range(
                start, seqlen_q, seqlen_k, *bounds, *flags, block_m, block_n
            )
            visited = set()
            for first, last in ((begin, full_begin), (full_begin, full_end), (full_end, end)):
                for start_n in range(first, last, block_n):
                    assert start_n % block_n == 0
                    visited |= set(range(start_n, start_n + block_n))
            for i, j in product(rows, range(seqlen_k + block_n)):
                seen = visible(i, j, seqlen_k, lower, upper)
                assert blocks.allowed(i, j, seqlen_k, *bounds, *flags) == seen
                assert j in visited or not seen
                assert seen or not full_begin <= j < full_end


@pytest.mark.parametrize(("lower", "upper"), list(product(BOUNDS[::3], BOUNDS[::3])))
def test_the_transposed_question_has_the_transposed_answer(lower, upper):
    flags = upper is not None, lower is not None
    for seqlen_q, seqlen_k, start in product((1, 5, 8), (4, 9), (0, 4)):
        begin, full_begin, full_end, end = blocks.visible_range(
            start, seqlen_k, seqlen_q, -(upper or 0), -(lower or 0), *flags, 4, 2
        )
        for i, j in product(range(seqlen_q), range(start, min(start + 4, seqlen_k))):
            seen = visible(i, j, seqlen_k, lower, upper)
            assert begin <= i < max(end, full_begin) or not seen
            assert seen or not full_begin <= i < full_end


@pytest.mark.parametrize("last_first", [False, True])
def test_tile_order_visits_every_tile_once(last_first):
    order = [blocks.tile_order(program, 3, 4, last_first) for program in range(3 * 4 * 2)]
    assert sorted(order) == sorted(product(range(3), range(4), range(2)))
    assert [block for block, _, _ in order[:3]] == ([2, 1, 0] if last_first else [0, 1, 2])


@pytest.mark.parametrize("block", [1, 4, 64])
@pytest.mark.parametrize("lengths", [(3,), (0, 5, 0, 0, 64, 1), (64, 64, 63, 65), (0, 0), ()], ids=str)
def test_each_packed_sequence_has_tiles_enough_of_its_own(lengths, block):
    starts = [0, *accumulate(lengths)]
    total = starts[-1] + 7  # rows that no sequence has follow
    first = [blocks.first_tile(start, sequence, block) for sequence, start in enumerate(starts)]
    ends = [*first[1:], total // block + len(lengths) + 1]
    for length, begin, end in zip((*lengths, 7), first, ends, strict=True):
        assert end - begin >= max(1, -(-length // block))
