"""Does plain scaled_dot_product_attention reach our kernels through PyTorch's registry, forward and backward?

PyTorch calls the registered operators on GPUs alone. Here they are registered for the CPU, and called by their names.
"""

from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from triton_attention.integrations import pytorch
from triton_attention.portable import launch

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning:triton")

flash_attention = torch.ops.aten._scaled_dot_product_flash_attention


@pytest.fixture
def _on_the_cpu():
    handle = pytorch.activate("CPU")
    yield
    handle.remove()


def make_leaves(layout):
    """query, key and value (2, heads, seqlen, 16); "bshd": the heads of a position are neighbours in memory."""
    shapes = ((2, 2, 7, 16), (2, 1, 9, 16), (2, 1, 9, 16))
    if layout == "bhsd":
        return [torch.randn(shape, requires_grad=True) for shape in shapes]
    return [torch.randn(b, s, h, d).transpose(1, 2).requires_grad_() for b, h, s, d in shapes]


@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_results_and_gradients(layout, is_causal, scale, monkeypatch):
    spy = Mock(wraps=launch.backward)
    monkeypatch.setattr(launch, "backward", spy)
    leaves = make_leaves(layout)
    out, lse, *_ = flash_attention(*leaves, is_causal=is_causal, scale=scale)
    assert out.stride() == torch.empty_like(leaves[0]).stride()
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, dout)
    assert spy.called

    expected = scaled_dot_product_attention(*leaves, is_causal=is_causal, scale=scale, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves, dout), rtol=1e-5, atol=1e-5)
    q, k, _ = leaves
    scores = (16**-0.5 if scale is None else scale) * q @ k.expand(2, 2, 9, 16).mT
    scores = scores.masked_fill(~torch.ones(7, 9, dtype=torch.bool).tril(), -torch.inf) if is_causal else scores
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("_on_the_cpu")
def test_shapes_and_layouts_are_those_that_the_compiler_expects():
    for layout in ("bhsd", "bshd"):
        leaves = make_leaves(layout)
        real = flash_attention(*leaves)
        fake = flash_attention(*(leaf.to("meta") for leaf in leaves))
        for mine, theirs in zip(real, fake, strict=True):
            if isinstance(theirs, torch.Tensor):
                assert (mine.shape, mine.stride(), mine.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
            else:
                assert mine == theirs


@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("arguments", [{"dropout_p": 0.1}, {"return_debug_mask": True}])
def test_dropout_is_refused(arguments):
    with pytest.raises(NotImplementedError, match=r"dropout_p must be 0\.0 and return_debug_mask False"):
        flash_attention(*make_leaves("bhsd"), **arguments)


def test_the_registry_activates_and_restores(monkeypatch):
    registry = torch.nn.attention
    activate = Mock(wraps=partial(pytorch.activate, "CPU"))
    monkeypatch.setattr(pytorch, "activate", activate)
    pytorch.register()
    assert pytorch.NAME in registry.list_flash_attention_impls()
    assert not activate.called  # registering changes nothing yet
    leaves = make_leaves("bhsd")
    registry.activate_flash_attention_impl(pytorch.NAME)
    try:
        assert registry.current_flash_attention_impl() == pytorch.NAME
        flash_attention(*leaves)
    finally:
        registry.restore_flash_attention_impl()
    assert registry.current_flash_attention_impl() is None
    with pytest.raises(NotImplementedError, match="_scaled_dot_product_flash_attention"):
        flash_attention(*leaves)


def test_gpus_are_what_is_activated_for():
    library = pytorch.activate()._library
    assert [operator.rsplit("/", 1)[1] for operator in sorted(library._op_impls)] == ["CUDA", "CUDA"]


def test_a_pytorch_without_the_registry(monkeypatch):
    monkeypatch.setattr(torch.nn, "attention", SimpleNamespace())
    with pytest.raises(
        NotImplementedError, match=r"torch must have torch\.nn\.attention\.register_flash_attention_impl"
    ):
        pytorch.register()
