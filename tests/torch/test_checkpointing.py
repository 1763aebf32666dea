"""What is kept for the backward, and does activation checkpointing compute it again with equal gradients?"""

from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from triton_attention import attention
from triton_attention.portable import launch

SEQLEN_Q, SEQLEN_K = 5, 8


@pytest.fixture(autouse=True)
def _compile_afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def run_forward(monkeypatch):
    """The launcher's forward, spied upon."""
    spy = Mock(wraps=launch.forward)
    monkeypatch.setattr(launch, "forward", spy)
    return spy


def make_leaves():
    shapes = ((1, SEQLEN_Q, 2, 16), (1, SEQLEN_K, 1, 16), (1, SEQLEN_K, 1, 16), (2, SEQLEN_Q, SEQLEN_K))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def block(q, k, v, bias):
    """Attention between operations whose results are kept too, unless they are checkpointed."""
    return attention(q.sin(), k, v.cos(), bias=bias, causal=True).exp()


def checkpointed(q, k, v, bias):
    return checkpoint(block, q, k, v, bias, use_reentrant=False)


def keep_attention(ctx, operator, *args, **kwargs):
    kept = operator == torch.ops.triton_attention.attention_fwd.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def selectively_checkpointed(q, k, v, bias):
    context = partial(create_selective_checkpoint_contexts, keep_attention)
    return checkpoint(block, q, k, v, bias, use_reentrant=False, context_fn=context)


def compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


def saved_by(function, *leaves):
    """The tensors that autograd keeps, and the results."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        results = function(*leaves)
    return saved, results


@pytest.mark.parametrize("shape", [(1, 2, SEQLEN_Q, SEQLEN_K), (1, 1, 1, SEQLEN_K), None])
def test_saves_its_inputs_and_outputs(shape):
    q, k, v, _ = make_leaves()
    bias = None if shape is None else torch.randn(shape, requires_grad=True)
    saved, (out, lse) = saved_by(lambda *leaves: attention(*leaves, bias=bias, return_lse=True), q, k, v)
    expected = [tensor for tensor in (q, k, v, bias, out, lse) if tensor is not None]
    assert len(saved) == len(expected)
    assert all(kept is tensor for kept, tensor in zip(saved, expected, strict=True))


def test_compiled_saves_its_inputs_and_outputs():
    q, k, v, _ = make_leaves()
    saved, (out, lse) = saved_by(compiled(partial(attention, causal=True, return_lse=True)), q, k, v)
    pointers = sorted(tensor.data_ptr() for tensor in (q, k, v, out, lse))
    assert sorted(tensor.data_ptr() for tensor in saved) == pointers


OUTPUTS = [(1, SEQLEN_Q, 2, 16), (1, 2, SEQLEN_Q)]  # the shapes of out and lse
VARIANTS = {  # then how often the forward kernel runs in all, and the shapes that autograd keeps beside the leaves
    "checkpointed": (checkpointed, 2, []),
    "selective": (selectively_checkpointed, 1, []),  # eager, checkpoint keeps out and lse in a cache of its own
    "checkpointed, compiled": (compiled(checkpointed), 2, []),
    "selective, compiled": (compiled(selectively_checkpointed), 1, OUTPUTS),
}


@pytest.mark.parametrize(("function", "forward_runs", "kept"), VARIANTS.values(), ids=VARIANTS)
def test_checkpointed_gradients_are_equal(run_forward, function, forward_runs, kept):
    leaves = make_leaves()
    out = block(*leaves)
    expected = torch.autograd.grad(out.sum(), leaves)
    run_forward.reset_mock()
    saved, result = saved_by(function, *leaves)
    gradients = torch.autograd.grad(result.sum(), leaves)
    assert run_forward.call_count == forward_runs
    torch.testing.assert_close(result, out)
    torch.testing.assert_close(gradients, expected)
    assert [tuple(tensor.shape) for tensor in saved if not any(tensor is leaf for leaf in leaves)] == kept
