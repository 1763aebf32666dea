"""Do operands that take turns at one place in shared memory lie there alike? See `layouts_of_places`."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from triton_attention.testing import Case
from triton_attention.testing.fake_device import TARGETS, launches, layouts_of_places

SM_90 = TARGETS["sm_90"]
LENGTHS = ((300, 304), (100, 90))


def case_of(head_dim, head_dim_v, lengths=None):
    return Case(304, 304, head_dim, head_dim_v, lengths=lengths, dtype=torch.bfloat16)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["dense", "packed"])
@pytest.mark.parametrize(("head_dim", "head_dim_v"), list(permutations((16, 32, 64), 2)))
def test_one_layout_a_place(head_dim, head_dim_v, lengths):
    for launch in launches(case_of(head_dim, head_dim_v, lengths), SM_90):
        layouts = layouts_of_places(launch, SM_90)
        assert all(len(alike) == 1 for alike in layouts), launch.kernel.__name__
        assert layouts or launch.kernel.__name__ == "attention_bwd_rows"


def test_two_layouts_are_seen():
    """Where blocks are not prefetched, values come to where keys were."""
    forward, *_ = launches(case_of(64, 32), SM_90)
    layouts = layouts_of_places(forward._replace(tile=replace(forward.tile, num_stages=1)), SM_90)
    assert max(map(len, layouts)) == 2
