"""Does the specification say what it means? Against loops over single elements, and against autograd's definition."""

import math

import pytest
import torch
from torch.nn import functional

from triton_attention import attention, reference
from triton_attention.philox import draw_seed, dropout_mask, kept_factor
from triton_attention.problem import Inputs, Mask, Problem

BATCH, HEADS, HEADS_KV, SEQLEN_Q, SEQLEN_K, HEAD_DIM, HEAD_DIM_V = 2, 4, 2, 3, 5, 4, 3
NO_MASK = Mask()


def make_inputs(seqlen_q=SEQLEN_Q, seqlen_k=SEQLEN_K, heads_kv=HEADS_KV, dtype=torch.float64, **others):
    q = torch.randn(BATCH, seqlen_q, HEADS, HEAD_DIM, dtype=dtype)
    k = torch.randn(BATCH, seqlen_k, heads_kv, HEAD_DIM, dtype=dtype)
    v = torch.randn(BATCH, seqlen_k, heads_kv, HEAD_DIM_V, dtype=dtype)
    return Inputs(q, k, v, **others)


def run(inputs, mask=NO_MASK, softmax_scale=None, softcap=0.0, dropout_p=0.0):
    numbers = {"softmax_scale": softmax_scale, "softcap": softcap, "dropout_p": dropout_p}
    problem = Problem.from_tensors(inputs, mask=mask, deterministic=False, **numbers)
    return reference.attention(inputs, problem)


