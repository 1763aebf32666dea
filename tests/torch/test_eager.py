"""Are plain eager calls that were seen before computed as the first was, and only these without the operators?

They are calls on a GPU; here the CPU counts as one.
"""

from operator import attrgetter
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from triton_attention import api, attention, eager, ops

# numpy's, where a query sees no key
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Counts the calls that go by the operator."""
    monkeypatch.setattr(eager, "_DEVICE", "cpu")
    monkeypatch.setattr(eager, "_is_there", attrgetter("is_cpu"))
    monkeypatch.setattr(api, "_known", {})
    spy = Mock(wraps=ops._run_forward)
    monkeypatch.setattr(ops, "_run_forward", spy)

    def by_the_operator():
        """Of the calls since it was last asked: whether each was."""
        made = [call.args[-1] is None for call in spy.call_args_list]
        spy.reset_mock()
        return made

    return by_the_operator


def make_inputs(requires_grad=False):
    shapes = ((1, 5, 2, 16), (1, 8, 1, 16), (1, 8, 1, 16), (1, 2, 5, 8))
    return [torch.randn(shape).requires_grad_(requires_grad) for shape in shapes]


def call(q, k, v, bias, **options):
    return attention(q, k, v, bias=bias, return_lse=True, backend="portable", **{"causal": True} | options)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_results_and_gradients_are_those_of_the_operator(launches, context):
    leaves = make_inputs(requires_grad=True)
    sink = nn.Parameter(torch.randn(2))
    gradients = []
    for _ in range(3):
        with context():
            out, lse = call(*leaves, sink=sink)
        assert out.requires_grad == (context is torch.enable_grad)
        assert out.is_inference() == (context is torch.inference_mode)
        given = (*leaves, sink)
        results = torch.autograd.grad(out.sum() + lse.square().sum(), given) if out.requires_grad else ()
        gradients.append((out, lse, *results))
    assert launches() == [True, False, False]
    for again in gradients[1:]:
        for result, first in zip(again, gradients[0], strict=True):
            assert torch.equal(result, first)


def test_what_is_not_used_has_no_gradient_to_wait_for(launches):
    leaves = make_inputs(requires_grad=True)
    bias = leaves[3].detach()
    results = []
    for _ in range(2):
        out, _ = call(*leaves[:3], bias)
        results.append(torch.autograd.grad(out.sum(), leaves[:3]))
        (dq,) = torch.autograd.grad(call(*leaves[:3], bias)[1].sum(), leaves[0])
        results[-1] += (dq,)
    for first, again in zip(*results, strict=True):
        assert torch.equal(first, again)


def test_dropout_draws_a_seed_each_time(launches):
    inputs = make_inputs()
    torch.manual_seed(3)
    drawn = [call(*inputs, dropout_p=0.5)[0] for _ in range(3)]
    assert launches() == [True, False, False]
    assert not any(torch.equal(drawn[0], other) for other in drawn[1:])
    torch.manual_seed(3)
    assert all(torch.equal(call(*inputs, dropout_p=0.5)[0], first) for first in drawn)


DIFFERENT = {
    "causal=1": ({"causal": 1}, TypeError),
    "deterministic=0": ({"deterministic": 0}, TypeError),
    "softcap=False": ({"softcap": False}, TypeError),
    "dropout_p=False": ({"dropout_p": False}, TypeError),
    "dropout_p=[0.0]": ({"dropout_p": [0.0]}, TypeError),
    "softmax_scale=True": ({"softmax_scale": True}, TypeError),
    "window of a bool": ({"window": (True, 0)}, TypeError),
    "no backend": ({"backend": "cuda"}, ValueError),
}


@pytest.mark.parametrize(("options", "error"), DIFFERENT.values(), ids=DIFFERENT)
def test_options_that_are_equal_and_wrong_are_refused(options, error):
    inputs = make_inputs()
    for _ in range(2):
        attention(*inputs[:3], causal=True, softmax_scale=1.0, window=(1, 0), backend="portable")
    with pytest.raises(error):
        attention(
            *inputs[:3], **{"causal": True, "softmax_scale": 1.0, "window": (1, 0), "backend": "portable"} | options
        )


@pytest.mark.parametrize("which", [1, 2, 3])
def test_tensors_that_do_not_fit_are_refused(which):
    inputs = make_inputs()
    for _ in range(2):
        call(*inputs)
    for wrong in (
        inputs[which][:, :-1, :-1, :-1],
        inputs[which].double(),
        inputs[which].to("meta"),
        inputs[which].to_sparse(),
    ):
        with pytest.raises((TypeError, ValueError)):
            call(*inputs[:which], wrong, *inputs[which + 1 :])


def test_other_layouts_are_other_calls(launches):
    inputs = make_inputs()
    expected = call(*inputs)
    for _ in range(2):
        for dim in range(1, 4):
            others = [x.transpose(dim, 0).contiguous().transpose(dim, 0) for x in inputs]
            others[3] = inputs[3].expand(1, 2, 5, 8)
            for result, first in zip(call(*others), expected, strict=True):
                assert torch.equal(result, first)


def test_a_key_tells_apart_whatever_a_plan_follows_from(launches):
    """The gradient's is asked of tensors that nobody validated: those that were saved, and the gradients of results."""
    tensor = torch.zeros(2, 4, 6, 8)
    others = [
        tensor.transpose(0, 1),
        tensor.expand(2, 4, 6, 8)[:1],
        tensor[..., 1:],
        tensor.double(),
        nn.Parameter(tensor),
    ]
    others += [torch.zeros(tensor.numel() + 1)[1:].view(tensor.shape), torch.zeros(4, 2, 6, 8).transpose(0, 1), None]
    keys = [eager.key((tensor, other, tensor), ("the call",)) for other in (tensor, *others)]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    not_plain = [tensor.to("meta"), torch._neg_view(tensor), tensor.to_sparse(), tensor.as_subclass(Doubled)]
    assert [eager.key((tensor, other), ()) for other in not_plain] == [None] * 4


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operators(launches):
    leaves = make_inputs(requires_grad=True)
    for _ in range(2):
        call(*leaves)
    out, _ = call(*leaves)
    with Watch() as watch:
        call(*leaves)
        torch.autograd.grad(out.sum(), leaves)
    assert torch.ops.triton_attention.attention_fwd.default in watch.seen
    assert torch.ops.triton_attention.attention_bwd.default in watch.seen
    with FlopCounterMode(display=False):
        call(*leaves)
    assert launches() == [True, False, False, True, True]


