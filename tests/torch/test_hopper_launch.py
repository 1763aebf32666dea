"""Does the Hopper launcher fill in the right addresses when it meets a layout again, and refuse what it cannot take?"""

import gc
import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from triton_attention import attention, blocks, ops
from triton_attention.hopper import launch
from triton_attention.hopper.bias import BiasTensor
from triton_attention.hopper.operands import row_descriptors
from triton_attention.hopper.plan_backward import plan_backward
from triton_attention.hopper.softmax import tanh_fraction
from triton_attention.problem import NO_EXTRAS, Extras, Mask, Packing

CAUSAL = Mask(None, 0)
EXTRAS = {
    "sink": Extras(sink=torch.ones(3)),
    "softcap": Extras(softcap=30.0),
    "dropout": Extras(dropout_p=0.1, seed=torch.tensor(1)),
    "packed": Extras(packing=Packing(*torch.tensor([[0, 300, 400, 600]] * 2, dtype=torch.int32), 300, 300)),
    "slopes": Extras(alibi_slopes=torch.ones(3)),
}
SMS = 4  # fewer than tiles, so that a causal call counts them


class Variant:
    """Stands for a compiled kernel: `variant[grid](*values)` keeps the values."""

    def __init__(self):
        self.calls, self.launches = [], []

    def __getitem__(self, grid):
        return lambda *values: self.calls.append(values)


@pytest.fixture
def variant(monkeypatch):
    variant = Variant()
    monkeypatch.setattr(launch, "_recipes", {})
    monkeypatch.setattr(launch, "_num_sms", lambda device: SMS)
    monkeypatch.setattr(launch, "run", variant.launches.append)
    monkeypatch.setattr(launch, "variant", lambda planned: variant)
    return variant


def tensors(head_dim, bias_shape, dtype=torch.bfloat16):
    q, k, v = torch.randn(3, 2, 300, 3, head_dim).to(dtype)
    return q, k, v, None if bias_shape is None else torch.randn(bias_shape).to(dtype)


def addresses(values):
    return [
        None if value is None
        else value.base.data_ptr() if hasattr(value, "base")
        else value.ptr.data_ptr() if isinstance(value, BiasTensor)
        else value.data_ptr()
        for value in values
    ]  # fmt: skip


