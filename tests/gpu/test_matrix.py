"""Are out and every gradient right over the classic matrix of head dimensions, lengths, masks, biases and dtypes?"""

from itertools import product

import pytest
import torch
from precompile import precompile

from triton_attention import ops
from triton_attention.testing import CASES, Case, check_against_float64, make_inputs
from triton_attention.testing.cases import CAUSAL, FULL

HEAD_DIMS = (40, 48, 59, 64, 80, 88, 96, 111, 128, 160, 192, 224, 256)
LENGTHS = (
    (113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1024, 1024), (1023, 1024), (1024, 1023),
    (2048, 2048), (1, 239), (3, 799), (127, 512), (127, 513),
)  # fmt: skip
BIASES = (None, "1h1k", "1hqk", "b11k", "b1qk", "bhqk")
DTYPES = (torch.float16, torch.bfloat16)

MATRIX = [
    Case(seqlen_q, seqlen_k, head_dim, mask=mask, bias=bias, dtype=dtype)
    for head_dim, mask, bias, dtype, (seqlen_q, seqlen_k) in product(HEAD_DIMS, (FULL, CAUSAL), BIASES, DTYPES, LENGTHS)
]
ALL = [*MATRIX, *CASES]


@pytest.fixture(scope="module")
def _precompiled():
    assert precompile(ALL) > len(HEAD_DIMS)


@pytest.mark.usefixtures("_precompiled")
@pytest.mark.parametrize("case", ALL, ids=str)
def test_against_float64(case):
    check = check_against_float64(lambda *call: ops.attention(*call, "portable"), *make_inputs(case, "cuda"))
    assert check.good, f"\n{check}"
