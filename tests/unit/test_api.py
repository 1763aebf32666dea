"""Does `attention` bring every permitted call into standard form?"""

import math

import pytest
import torch

from triton_attention import attention, attention_varlen, dispatch, reference
from triton_attention.dispatch import Backend

BATCH, HEADS, SEQLEN_Q, SEQLEN_K, HEAD_DIM, HEAD_DIM_V = 2, 4, 3, 5, 8, 6


def make_qkv(seqlen_q=SEQLEN_Q, seqlen_k=SEQLEN_K, batch=BATCH, dtype=torch.float32, requires_grad=False):
    shapes = (
        (batch, seqlen_q, HEADS, HEAD_DIM),
        (batch, seqlen_k, HEADS // 2, HEAD_DIM),
        (batch, seqlen_k, HEADS // 2, HEAD_DIM_V),
    )
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def spy(monkeypatch):
    """The inputs that the one backend left is run on."""
    seen = []

    def run(inputs, problem):
        seen.append(inputs)
        return reference.attention(inputs, problem)

    monkeypatch.setattr(dispatch, "BACKENDS", (Backend("spy", lambda problem: [], run),))
    return seen


@pytest.mark.parametrize(
    "shape", [(), (5,), (1,), (3, 1), (3, 5), (4, 1, 5), (1, 3, 5), (2, 1, 1, 5), (2, 4, 3, 1), (2, 4, 3, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bias_broadcasts_and_its_gradient_has_its_shape(shape, dtype):
    qkv = make_qkv(dtype=torch.bfloat16)
    bias = torch.randn(shape).to(dtype).requires_grad_()
    full = bias.detach().broadcast_to(BATCH, HEADS, SEQLEN_Q, SEQLEN_K).float().clone().requires_grad_()
    out, expected = attention(*qkv, bias=bias), attention(*qkv, bias=full)
    assert torch.equal(out, expected)
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    expected.backward(grad_out)
    assert (bias.grad.shape, bias.grad.dtype) == (shape, dtype)
    # A sum over the broadcast axes, rounded once to the bias's dtype.
    scale = full.grad.abs().sum_to_size(shape)
    rounding = torch.finfo(dtype).eps * scale + 1e-6
    assert ((bias.grad.float() - full.grad.sum_to_size(shape)).abs() <= rounding).all()


def test_bool_bias_broadcasts():
    qkv = make_qkv()
    visible = torch.tensor([True, False, True, True, False])
    out = attention(*qkv, bias=visible)
    expected = attention(qkv[0], qkv[1][:, visible], qkv[2][:, visible])
    torch.testing.assert_close(out, expected)


def test_lse_is_differentiable():
    q, k, v = make_qkv(requires_grad=True)
    out, lse = attention(q, k, v, return_lse=True)
    assert (out.shape, out.dtype) == ((BATCH, SEQLEN_Q, HEADS, HEAD_DIM_V), torch.float32)
    assert (lse.shape, lse.dtype) == ((BATCH, HEADS, SEQLEN_Q), torch.float32)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, dim=2)) / math.sqrt(HEAD_DIM)
    expected = scores.logsumexp(-1)
    torch.testing.assert_close(lse, expected)
    weight = torch.randn_like(lse)
    torch.testing.assert_close(torch.autograd.grad(lse, (q, k), weight), torch.autograd.grad(expected, (q, k), weight))


EMPTY = {"batch": (3, 5, 0), "seqlen_q": (0, 5, 2), "seqlen_k": (3, 0, 2), "both": (0, 0, 2)}


@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "batch"), EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_empty(seqlen_q, seqlen_k, batch, dropout_p):
    q, k, v = make_qkv(seqlen_q, seqlen_k, batch, requires_grad=True)
    bias = torch.zeros(HEADS, seqlen_q, seqlen_k, requires_grad=True)
    out, lse = attention(q, k, v, bias=bias, causal=True, dropout_p=dropout_p, return_lse=True)
    assert torch.equal(out, torch.zeros(batch, seqlen_q, HEADS, HEAD_DIM_V))
    assert torch.equal(lse, torch.full((batch, HEADS, seqlen_q), -math.inf))
    (out.sum() + lse.sum()).backward()
    for tensor in (q, k, v, bias):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "batch"), EMPTY.values(), ids=EMPTY)
def test_no_backend_is_launched_on_nothing(seqlen_q, seqlen_k, batch, monkeypatch):
    seen = spy(monkeypatch)
    q, k, v = make_qkv(seqlen_q, seqlen_k, batch)
    assert torch.equal(attention(q, k, v), torch.zeros(batch, seqlen_q, HEADS, HEAD_DIM_V))
    assert not seen


