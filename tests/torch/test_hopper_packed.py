"""Do the programs of the Hopper backward own every row of packed sequences once, and read what belongs to it? And do
the sums of dq, to which several add, begin as zeros and end in the rows that they are of?"""

import math
from functools import lru_cache
from itertools import accumulate, pairwise, product

import pytest
import torch
from gluon_as_python import Pointer, as_python, language
from test_hopper_steps import Dealt, walking

from triton_attention import attention_varlen, kernel
from triton_attention.hopper import (
    backward_call,
    backward_dq,
    backward_queries,
    backward_scores,
    backward_walk,
    heads,
    schedule,
)
from triton_attention.hopper.channel import PACKED_ROWS
from triton_attention.hopper.configs import takes_turns
from triton_attention.hopper.plan_backward import plan_backward
from triton_attention.philox import drop_below, kept_factor
from triton_attention.problem import Extras, Mask, Packing

CAUSAL = Mask(None, 0)
SMS = 4
LENGTHS = (
    ((70, 30), (0, 65), (200, 200), (1, 0), (0, 0), (129, 64)),
    ((64, 64), (128, 63), (192, 193)),
    ((5, 400),),
)


def boundaries(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


class Call:
    """A planned backward of packed sequences, with rows behind the last one, and two query heads to a key head."""

    def __init__(self, lengths, mask, head_dim=64, deterministic=True, dropout_p=0.0):
        self.lengths = lengths
        self.starts = [boundaries(column) for column in zip(*lengths, strict=True)]
        self.totals = [int(starts[-1]) + unused for starts, unused in zip(self.starts, (70, 130), strict=True)]
        total_q, total_k = self.totals
        q, k, v = (
            torch.randn(1, total, heads, head_dim).half() for total, heads in ((total_q, 4), (total_k, 2), (total_k, 2))
        )
        packing = Packing(*self.starts, *map(max, zip(*lengths, strict=True)))
        extras = Extras(packing=packing, alibi_slopes=torch.arange(4.0 * len(lengths)).view(-1, 4), sink=torch.zeros(4))
        if dropout_p > 0.0:
            extras = extras._replace(dropout_p=dropout_p, seed=torch.tensor(7))
        lse = torch.zeros(1, 4, total_q)
        self.plan = plan_backward(q, None, q, k, v, None, q, lse, mask, 0.1, False, extras, deterministic, SMS)
        self.rows, self.keys, self.queries = self.plan.launches  # "queries": that of dq

    def numbers(self, launch):
        """Those of a launch, with pointers that Python can load from."""
        call = launch.arguments[-1].value
        packing = call.packing._replace(cu_seqlens_q=Pointer(self.starts[0]), cu_seqlens_k=Pointer(self.starts[1]))
        slopes = call.extras.slopes
        slopes = slopes._replace(ptr=Pointer(slopes.ptr.flatten()))
        return call._replace(packing=packing, extras=call.extras._replace(slopes=slopes))

    def blocks(self, launch, along_keys):
        """Of each number: the call of its sequence, its block, and who sees its parts."""
        program = [0]
        stand_in = language(program, launch.programs)
        own = as_python(backward_call.call_of_block, stand_in)
        block_of = as_python(backward_walk.block_in if along_keys else backward_queries.block_of_program, stand_in)
        seen_by = as_python(backward_walk.seen_by, stand_in)
        load_slope = as_python(heads.load_slope, stand_in)
        call = self.numbers(launch)
        count = launch.programs
        if along_keys:
            count = as_python(backward_walk.num_blocks, stand_in)(call, launch.spec, launch.tile)
            assert launch.programs == (min(count, SMS) if takes_turns(launch.spec) else count)
        for program[0] in range(count):
            found = own(program[0], call, along_keys, launch.tile.CONSUMERS * 64, launch.spec)
            block = block_of(*program[: int(along_keys)], found, launch.spec, launch.tile)
            load_slope(block.batch, 0, found, launch.spec)  # of a sequence that there is
            parts = [block]
            if along_keys:
                starts = range(block.start_n, block.start_n + 64 * launch.tile.CONSUMERS, 64)
                parts = [seen_by(block, start_n, found, launch.spec, launch.tile) for start_n in starts]
            yield found, block, parts


@lru_cache
def placed():
    """The functions that say where a block is in a descriptor."""
    functions = (schedule.place_of_queries, schedule.place_of_keys, backward_scores.rows_origin)
    return [as_python(function, language([0])) for function in functions]


def rows_at(place, total, count):
    """The rows of a packed tensor that a copy to or from `count` rows at a place touches, see `packed_descriptor`."""
    end, row = place
    row += total - PACKED_ROWS.value
    assert 0 <= end <= total
    return [end + row + i - total for i in range(count) if 0 <= row + i < total]


def visible(call, i, j, batch, mask):
    """The rule itself, written once more by hand."""
    lengths = call.lengths[batch]
    lower, upper = mask.bounds(*lengths)
    return (mask.left is None or j - i >= lower) and (mask.right is None or j - i <= upper)


MASKS = [Mask(), CAUSAL, Mask(None, 0, top_left=True), Mask(70, 40), Mask(10**12, 0)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("lengths", "head_dim"), list(product(LENGTHS, (64, 256))), ids=str)
@pytest.mark.parametrize("owners_of", ["keys", "keys, adding dq", "queries"])
def test_each_row_has_one_owner_that_visits_what_it_sees(owners_of, lengths, head_dim, mask):
    call = Call(lengths, mask, head_dim, deterministic=owners_of != "keys, adding dq")
    along_keys = owners_of != "queries"
    launch = call.keys if along_keys else call.queries
    step = 64 if along_keys else launch.tile.BLOCK_N
    place_of_queries, place_of_keys, rows_origin = placed()
    place_of_own, place_of_others = (place_of_keys, place_of_queries)[:: 1 if along_keys else -1]
    total, other_total = call.totals[::-1] if along_keys else call.totals
    starts, other_starts = call.starts[::-1] if along_keys else call.starts
    owners = torch.zeros(2 if along_keys else 4, total, dtype=torch.int32)
    for found, block, parts in call.blocks(launch, along_keys):
        start, head = (block.start_n, block.head_kv) if along_keys else (block.start_m, block.head)
        own = rows_at(place_of_own(start, block.batch, block.sequence, launch.spec), total,
                      64 * launch.tile.CONSUMERS)  # fmt: skip
        owners[head, own] += 1
        steps = range(block.first, block.last)
        if block.batch == len(lengths) or not own:
            assert all(part.first >= part.last for part in parts)
            assert takes_turns(launch.spec) or not steps
            continue
        lengths_of_it = lengths[block.batch]
        assert own == list(range(starts[block.batch] + start, own[-1] + 1))
        assert own[-1] < starts[block.batch + 1]
        assert (found.seqlen_q, found.seqlen_k) == lengths_of_it
        assert found.extras.diagonal == mask.diagonal(*lengths_of_it)
        for n in steps:
            others = rows_at(place_of_others(n * step, block.batch, block.sequence, launch.spec), other_total, step)
            first = int(other_starts[block.batch]) + n * step
            assert others == list(range(first, min(first + step, int(other_starts[block.batch + 1]))))
        for i, n in product(range(len(own)), range(-(-lengths_of_it[0 if along_keys else 1] // step))):
            for other in range(n * step, min((n + 1) * step, lengths_of_it[0 if along_keys else 1]), step // 4):
                pair = (other, start + i) if along_keys else (start + i, other)
                sees = visible(call, *pair, block.batch, mask)
                part = parts[i // 64 % len(parts)]
                assert part.first <= n < part.last or not sees
                assert sees or not part.full_first <= n < part.full_last
        padded = (call.totals[0] // 64 + len(lengths) + 1) * 64
        origin = torch.tensor(3) * 2 * padded + int(starts_of_numbers(call)[block.batch]) * 64
        assert (rows_origin(block.batch, torch.tensor(3), found, launch.spec), found.padded_q) == (origin, padded)
    assert (owners == 1).all()


@pytest.mark.parametrize("along_keys", [True, False], ids=["keys", "queries"])
def test_sequences_share_the_seed_and_the_rate_of_dropout(along_keys):
    call = Call(LENGTHS[0], CAUSAL, dropout_p=0.3)
    launch = call.keys if along_keys else call.queries
    shared = launch.arguments[-1].value.extras
    for found, _, _ in call.blocks(launch, along_keys):
        assert found.extras.seed is shared.seed
        assert found.extras.drop_below == shared.drop_below == drop_below(0.3)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_an_assistant_sends_the_steps_of_one_block_after_the_other(lengths, mask):
    call = Call(lengths, mask, deterministic=False)
    launch, numbers = call.keys, call.numbers(call.keys)
    blocks = [block for _, block, _ in call.blocks(launch, True)]
    program = [0]
    walk = walking(launch, program)
    assert walk.num_blocks(numbers, launch.spec, launch.tile) == len(blocks)
    for program[0] in range(launch.programs):
        mine = range(program[0], len(blocks), launch.programs)
        turns = Dealt(mine[1:], len(blocks))
        step = walk.first_step(turns, numbers, launch.spec, launch.tile)
        for i, number in enumerate(mine):
            block = blocks[number]
            heads_of_it = range(2 * block.head_kv, 2 * block.head_kv + 2)
            assert block.first < block.last
            for head, m in product(heads_of_it, range(block.first, block.last)):
                assert (step.number, step.i, step.head, step.m) == (number, i, head, m)
                assert step.block == block
                step = walk.following(step, turns, numbers, launch.spec, launch.tile)
        assert step.number >= len(blocks)


def in_order_of_threads(tile, pieces):
    """(64, columns) as `backward_dq.multiply_keys` leaves it: one piece of the columns after the other."""
    order = (0, 4, 1, 3, 5, 2, 6)
    return torch.cat(
        [piece.reshape(1, 4, 2, 8, -1, 4, 2).permute(order).flatten() for piece in tile.chunk(pieces, dim=1)]
    )


@pytest.mark.parametrize("mask", MASKS[:3], ids=str)
@pytest.mark.parametrize(
    ("lengths", "head_dim"), [*product(LENGTHS, [64]), (LENGTHS[0], 32), (LENGTHS[2], 128)], ids=str
)
def test_sums_of_dq_begin_as_zeros_and_end_in_their_rows(lengths, head_dim, mask):
    call = Call(lengths, mask, head_dim, deterministic=False)
    sums = call.rows.arguments[6].value.fill_(math.nan)
    kernel.run(call.rows)
    assert not sums.any()
    tiles = sums.view(-1, 64 * head_dim)
    tile_of_sums = as_python(backward_dq.tile_of_sums, language([0]))
    dq = call.plan.dq.fill_(math.nan)[0]
    expected = torch.zeros(dq.shape)
    for found, block, parts in call.blocks(call.keys, True):
        unused = block.batch == len(lengths)  # rows that no sequence has may hold NaN
        seen = any(part.first < part.last for part in parts)
        for head, m in product(range(2 * block.head_kv, 2 * block.head_kv + 2), range(block.first, block.last)):
            share = torch.full([64, head_dim], math.nan) if unused else torch.randn(64, head_dim) * seen
            tile = tiles[tile_of_sums(block, head, m, found, call.keys.spec, 64)]
            tile += in_order_of_threads(share, max(head_dim // 64, 1))
            if unused:
                continue
            start, end = call.starts[0][block.batch : block.batch + 2].tolist()
            own = slice(start + 64 * m, min(start + 64 * m + 64, end))
            expected[own, head] += share[: own.stop - own.start]
    kernel.run(call.queries)
    torch.testing.assert_close(dq.float(), 0.1 * expected, rtol=1e-3, atol=1e-3)
    assert not dq[int(call.starts[0][-1]) :].any()


def starts_of_numbers(call):
    """In blocks of 64."""
    return call.starts[0][:-1] // 64 + torch.arange(len(call.lengths))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("mask", MASKS[:2], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_the_numbers_of_queries_are_padded_sequence_by_sequence(lengths, mask, dropout_p):
    """And the gradient of a sink, which is made of them; rows that no sequence has may hold anything."""
    starts = [boundaries(column) for column in zip(*lengths, strict=True)]
    longest = list(map(max, zip(*lengths, strict=True)))
    q, k, v = (
        torch.randn(int(total[-1]), heads, 16).double()
        for total, heads in zip((starts[0], *[starts[1]] * 2), (4, 2, 2), strict=True)
    )
    sink = torch.tensor([0.5, 2.0, -math.inf, -1.0]).double().requires_grad_()
    how = dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), (*starts, *longest), strict=True))
    how |= {"causal": mask == CAUSAL, "sink": sink, "dropout_p": dropout_p, "return_lse": True, "backend": "reference"}
    out, lse = attention_varlen(q, k, v, **how)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse == -math.inf, 0.0)
    (exact,) = torch.autograd.grad([out, lse.masked_fill(lse == -math.inf, 0.0)], sink, [dout, dlse])

    def with_unused_rows(tensor, value, axis=0):
        shape = list(tensor.shape)
        shape[axis] = 70
        return torch.cat((tensor.detach().float(), torch.full(shape, value)), axis)

    out, dout, q = (with_unused_rows(x, math.nan)[None] for x in (out, dout, q))
    lse, dlse = (with_unused_rows(x, math.nan, 1)[None] for x in (lse, dlse))
    k, v = (x[None].bfloat16() for x in (k, v))
    seed = torch.tensor(1) if dropout_p > 0.0 else None
    extras = Extras(0.0, None, sink.detach().float(), dropout_p, seed, Packing(*starts, *longest))
    plan = plan_backward(
        dout.bfloat16(), dlse[0], q.bfloat16(), k, v, None, out.bfloat16(), lse, mask, 0.25, False, extras, False, SMS
    )
    rows = plan.sink_rows.rows.fill_(math.nan)
    kernel.run(plan.launches[0])
    expected = torch.zeros_like(rows)
    expected[:, :, 0] = math.inf
    factor = kept_factor(dropout_p)
    delta = (dlse - (dout.bfloat16().float() * out.bfloat16().float()).sum(-1).transpose(1, 2))[0] / factor
    for batch, (start, end) in enumerate(pairwise(starts[0].tolist())):
        first = (start // 64 + batch) * 64
        of_lse = (lse[0, :, start:end] - math.log(factor)) / math.log(2)
        expected[0, :, 0, first : first + end - start] = of_lse.masked_fill(of_lse == -math.inf, math.inf)
        expected[0, :, 1, first : first + end - start] = delta[:, start:end]
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(plan.finish_dsink().double(), exact, rtol=2e-2, atol=2e-2)
