"""Does the bound on errors take what rounding explains, and refuse what it does not?"""

from functools import partial

import pytest
import torch

from triton_attention import reference
from triton_attention.testing import Case, check_against_float64, make_inputs, tolerance
from triton_attention.testing.cases import CAUSAL, LENGTHS
from triton_attention.testing.rounding import rounded_attention

ONE_KEY = Case(67, 1, 16, dropout_p=0.3, bias="b1q1")
DROPOUT = {"mask": CAUSAL, "sink": True, "dropout_p": 0.3}


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rounding_out_is_allowed_where_its_terms_cancel(monkeypatch, dtype, extreme):
    """Of one key dscores is dlse in truth. Plain PyTorch has the probabilities, and finds it without the error."""
    inputs, problem = make_inputs(ONE_KEY._replace(dtype=dtype))
    inputs = inputs._replace(v=(16 * inputs.v.detach()).requires_grad_())
    check = check_against_float64(rounded_attention, inputs, problem, extreme=extreme)
    assert check.good, check
    if not extreme:
        monkeypatch.setattr(tolerance, "_roundings_of_delta", lambda *_: {})
        check = check_against_float64(rounded_attention, inputs, problem)
        assert [row.name for row in check.rows if not row.good] == ["dq", "dk", "dbias"]


def off_by(factor, name, inputs, problem):
    """The reference, with one gradient times `factor`."""
    double = type(inputs)._make(x.double() if x is not None and x.is_floating_point() else x for x in inputs)
    tensor = getattr(double, name)
    double = double._replace(**{name: tensor.detach() + factor * (tensor - tensor.detach())})
    out, lse = reference.attention(double, problem._replace(dtype=torch.float64))
    return out.to(inputs.q.dtype), lse.float()


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sink"])
@pytest.mark.parametrize(
    "case",
    [
        Case(128, 96, 64, bias="bhqk", **DROPOUT),
        Case(65, 200, 32, heads_q=4, heads_kv=2, bias="bhqk", **DROPOUT),
        Case(50, 61, 40, 24, bias="bhqk", lengths=LENGTHS, **DROPOUT),
        Case(60, 60, 16, bias="bhqk", dtype=torch.float32, **DROPOUT),
    ],
    ids=str,
)
def test_a_gradient_that_is_off_by_a_percent_is_refused(case, name, extreme):
    inputs, problem = make_inputs(case)
    check = check_against_float64(partial(off_by, 1.0, name), inputs, problem, extreme=extreme)
    assert check.good, check
    check = check_against_float64(partial(off_by, 1.01, name), inputs, problem, extreme=extreme)
    assert [row.name for row in check.rows if not row.good] == [f"d{name}"], check
