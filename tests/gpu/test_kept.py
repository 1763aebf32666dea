"""Are gradients right, and always the same bits, where a program keeps dq of a head in shared memory?"""

import pytest
import torch
from hardware import needs_hopper

from triton_attention import ops
from triton_attention.hopper.configs import BackwardSpec, kept_tile_for
from triton_attention.problem import Mask
from triton_attention.testing import Case, check_against_float64, make_inputs
from triton_attention.testing.cases import CAUSAL, CAUSAL_TOP_LEFT, FULL

pytestmark = needs_hopper

HEADS = {"batch": 132, "heads_q": 4}  # four for each of an H100's multiprocessors
LENGTHS = ((64, 64), (49, 49), (130, 200), (256, 256), (1, 70), (250, 513))
CASES = [
    *(Case(q, k, 32, mask=mask, **HEADS) for q, k in LENGTHS for mask in (FULL, CAUSAL, CAUSAL_TOP_LEFT, Mask(70, 40))),
    *(
        Case(200, 136, 32, mask=mask, bias=bias, dtype=torch.bfloat16, **HEADS)
        for bias in ("1hqk", "bhqk", "b1qk", "b11k", "bhq1")
        for mask in (FULL, CAUSAL)
    ),
    Case(256, 136, 16, bias="bhqk", **HEADS),
    Case(200, 144, 32, bias="1hqk", bias_dtype=torch.bool, mask=CAUSAL, **HEADS),
    Case(200, 140, 32, alibi="bh", sink=True, mask=CAUSAL, **HEADS),
    Case(200, 140, 32, softcap=3.0, **HEADS),
    Case(200, 140, 32, dropout_p=0.3, mask=CAUSAL, **HEADS),
]


def attention(inputs, problem):
    return ops.attention(inputs, problem, "hopper")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case):
    check = check_against_float64(attention, *make_inputs(case, "cuda"))
    assert check.good, f"\n{check}"


def test_dq_is_the_same_in_every_run():
    case = Case(256, 256, 32, bias="1hqk", dtype=torch.bfloat16, **HEADS)
    assert kept_tile_for(BackwardSpec(32, 0, 32, 0, False, False, "added", True), 2, case.seqlen_q) is not None
    inputs, problem = make_inputs(case, "cuda")
    out, _ = attention(inputs, problem)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, inputs.q, dout, retain_graph=True)[0]
    for _ in range(100):
        assert torch.equal(torch.autograd.grad(out, inputs.q, dout, retain_graph=True)[0], first)
