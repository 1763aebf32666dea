"""Does torch.compile trace a call as one graph, once for all sequence lengths?"""

import pytest
import torch

from triton_attention import attention
from triton_attention.compat.flash_attn import flash_attn_qkvpacked_func

LENGTHS = [(9, 14), (13, 11), (30, 47)]  # (seqlen_q, seqlen_k)
HEADS, HEADS_KV, HEAD_DIM = 4, 2, 8


@pytest.fixture(autouse=True)
def _compile_once():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


def leaf(*shape, dynamic_axes=(1,), requires_grad=True):
    """A tensor of which only the lengths are dynamic: it keeps tracing short."""
    tensor = torch.randn(shape, requires_grad=requires_grad)
    for axis in set(range(tensor.dim())) - set(dynamic_axes):
        torch._dynamo.mark_static(tensor, axis)
    return tensor


def qkv(seqlen_q, seqlen_k, **options):
    return (
        leaf(2, seqlen_q, HEADS, HEAD_DIM, **options),
        leaf(2, seqlen_k, HEADS_KV, HEAD_DIM, **options),
        leaf(2, seqlen_k, HEADS_KV, HEAD_DIM, **options),
    )


def everything(q, k, v, bias, sink, alibi_slopes):
    return attention(
        q,
        k,
        v,
        bias=bias,
        sink=sink,
        alibi_slopes=alibi_slopes,
        window=(20, 3),
        softmax_scale=0.4,
        softcap=2.0,
        return_lse=True,
    )


def everything_inputs(seqlen_q, seqlen_k):
    bias, slopes = leaf(HEADS, seqlen_q, seqlen_k, dynamic_axes=(1, 2)), leaf(HEADS, requires_grad=False).abs()
    torch._dynamo.mark_static(slopes)
    return *qkv(seqlen_q, seqlen_k), bias, leaf(HEADS, dynamic_axes=()), slopes


def causal_packed(packed):
    return flash_attn_qkvpacked_func(packed, causal=True)


def causal_packed_inputs(seqlen_q, seqlen_k):
    return (leaf(2, seqlen_q, 3, HEADS, HEAD_DIM),)


def autocast_inside(q, k, v):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return attention(q, k, v)


def check(function, make_inputs):
    """Compiled and eager agree, in the results and in the gradients of what requires one."""
    compiled_function = compiled(function)
    for seqlen_q, seqlen_k in LENGTHS:
        inputs = make_inputs(seqlen_q, seqlen_k)
        results = []
        for variant in (compiled_function, function):
            outputs = variant(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            leaves = [tensor for tensor in inputs if tensor.requires_grad] if outputs[0].requires_grad else []
            total = sum(output.float().square().sum() for output in outputs)
            results.append((outputs, torch.autograd.grad(total, leaves) if leaves else ()))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("function", "make_inputs"),
    [(everything, everything_inputs), (causal_packed, causal_packed_inputs), (autocast_inside, qkv)],
)
def test_forward_and_backward(function, make_inputs):
    check(function, make_inputs)


def test_dropout():
    """Compiled and eager draw different seeds, so only what they share is compared."""
    function = compiled(lambda q, k, v: attention(q, k, v, dropout_p=0.3))
    for seqlen_q, seqlen_k in LENGTHS:
        q, k, v = qkv(seqlen_q, seqlen_k)
        out = function(q, k, v)
        assert not torch.equal(out, function(q, k, v))
        grad_out = torch.randn_like(out)
        (grad_v,) = torch.autograd.grad(out, v, grad_out)
        # out is linear in v: grad_out . out = grad_v . v, with the same mask in backward only.
        torch.testing.assert_close((grad_out * out).sum(), (grad_v * v).sum())


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def masked(q, k, v, mask):
    return attention(q, k, v, bias=mask > 0, causal=True)


def masked_inputs(seqlen_q, seqlen_k):
    mask = leaf(2, 1, 1, seqlen_k, dynamic_axes=(3,), requires_grad=False)
    return *qkv(seqlen_q, seqlen_k, requires_grad=False), mask


@pytest.mark.parametrize("region", [torch.no_grad, torch.inference_mode, autocast])
def test_inside_a_region(region):
    with region():
        check(masked, masked_inputs)


def test_every_size_dynamic():
    with torch.no_grad():
        check(lambda q, k, v: attention(q, k, v), lambda i, j: [torch.randn(2, n, 4, 8) for n in (i, j, j)])
