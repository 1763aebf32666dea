"""Do the drop-in faces have the signatures and the semantics of what they replace?"""

import inspect
from itertools import accumulate

import pytest
import torch
from torch.nn import functional

from triton_attention import attention
from triton_attention.compat import flash_attn, flash_attn_triton, sdpa
from triton_attention.problem import Inputs, Mask, Problem
from triton_attention.reference import attention as reference_attention

BATCH, HEADS, HEADS_KV, SEQLEN_Q, SEQLEN_K, HEAD_DIM = 2, 4, 2, 5, 7, 8

# flash_attn 2.8: flash_attn/flash_attn_interface.py. The classic module: flash_attn/flash_attn_triton.py.
COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
CU_SEQLENS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
BIAS = "*, bias=None"
SIGNATURES = [
    (flash_attn.flash_attn_func, f"q, k, v, {COMMON}, {BIAS}"),
    (flash_attn.flash_attn_kvpacked_func, f"q, kv, {COMMON}, {BIAS}"),
    (flash_attn.flash_attn_qkvpacked_func, f"qkv, {COMMON}, {BIAS}"),
    (flash_attn.flash_attn_varlen_func, f"q, k, v, {CU_SEQLENS}, {COMMON}, block_table=None, {BIAS}"),
    (flash_attn.flash_attn_varlen_kvpacked_func, f"q, kv, {CU_SEQLENS}, {COMMON}, {BIAS}"),
    (flash_attn.flash_attn_varlen_qkvpacked_func, f"qkv, cu_seqlens, max_seqlen, {COMMON}, {BIAS}"),
    (
        flash_attn.flash_attn_with_kvcache,
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        f"return_softmax_lse=False, {BIAS}",
    ),
    (flash_attn_triton.flash_attn_func, "q, k, v, bias=None, causal=False, softmax_scale=None"),
    (flash_attn_triton.flash_attn_kvpacked_func, "q, kv, bias=None, causal=False, softmax_scale=None"),
    (flash_attn_triton.flash_attn_qkvpacked_func, "qkv, bias=None, causal=False, softmax_scale=None"),
    (
        sdpa.scaled_dot_product_attention,
        "query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False",
    ),
]


@pytest.mark.parametrize(("function", "expected"), SIGNATURES)
def test_signature(function, expected):
    signature = inspect.signature(function)
    parameters = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    bare = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    assert str(bare) == f"({expected})"


def make_qkv(heads_kv=HEADS_KV, seqlen_k=SEQLEN_K):
    return (
        torch.randn(BATCH, SEQLEN_Q, HEADS, HEAD_DIM, requires_grad=True),
        torch.randn(BATCH, seqlen_k, heads_kv, HEAD_DIM, requires_grad=True),
        torch.randn(BATCH, seqlen_k, heads_kv, HEAD_DIM, requires_grad=True),
    )


def top_left(q, k, v, bias=None, causal=False, softmax_scale=None):
    problem = Problem.from_tensors(
        Inputs(q, k, v, bias),
        mask=Mask.of(causal, None, top_left=True),
        softmax_scale=softmax_scale,
        softcap=0.0,
        dropout_p=0.0,
        deterministic=False,
    )
    return reference_attention(Inputs(q, k, v, bias), problem)[0]


def assert_same(actual, expected, leaves):
    torch.testing.assert_close(actual, expected)
    grad_out = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, grad_out),
        torch.autograd.grad(expected, leaves, grad_out, retain_graph=True),
    )


def assert_refuses(error, message, function, *arguments, **options):
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    assert str(caught.value) == message


# flash_attn 2.8


def test_flash_attn_is_attention():
    q, k, v = make_qkv()
    bias = torch.randn(HEADS, 1, SEQLEN_K, requires_grad=True)
    slopes = torch.rand(HEADS)
    actual = flash_attn.flash_attn_func(q, k, v, 0.0, 0.5, True, (2, -1), 3.0, slopes, True, bias=bias)
    expected = attention(
        q, k, v, softmax_scale=0.5, causal=True, window=(2, None), softcap=3.0, alibi_slopes=slopes, bias=bias
    )
    assert_same(actual, expected, (q, k, v, bias))