def test_nothing_visible_but_the_sink():
    q, k, v = make_qkv(seqlen_k=0)
    sink = torch.randn(HEADS)
    out, lse = attention(q, k, v, sink=sink, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(lse, sink[:, None].expand_as(lse))


def test_meta_tensors_give_shapes():
    q, k, v = (tensor.to("meta") for tensor in make_qkv(dtype=torch.bfloat16))
    out, lse = attention(q, k, v, bias=torch.empty(5, device="meta"), dropout_p=0.5, causal=True, return_lse=True)
    assert (out.shape, out.dtype, out.device.type) == ((BATCH, SEQLEN_Q, HEADS, HEAD_DIM_V), torch.bfloat16, "meta")
    assert (lse.shape, lse.dtype) == ((BATCH, HEADS, SEQLEN_Q), torch.float32)


def test_any_strides(monkeypatch):
    seen = spy(monkeypatch)
    q, k, v = make_qkv()
    turned = [tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for tensor in (q, k, v)]
    heads_first = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]
    expected = attention(q, k, v)
    torch.testing.assert_close(attention(*turned), expected)
    torch.testing.assert_close(attention(*heads_first), expected)
    for inputs in seen:
        assert [tensor.stride(-1) for tensor in inputs[:3]] == [1, 1, 1]
    for given, arrived in zip(heads_first, seen[2][:3], strict=True):  # unit last strides: not copied
        assert given.data_ptr() == arrived.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    q, k, v = make_qkv(requires_grad=True)
    mixed = (q, k.to(dtype), v.half())  # as SDPA, which brings all three into the region's dtype
    with torch.autocast("cpu", dtype=dtype):
        out, lse = attention(*mixed, return_lse=True)
    expected, expected_lse = attention(q.to(dtype), k.to(dtype), v.half().to(dtype), return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close((out, lse), (expected, expected_lse), rtol=0, atol=0)
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    q, k, v = make_qkv(dtype=torch.float64)
    expected = attention(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(q, k, v), expected)


def test_dropout_is_reproducible():
    q, k, v = make_qkv(dtype=torch.float64)
    torch.manual_seed(1)
    first, second = attention(q, k, v, dropout_p=0.5), attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)


SEQUENCES = ((3, 5), (0, 2), (4, 0), (1, 1))  # (seqlen_q, seqlen_k); one row of q and two of k belong to none
LENGTHS = {
    "cu_seqlens_q": torch.tensor([0, 3, 3, 7, 8], dtype=torch.int32),
    "cu_seqlens_k": torch.tensor([0, 5, 7, 7, 8], dtype=torch.int32),
    "max_seqlen_q": 6,
    "max_seqlen_k": 5,
}


def packed_qkv():
    shapes = ((9, HEADS, HEAD_DIM), (10, HEADS // 2, HEAD_DIM), (10, HEADS // 2, HEAD_DIM_V))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_varlen_is_attention_of_each_sequence():
    q, k, v = leaves = packed_qkv()
    bias = torch.randn(4, 1, 6, 5, requires_grad=True)
    slopes, sink = torch.rand(4, HEADS), torch.randn(HEADS, dtype=torch.float64, requires_grad=True)
    leaves += [bias, sink]
    options = {"causal": True, "window": (3, None), "softcap": 2.0, "sink": sink, "return_lse": True}
    out, lse = attention_varlen(q, k, v, **LENGTHS, **options, bias=bias, alibi_slopes=slopes)
    assert (out.shape, lse.shape) == ((9, HEADS, HEAD_DIM_V), (HEADS, 9))
    starts_q, starts_k = LENGTHS["cu_seqlens_q"].tolist(), LENGTHS["cu_seqlens_k"].tolist()
    outs, lses = [], []
    for i, (seqlen_q, seqlen_k) in enumerate(SEQUENCES):
        rows, keys = slice(starts_q[i], starts_q[i] + seqlen_q), slice(starts_k[i], starts_k[i] + seqlen_k)
        part = bias[i, None, :, :seqlen_q, :seqlen_k]
        alone = attention(q[None, rows], k[None, keys], v[None, keys], **options, bias=part, alibi_slopes=slopes[i])
        outs.append(alone[0][0])
        lses.append(alone[1][0])
    expected, expected_lse = torch.cat(outs), torch.cat(lses, dim=1)
    torch.testing.assert_close((out[:8], lse[:, :8]), (expected, expected_lse))
    assert torch.equal(out[8], torch.zeros_like(out[8]))
    assert torch.equal(lse[:, 8], torch.full_like(lse[:, 8], -math.inf))
    weights = torch.randn_like(expected), torch.randn_like(expected_lse)
    torch.testing.assert_close(
        torch.autograd.grad((out[:8], lse[:, :8]), leaves, weights),
        torch.autograd.grad((expected, expected_lse), leaves, weights),
    )


def test_varlen_of_meta_tensors_gives_shapes():
    lengths = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in LENGTHS.items()}
    q, k, v = (tensor.detach().to("meta").requires_grad_() for tensor in packed_qkv())
    out, lse = attention_varlen(q, k, v, **lengths, return_lse=True)
    assert (out.shape, out.device.type, lse.shape) == ((9, HEADS, HEAD_DIM_V), "meta", (HEADS, 9))
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_dropout_of_a_sequence_is_that_of_its_batch_entry():
    q, k, v = torch.randn(3, 2, 4, HEADS, 8)
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 4, "max_seqlen_k": 4}
    torch.manual_seed(1)
    packed = attention_varlen(*(x.flatten(0, 1) for x in (q, k, v)), **lengths, dropout_p=0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(packed, attention(q, k, v, dropout_p=0.5).flatten(0, 1))


@pytest.mark.parametrize(("total_q", "total_k", "batch"), [(0, 3, 2), (3, 0, 2), (0, 0, 1), (3, 4, 0)])
def test_varlen_of_nothing(total_q, total_k, batch, monkeypatch):
    seen = spy(monkeypatch)
    q, k = torch.randn(total_q, HEADS, 8, requires_grad=True), torch.randn(total_k, HEADS // 2, 8, requires_grad=True)
    starts = (torch.zeros(batch + 1, dtype=torch.int32) for _ in range(2))
    lengths = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=True), max_seqlen_q=total_q, max_seqlen_k=9)
    out, lse = attention_varlen(q, k, k, **lengths, return_lse=True)
    assert torch.equal(out, torch.zeros(total_q, HEADS, 8))
    assert torch.equal(lse, torch.full((HEADS, total_q), -math.inf))
    assert not seen
    out.sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q))
