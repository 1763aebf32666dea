"""Is everything as before after a call that failed: out of memory, or interrupted, at any of its allocations?"""

from itertools import count

import pytest
import torch

from triton_attention import attention


class Fault:
    """Raises an error in place of the `at`-th allocation by Python code."""

    def __init__(self, monkeypatch, error, at):
        self.error, self.left = error, at
        for owner, name in ((torch, "empty"), (torch, "zeros"), (torch.Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, self.failing(getattr(owner, name)))

    def failing(self, allocate):
        def failing(*arguments, **keywords):
            self.left -= 1
            if self.left == 0:
                raise self.error
            return allocate(*arguments, **keywords)

        return failing


def leaves():
    shapes = ((1, 5, 2, 16), (1, 8, 1, 16), (1, 8, 1, 16), (1, 2, 5, 8))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def backward(q, k, v, bias):
    out, lse = attention(q, k, v, bias=bias, causal=True, return_lse=True)
    (out.sum() + lse.sum()).backward()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()], ids=repr)
def test_a_call_that_failed_leaves_nothing_behind(monkeypatch, error):
    tensors = leaves()
    backward(*tensors)
    expected = [tensor.grad for tensor in tensors]
    for at in count(1):
        for tensor in tensors:
            tensor.grad = None
        with monkeypatch.context() as patch:
            Fault(patch, error, at)
            if not raises(type(error), tensors):
                break
            assert [tensor.grad for tensor in tensors] == [None] * 4
        backward(*tensors)
        assert all(torch.equal(tensor.grad, true) for tensor, true in zip(tensors, expected, strict=True))
    assert at > 6  # out, lse, and in the backward dq, dk, dv, dbias and two numbers a row


def raises(error, tensors):
    try:
        backward(*tensors)
    except error:
        return True
    return False


def test_a_graph_that_is_kept_can_be_differentiated_after_a_failure(monkeypatch):
    tensors = leaves()
    out = attention(*tensors[:3], bias=tensors[3])
    expected = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    with monkeypatch.context() as patch:
        Fault(patch, torch.OutOfMemoryError("CUDA out of memory"), 2)
        with pytest.raises(torch.OutOfMemoryError):
            torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    again = torch.autograd.grad(out.sum(), tensors)
    assert all(map(torch.equal, expected, again))
