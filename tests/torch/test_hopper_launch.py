"""Does the Hopper launcher fill in the right addresses when it meets a layout again, and refuse what it cannot take?"""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from triton_attention.hopper import launch
from triton_attention.hopper.bias import BiasTensor
from triton_attention.problem import Mask

CAUSAL = Mask(None, 0)
SMS = 4  # fewer than tiles, so that a causal call counts them


class Variant:
    """Stands for a compiled kernel: `variant[grid](*values)` keeps the values."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *values: self.calls.append(values)


@pytest.fixture
def variant(monkeypatch):
    variant = Variant()
    monkeypatch.setattr(launch, "_recipes", {})
    monkeypatch.setattr(launch, "_num_sms", lambda device: SMS)
    monkeypatch.setattr(launch, "run", lambda planned: None)
    monkeypatch.setattr(launch, "variant", lambda planned: variant)
    return variant


def tensors(head_dim, bias_shape, dtype=torch.bfloat16):
    q, k, v = torch.randn(3, 2, 300, 3, head_dim).to(dtype)
    return q, k, v, None if bias_shape is None else torch.randn(bias_shape).to(dtype)


def addresses(values):
    return [
        None if value is None
        else value.base.data_ptr() if hasattr(value, "base")
        else value.ptr.data_ptr() if isinstance(value, BiasTensor)
        else value.data_ptr()
        for value in values
    ]  # fmt: skip


@pytest.mark.parametrize("mask", [Mask(), CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("bias_shape", [None, (1, 3, 300, 304), (2, 1, 1, 304), (1, 3, 300, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_a_layout_met_again_changes_addresses_alone(variant, head_dim, bias_shape, mask):
    q, k, v, bias = tensors(head_dim, bias_shape)
    if bias_shape is not None and bias_shape[3] == 304:
        k, v = (torch.cat((x, x[:, :4]), dim=1) for x in (k, v))
    first = launch.forward(q, k, v, bias, mask, 0.1)
    assert variant.calls == []
    others = [None if x is None else x.clone() for x in (q, k, v, bias)]
    out, lse = launch.forward(*others, mask, 0.1)
    assert [x.shape for x in (out, lse)] == [x.shape for x in first]

    (values,) = variant.calls
    plan = launch.plan_forward(*others, mask, 0.1, SMS)
    planned = [argument.value for argument in plan.launch.arguments]
    assert values[-3:] == (planned[-1], plan.launch.spec, plan.launch.tile)
    tail = None if head_dim == 64 else 64 * 2
    *inputs, out_address, out_tail, lse_address, counter = addresses(values[:-3])
    assert inputs == addresses(planned[:7])
    assert (out_address, lse_address) == (out.data_ptr(), lse.data_ptr())
    assert out_tail == (None if tail is None else out.data_ptr() + tail)
    assert (counter == lse_address) == (mask != CAUSAL)  # the word that tiles are counted in


@pytest.mark.parametrize("what", ["q", "k", "v", "bias"])
def test_rows_that_are_not_aligned_are_not_taken(variant, what):
    calls = dict(zip(("q", "k", "v", "bias"), tensors(64, (1, 3, 300, 300)), strict=True))
    calls["bias"] = calls["bias"][..., :296].contiguous()
    calls["k"], calls["v"] = (calls[name][:, :296] for name in ("k", "v"))
    assert launch.forward(**calls, mask=Mask(), softmax_scale=0.1) is not None
    wide = torch.zeros(*calls[what].shape[:3], calls[what].shape[3] + 1, dtype=torch.bfloat16)
    calls[what] = wide[..., 1:]
    assert launch.forward(**calls, mask=Mask(), softmax_scale=0.1) is None


def test_a_vector_of_bias_that_is_not_aligned_is_copied_each_time(variant):
    q, k, v, _ = tensors(64, None)
    k, v, bias = k[:, :299], v[:, :299], torch.randn(2, 1, 1, 299).bfloat16()
    for _ in range(2):
        assert launch.forward(q, k, v, bias, Mask(), 0.1) is not None
    assert variant.calls == []


def test_what_is_remembered_keeps_no_tensor_alive(variant):
    calls = [(*tensors(96, (1, 3, 300, 304))[:1], *tensors(96, None)[1:3], None) for _ in range(2)]
    calls.append((*tensors(96, None)[:3], torch.randn(1, 3, 300, 1)))
    references = []
    for call in calls:
        results = launch.forward(*call, CAUSAL, 0.1)
        references += [StorageWeakRef(x.untyped_storage()) for x in (*call, *results) if x is not None]
    variant.calls.clear()
    del call, calls, results
    gc.collect()
    assert all(reference.expired() for reference in references)
