"""Does attention keep to the modes it is called in: no_grad, inference_mode, autocast?"""

import pytest
import torch

from triton_attention import attention

BACKENDS = ("portable", "reference")


def make_qkvb(dtype=torch.float32, requires_grad=True):
    shapes = ((1, 5, 2, 16), (1, 8, 1, 16), (1, 8, 1, 16), (2, 5, 8))
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def call(backend, q, k, v, bias):
    return attention(q, k, v, bias=bias, causal=True, return_lse=True, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend, mode):
    inputs = make_qkvb()
    expected = call(backend, *inputs)
    with mode():
        results = call(backend, *inputs)
    for result, true in zip(results, expected, strict=True):
        assert torch.equal(result, true)
        assert (true.requires_grad, result.requires_grad, result.grad_fn) == (True, False, None)
        assert result.is_inference() == (mode is torch.inference_mode)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_made_in_inference_mode(backend):
    with torch.inference_mode():
        inputs = make_qkvb(requires_grad=False)
        results = call(backend, *inputs)
    expected = call(backend, *(tensor.clone() for tensor in inputs))
    for result, true in zip(results, expected, strict=True):
        assert torch.equal(result, true)


# Triton's interpreter computes products of bfloat16 wrongly, so there it is float16.
AUTOCAST = [("portable", torch.float16), ("reference", torch.float16), ("reference", torch.bfloat16)]


@pytest.mark.parametrize(("backend", "dtype"), AUTOCAST)
def test_autocast_is_a_cast_of_q_k_and_v(backend, dtype):
    leaves = make_qkvb()
    with torch.autocast("cpu", dtype=dtype):
        out, lse = call(backend, *leaves)
    gradients = torch.autograd.grad([out.float().sum(), lse.sum()], leaves)
    expected_out, expected_lse = call(backend, *(tensor.to(dtype) for tensor in leaves[:3]), leaves[3])
    expected = torch.autograd.grad([expected_out.float().sum(), expected_lse.sum()], leaves)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)
    for gradient, true in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, true)


@pytest.mark.parametrize(("backend", "dtype"), AUTOCAST)
def test_autocast_against_float64(backend, dtype):
    leaves = make_qkvb()
    with torch.autocast("cpu", dtype=dtype):
        out, lse = call(backend, *leaves)
    exact = [tensor.detach().to(dtype).double().requires_grad_() for tensor in leaves[:3]]
    true_out, true_lse = call("reference", *exact, leaves[3].detach().double())
    epsilon = torch.finfo(dtype).eps  # of probabilities that are at most 1, and of the result's rounding
    torch.testing.assert_close(out.double(), true_out, rtol=epsilon, atol=epsilon)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_disabled_autocast_casts_nothing(backend):
    inputs = make_qkvb(requires_grad=False)
    with torch.autocast("cpu", dtype=torch.float16), torch.autocast("cpu", enabled=False):
        out, _ = call(backend, *inputs)
    assert out.dtype == torch.float32
    assert torch.equal(out, call(backend, *inputs)[0])


def test_backward_inside_autocast():
    """The operator computes the same there. (PyTorch's own backward, the reference's, would round its products.)"""
    leaves = make_qkvb()
    with torch.autocast("cpu", dtype=torch.float16):
        out, _ = call("portable", *leaves)
        inside = torch.autograd.grad(out.float().sum(), leaves, retain_graph=True)
    for gradient, outside in zip(inside, torch.autograd.grad(out.float().sum(), leaves), strict=True):
        assert torch.equal(gradient, outside)
