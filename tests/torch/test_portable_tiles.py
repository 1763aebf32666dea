"""Do packed sequences with dropout have a tile of their own, and nothing else?"""

import pytest

from triton_attention.testing import Case
from triton_attention.testing.fake_device import TARGETS, launches

LENGTHS = ((35, 40), (50, 61))


@pytest.mark.parametrize(
    ("lengths", "dropout_p", "stages"), [(LENGTHS, 0.3, 1), (LENGTHS, 0.0, 3), (None, 0.3, 3)], ids=str
)
def test_stages_beside_packed_values_and_dropout(lengths, dropout_p, stages):
    forward, *_ = launches(Case(50, 61, 40, lengths=lengths, dropout_p=dropout_p), TARGETS["sm_90"])
    assert forward.tile.TMA
    assert forward.tile.num_stages == stages
