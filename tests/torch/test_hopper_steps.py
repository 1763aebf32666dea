"""Do the programs of the Hopper backward visit every block of keys once, and in the order in which operands come?"""

import random
from functools import partial
from itertools import product, takewhile
from types import SimpleNamespace

import pytest
import torch
from gluon_as_python import as_python, language

from triton_attention.hopper import backward_walk, schedule
from triton_attention.hopper.configs import BackwardSpec
from triton_attention.hopper.plan_backward import _splits, plan_backward
from triton_attention.problem import NO_EXTRAS, Mask

SMS = 3
SLOTS = 4  # of `backward_walk.new_turns`
NOTICE = backward_walk.NOTICE.value
MASKS = [Mask(), Mask(None, 0), Mask(None, 0, top_left=True), Mask(70, 40), Mask(20, -30)]


def keys_launch(mask, seqlen_q, seqlen_k):
    q, k = torch.empty(2, seqlen_q, 4, 64).half(), torch.empty(2, seqlen_k, 2, 64).half()
    lse = torch.empty(2, 4, seqlen_q)
    return plan_backward(q, None, q, k, k, None, q, lse, mask, 0.1, False, NO_EXTRAS, False, SMS).launches[1]


class Dealt:
    """The turns of a program, whose blocks after the first are dealt beforehand; after them come `end` and more."""

    def __init__(self, numbers, end):
        self.tickets, self.end, self.told = list(numbers), end, {}

    def next_ticket(self):
        return self.tickets.pop(0) if self.tickets else self.end

    def announce(self, i, number, spec):
        assert i not in self.told
        self.told[i] = number


def ticket_with(step, turns, call, spec):
    block = step.block
    late = step.head + 1 == (block.head_kv + 1) * call.group and step.m == max(block.last - NOTICE, block.first)
    return turns.next_ticket() if late else step.ticket


def walking(launch, program):
    """The functions of the walk as those of Python; a number that was not announced is an error, not a hang."""
    return SimpleNamespace(
        **{
            name: as_python(
                getattr(backward_walk, name),
                language(program, launch.programs),
                {
                    "no_ticket": lambda turns, spec: None,
                    "ticket_with": ticket_with,
                    "announce": Dealt.announce,
                    "number_of": lambda turns, i, call, spec, tile: turns.told[i],
                },
            )
            for name in ("num_blocks", "block_of", "first_step", "following")
        }
    )


