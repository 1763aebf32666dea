"""Do the programs of the Hopper backward visit every block of keys once, and in the order in which operands come?"""

import pytest
import torch
from gluon_as_python import as_python, language

from triton_attention.hopper import backward_walk
from triton_attention.hopper.configs import BackwardSpec, takes_blocks_in_turn
from triton_attention.hopper.plan_backward import _splits, plan_backward
from triton_attention.problem import NO_EXTRAS, Mask

SMS = 3
MASKS = [Mask(), Mask(None, 0), Mask(None, 0, top_left=True), Mask(70, 40), Mask(20, -30)]


def keys_launch(mask, seqlen_q, seqlen_k):
    q, k = torch.empty(2, seqlen_q, 4, 64).half(), torch.empty(2, seqlen_k, 2, 64).half()
    lse = torch.empty(2, 4, seqlen_q)
    return plan_backward(q, None, q, k, k, None, q, lse, mask, 0.1, False, NO_EXTRAS, False, SMS).launches[1]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(300, 1000), (1, 64), (700, 130), (64, 2000)])
def test_operands_come_in_the_order_in_which_they_are_used(mask, seqlen_q, seqlen_k):
    launch = keys_launch(mask, seqlen_q, seqlen_k)
    call, spec, tile = launch.arguments[-1].value, launch.spec, launch.tile
    assert launch.programs == SMS or launch.programs < 2 * SMS  # several blocks each, where there are as many
    visited = []
    program = [0]
    stand_in = language(program, launch.programs)
    names = ("num_blocks", "block_of", "first_step", "following")
    num_blocks, block_of, first_step, following = (as_python(getattr(backward_walk, name), stand_in) for name in names)
    blocks = num_blocks(call, spec, tile)
    for program[0] in range(launch.programs):
        to_send = first_step(call, spec, tile)
        for number in range(program[0], blocks, launch.programs):
            block = block_of(number, call, spec, tile)
            visited.append((block.batch, block.head_kv, block.start_n))
            assert 0 <= block.first < block.last <= -(-seqlen_q // 64)
            for head in range(block.head_kv * call.group, (block.head_kv + 1) * call.group):
                for m in range(block.first, block.last):
                    assert to_send == (head, m, block, number)
                    to_send = following(to_send, call, spec, tile)
        assert to_send.number >= blocks
    rows = 64 * tile.CONSUMERS
    assert sorted(visited) == [(b, h, n) for b in range(2) for h in range(2) for n in range(0, seqlen_k, rows)]


def test_a_block_that_no_query_sees_has_one_step_all_masked():
    launch = keys_launch(Mask(None, 0, top_left=True), 64, 2000)
    stand_in = language([0], SMS)
    block = as_python(backward_walk.block_of, stand_in)(8, launch.arguments[-1].value, launch.spec, launch.tile)
    assert block.start_n >= 64
    assert (block.first, block.last) == (0, 1)
    assert not block.full_first <= 0 < block.full_last


def test_which_blocks_are_taken_in_turn():
    full, causal = BackwardSpec(64, 64, False, False), BackwardSpec(64, 64, False, True)
    wide, packed = BackwardSpec(128, 128, False, False), BackwardSpec(64, 64, False, False, VARLEN=True)
    assert takes_blocks_in_turn(full, 10**6)
    assert takes_blocks_in_turn(causal, 1024)
    assert not takes_blocks_in_turn(causal, 1025)
    assert takes_blocks_in_turn(wide, 1024)
    assert not takes_blocks_in_turn(wide, 1025)
    assert not takes_blocks_in_turn(packed, 64)


@pytest.mark.parametrize(
    ("tiles", "sharers", "splits"), [(16, 256, 8), (36, 384, 7), (64, 512, 2), (4, 64, 32), (4096, 4, 1), (1, 8, 8)]
)
def test_sharers_of_a_bias_are_split_evenly(tiles, sharers, splits):
    assert _splits(tiles, sharers, 132) == splits