def test_flash_attn_causal_is_bottom_right():
    q, k, v = make_qkv()
    visible = torch.ones(SEQLEN_Q, SEQLEN_K, dtype=torch.bool).tril(SEQLEN_K - SEQLEN_Q)
    assert_same(flash_attn.flash_attn_func(q, k, v, causal=True), attention(q, k, v, bias=visible), (q, k, v))


def test_flash_attn_dropout():
    q, k, v = make_qkv()
    torch.manual_seed(1)
    out = flash_attn.flash_attn_func(q, k, v, 0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(out, attention(q, k, v, dropout_p=0.5))


def test_flash_attn_return_attn_probs():
    q, k, v = make_qkv()
    out, lse, probabilities = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    torch.testing.assert_close((out, lse), attention(q, k, v, return_lse=True))
    assert probabilities is None


def test_flash_attn_packed():
    q, k, v = make_qkv(HEADS, SEQLEN_Q)
    kv, qkv = torch.stack([k, v], dim=2), torch.stack([q, k, v], dim=2)
    arguments = (0.0, 0.5, True, (3, 0))
    bias = torch.randn(HEADS, SEQLEN_Q, SEQLEN_Q)
    expected = flash_attn.flash_attn_func(q, k, v, *arguments, bias=bias)
    assert_same(flash_attn.flash_attn_kvpacked_func(q, kv, *arguments, bias=bias), expected, (q, k, v))
    assert_same(flash_attn.flash_attn_qkvpacked_func(qkv, *arguments, bias=bias), expected, (q, k, v))
    _, lse, _ = flash_attn.flash_attn_qkvpacked_func(qkv, return_attn_probs=True)
    torch.testing.assert_close(lse, attention(q, k, v, return_lse=True)[1])


@pytest.mark.parametrize("module", [flash_attn, flash_attn_triton])
def test_packed_tensors_are_not_copied(module, monkeypatch):
    seen = []
    monkeypatch.setattr(flash_attn, "run", lambda inputs, **_: seen.append(inputs) or (inputs.q, None))
    monkeypatch.setattr(flash_attn_triton, "run", flash_attn.run)
    qkv, kv = torch.randn(BATCH, SEQLEN_Q, 3, HEADS, HEAD_DIM), torch.randn(BATCH, SEQLEN_K, 2, HEADS_KV, HEAD_DIM)
    module.flash_attn_qkvpacked_func(qkv)
    module.flash_attn_kvpacked_func(torch.randn(BATCH, SEQLEN_Q, HEADS, HEAD_DIM), kv)
    storages = [[tensor.untyped_storage().data_ptr() for tensor in inputs[:3]] for inputs in seen]
    assert storages[0] == [qkv.untyped_storage().data_ptr()] * 3
    assert storages[1][1:] == [kv.untyped_storage().data_ptr()] * 2
    assert all(tensor.stride(-1) == 1 for inputs in seen for tensor in inputs[:3])


@pytest.mark.parametrize("module", [flash_attn, flash_attn_triton])
def test_packed_shapes(module):
    packed = torch.zeros(2, 5, 2, 4, 8)
    message = "qkv must be (batch, seqlen, 3, heads, head_dim), got (2, 5, 2, 4, 8)"
    assert_refuses(ValueError, message, module.flash_attn_qkvpacked_func, packed)
    message = "kv must be (batch, seqlen, 2, heads, head_dim), got (5, 2, 4, 8)"
    assert_refuses(ValueError, message, module.flash_attn_kvpacked_func, packed[:, :, 0], packed[0])
    assert_refuses(TypeError, "qkv must be a torch.Tensor, got list", module.flash_attn_qkvpacked_func, [1.0])


def boundaries(*lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def test_flash_attn_varlen_is_attention_of_each_sequence():
    q, k, v = (torch.randn(total, heads, HEAD_DIM, requires_grad=True) for total, heads in ((8, 4), (10, 2), (10, 2)))
    slopes, bias = torch.rand(2, HEADS), torch.randn(HEADS, 1, 7, requires_grad=True)
    lengths = (boundaries(3, 5), boundaries(7, 3), 5, 7)
    actual, lse, probabilities = flash_attn.flash_attn_varlen_func(
        q, k, v, *lengths, 0.0, 0.5, True, (2, -1), 3.0, slopes, True, True, None, bias=bias
    )
    options = {"softmax_scale": 0.5, "causal": True, "window_size": (2, -1), "softcap": 3.0, "return_attn_probs": True}
    each = [
        flash_attn.flash_attn_func(
            q[None, rows], k[None, keys], v[None, keys], alibi_slopes=slopes[i], bias=bias[:, :, :seqlen_k], **options
        )
        for i, (rows, keys, seqlen_k) in enumerate(((slice(3), slice(7), 7), (slice(3, 8), slice(7, 10), 3)))
    ]
    assert_same(actual, torch.cat([out[0] for out, _, _ in each]), (q, k, v, bias))
    torch.testing.assert_close(lse, torch.cat([lse[0] for _, lse, _ in each], dim=1))
    assert probabilities is None


def test_flash_attn_varlen_packed():
    q, k, v = (torch.randn(8, HEADS, HEAD_DIM, requires_grad=True) for _ in range(3))
    kv, qkv = torch.stack([k, v], dim=1), torch.stack([q, k, v], dim=1)
    starts, arguments, bias = boundaries(3, 5), (0.0, 0.5, True, (3, 0)), torch.randn(HEADS, 5, 5)
    expected = flash_attn.flash_attn_varlen_func(q, k, v, starts, starts, 5, 5, *arguments, bias=bias)
    actual = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, starts, starts, 5, 5, *arguments, bias=bias)
    assert_same(actual, expected, (q, k, v))
    actual = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, starts, 5, *arguments, bias=bias)
    assert_same(actual, expected, (q, k, v))


