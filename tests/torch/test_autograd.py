"""Are gradients right however they are asked for, and is what has no derivative refused?"""

from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.autograd import forward_ad

from triton_attention import attention, ops
from triton_attention.compat.flash_attn import flash_attn_qkvpacked_func
from triton_attention.portable import backward, launch
from triton_attention.testing import Case, check_against_float64, make_inputs

portable = partial(attention, backend="portable", return_lse=True)
reference = partial(attention, backend="reference", return_lse=True)

HEADS, HEADS_KV, SEQLEN_Q, SEQLEN_K, HEAD_DIM = 2, 1, 5, 8, 16
NAMES = ("q", "k", "v", "bias")


def make_leaves(dtype=torch.float32, batch=1):
    """q, k, v and a bias that require gradients."""
    shapes = (
        (batch, SEQLEN_Q, HEADS, HEAD_DIM),
        (batch, SEQLEN_K, HEADS_KV, HEAD_DIM),
        (batch, SEQLEN_K, HEADS_KV, HEAD_DIM),
        (1, HEADS, SEQLEN_Q, SEQLEN_K),
    )
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def weighted_sum(tensor):
    """Its gradient has different numbers everywhere, the same in every precision."""
    weights = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (tensor * weights.to(tensor.dtype)).sum()


def assert_gradients_are_exact(loss, leaves):
    """Those of loss(attention, *leaves), in float32, against the reference in float64."""
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    gradients = torch.autograd.grad(loss(portable, *leaves), leaves)
    exact = torch.autograd.grad(loss(reference, *exact_leaves), exact_leaves, materialize_grads=True)
    for gradient, true in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient, true.float(), rtol=1e-5, atol=2e-6)


@pytest.fixture
def run_backward(monkeypatch):
    """The launcher's backward, spied upon."""
    spy = Mock(wraps=launch.backward)
    monkeypatch.setattr(launch, "backward", spy)
    return spy


LOSSES = {  # of out and lse; then what the launcher must get: (strides of dout, whether there is a dlse)
    "out": (lambda out, lse: weighted_sum(out), (160, 32, 16, 1), False),
    "lse": (lambda out, lse: weighted_sum(lse), (160, 32, 16, 1), True),
    "both": (lambda out, lse: weighted_sum(out) + weighted_sum(lse), (160, 32, 16, 1), True),
    "expanded": (lambda out, lse: out.sum() + lse.sum(), (0, 0, 0, 0), True),
    "heads before queries": (lambda out, lse: weighted_sum(out.transpose(1, 2)), (160, 16, 80, 1), False),
    "no unit stride": (lambda out, lse: weighted_sum(out.mT) + weighted_sum(lse.mT), (160, 32, 1, 2), True),
}


@pytest.mark.parametrize(("loss", "strides", "has_dlse"), LOSSES.values(), ids=LOSSES)
def test_gradient_of_the_results(run_backward, loss, strides, has_dlse):
    assert_gradients_are_exact(lambda attention, *leaves: loss(*attention(*leaves[:3], bias=leaves[3])), make_leaves())
    dout, dlse, *_ = run_backward.call_args.args
    assert (dout.stride(), dlse is not None) == (strides, has_dlse)


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("bias",), ("q", "k", "v"), ("v", "bias")], ids=str)
def test_gradients_of_some(run_backward, wanted):
    leaves = make_leaves()
    out, lse = portable(*leaves[:3], bias=leaves[3])
    everything = torch.autograd.grad(weighted_sum(out) + weighted_sum(lse), leaves)
    for name, leaf in zip(NAMES, leaves, strict=True):
        leaf.requires_grad_(name in wanted)
    out, lse = portable(*leaves[:3], bias=leaves[3])
    (weighted_sum(out) + weighted_sum(lse)).backward()
    for name, leaf, gradient in zip(NAMES, leaves, everything, strict=True):
        assert leaf.grad is None if name not in wanted else torch.equal(leaf.grad, gradient)
    needs_dbias = run_backward.call_args.args[-3]
    assert needs_dbias == ("bias" in wanted)


@pytest.mark.parametrize(
    "shape", [(1, HEADS, SEQLEN_Q, SEQLEN_K), (2, 1, 1, SEQLEN_K), (1, HEADS, SEQLEN_Q, 1), (1, 1, 1, 1)], ids=str
)
def test_bias_that_the_user_expanded(run_backward, shape):
    """Its strides are 0, and its gradient is full: autograd sums it."""

    def loss(attention, q, k, v, bias):
        bias = bias.expand(2, HEADS, SEQLEN_Q, SEQLEN_K)
        out, lse = attention(q, k, v, bias=bias, causal=True)
        return weighted_sum(out) + weighted_sum(lse)

    assert_gradients_are_exact(loss, [*make_leaves(batch=2)[:3], torch.randn(shape, requires_grad=True)])
    bias = run_backward.call_args.args[5]
    strides_of_ones = [stride for stride, size in zip(bias.stride(), shape, strict=True) if size == 1]
    assert not any(strides_of_ones)