def loops(inputs, mask=NO_MASK, softmax_scale=None, softcap=0.0, dropout_p=0.0, kept=None):
    """(out, lse) by loops over single elements, in Python's float64."""
    q, k, v = inputs.q.tolist(), inputs.k.tolist(), inputs.v.tolist()
    batch, seqlen_q, heads, head_dim = inputs.q.shape
    _, seqlen_k, heads_kv, head_dim_v = inputs.v.shape
    scale = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    diagonal = 0 if mask.top_left else seqlen_k - seqlen_q
    out = torch.zeros(batch, seqlen_q, heads, head_dim_v, dtype=torch.float64)
    lse = torch.zeros(batch, heads, seqlen_q, dtype=torch.float64)

    def logit(b, h, i, j):
        visible = mask.left is None or j >= i + diagonal - mask.left
        visible = visible and (mask.right is None or j <= i + diagonal + mask.right)
        score = scale * sum(q[b][i][h][d] * k[b][j][h // (heads // heads_kv)][d] for d in range(head_dim))
        if softcap:
            score = softcap * math.tanh(score / softcap)
        if inputs.alibi_slopes is not None:
            slope = inputs.alibi_slopes.expand(batch, heads)[b, h].item()
            score -= slope * abs(i + diagonal - j)
        if inputs.bias is not None:
            added = inputs.bias.expand(batch, heads, seqlen_q, seqlen_k)[b, h, i, j].item()
            if inputs.bias.dtype == torch.bool:
                visible = visible and added
            else:
                score += added
        return score if visible else -math.inf

    for b, h, i in torch.cartesian_prod(*map(torch.arange, (batch, heads, seqlen_q))).tolist():
        logits = [logit(b, h, i, j) for j in range(seqlen_k)]
        total = sum(math.exp(value) for value in logits)
        if inputs.sink is not None:
            total += math.exp(inputs.sink[h])
        lse[b, h, i] = math.log(total) if total > 0 else -math.inf
        for j, value in enumerate(logits):
            if value > -math.inf and (kept is None or kept[b, h, i, j]):
                probability = math.exp(value) / total * kept_factor(dropout_p)
                for d in range(head_dim_v):
                    out[b, i, h, d] += probability * v[b][j][h // (heads // heads_kv)][d]
    return out, lse


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)
VISIBLE = random(BATCH, 1, SEQLEN_Q, SEQLEN_K) > -0.3
VISIBLE[0, 0, 1] = False  # a query that sees nothing
SLOPES = random(BATCH, HEADS).abs()
SINK = random(HEADS)
DENSE = random(BATCH, HEADS, SEQLEN_Q, SEQLEN_K)

CASES = {
    "plain": ({}, {}),
    "scale": ({}, {"softmax_scale": 0.3}),
    "scale_zero": ({}, {"softmax_scale": 0.0}),
    "scale_negative": ({}, {"softmax_scale": -1.5}),
    "causal": ({}, {"mask": Mask.of(True, None)}),
    "causal_top_left": ({}, {"mask": Mask.of(True, None, top_left=True)}),
    "window": ({}, {"mask": Mask.of(False, (1, 0))}),
    "window_left": ({}, {"mask": Mask.of(False, (1, None))}),
    "window_right": ({}, {"mask": Mask.of(False, (-1, 1))}),
    "window_top_left": ({}, {"mask": Mask.of(False, (1, 1), top_left=True)}),
    "window_causal": ({}, {"mask": Mask.of(True, (1, 1))}),
    "softcap": ({}, {"softcap": 0.7}),
    "alibi": ({"alibi_slopes": SLOPES[0]}, {}),
    "alibi_batch": ({"alibi_slopes": SLOPES}, {}),
    "alibi_top_left": ({"alibi_slopes": SLOPES}, {"mask": Mask.of(True, None, top_left=True)}),
    "sink": ({"sink": SINK}, {}),
    "bias_bool": ({"bias": VISIBLE}, {}),
    "bias_infinite": ({"bias": DENSE.masked_fill(~VISIBLE, -math.inf)}, {}),
    "bias_bool_sink": ({"bias": VISIBLE, "sink": SINK}, {}),
    "everything": (
        {"bias": DENSE[:1], "alibi_slopes": SLOPES, "sink": SINK},
        {"mask": Mask.of(True, (2, None)), "softcap": 1.2, "softmax_scale": 0.8},
    ),
}
for axes in range(16):
    shape = [size if axes >> axis & 1 else 1 for axis, size in enumerate(DENSE.shape)]
    CASES["bias_" + "x".join(map(str, shape))] = ({"bias": random(*shape)}, {})


@pytest.mark.parametrize(("tensors", "arguments"), CASES.values(), ids=CASES)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(SEQLEN_Q, SEQLEN_K), (SEQLEN_K, SEQLEN_Q)])
def test_is_what_loops_over_elements_give(tensors, arguments, seqlen_q, seqlen_k):
    bias = tensors.get("bias")
    if bias is not None and seqlen_q == SEQLEN_K:
        tensors = tensors | {"bias": bias.mT}
    inputs = make_inputs(seqlen_q, seqlen_k, **tensors)
    torch.testing.assert_close(run(inputs, **arguments), loops(inputs, **arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_heads_share_keys_and_values(heads_kv):
    inputs = make_inputs(heads_kv=heads_kv)
    torch.testing.assert_close(run(inputs), loops(inputs), rtol=1e-12, atol=1e-12)


def test_dropout_is_what_loops_over_elements_give():
    inputs = make_inputs(sink=torch.randn(HEADS))
    torch.manual_seed(5)
    kept = dropout_mask(draw_seed(inputs.q.device), 0.4, BATCH, HEADS, SEQLEN_Q, SEQLEN_K)
    assert 0 < kept.sum() < kept.numel()
    torch.manual_seed(5)
    result = run(inputs, dropout_p=0.4)
    torch.testing.assert_close(result, loops(inputs, dropout_p=0.4, kept=kept), rtol=1e-12, atol=1e-12)


def test_dropout_is_the_same_in_backward():
    inputs = make_inputs()
    v = inputs.v.requires_grad_()
    torch.manual_seed(5)
    out, _ = run(inputs, dropout_p=0.4)
    grad_out = torch.randn_like(out)
    (grad_v,) = torch.autograd.grad(out, v, grad_out)
    # out is linear in v: grad_out . out = grad_v . v, with the same mask only.
    torch.testing.assert_close((grad_out * out).sum(), (grad_v * v).sum())
    assert not torch.equal(out, run(inputs, dropout_p=0.4)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision(dtype):
    """Computed in float32: the output's rounding to its dtype is all that the inputs' dtype costs."""
    inputs = make_inputs(dtype=dtype, bias=torch.randn(HEADS, SEQLEN_Q, SEQLEN_K)[None], sink=torch.randn(HEADS))
    out, lse = run(inputs)
    exact = [tensor.double() for tensor in (inputs.q, inputs.k, inputs.v, inputs.bias, inputs.sink)]
    expected_out, expected_lse = run(Inputs(*exact[:4], sink=exact[4]))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), expected_out, rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seqlen_k", [SEQLEN_Q, SEQLEN_K])
@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float", "gqa"])
def test_is_scaled_dot_product_attention(kind, seqlen_k):
    inputs = make_inputs(seqlen_k=seqlen_k, heads_kv=HEADS_KV if kind == "gqa" else HEADS)
    q, k, v = (tensor.requires_grad_() for tensor in inputs[:3])
    bias = torch.randn(BATCH, 1, SEQLEN_Q, seqlen_k, dtype=torch.float64)
    bias = {"bool": bias > -1, "float": bias}.get(kind)
    out, _ = run(Inputs(q, k, v, bias), mask=Mask.of(kind == "causal", None, top_left=True))
    expected = functional.scaled_dot_product_attention(
        *(tensor.transpose(1, 2) for tensor in (q, k, v)), attn_mask=bias, is_causal=kind == "causal", enable_gqa=True
    ).transpose(1, 2)
    grad_out = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), grad_out), torch.autograd.grad(expected, (q, k, v), grad_out)
    )