def test_a_profiler_sees_the_operators():
    leaves = make_inputs(requires_grad=True)
    for _ in range(2):
        call(*leaves)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out, _ = call(*leaves)
        torch.autograd.grad(out.sum(), leaves)
    names = {event.name for event in profile.events()}
    assert {"triton_attention::attention_fwd", "triton_attention::attention_bwd"} <= names


class Doubled(torch.Tensor):
    """A tensor subclass that changes what goes into operators."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def test_who_is_no_plain_tensor_goes_by_the_operator(launches):
    inputs = make_inputs()
    for _ in range(2):
        call(*inputs)
    launches()
    call(inputs[0].as_subclass(Doubled), *inputs[1:])
    assert launches() == [True]
    negative = torch._neg_view(inputs[2])
    for _ in range(2):
        torch.testing.assert_close(call(*inputs[:2], negative, inputs[3])[0], -call(*inputs)[0])
    assert launches() == [True, False] * 2


def test_a_second_derivative_is_refused():
    leaves = make_inputs(requires_grad=True)
    for _ in range(2):
        call(*leaves)
    (dq,) = torch.autograd.grad(call(*leaves)[0].sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        torch.autograd.grad(dq.sum(), leaves[0])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_forward_mode_is_refused():
    inputs = make_inputs()
    for _ in range(2):
        call(*inputs)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"), torch.autograd.forward_ad.dual_level():
        call(torch.autograd.forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:])


def test_batches_of_gradients():
    leaves = make_inputs(requires_grad=True)
    for _ in range(2):
        call(*leaves)
    out, _ = call(*leaves)
    douts = torch.randn(3, *out.shape)
    together = torch.autograd.grad(out, leaves, douts, retain_graph=True, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(out, leaves, dout, retain_graph=True) for dout in douts]
    for result, singles in zip(together, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(result, torch.stack(singles))


def test_gradients_asked_for_later_are_computed(launches):
    """The same tensors, of which another requires a gradient now, under the same or another mode."""
    inputs = make_inputs()
    for _ in range(2):
        assert not call(*inputs)[0].requires_grad
    for tensor in inputs:
        tensor.requires_grad_()
        for _ in range(2):
            out, _ = call(*inputs)
            (gradient,) = torch.autograd.grad(out.sum(), tensor)
            assert gradient.shape == tensor.shape
        with torch.no_grad():
            assert not call(*inputs)[0].requires_grad


def test_hooks_on_saved_tensors_may_change_their_layout():
    leaves = make_inputs(requires_grad=True)
    expected = [torch.autograd.grad(call(*leaves)[0].square().sum(), leaves) for _ in range(2)][1]

    def unpack(tensor):
        return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.dim() == 4 else tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        out, _ = call(*leaves)
    for gradient, first in zip(torch.autograd.grad(out.square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(gradient, first)


def test_autocast_is_part_of_the_call():
    inputs = make_inputs()
    dtypes = []
    for _ in range(2):
        dtypes.append(call(*inputs)[0].dtype)
        with torch.autocast("cpu", dtype=torch.float16):
            dtypes.append(call(*inputs)[0].dtype)
    assert dtypes == [torch.float32, torch.float16] * 2


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(api, "_MAX_KNOWN", 3)
    for length in range(1, 8):
        q, k, v, bias = make_inputs()
        for _ in range(2):
            call(q[:, :length], k, v, bias[:, :, :length])
            assert len(api._known) <= 3