def test_inputs_whose_last_stride_is_not_one():
    def loss(attention, *leaves):
        q, k, v, bias = (leaf.mT.contiguous().mT for leaf in leaves)
        return weighted_sum(attention(q, k, v, bias=bias)[0])

    assert_gradients_are_exact(loss, make_leaves())


@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.float32])
def test_float16(bias_dtype):
    case = Case(SEQLEN_Q, SEQLEN_K, HEAD_DIM, heads_kv=HEADS_KV, bias="1hqk", bias_dtype=bias_dtype)
    inputs, problem = make_inputs(case)
    check = check_against_float64(lambda inputs, problem: ops.attention(inputs, problem, "portable"), inputs, problem)
    assert check.good, f"\n{check}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_packed_inputs_are_not_copied(monkeypatch, dtype):
    """The kernels read where the user's tensor is, by pointers (float32) and by descriptors (float16)."""
    spy = Mock(wraps=launch.run)
    monkeypatch.setattr(launch, "run", spy)
    qkv = torch.randn(2, SEQLEN_Q, 3, HEADS, HEAD_DIM, dtype=dtype, requires_grad=True)
    flash_attn_qkvpacked_func(qkv).sum().backward()
    assert qkv.grad.shape == qkv.shape
    launches = [call.args[0] for call in spy.call_args_list]
    readers = [launch for launch in launches if launch.kernel is not backward.attention_bwd_rows]
    assert len(readers) == 3  # the forward, dK and dV, dQ
    views = [view.data_ptr() for view in qkv.unbind(2)]
    for reader in readers:
        tensors = [argument.value for argument in reader.arguments[:3]]
        if dtype == torch.float16:
            pointers = [descriptor.base.data_ptr() for descriptor in tensors]
        else:
            pointers = [strided.ptr.data_ptr() for strided in tensors]
        assert pointers == views


def nothing(*call):
    return None


@pytest.mark.parametrize("forward", [nothing, launch.forward], ids=["all", "the backward"])
def test_what_hopper_does_not_take_goes_to_portable(monkeypatch, forward):
    """A graph of torch.compile learns only when it runs that rows are not aligned; head dims can be too large for the
    backward alone. Hopper then answers None."""
    launchers = {"hopper": SimpleNamespace(forward=forward, backward=nothing), "portable": launch}
    monkeypatch.setattr(ops, "_launcher", launchers.__getitem__)
    inputs, problem = make_inputs(Case(SEQLEN_Q, SEQLEN_K, HEAD_DIM, bias="1hqk", dtype=torch.float32))
    check = check_against_float64(lambda *call: ops.attention(*call, "hopper"), inputs, problem)
    assert check.good, f"\n{check}"


def test_backward_twice_through_a_retained_graph():
    leaves = make_leaves()
    out, lse = portable(*leaves[:3], bias=leaves[3])
    loss = weighted_sum(out) + weighted_sum(lse)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for gradient, again in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(gradient, again)


@pytest.mark.parametrize("name", [*NAMES, "out", "lse"])
def test_change_of_what_the_backward_needs_is_noticed(name):
    leaves = make_leaves()
    out, lse = portable(*leaves[:3], bias=leaves[3])
    loss = weighted_sum(out.clone())
    with torch.no_grad():
        dict(zip((*NAMES, "out", "lse"), (*leaves, out, lse), strict=True))[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("result", [0, 1], ids=["out", "lse"])
def test_second_derivative_is_refused(result):
    leaves = make_leaves()
    outputs = portable(*leaves[:3], bias=leaves[3])
    gradients = torch.autograd.grad(outputs[result].square().sum(), leaves, create_graph=True, materialize_grads=True)
    for gradient in gradients:
        with pytest.raises(NotImplementedError, match="attention can be differentiated once on the Triton backends"):
            torch.autograd.grad(gradient.sum(), leaves, retain_graph=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # raised by make_dual itself
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_refused(name, requires_grad):
    arguments = {x: leaf.requires_grad_(requires_grad) for x, leaf in zip(NAMES, make_leaves(), strict=True)}
    with forward_ad.dual_level():
        arguments[name] = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative on the Triton backends"):
            portable(**arguments)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_forward_mode_of_the_reference():
    """It is there, as the refusal promises: J t . w = t . J^T w."""
    leaves = make_leaves(torch.float64)
    tangents = [torch.randn_like(leaf) for leaf in leaves]

    def loss(q, k, v, bias):
        out, lse = reference(q, k, v, bias=bias, causal=True)
        return weighted_sum(out) + weighted_sum(lse)

    _, forward = torch.func.jvp(loss, tuple(leaves), tuple(tangents))
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    products = [(gradient * tangent).sum() for gradient, tangent in zip(gradients, tangents, strict=True)]
    torch.testing.assert_close(forward, sum(products))
