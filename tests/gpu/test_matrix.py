"""Are out, lse and every gradient right over the classic matrix, and over every case the interpreter tries?"""

import pytest
from matrix import ALL

from triton_attention import ops
from triton_attention.testing import check_against_float64, make_inputs


@pytest.mark.parametrize("case", ALL, ids=str)
def test_against_float64(case):
    check = check_against_float64(lambda *call: ops.attention(*call, "portable"), *make_inputs(case, "cuda"))
    assert check.good, f"\n{check}"
