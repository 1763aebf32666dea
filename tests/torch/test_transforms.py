"""Do torch.export and torch.func take attention, or do they refuse it clearly?"""

from functools import partial

import pytest
import torch
from torch import nn

from triton_attention import attention

BACKENDS = ("portable", "reference")


class Attention(nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, q, k, v, bias):
        return attention(q, k, v, bias=bias, causal=True, return_lse=True, backend=self.backend)


def make_inputs(seqlen_q, seqlen_k, *leading):
    shapes = ((1, seqlen_q, 2, 16), (1, seqlen_k, 1, 16), (1, seqlen_k, 1, 16), (2, seqlen_q, seqlen_k))
    return tuple(torch.randn(*leading, *shape) for shape in shapes)


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_export_with_dynamic_lengths(backend, strict):
    module, (q, k) = Attention(backend), (torch.export.Dim(f"seqlen_{name}", max=512) for name in "qk")
    shapes = ({1: q}, {1: k}, {1: k}, {1: q, 2: k})
    program = torch.export.export(module, make_inputs(5, 8), dynamic_shapes=shapes, strict=strict)
    for lengths in ((5, 8), (7, 9), (2, 40)):
        inputs = make_inputs(*lengths)
        torch.testing.assert_close(program.module()(*inputs), module(*inputs))
    if backend == "portable":
        operators = {node.target for node in program.graph.nodes if node.op == "call_function"}
        assert torch.ops.triton_attention.attention_fwd.default in operators


def per_example(function, inputs, in_dims):
    """What vmap says it computes."""
    results = []
    for i in range(inputs[0].shape[0]):
        example = [x if dim is None else x[i] for x, dim in zip(inputs, in_dims, strict=True)]
        results.append(function(*example))
    return tuple(torch.stack(result) for result in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (0, None, None, None)], ids=["all", "q"])
def test_vmap(backend, in_dims):
    """The Triton operator runs once for each example: it has no batching rule of its own."""
    function = Attention(backend)
    inputs = make_inputs(5, 8, 2)
    leaves = [(x[0] if dim is None else x).requires_grad_() for x, dim in zip(inputs, in_dims, strict=True)]
    results = torch.func.vmap(function, in_dims=in_dims)(*leaves)
    expected = per_example(function, leaves, in_dims)
    torch.testing.assert_close(results, expected)
    gradients = [torch.autograd.grad([x.sum() for x in outputs], leaves) for outputs in (results, expected)]
    torch.testing.assert_close(*gradients)


def loss(backend, *inputs):
    out, lse = Attention(backend)(*inputs)
    return out.square().sum() + lse.sum()


def test_func_grad_on_the_reference():
    inputs = make_inputs(5, 8)
    gradients = torch.func.grad(partial(loss, "reference"), argnums=(0, 1, 2, 3))(*inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.testing.assert_close(gradients, torch.autograd.grad(loss("reference", *leaves), leaves))


def test_func_grad_is_refused_by_pytorch_on_a_triton_backend():
    """torch.library.register_autograd makes no operator for torch.func.grad; torch.autograd.grad is the way."""
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(partial(loss, "portable"))(*make_inputs(5, 8))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # raised by jvp itself
def test_jvp_is_refused_on_a_triton_backend():
    q, *others = make_inputs(5, 8)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative on the Triton backends"):
        torch.func.jvp(lambda q: loss("portable", q, *others), (q,), (q,))