@pytest.mark.parametrize("section", [1, 2, 3, 12])
@pytest.mark.parametrize("least_last", [1, 4, 5, 100])
def test_every_block_has_a_number_and_the_last_section_is_large(section, least_last):
    blocks, matrices = 3, 12
    place = as_python(schedule.place_in_section, language([0]))
    places = [place(number, blocks, matrices, section, least_last) for number in range(blocks * matrices)]
    assert sorted(places) == list(product(range(blocks), range(matrices)))
    width = len(list(takewhile(lambda block_and_matrix: block_and_matrix[0] == blocks - 1, reversed(places))))
    assert width >= min(least_last, matrices)
    place(blocks * matrices + 1, blocks, matrices, section, least_last)  # a program asks before it knows the end


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(300, 1000), (1, 64), (700, 130), (64, 2000)])
def test_operands_come_in_the_order_in_which_they_are_used(mask, seqlen_q, seqlen_k):
    launch = keys_launch(mask, seqlen_q, seqlen_k)
    call, spec, tile = launch.arguments[-1].value, launch.spec, launch.tile
    assert tile.STAGES < SLOTS
    assert launch.programs == SMS or launch.programs < 2 * SMS  # several blocks each, where there are as many
    visited = []
    program = [0]
    walk = walking(launch, program)
    blocks = walk.num_blocks(call, spec, tile)
    owner = [random.Random(0).randrange(launch.programs) for _ in range(blocks)]
    for program[0] in range(launch.programs):
        turns = Dealt([number for number in range(launch.programs, blocks) if owner[number] == program[0]], blocks)
        numbers = [program[0], *turns.tickets]
        to_send = walk.first_step(turns, call, spec, tile)
        steps_of = []  # of each step sent, which block of the program's it is for

        def send(to_send, steps_of=steps_of, turns=turns):
            steps_of.append(to_send.i)
            to_send = walk.following(to_send, turns, call, spec, tile)
            # Consumers have left the step STAGES ago, and so read its block's number: what is told now is not in the
            # slot of a later one.
            read = steps_of[max(len(steps_of) - 1 - tile.STAGES, 0)]
            assert max(turns.told, default=0) - SLOTS <= read
            return to_send

        sent = [(to_send.number, to_send.head, to_send.m)]
        for _ in range(tile.STAGES):
            if to_send.number < blocks:
                to_send = send(to_send)
                sent.append((to_send.number, to_send.head, to_send.m))
        step = 0
        for i, number in enumerate(numbers):
            keys_are_due = tile.KEYS_STAGES > 1
            block = walk.block_of(number, call, spec, tile)
            visited.append((block.batch, block.head_kv, block.start_n))
            assert 0 <= block.first < block.last <= -(-seqlen_q // tile.BLOCK_M)
            for head in range(block.head_kv * call.group, (block.head_kv + 1) * call.group):
                for m in range(block.first, block.last):
                    if step > 0 and to_send.number < blocks:
                        to_send = send(to_send)
                        sent.append((to_send.number, to_send.head, to_send.m))
                    if keys_are_due and to_send.i > i:
                        assert turns.told[i + 1] == [*numbers, blocks][i + 1]  # else the assistant waits for itself
                        keys_are_due = False
                    assert sent[step] == (number, head, m)
                    step += 1
            assert not keys_are_due
            assert turns.told[i + 1] == [*numbers, blocks][i + 1]
        assert to_send.number >= blocks
    rows = 64 * tile.CONSUMERS
    assert sorted(visited) == [(b, h, n) for b in range(2) for h in range(2) for n in range(0, seqlen_k, rows)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(200, 1000), (1, 64), (256, 130), (64, 2000)])