def test_flash_attn_varlen_refuses():
    packed, starts = torch.zeros(8, 2, HEADS, HEAD_DIM), boundaries(3, 5)
    message = "qkv must be (total, 3, heads, head_dim), got (8, 2, 4, 8)"
    assert_refuses(ValueError, message, flash_attn.flash_attn_varlen_qkvpacked_func, packed, starts, 5)
    message = "kv must be (total_k, 2, heads, head_dim), got (8, 4, 8)"
    arguments = (packed[:, 0], packed[:, 0], starts, starts, 5, 5)
    assert_refuses(ValueError, message, flash_attn.flash_attn_varlen_kvpacked_func, *arguments)
    message = "block_table is not there yet: give flash_attn_varlen_func k and v as contiguous rows, without pages"
    arguments = (*packed.unbind(1), packed[:, 0], starts, starts, 5, 5)
    assert_refuses(
        NotImplementedError, message, flash_attn.flash_attn_varlen_func, *arguments, block_table=torch.zeros(2, 1)
    )


def test_key_value_caches_are_not_there_yet():
    with pytest.raises(NotImplementedError, match=r"^flash_attn_with_kvcache is not there yet: .*flash_attn_func"):
        flash_attn.flash_attn_with_kvcache(*[torch.zeros(3)] * 3)


# The classic module


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, SEQLEN_K), (BATCH, HEADS, SEQLEN_Q, SEQLEN_K), (1, HEADS, SEQLEN_Q, SEQLEN_K)]
)
def test_flash_attn_triton(causal, shape):
    q, k, v = make_qkv(HEADS)
    bias = torch.randn(shape, requires_grad=True)
    actual = flash_attn_triton.flash_attn_func(q, k, v, bias, causal, 0.5)
    expected = functional.scaled_dot_product_attention(
        *(tensor.transpose(1, 2) for tensor in (q, k, v)),
        attn_mask=bias.masked_fill(torch.ones(SEQLEN_Q, SEQLEN_K).triu(1) > 0, -torch.inf) if causal else bias,
        scale=0.5,
    ).transpose(1, 2)
    assert_same(actual, expected, (q, k, v, bias))


