"""Do packed sequences keep to themselves, and do programs run for the blocks that there are, and no more?"""

import math
from itertools import accumulate

import pytest
import torch

from triton_attention import ops, reference
from triton_attention.arguments import ceil_div
from triton_attention.portable.launch import Settings, plan_backward, plan_forward
from triton_attention.problem import Extras, Inputs, Mask, Packing, Problem

# numpy's, in rows that see no key or that hold NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

FULL, CAUSAL = Mask(), Mask(None, 0)


def boundaries(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def problem_of(inputs, mask=FULL, max_seqlen_q=99, max_seqlen_k=99):
    numbers = {"softmax_scale": None, "softcap": 0.0, "dropout_p": 0.0, "deterministic": False}
    return Problem.from_tensors(inputs, mask=mask, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, **numbers)


def packed(lengths, head_dim, bias=None):
    """q, k and v of sequences of equal lengths along the queries and keys, 2 query heads and 1 key head."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(lengths), heads, head_dim, generator=generator).half().requires_grad_() for heads in (2, 1, 1)
    )
    starts = boundaries(lengths)
    return Inputs(q, k, v, bias, cu_seqlens_q=starts, cu_seqlens_k=starts)


def results(inputs, problem, attention=None):
    """out, lse, and the gradients through both, of what requires one."""
    out, lse = attention(inputs, problem) if attention else ops.attention(inputs, problem, "portable")
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse)]
    return out.detach(), lse.detach().T, *torch.autograd.grad((out, lse), leaves, weights)


@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [16, 13])  # by descriptors, which know no end of a sequence, and by pointers
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_sequence(head_dim, mask, value):
    lengths = (20, 35, 3, 17)
    bias = torch.randn(4, 1, 40, 40).requires_grad_()
    inputs = packed(lengths, head_dim, bias)
    problem = problem_of(inputs, mask, 40, 40)
    expected = results(inputs, problem)
    with torch.no_grad():
        for tensor in inputs[:3]:
            tensor[20:55] = value  # the second sequence
    *actual, dbias = results(inputs, problem)
    others = torch.tensor([*range(20), *range(55, 75)])
    assert actual[0][20:55].isnan().any()
    for one, two in zip(actual, expected, strict=False):
        assert torch.equal(one[others], two[others])
    assert torch.equal(dbias[[0, 2, 3]], expected[-1][[0, 2, 3]])


@pytest.mark.parametrize("pattern", [(3, 2, 40, 40), (1, 2, 40, 40), (3, 1, 1, 40), (1, 1, 40, 1)], ids=str)
def test_what_lies_beyond_a_sequence_in_its_bias_is_not_read(pattern):
    inputs = packed((20, 35, 3), 16)
    bias = torch.randn(pattern)
    if pattern[0] == 3:
        bias[0, :, 20:, :] = math.nan
        bias[0, :, :, 20:] = math.nan
    bias[:, :, 35:, :] = math.nan
    bias[:, :, :, 35:] = math.nan
    inputs = inputs._replace(bias=bias.requires_grad_())
    *finite, dbias = results(inputs, problem_of(inputs, FULL, 40, 40))
    assert all(x.isfinite().all() for x in finite)
    assert torch.equal(dbias[:, :, 35:], torch.zeros_like(dbias[:, :, 35:]))
    assert torch.equal(dbias[..., 35:], torch.zeros_like(dbias[..., 35:]))


@pytest.mark.parametrize("wanted", [1, 30])
def test_lengths_beyond_what_was_promised_are_right_without_a_bias_and_within_bounds_with_one(wanted):
    """On a GPU max_seqlen is not compared with the lengths, which would wait for them."""
    inputs = packed((20, 35, 3), 16)
    problem = problem_of(inputs)
    shorter = problem._replace(seqlen_q=wanted, seqlen_k=wanted)
    assert all(torch.equal(*pair) for pair in zip(results(inputs, problem), results(inputs, shorter), strict=True))
    guarded = torch.full((1, 2, wanted + 40, wanted + 40), math.nan)
    guarded[:, :, :wanted, :wanted] = 0.0
    inputs = inputs._replace(bias=guarded[:, :, :wanted, :wanted].requires_grad_())
    assert all(x.isfinite().all() for x in results(inputs, shorter))


def test_more_sequences_than_are_searched_at_once():
    lengths = [1, 0, 2] * 201 + [40]
    inputs = packed(lengths, 16)
    problem = problem_of(inputs, CAUSAL)
    assert problem.batch > 2 * 256
    for one, two in zip(results(inputs, problem), results(inputs, problem, reference.attention), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-2)


def test_equal_lengths_are_a_batch():
    inputs = packed((37, 37), 16)
    q, k, v = (x.detach().unflatten(0, (2, 37)).requires_grad_() for x in inputs[:3])
    out, lse, *gradients = results(inputs, problem_of(inputs, CAUSAL))
    dense = Inputs(q, k, v)
    dense_out, dense_lse = ops.attention(dense, problem_of(dense, CAUSAL), "portable")
    assert torch.equal(out, dense_out.flatten(0, 1))
    assert torch.equal(lse, dense_lse.transpose(1, 2).flatten(0, 1))
    weights = torch.Generator().manual_seed(1)
    dout, dlse = torch.randn(out.shape, generator=weights).half(), torch.randn(lse.T.shape, generator=weights)
    dense_weights = dout.unflatten(0, (2, 37)), dlse.unflatten(1, (2, 37)).transpose(0, 1)
    for one, two in zip(gradients, torch.autograd.grad((dense_out, dense_lse), (q, k, v), dense_weights), strict=True):
        assert torch.equal(one, two.flatten(0, 1))


def test_programs_are_as_many_as_there_are_blocks():
    """One long sequence and 63 short ones: a grid over the longest would have 64 times as many."""
    lengths, heads = [16384, *[64] * 63], 4
    total = sum(lengths)
    q = torch.empty(1, total, heads, 64, dtype=torch.bfloat16, device="meta")
    starts = torch.empty(len(lengths) + 1, dtype=torch.int32, device="meta")
    extras = Extras(packing=Packing(starts, starts, 16384, 16384))
    settings = Settings(CAUSAL, 0.125, "sm_90", extras)
    forward = plan_forward(q, q, q, None, settings)
    backward = plan_backward(q, None, q, q, q, None, q, forward.lse, settings, needs_dbias=False)
    for launch in (forward.launch, *backward.launches):
        block = launch.tile.BLOCK_N if launch.kernel.__name__ == "attention_bwd_dkdv" else launch.tile.BLOCK_M
        blocks = sum(ceil_div(length, block) for length in lengths)
        assert blocks * heads <= launch.programs <= (blocks + len(lengths) + 1) * heads