def test_a_program_that_keeps_dq_has_all_blocks_of_a_matrix(mask, seqlen_q, seqlen_k):
    programs = 2
    q, k = torch.empty(2, seqlen_q, 4, 32).half(), torch.empty(2, seqlen_k, 4, 32).half()
    lse = torch.empty(2, 4, seqlen_q)
    plan = plan_backward(q, None, q, k, k, None, q, lse, mask, 0.1, False, NO_EXTRAS, False, programs)
    launch = plan.launches[1]
    call, spec, tile = launch.arguments[-1].value, launch.spec, launch.tile
    assert spec.DQ == "kept"
    assert len(plan.launches) == 2
    assert launch.programs == programs
    program = [0]
    names = ("num_blocks", "first_number", "number_of", "block_of", "first_step", "following")
    stand_in = language(program, programs)
    walk = SimpleNamespace(**{name: as_python(getattr(backward_walk, name), stand_in) for name in names})
    turns = backward_walk.Turns(0, 0, 0)
    blocks = walk.num_blocks(call, spec, tile)
    visited = []
    for program[0] in range(programs):
        sent, used = [], []
        step = walk.first_step(turns, call, spec, tile)
        while step.number < blocks:
            sent.append((step.number, step.i, step.head, step.m))
            step = walk.following(step, turns, call, spec, tile)
        i, number = 0, walk.first_number(call, spec, tile)
        while number < blocks:
            block = walk.block_of(number, call, spec, tile)
            assert block.last <= -(-seqlen_q // tile.BLOCK_M) <= tile.DQ_TILES * 64 // tile.BLOCK_M
            visited.append((block.batch, block.head_kv, block.start_n))
            used += [(number, i, block.head_kv, m) for m in range(block.first, block.last)]
            i += 1
            number = walk.number_of(turns, i, call, spec, tile)
        assert sent == used
    starts = range(0, seqlen_k, 64 * tile.CONSUMERS)
    matrices = [matrix[:2] for matrix in visited[:: len(starts)]]
    assert sorted(matrices) == list(product(range(2), range(4)))
    assert visited == [(*matrix, start) for matrix in matrices for start in starts]


class Slots:
    """Shared memory and barriers of `SLOTS` slots: a wait for a phase that is not over yet fails here."""

    def __init__(self):
        self.shape = (SLOTS, 32)
        self.stored, self.phases = [None] * SLOTS, [0] * SLOTS

    def index(self, slot):
        return SimpleNamespace(
            slot=slot,
            store=partial(self.stored.__setitem__, slot),
            slice=lambda start, length: SimpleNamespace(load=lambda layout: torch.tensor([self.stored[slot]])),
        )

    def arrive(self, barrier, count):
        self.phases[barrier.slot] += count

    def wait(self, barrier, parity):
        if self.phases[barrier.slot] % 2 == parity:
            raise TimeoutError


def test_a_number_is_heard_when_it_was_told():
    slots = Slots()
    turns = backward_walk.Turns(0, slots, slots)
    stand_in = language([0], SMS)
    announce, number_of = (
        as_python(function, stand_in, {"mbarrier": slots})
        for function in (backward_walk.announce, backward_walk.number_of)
    )
    spec = BackwardSpec(64, 0, 64, 0, False, False)
    for i in range(1, 5 * SLOTS):
        with pytest.raises(TimeoutError):
            number_of(turns, i, None, spec, None)
        announce(turns, i, 10 * i, spec)
        assert number_of(turns, i, None, spec, None) == SMS + 10 * i


def test_a_block_that_no_query_sees_has_one_step_all_masked():
    launch = keys_launch(Mask(None, 0, top_left=True), 64, 2000)
    call, spec, tile = launch.arguments[-1].value, launch.spec, launch.tile
    stand_in = language([0], SMS)
    block = as_python(backward_walk.block_of, stand_in)(8, call, spec, tile)
    assert block.start_n >= 64
    assert (block.first, block.last) == (0, 1)
    seen = as_python(backward_walk.seen_by, stand_in)(block, block.start_n, call, spec, tile)
    assert seen.first == seen.last or not seen.full_first <= 0 < seen.full_last


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(300, 1000), (1, 64), (700, 130), (64, 2000), (1000, 1000)])
def test_a_consumer_masks_what_its_keys_need_and_skips_what_sees_none_of_them(mask, seqlen_q, seqlen_k):
    launch = keys_launch(mask, seqlen_q, seqlen_k)
    call, spec, tile = launch.arguments[-1].value, launch.spec, launch.tile
    stand_in = language([0], SMS)
    block_of, seen_by = (as_python(getattr(backward_walk, name), stand_in) for name in ("block_of", "seen_by"))
    lower, upper = mask.band(seqlen_q, seqlen_k)
    queries, keys = torch.arange(seqlen_q)[:, None], torch.arange(tile.CONSUMERS * 64 + seqlen_k)[None]
    visible = (keys < seqlen_k).expand(seqlen_q, -1).clone()
    if lower is not None:
        visible &= keys - queries >= lower
    if upper is not None:
        visible &= keys - queries <= upper
    for number in range(launch.programs):
        block = block_of(number, call, spec, tile)
        for part in range(tile.CONSUMERS):
            start_n = block.start_n + 64 * part
            seen = seen_by(block, start_n, call, spec, tile)
            assert block.first <= seen.first <= seen.last <= block.last
            rows = tile.BLOCK_M
            for m in range(-(-seqlen_q // rows)):
                tile_of = visible[rows * m : rows * (m + 1), start_n : start_n + 64]
                assert seen.first <= m < seen.last or not tile_of.any()
                assert tile_of.all() or not seen.full_first <= m < seen.full_last


@pytest.mark.parametrize(
    ("tiles", "sharers", "splits"), [(16, 256, 8), (36, 384, 7), (64, 512, 2), (4, 64, 32), (4096, 4, 1), (1, 8, 8)]
)
def test_sharers_of_a_bias_are_split_evenly(tiles, sharers, splits):
    assert _splits(tiles, sharers, 132) == splits