@pytest.mark.parametrize("mask", [Mask(), CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("bias_shape", [None, (1, 3, 300, 304), (2, 1, 1, 304), (1, 3, 300, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_a_layout_met_again_changes_addresses_alone(variant, head_dim, bias_shape, mask):
    q, k, v, bias = tensors(head_dim, bias_shape)
    if bias_shape is not None and bias_shape[3] == 304:
        k, v = (torch.cat((x, x[:, :4]), dim=1) for x in (k, v))
    first = launch.forward(q, k, v, bias, mask, 0.1)
    assert variant.calls == []
    others = [None if x is None else x.clone() for x in (q, k, v, bias)]
    out, lse = launch.forward(*others, mask, 0.1)
    assert [x.shape for x in (out, lse)] == [x.shape for x in first]

    (values,) = variant.calls
    plan = launch.plan_forward(*others, mask, 0.1, SMS)
    planned = [argument.value for argument in plan.launch.arguments]
    assert values[-3:] == (planned[-1], plan.launch.spec, plan.launch.tile)
    tail = None if head_dim == 64 else 64 * 2
    *inputs, out_address, out_tail, lse_address, counter = addresses(values[:-3])
    assert inputs == addresses(planned[:7])
    assert (out_address, lse_address) == (out.data_ptr(), lse.data_ptr())
    assert out_tail == (None if tail is None else out.data_ptr() + tail)
    assert (counter == lse_address) == (mask != CAUSAL)  # the word that tiles are counted in


@pytest.mark.parametrize("what", ["q", "k", "v", "bias"])
def test_rows_that_are_not_aligned_are_not_taken(variant, what):
    calls = dict(zip(("q", "k", "v", "bias"), tensors(64, (1, 3, 300, 300)), strict=True))
    calls["bias"] = calls["bias"][..., :296].contiguous()
    calls["k"], calls["v"] = (calls[name][:, :296] for name in ("k", "v"))
    assert launch.forward(**calls, mask=Mask(), softmax_scale=0.1) is not None
    wide = torch.zeros(*calls[what].shape[:3], calls[what].shape[3] + 1, dtype=torch.bfloat16)
    calls[what] = wide[..., 1:]
    assert launch.forward(**calls, mask=Mask(), softmax_scale=0.1) is None


def test_a_vector_of_bias_that_is_not_aligned_is_copied_each_time(variant):
    q, k, v, _ = tensors(64, None)
    k, v, bias = k[:, :299], v[:, :299], torch.randn(2, 1, 1, 299).bfloat16()
    for _ in range(2):
        assert launch.forward(q, k, v, bias, Mask(), 0.1) is not None
    assert variant.calls == []


def test_what_is_remembered_keeps_no_tensor_alive(variant):
    calls = [(*tensors(96, (1, 3, 300, 304))[:1], *tensors(96, None)[1:3], None) for _ in range(2)]
    calls.append((*tensors(96, None)[:3], torch.randn(1, 3, 300, 1)))
    references = []
    for call in calls:
        results = launch.forward(*call, CAUSAL, 0.1)
        references += [StorageWeakRef(x.untyped_storage()) for x in (*call, *results) if x is not None]
    variant.calls.clear()
    variant.launches.clear()
    del call, calls, results
    gc.collect()
    assert all(reference.expired() for reference in references)


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_what_few_calls_have_is_planned_each_time(variant, extras):
    q, k, v, _ = tensors(64, None)
    lse_shape = (2, 3, 300)
    if extras.packing is not None:
        (q, k, v), lse_shape = (x.flatten(0, 1) for x in (q, k, v)), (3, 600)
    for _ in range(2):
        out, lse = launch.forward(q, k, v, None, CAUSAL, 0.1, extras)
        assert (out.shape, lse.shape) == (q.shape, lse_shape)
    assert (variant.calls, launch._recipes) == ([], {})


@pytest.mark.parametrize("name", ["sink", "softcap", "slopes"])
def test_what_few_calls_have_in_the_backward(variant, name):
    """A gradient of the bias beside scores that are changed is left to portable. A sink changes no kernel."""
    extras = EXTRAS[name]
    *_, dsink = backward(*tensors(64, None), extras=extras)
    assert (dsink is None) == (extras.sink is None)
    plain, bias = [planned.spec for planned in variant.launches], tensors(64, (2, 3, 1, 300))
    assert [spec.SOFTCAP or spec.ALIBI for spec in plain if hasattr(spec, "ALIBI")] == [extras.sink is None]
    assert backward(*bias, extras=extras) is not None
    assert (backward(*bias, extras=extras, needs_dbias=True) is None) == (extras.sink is None)


@pytest.mark.parametrize("extras", [EXTRAS["dropout"], Extras(packing=())], ids=str)
def test_what_the_backward_leaves(variant, extras):
    assert backward(*tensors(64, None), extras=extras) is None


@pytest.mark.parametrize("bias_shape", [None, (1, 3, 300, 1)])
def test_the_gradient_of_a_sink_and_of_a_bias_beside_it(bias_shape):
    """From lse and -delta, the numbers that `attention_bwd_rows` leaves."""
    q, k, v, bias = (None if x is None else x.double() for x in tensors(16, bias_shape, torch.float32))
    sink = torch.tensor([0.5, 2.0, -math.inf], dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (sink, bias) if x is not None]
    k, v = k[:, :200], v[:, :200]  # the first queries see no key
    out, lse = attention(q, k, v, bias=bias, sink=sink, causal=True, return_lse=True, backend="reference")
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dlse = dlse.masked_fill(lse == -math.inf, 0.0)
    exact = torch.autograd.grad([out, lse.masked_fill(lse == -math.inf, 0.0)], leaves, [dout, dlse])
    out, lse = out.detach(), lse.detach().float()
    bias = None if bias is None else bias.detach().float()
    call = (dout.bfloat16(), dlse.float(), *(x.bfloat16() for x in (q, k, v)), bias, out.bfloat16(), lse)
    plan = plan_backward(*call, CAUSAL, 0.25, bias is not None, Extras(sink=sink.detach().float()), False, SMS)
    plan.rows[:, :, 1, :300] = (dlse - (dout * out).sum(-1).transpose(1, 2)).float()
    torch.testing.assert_close(plan.finish_dsink().double(), exact[0], rtol=1e-4, atol=1e-4)
    if bias is not None:
        torch.testing.assert_close(plan.finish_dbias().double(), exact[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "strides"), [((3,), (0, 1)), ((2, 3), (3, 1)), ((1, 3), (0, 1)), ((2, 1), (1, 0))])
@pytest.mark.parametrize("mask", [CAUSAL, Mask(None, 0, top_left=True)], ids=["bottom-right", "top-left"])
def test_slopes_are_read_by_strides_and_distances_counted_from_the_diagonal(shape, strides, mask):
    q, k, v, _ = tensors(64, None)
    plan = launch.plan_forward(q, k[:, :200], v[:, :200], None, mask, 0.1, SMS, Extras(alibi_slopes=torch.ones(shape)))
    extras = plan.launch.arguments[-1].value.extras
    assert extras.slopes[1:] == strides
    assert extras.diagonal == (0 if mask.top_left else -100)


def packed_views():
    together = torch.arange(70 * 3 * 2 * 48, dtype=torch.int32).to(torch.bfloat16).view(70, 3, 2, 48)
    return {"contiguous": torch.zeros(70, 3, 40).bfloat16(), "of qkv": together.unbind(1)[1][:, :, 8:40],
            "one head": together[:, 1, :1], "one row": together[5:6, 2]}  # fmt: skip


@pytest.mark.parametrize("tensor", packed_views().values(), ids=packed_views())
def test_copies_of_a_packed_sequence_end_where_it_does(tensor):
    """A copy leaves out what is outside of the descriptor's shape: all but the rows of the sequence."""
    total, heads, columns = tensor.shape
    tail = 16 if columns > 32 else 0
    descriptors = row_descriptors(tensor[None], 64, 32, tail, True)
    for first, (made, _) in zip((0, 32) if tail else (0,), descriptors, strict=False):
        for start, end in {(0, 0), (0, total), (total // 3, total // 2), (total - 1, total), (total, total)}:
            for row in range(130):
                place = [end, heads - 1, blocks.place_of_row(row, end - start, total), 0]
                inside = all(0 <= index < size for index, size in zip(place, made.shape, strict=True))
                assert inside == (row < end - start)
                offset = sum(index * stride for index, stride in zip(place, made.strides, strict=True))
                address = made.base.data_ptr() + offset * tensor.element_size()
                assert not inside or address == tensor[start + row, heads - 1, first:].data_ptr()


@pytest.mark.parametrize("mask", [Mask(9, 4), Mask(None, 0, top_left=True), Mask(10**12, 10**12)], ids=str)
def test_the_numbers_of_packed_sequences(mask):
    q, k, v, _ = (None if x is None else x.flatten(0, 1)[None] for x in tensors(64, None))
    bias = torch.zeros(1, 3, 320, 320).bfloat16()
    extras = EXTRAS["packed"]._replace(packing=EXTRAS["packed"].packing._replace(max_seqlen_q=320, max_seqlen_k=320))
    plan = launch.plan_forward(q, k[:, :400], v[:, :400], bias, mask, 0.1, SMS, extras)
    call, spec = plan.launch.arguments[-1].value, plan.launch.spec
    assert (call.batch, call.seqlen_q, call.seqlen_k) == (3, 320, 320)
    assert call.packing[2:] == (600, 400, int(not mask.top_left))
    assert (call.lower, call.upper) == (-min(mask.left or 0, 600), min(mask.right, 600))
    assert (spec.VARLEN, spec.UNEVEN, spec.BIAS_SHARED) == (True, True, False)


@pytest.mark.parametrize("softcap", [1e-300, 30.0, 1e300])
def test_a_softcap_and_the_factor_before_it_are_float32_numbers(softcap):
    q, k, v, _ = tensors(64, None)
    plan = launch.plan_forward(q, k, v, None, CAUSAL, -0.1, SMS, Extras(softcap=softcap))
    call = plan.launch.arguments[-1].value
    scale, cap = torch.tensor([call.scale, call.extras.softcap]).tolist()
    assert scale * cap == pytest.approx(-0.1)


def test_the_tanh_of_a_softcap():
    x = torch.cat((torch.logspace(-30, 0.75, 10001), torch.linspace(1, 6, 10001)))
    numerator, denominator = tanh_fraction(x)
    error = (numerator / denominator).double() / x.double().tanh() - 1
    assert error.abs().max() < 3e-5
    numerator, denominator = tanh_fraction(torch.tensor([-6.0, 6.0]))
    torch.testing.assert_close(numerator / denominator, torch.tensor([-1.0, 1.0]), rtol=3e-7, atol=0.0)


def backward(q, k, v, bias, *, dlse=None, mask=CAUSAL, needs_dbias=False, extras=NO_EXTRAS, deterministic=False):
    """What the launcher makes of a call whose results are zeros."""
    out, lse = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype), torch.zeros(q.shape[0], q.shape[2], q.shape[1])
    return launch.backward(
        torch.zeros_like(out), dlse, q, k, v, bias, out, lse, mask, 0.1, needs_dbias, extras, deterministic
    )


def test_the_backward_leaves_rows_that_are_not_aligned(variant):
    q, k, v, _ = tensors(64, None)
    assert backward(q, k, v, None) is not None
    wide = torch.zeros(2, 300, 3, 65, dtype=torch.bfloat16)
    assert backward(q, wide[..., 1:], v, None) is None


ADDED = ["attention_bwd_rows", "attention_bwd", "attention_bwd_dq"]
APART = ["attention_bwd_rows", "attention_bwd", "attention_bwd_queries"]
WIDE = ["attention_bwd_rows", "attention_bwd_wide", "attention_bwd_queries"]


@pytest.mark.parametrize(
    ("head_dim", "deterministic", "kernels"),
    [
        (64, False, ADDED), (128, False, ADDED), (64, True, APART), (128, True, APART), (136, False, WIDE),
        (256, True, WIDE),
    ],
)  # fmt: skip
def test_which_kernels_a_backward_has(variant, head_dim, deterministic, kernels):
    backward(*tensors(head_dim, None), deterministic=deterministic)
    assert [planned.kernel.__name__ for planned in variant.launches] == kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3, 300, 300), (1, 3, 300, 300), (2, 1, 1, 300), (1, 3, 300, 1), (1, 1, 1, 1)])
def test_the_gradient_of_a_bias_has_its_shape_and_dtype(variant, shape, dtype):
    q, k, v, _ = tensors(64, None)
    if shape[3] == 300:  # rows of 16 bytes
        k, v, shape = k[:, :296], v[:, :296], (*shape[:3], 296)
    bias = torch.randn(shape).to(dtype)
    *others, dbias, _ = backward(q, k, v, bias, needs_dbias=True)
    assert [x.shape for x in others] == [x.shape for x in (q, k, v)]
    assert (dbias.shape, dbias.dtype, dbias.is_contiguous()) == (bias.shape, dtype, True)
    assert backward(q, k, v, bias)[3] is None


@pytest.mark.parametrize("step", [2, 0], ids=["every other", "one number"])
def test_a_bias_of_keys_that_do_not_lie_side_by_side_is_read_from_a_copy(step):
    q, k, v, _ = tensors(64, None)
    bias = torch.randn(2, 3, 1, 600).as_strided((2, 3, 1, 300), (1800, 600, 600, step))
    out, lse = torch.zeros_like(q), torch.zeros(2, 3, 300)
    plan = plan_backward(out, None, q, k, v, bias, out, lse, CAUSAL, 0.1, False, NO_EXTRAS, False, SMS)
    (read,) = (argument.value for argument in plan.launches[1].arguments if isinstance(argument.value, BiasTensor))
    assert torch.equal(read.ptr, bias.expand(2, 3, 300, 300))
    assert read.ptr.stride(3) == 1
    assert (read.batch, read.head) == read.ptr.stride()[:2]


def test_the_gradient_of_a_bias_of_queries_is_that_of_their_log_sum_exp(variant):
    q, k, v, _ = tensors(64, None)
    bias, dlse = torch.randn(1, 3, 300, 1), torch.randn(2, 3, 300)
    *_, dbias, _ = backward(q, k, v, bias, dlse=dlse, needs_dbias=True)
    torch.testing.assert_close(dbias, dlse.sum(0)[None, ..., None])
    exact_bias = bias.double().requires_grad_()
    _, lse = attention(*(x.double() for x in (q, k, v)), bias=exact_bias, return_lse=True, backend="reference")
    (exact,) = torch.autograd.grad(lse, exact_bias, dlse.double())
    torch.testing.assert_close(dbias.double(), exact)


@pytest.mark.parametrize(
    ("mode", "asked", "expected"),
    [(None, False, False), (None, True, True), ("warn", False, False), ("warn", True, True), ("on", False, True)],
)
def test_when_a_backward_is_deterministic(monkeypatch, mode, asked, expected):
    """Where the call or PyTorch asks for it; a mode that only warns does not."""
    q = torch.randn(1, 8, 2, 16, dtype=torch.float16)
    heard = []

    class Launcher:
        @staticmethod
        def backward(*arguments):
            heard.append(arguments[-1])
            return q, q, q, None, None

    monkeypatch.setattr(ops, "_launcher", lambda name: Launcher)
    call = (q, q, q, *[None] * 8, 0.25, 0.0, 0.0, None, None, False, asked, "hopper")
    if mode is not None:
        torch.use_deterministic_algorithms(True, warn_only=mode == "warn")
    try:
        torch.ops.triton_attention.attention_bwd(q.clone(), None, q.clone(), torch.zeros(1, 2, 8), False, *call)
    finally:
        torch.use_deterministic_algorithms(False)
    assert heard == [expected]


def test_the_operator_gives_what_hopper_leaves_to_portable(monkeypatch):
    q = torch.randn(1, 8, 2, 16, dtype=torch.float16)
    lse = torch.zeros(1, 2, 8)
    asked = []

    class Launcher:
        def __init__(self, name, result):
            self.name, self.result = name, result

        def backward(self, *arguments):
            asked.append((self.name, len(arguments)))
            return self.result

    launchers = {"hopper": Launcher("hopper", None), "portable": Launcher("portable", (q, q, q, None, None))}
    monkeypatch.setattr(ops, "_launcher", launchers.get)
    nothing = [None] * 8  # no bias, slopes, sink, boundaries, seed or longest lengths
    call = (q, q, q, *nothing, 0.25, 0.0, 0.0, None, None, False, False, "hopper")
    torch.ops.triton_attention.attention_bwd(q.clone(), None, q.clone(), lse, False, *call)
    assert asked == [("hopper", 13), ("portable", 13)]