GRADIENT_CASES = {
    "plain": {},
    "window": {"mask": Mask.of(False, (1, 1))},
    "softcap": {"softcap": 0.9},
    "dropout": {"dropout_p": 0.3},
}


@pytest.mark.parametrize("arguments", GRADIENT_CASES.values(), ids=GRADIENT_CASES)
@pytest.mark.parametrize("bias_shape", [(1, HEADS, 1, SEQLEN_K), (BATCH, 1, SEQLEN_Q, SEQLEN_K)])
def test_gradients(arguments, bias_shape):
    inputs = make_inputs(
        bias=torch.randn(bias_shape, dtype=torch.float64), sink=torch.randn(HEADS, dtype=torch.float64)
    )
    leaves = [tensor.requires_grad_() for tensor in inputs if tensor is not None]

    def function(q, k, v, bias, sink):
        torch.manual_seed(2)
        return run(Inputs(q, k, v, bias, sink=sink), **arguments)

    assert torch.autograd.gradcheck(function, leaves)


def test_second_gradients():
    inputs = make_inputs(seqlen_q=2, seqlen_k=2, bias=torch.randn(1, 1, 2, 2, dtype=torch.float64))
    leaves = [tensor.requires_grad_() for tensor in inputs if tensor is not None]
    assert torch.autograd.gradgradcheck(lambda *tensors: run(Inputs(*tensors), mask=Mask(right=0)), leaves)


@pytest.mark.parametrize("kind", ["causal", "bool", "infinite"])
@pytest.mark.parametrize("with_sink", [False, True])
def test_a_query_that_sees_nothing(kind, with_sink):
    seqlen_q, seqlen_k, hidden = 5, 3, 2  # the first two queries see nothing
    bias = torch.zeros(1, 1, seqlen_q, seqlen_k, dtype=torch.float64)
    bias[:, :, :hidden] = -math.inf
    bias = {"causal": None, "bool": bias == 0, "infinite": bias}[kind]
    sink = torch.randn(HEADS, dtype=torch.float64) if with_sink else None
    inputs = make_inputs(seqlen_q, seqlen_k, bias=bias, sink=sink)
    leaves = [tensor.requires_grad_() for tensor in inputs if tensor is not None and tensor.is_floating_point()]

    out, lse = run(inputs, mask=Mask.of(kind == "causal", None))
    assert torch.equal(out[:, :hidden], torch.zeros_like(out[:, :hidden]))
    expected_lse = sink if with_sink else torch.full((HEADS,), -math.inf, dtype=torch.float64)
    torch.testing.assert_close(lse[..., :hidden], expected_lse[:, None].expand(BATCH, HEADS, hidden))

    grads = torch.autograd.grad(out[:, :hidden].sum() + lse[..., :hidden].sum(), leaves)
    for leaf, grad in zip(leaves, grads, strict=True):
        expected = torch.full_like(leaf, BATCH * hidden) if leaf is sink else torch.zeros_like(leaf)
        torch.testing.assert_close(grad, expected)  # lse is the sink itself there, and nothing else matters
    for grad in torch.autograd.grad(run(inputs, mask=Mask.of(kind == "causal", None))[0].sum(), leaves):
        assert grad.isfinite().all()


def test_autocast_does_not_lower_its_precision():
    inputs = make_inputs(dtype=torch.float32)
    expected = run(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(run(inputs), expected, rtol=0, atol=0)


def test_out_is_contiguous_whatever_the_inputs_strides():
    q, k, v = make_inputs()[:3]
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]
    out = attention(*strided)
    assert out.is_contiguous()
    torch.testing.assert_close(out, attention(q, k, v))
