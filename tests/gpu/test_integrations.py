"""Does code that knows nothing of this package run on it on a GPU, through PyTorch's registry of flash attention?"""

from unittest.mock import Mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from triton_attention import attention, dispatch
from triton_attention.integrations import pytorch

pytestmark = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "register_flash_attention_impl"),
    reason="this PyTorch has no registry of flash attention",
)


@pytest.fixture
def select(monkeypatch):
    """Activates our kernels; what chooses among them is spied upon."""
    spy = Mock(wraps=dispatch.select)
    monkeypatch.setattr(dispatch, "select", spy)
    pytorch.register()
    torch.nn.attention.activate_flash_attention_impl(pytorch.NAME)
    yield spy
    torch.nn.attention.restore_flash_attention_impl()


def make_leaves(layout):
    """query, key and value (2, 4, 300, 64) in bfloat16; "bshd": the heads of a position are neighbours in memory."""
    torch.manual_seed(0)
    shape = (2, 4, 300, 64) if layout == "bhsd" else (2, 300, 4, 64)
    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    return [(leaf if layout == "bhsd" else leaf.transpose(1, 2)).requires_grad_() for leaf in leaves]


def results(function, leaves):
    out = function(*leaves)
    return out, *torch.autograd.grad(out.float().square().sum(), leaves)


def ours(is_causal, q, k, v):
    return attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=is_causal).transpose(1, 2)


def sdpa(is_causal, q, k, v):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_plain_sdpa_is_our_attention(select, layout, is_causal):
    leaves = make_leaves(layout)
    expected = results(lambda *leaves: ours(is_causal, *leaves), leaves)
    select.reset_mock()
    found = results(lambda *leaves: sdpa(is_causal, *leaves), leaves)
    assert select.call_count == 2  # forward and backward
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)  # the same kernels


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_compiled(select, layout):
    leaves = make_leaves(layout)
    expected = results(lambda *leaves: sdpa(True, *leaves), leaves)
    select.reset_mock()
    found = results(torch.compile(lambda *leaves: sdpa(True, *leaves)), leaves)
    assert select.call_count == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_restored_it_is_pytorchs_own(select):
    torch.nn.attention.restore_flash_attention_impl()
    select.reset_mock()
    results(lambda *leaves: sdpa(True, *leaves), make_leaves("bhsd"))
    assert not select.called
    torch.nn.attention.activate_flash_attention_impl(pytorch.NAME)  # for the fixture to restore