def test_flash_attn_triton_packed():
    q, k, v = make_qkv(HEADS, SEQLEN_Q)
    kv, qkv = torch.stack([k, v], dim=2), torch.stack([q, k, v], dim=2)
    bias = torch.randn(1, HEADS, 1, SEQLEN_Q)
    expected = top_left(q, k, v, bias, True, 0.5)
    assert_same(flash_attn_triton.flash_attn_kvpacked_func(q, kv, bias, True, 0.5), expected, (q, k, v))
    assert_same(flash_attn_triton.flash_attn_qkvpacked_func(qkv, bias, True, 0.5), expected, (q, k, v))


# torch.nn.functional.scaled_dot_product_attention


def sdpa_inputs(heads_kv=HEADS):
    return [tensor.detach().transpose(1, 2).contiguous().requires_grad_() for tensor in make_qkv(heads_kv)]


SDPA_CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool": {"attn_mask": torch.arange(SEQLEN_Q * SEQLEN_K).view(SEQLEN_Q, SEQLEN_K) % 3 != 1},
    "bool_heads": {"attn_mask": torch.arange(BATCH * SEQLEN_K).view(BATCH, 1, 1, SEQLEN_K) % 5 != 1},
    "float": {"attn_mask": torch.linspace(-1, 1, SEQLEN_Q * SEQLEN_K).view(SEQLEN_Q, SEQLEN_K)},
}


@pytest.mark.parametrize("arguments", SDPA_CASES.values(), ids=SDPA_CASES)
@pytest.mark.parametrize("heads_kv", [HEADS, HEADS_KV])
def test_sdpa(arguments, heads_kv):
    query, key, value = sdpa_inputs(heads_kv)
    enable_gqa = heads_kv != HEADS
    actual = sdpa.scaled_dot_product_attention(query, key, value, **arguments, enable_gqa=enable_gqa)
    expected = functional.scaled_dot_product_attention(query, key, value, **arguments, enable_gqa=enable_gqa)
    assert_same(actual, expected, (query, key, value))


def test_sdpa_mask_gradient():
    query, key, value = sdpa_inputs()
    attn_mask = torch.randn(HEADS, 1, SEQLEN_K, requires_grad=True)
    actual = sdpa.scaled_dot_product_attention(query, key, value, attn_mask)
    assert_same(actual, functional.scaled_dot_product_attention(query, key, value, attn_mask), (attn_mask,))


def test_sdpa_dropout():
    query, key, value = sdpa_inputs()
    torch.manual_seed(1)
    out = sdpa.scaled_dot_product_attention(query, key, value, None, 0.5)
    torch.manual_seed(1)
    expected = attention(*(tensor.transpose(1, 2) for tensor in (query, key, value)), dropout_p=0.5)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_sdpa_does_not_copy():
    query, key, value = sdpa_inputs()
    out = sdpa.scaled_dot_product_attention(query, key, value)
    assert out.transpose(1, 2).is_contiguous()


def test_sdpa_refuses():
    query, key, value = sdpa_inputs(HEADS_KV)
    function = sdpa.scaled_dot_product_attention
    message = "key must have the 4 heads of query unless enable_gqa=True, got 2"
    assert_refuses(ValueError, message, function, query, key, value)
    message = "attn_mask must be None with is_causal=True, got both"
    assert_refuses(ValueError, message, function, query, query, query, torch.zeros(5, 5), is_causal=True)
    message = "query must be (batch, heads, seqlen, head_dim), got (4, 5, 8)"
    assert_refuses(ValueError, message, function, query[0], key[0], value[0])
    assert_refuses(TypeError, "value must be a torch.Tensor, got NoneType", function, query, query, None)
    assert_refuses(TypeError, "is_causal must be a bool, got 1", function, query, query, query, is_causal=1)
