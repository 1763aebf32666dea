"""Does the Hopper launcher fill in the right addresses when it meets a layout again, and refuse what it cannot take?"""

import ctypes
import gc
import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import triton
from torch.multiprocessing.reductions import StorageWeakRef

from triton_attention import attention, kernel, ops, recipes
from triton_attention.hopper import launch
from triton_attention.hopper.bias import BiasTensor
from triton_attention.hopper.channel import PACKED_ROWS
from triton_attention.hopper.operands import row_descriptors
from triton_attention.hopper.plan_backward import plan_backward
from triton_attention.philox import kept_factor
from triton_attention.problem import NO_EXTRAS, Extras, Mask, Packing
from triton_attention.ready import Ready

CAUSAL = Mask(None, 0)
EXTRAS = {
    "sink": Extras(sink=torch.ones(3)),
    "softcap": Extras(softcap=30.0),
    "dropout": Extras(dropout_p=0.1, seed=torch.tensor(1)),
    "packed": Extras(packing=Packing(*torch.tensor([[0, 300, 400, 600]] * 2, dtype=torch.int32), 300, 300)),
    "slopes": Extras(alibi_slopes=torch.ones(3)),
}
SMS = 4  # fewer than tiles, so that a causal call counts them


class Variants:
    """Stand for compiled kernels. They keep the names of the kernels that were launched, and the values."""

    def __init__(self):
        self.launched = []
        self.prepared = 0

    def of(self, planned):
        return lambda *values: self.launched.append((planned.kernel, values))

    def ready(self, start, programs, values):
        self.prepared += 1
        return Ready(lambda stream, items: start(*items), [(value,) for value in values])


@pytest.fixture
def variants(monkeypatch):
    variants = Variants()
    monkeypatch.setattr(launch, "_num_sms", lambda device: SMS)
    monkeypatch.setattr(recipes, "_recipes", recipes._Kept(100))
    monkeypatch.setattr(recipes, "_made", {})
    monkeypatch.setattr(recipes, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: 0)))
    monkeypatch.setattr(recipes, "ready", variants.ready)
    monkeypatch.setattr(kernel, "variant", variants.of)
    for module in (kernel, launch):
        monkeypatch.setattr(module, "run", lambda planned: variants.of(planned)(*recipes._values(planned)))
    return variants


def tensors(head_dim, bias_shape, dtype=torch.bfloat16):
    q, k, v = torch.randn(3, 2, 300, 3, head_dim).to(dtype)
    return q, k, v, None if bias_shape is None else torch.randn(bias_shape).to(dtype)


def places(launched, known):
    """The launches with each address as a place in one of the known tensors, or else the number of one it is in."""
    scratch = {}

    def place(value):
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        elif hasattr(value, "base"):
            fields = {name: field for name, field in vars(value).items() if name != "base"}
            return place(value.base.data_ptr()), fields
        elif isinstance(value, tuple):
            return type(value), tuple(place(item) for item in value)
        if not isinstance(value, int) or value < 2**32:
            return value
        for name, tensor in known.items():
            if 0 <= value - tensor.data_ptr() < tensor.untyped_storage().nbytes():
                return name, value - tensor.data_ptr()
        return scratch.setdefault(value, f"scratch {len(scratch)}")

    return [(kernel, [place(value) for value in values]) for kernel, values in launched]


def thrice(call, make_tensors, variants):
    """What three calls return, each with tensors of its own that stay, and what they launch."""
    kept, made = [], []
    for _ in range(3):
        inputs = [None if x is None else x.clone() for x in make_tensors()]  # each with memory of its own
        variants.launched.clear()
        results = call(*inputs)
        known = {f"input {i}": x for i, x in enumerate(inputs) if x is not None}
        known |= {f"result {i}": x for i, x in enumerate(results) if x is not None}
        made.append(places(variants.launched, known))
        kept.append((inputs, results))
    return kept, made


each_mask = pytest.mark.parametrize("mask", [Mask(), CAUSAL], ids=["full", "causal"])
BIASES = [None, (1, 3, 300, 304), (2, 1, 1, 304), (1, 3, 300, 1)]


@each_mask
@pytest.mark.parametrize("bias_shape", BIASES, ids=str)
@pytest.mark.parametrize(("head_dim", "known"), [(64, None), (96, None), (96, "what stands for the call")])
def test_a_layout_met_again_changes_addresses_alone(variants, head_dim, known, bias_shape, mask):
    def make_tensors():
        q, k, v, bias = tensors(head_dim, bias_shape)
        if bias_shape is not None and bias_shape[3] == 304:
            k, v = (torch.cat((x, x[:, :4]), dim=1) for x in (k, v))
        return q, k, v, bias

    kept, made = thrice(lambda *call: launch.forward(*call, mask, 0.1, known=known), make_tensors, variants)
    assert made[0] == made[1] == made[2]
    assert len(recipes._recipes) == 1
    for _, results in kept:
        assert [(x.shape, x.dtype, x.is_contiguous()) for x in results] == [
            (x.shape, x.dtype, True) for x in kept[0][1]
        ]


@each_mask
@pytest.mark.parametrize("known", [None, "what stands for the call"])
@pytest.mark.parametrize("bias_shape", [*BIASES, (2, 3, 300, 304), (1, 1, 1, 304)], ids=str)
def test_a_backward_met_again_changes_addresses_alone(variants, bias_shape, known, mask):
    def make_tensors():
        q, k, v, bias = tensors(64, bias_shape)
        if bias_shape is not None and bias_shape[3] == 304:
            k, v = (torch.cat((x, x[:, :4]), dim=1) for x in (k, v))
        lse = torch.zeros(2, 3, 300)
        return torch.randn_like(q), lse + 1, q, k, v, bias, torch.zeros_like(q), lse

    def call(*inputs):
        return launch.backward(*inputs, mask, 0.1, bias_shape is not None, NO_EXTRAS, False, known=known)

    kept, made = thrice(call, make_tensors, variants)
    assert made[0] == made[1] == made[2]
    assert len(recipes._recipes) == (bias_shape != (1, 3, 300, 1))  # whose gradient PyTorch computes
    for _, results in kept:
        assert [None if x is None else (x.shape, x.dtype) for x in results] == [
            None if x is None else (x.shape, x.dtype) for x in kept[0][1]
        ]


def test_what_stands_for_a_backward_says_neither_what_is_wanted_nor_how(variants):
    """The same call may be differentiated in other ways: PyTorch's switch of deterministic algorithms is global."""
    q, k, v, bias = tensors(64, (2, 3, 1, 300))
    for needs_dbias, deterministic in [(False, False), (True, False), (False, True), (True, True)] * 3:
        variants.launched.clear()
        *_, dbias, _ = backward(q, k, v, bias, needs_dbias=needs_dbias, deterministic=deterministic, known="the call")
        assert [kernel.__name__ for kernel, _ in variants.launched] == (APART if deterministic else ADDED)
        assert (dbias is not None) == needs_dbias


def test_a_gradient_of_results_whose_rows_are_not_aligned_is_copied_each_time(variants):
    q, k, v, _ = tensors(64, None)
    out, lse = torch.zeros_like(q), torch.zeros(2, 3, 300)
    for number in range(4):
        dout = torch.full((), float(number), dtype=q.dtype).expand(q.shape)
        launch.backward(dout, None, q, k, v, None, out, lse, CAUSAL, 0.1, False, NO_EXTRAS, False, known="the call")
        (_, (_, *strides)) = variants.launched[-3][1][:2]
        assert strides == list(q.stride()[:3])
    assert len(recipes._recipes) == 1


def test_scratch_memory_does_not_overlap(variants):
    q, k, v, _ = tensors(64, None)
    out, lse = torch.zeros_like(q), torch.zeros(2, 3, 300)
    plan = plan_backward(out, None, q, k, v, None, out, lse, CAUSAL, 0.1, False, NO_EXTRAS, False, SMS)
    rows, sums = (argument.value for argument in plan.launches[0].arguments[5:7])
    for _ in range(2):
        backward(q, k, v, None)
    variants.launched.clear()
    backward(q, k, v, None)
    (first, second) = sorted(zip(variants.launched[0][1][5:7], (rows, sums), strict=True), key=lambda pair: pair[0])
    assert first[0] + first[1].nbytes <= second[0]


def test_what_counts_starts_at_zero(variants, monkeypatch):
    """The memory that it gets may have held anything."""
    q, k, v, _ = tensors(64, None)
    counts = []

    def read(*values):
        counter = values[-4] if isinstance(values[-4], int) else values[-4].data_ptr()
        word = ctypes.c_int.from_address(counter)
        counts.append(word.value)
        word.value = 7

    monkeypatch.setattr(variants, "of", lambda planned: read)
    monkeypatch.setattr(kernel, "variant", variants.of)
    monkeypatch.setattr(kernel, "run", lambda planned: read(*recipes._values(planned)))
    for _ in range(6):
        launch.forward(q, k, v, None, CAUSAL, 0.1)
    assert counts == [0] * 6


def test_a_tensor_that_shares_memory_with_another_is_found_where_it_is(variants):
    """In calls of the same layout k may be v, or a slice of the tensor of which q is one, and then not."""
    packed = torch.randn(2, 300, 3, 3, 64).bfloat16()
    q, k, v = packed.unbind(2)
    apart = [torch.randn(2, 300, 3, 3, 64).bfloat16().unbind(2)[i] for i in range(3)]
    assert [x.stride() for x in apart] == [x.stride() for x in (q, k, v)]
    for call in ((q, k, v), (q, k, v), (q, k, k), (q, q, q), apart):
        variants.launched.clear()
        launch.forward(*call, None, Mask(), 0.1)
        ((_, values),) = variants.launched
        assert [values[i].base.data_ptr() for i in (0, 2, 4)] == [x.data_ptr() for x in call]


def test_arguments_are_prepared_where_addresses_come_again(variants):
    q, k, v, _ = tensors(64, None)
    addresses_of_results = set()
    for _ in range(8):  # freed memory is given out again, more often or less
        addresses_of_results |= {x.data_ptr() for x in launch.forward(q, k, v, None, Mask(), 0.1)}
    assert len(variants.launched) == 8
    assert 1 <= variants.prepared <= 3 + len(addresses_of_results)  # one for each that is new, at most
    kept = [launch.forward(*(x.clone() for x in (q, k, v)), None, Mask(), 0.1) for _ in range(8)]
    addresses = [values[7].base.data_ptr() for _, values in variants.launched[-8:]]
    assert addresses == [out.data_ptr() for out, _ in kept]


def test_addresses_may_come_again_in_other_company(variants):
    tensors_of = [tensors(64, None)[:3] for _ in range(3)]
    combinations = list(product(*zip(*tensors_of, strict=True)))
    addresses_of_results = set()
    for call in (*combinations[:2], *combinations, *combinations[::-1]):
        out, lse = launch.forward(*call, None, Mask(), 0.1)
        values = variants.launched[-1][1]
        read = [values[i].base.data_ptr() for i in (0, 2, 4, 7)]
        assert read == [x.data_ptr() for x in (*call, out)]
        addresses_of_results |= {out.data_ptr(), lse.data_ptr()}
    assert variants.prepared <= 3 * 3 + len(addresses_of_results)  # one for each that is new, at most


def test_a_launcher_of_another_make_is_called_the_public_way(variants, monkeypatch):
    public = []

    class Compiled:
        def __getitem__(self, programs):
            return lambda *values, stream: public.append((programs, stream))

    monkeypatch.setattr(kernel, "variant", lambda planned: Compiled())
    monkeypatch.setattr(recipes, "ready", lambda compiled, programs, values: None)
    q, k, v, _ = tensors(64, None)
    for _ in range(4):
        launch.forward(q, k, v, None, Mask(), 0.1)
    assert public == [((SMS, 1, 1), 0)] * 3
    assert not recipes._made


def test_what_is_kept_is_bounded(variants, monkeypatch):
    monkeypatch.setattr(recipes, "_recipes", recipes._Kept(3))
    monkeypatch.setattr(recipes, "_MAX_ARGUMENTS", 8)
    for length in range(100, 108):
        q, k, v = (x[:, :length] for x in tensors(64, None)[:3])
        for _ in range(4):
            launch.forward(q, k, v, None, Mask(), 0.1)
            assert len(recipes._recipes) <= 3
            assert len(recipes._made) <= 8
    assert len(variants.launched) == 8 * 4


def test_who_watches_launches_sees_them(variants, monkeypatch):
    """Hooks of Triton, which profilers set, are told by its own way to launch."""
    q, k, v, _ = tensors(64, None)
    for _ in range(4):
        launch.forward(q, k, v, None, Mask(), 0.1)
    asked = []
    monkeypatch.setattr(kernel, "run", asked.append)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        hook = getattr(triton.knobs.runtime, name)
        hook.add(print)
        try:
            launch.forward(q, k, v, None, Mask(), 0.1)
        finally:
            hook.remove(print)
    assert len(asked) == 2
    launch.forward(q, k, v, None, Mask(), 0.1)
    assert len(asked) == 2


@pytest.mark.parametrize("what", ["q", "k", "v", "bias"])
def test_rows_that_are_not_aligned_are_not_taken(variants, what):
    calls = dict(zip(("q", "k", "v", "bias"), tensors(64, (1, 3, 300, 300)), strict=True))
    calls["bias"] = calls["bias"][..., :296].contiguous()
    calls["k"], calls["v"] = (calls[name][:, :296] for name in ("k", "v"))
    assert launch.forward(**calls, mask=Mask(), softmax_scale=0.1) is not None
    wide = torch.zeros(*calls[what].shape[:3], calls[what].shape[3] + 1, dtype=torch.bfloat16)
    calls[what] = wide[..., 1:]
    for _ in range(3):
        assert launch.forward(**calls, mask=Mask(), softmax_scale=0.1) is None


def test_a_vector_of_bias_that_is_not_aligned_is_copied_each_time(variants):
    q, k, v, _ = tensors(64, None)
    k, v, bias = k[:, :299], v[:, :299], torch.randn(2, 1, 1, 299).bfloat16()
    for _ in range(3):
        assert launch.forward(q, k, v, bias, Mask(), 0.1) is not None
        *_, (_, values) = variants.launched
        assert torch.equal(values[6].base[0, 0, 0], bias[0, 0, 0])
    assert len(recipes._recipes) == 0


def test_what_is_remembered_keeps_no_tensor_alive(variants):
    references = []
    for bias_shape in (None, (1, 3, 300, 1), (2, 3, 300, 304)):
        call = tensors(64, bias_shape)
        if bias_shape == (2, 3, 300, 304):
            call = (call[0], call[1][:, :296], call[2][:, :296], call[3][..., :296])  # rows of whole 16 bytes
        for _ in range(4):
            results = (*launch.forward(*call, CAUSAL, 0.1), *backward(*call, needs_dbias=bias_shape is not None))
            references += [StorageWeakRef(x.untyped_storage()) for x in (*call, *results) if x is not None]
    variants.launched.clear()
    del call, results
    gc.collect()
    assert all(reference.expired() for reference in references)


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_what_few_calls_have_is_planned_each_time(variants, extras):
    q, k, v, _ = tensors(64, None)
    lse_shape = (2, 3, 300)
    if extras.packing is not None:
        (q, k, v), lse_shape = (x.flatten(0, 1) for x in (q, k, v)), (3, 600)
    for _ in range(2):
        out, lse = launch.forward(q, k, v, None, CAUSAL, 0.1, extras)
        assert (out.shape, lse.shape) == (q.shape, lse_shape)
    assert (variants.prepared, len(recipes._recipes)) == (0, 0)


@pytest.mark.parametrize("name", ["sink", "softcap", "dropout", "slopes"])
def test_what_few_calls_have_in_the_backward(variants, name):
    """Each changes the kernels but a sink, which has a gradient."""
    extras = EXTRAS[name]
    *_, dsink = backward(*tensors(64, None), extras=extras)
    assert (dsink is None) == (extras.sink is None)
    specs = [values[-2] for _, values in variants.launched]
    changed = [spec.SOFTCAP or spec.ALIBI or spec.DROPOUT for spec in specs if hasattr(spec, "ALIBI")]
    assert changed == [extras.sink is None]
    assert [spec.DROPOUT for spec in specs if not hasattr(spec, "ALIBI")] == [extras.seed is not None] * 2


@pytest.mark.parametrize(("softcap", "kernels"), [(0.0, ["rows", "bwd", "dq"]), (30.0, ["rows", "bwd", "dq", "dbias"])])
def test_a_softcap_has_the_gradient_of_a_bias_made_apart(variants, softcap, kernels):
    """What makes dq has the cap's derivative, and the gradient of a bias, which is added after the cap, has not."""
    q, k, v, bias = tensors(64, (2, 3, 300, 304))
    extras = Extras(softcap=softcap, sink=torch.ones(3))
    backward(q, k[:, :296], v[:, :296], bias[..., :296], needs_dbias=True, extras=extras)  # rows of whole 16 bytes
    assert [kernel.__name__.split("_")[-1] for kernel, _ in variants.launched] == kernels


def test_what_the_backward_leaves(variants):
    packed = [x.flatten(0, 1) for x in tensors(64, None)[:3]]
    assert backward(*packed, None, extras=EXTRAS["packed"]) is not None
    assert backward(*packed, None, extras=EXTRAS["packed"]._replace(dropout_p=0.1, seed=torch.tensor(1))) is not None
    assert backward(*packed, torch.zeros(1, 3, 300, 304).bfloat16(), extras=EXTRAS["packed"]) is None


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("bias_shape", [None, (1, 3, 300, 1)])
def test_the_gradient_of_a_sink_and_of_a_bias_beside_it(bias_shape, dropout_p):
    """From lse and -delta / kept_factor, the numbers that `attention_bwd_rows` leaves."""
    q, k, v, bias = (None if x is None else x.double() for x in tensors(16, bias_shape, torch.float32))
    sink = torch.tensor([0.5, 2.0, -math.inf], dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (sink, bias) if x is not None]
    k, v = k[:, :200], v[:, :200]  # the first queries see no key
    out, lse = attention(
        q, k, v, bias=bias, sink=sink, causal=True, dropout_p=dropout_p, return_lse=True, backend="reference"
    )
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dlse = dlse.masked_fill(lse == -math.inf, 0.0)
    exact = torch.autograd.grad([out, lse.masked_fill(lse == -math.inf, 0.0)], leaves, [dout, dlse])
    out, lse = out.detach(), lse.detach().float()
    bias = None if bias is None else bias.detach().float()
    call = (dout.bfloat16(), dlse.float(), *(x.bfloat16() for x in (q, k, v)), bias, out.bfloat16(), lse)
    seed = torch.tensor(1) if dropout_p > 0.0 else None
    extras = Extras(sink=sink.detach().float(), dropout_p=dropout_p, seed=seed)
    plan = plan_backward(*call, CAUSAL, 0.25, bias is not None, extras, False, SMS)
    plan.sink_rows.rows[:, :, 1, :300] = (dlse - (dout * out).sum(-1).transpose(1, 2)).float() / kept_factor(dropout_p)
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
    last = heads - 1
    descriptors = row_descriptors(tensor[None], 64, 32, tail, True)
    for first, (made, _) in zip((0, 32) if tail else (0,), descriptors, strict=False):

        def address_of(place, made=made):
            offset = sum(index * stride for index, stride in zip(place, made.strides, strict=True))
            return (made.base.data_ptr() + offset * tensor.element_size()) % 2**64

        for start, end in {(0, 0), (0, total), (total // 3, total // 2), (total - 1, total), (total, total)}:
            for row in range(130):
                place = [PACKED_ROWS.value, end, last, row + PACKED_ROWS.value - (end - start), 0]
                inside = all(0 <= index < size for index, size in zip(place, made.shape, strict=True))
                assert inside == (row < end - start)
                assert not inside or address_of(place) == tensor[start + row, last, first:].data_ptr()


@pytest.mark.parametrize("tensor", packed_views().values(), ids=packed_views())
def test_a_descriptor_of_packed_sequences_begins_and_ends_with_its_tensor(tensor):
    """A GPU reads by one only where memory is mapped at its beginning, and may touch what its axes reach."""
    (made, _), _ = row_descriptors(tensor[None], 64, 32, 0, True)
    assert made.base.data_ptr() == tensor.data_ptr()
    end = sum((size - 1) * stride for size, stride in zip(made.shape, made.strides, strict=True))
    assert end * tensor.element_size() % 2**64 == tensor[-1, -1, -1:].data_ptr() - tensor.data_ptr()
    assert all(0 < stride * tensor.element_size() < 2**40 for stride in made.strides)


def test_more_packed_rows_than_a_descriptor_has_are_not_taken():
    rows = torch.empty(PACKED_ROWS.value + 1, 1, 8, device="meta", dtype=torch.bfloat16)
    assert launch.forward(rows, rows, rows, None, CAUSAL, 0.1, EXTRAS["packed"]) is None


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


@pytest.mark.parametrize(("softmax_scale", "raw"), [(0.1, True), (1e-9, False), (0.0, False), (-0.1, False)])
def test_slopes_are_divided_by_the_scale_where_that_is_no_tiny_number(softmax_scale, raw):
    q, k, v, _ = tensors(64, None)
    slopes = torch.ones(q.shape[2])
    plan = launch.plan_forward(q, k, v, None, CAUSAL, softmax_scale, SMS, Extras(alibi_slopes=slopes))
    assert plan.launch.spec.RAW_SCORES is raw
    assert plan.launch.arguments[-1].value.scale == pytest.approx(softmax_scale * (math.log2(math.e) if raw else 1.0))


def backward(
    q, k, v, bias, *, dlse=None, mask=CAUSAL, needs_dbias=False, extras=NO_EXTRAS, deterministic=False, known=None
):
    """What the launcher makes of a call whose results are zeros."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    lse = torch.zeros(q.shape[:-1]).transpose(-1, -2).contiguous()
    given = (torch.zeros_like(out), dlse, q, k, v, bias, out, lse, mask, 0.1, needs_dbias, extras, deterministic)
    return launch.backward(*given, known=known)


def test_the_backward_leaves_rows_that_are_not_aligned(variants):
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
def test_which_kernels_a_backward_has(variants, head_dim, deterministic, kernels):
    backward(*tensors(head_dim, None), deterministic=deterministic)
    assert [kernel.__name__ for kernel, _ in variants.launched] == kernels


@pytest.mark.parametrize(
    ("head_dim", "deterministic", "kernels"),
    [
        (64, False, ADDED), (128, False, ADDED), (64, True, APART), (128, True, APART), (256, False, WIDE),
        (256, True, WIDE),
    ],
)  # fmt: skip
def test_which_kernels_a_backward_of_packed_sequences_has(variants, head_dim, deterministic, kernels):
    packed = [x.flatten(0, 1) for x in tensors(head_dim, None)[:3]]
    q, k, v = packed[0], *(x[:500] for x in packed[1:])
    extras = EXTRAS["packed"]._replace(sink=torch.ones(3))
    dq, dk, dv, dbias, dsink = backward(q, k, v, None, extras=extras, deterministic=deterministic)
    assert [x.shape for x in (dq, dk, dv, dsink)] == [q.shape, k.shape, v.shape, (3,)]
    assert dbias is None
    assert [kernel.__name__ for kernel, _ in variants.launched] == kernels
    assert len(recipes._recipes) == 0


@pytest.mark.parametrize(("sequences", "kernels"), [(100, ADDED), (1000, APART)])
def test_sums_of_dq_are_not_mostly_padding(variants, sequences, kernels):
    """Each sequence has 64 rows of them at least."""
    q, k, v, _ = (None if x is None else x.flatten(0, 1) for x in tensors(64, None))
    starts = torch.linspace(0, len(q), sequences + 1).to(torch.int32)
    backward(q, k, v, None, extras=Extras(packing=Packing(starts, starts, 10, 10)))
    assert [kernel.__name__ for kernel, _ in variants.launched] == kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3, 300, 300), (1, 3, 300, 300), (2, 1, 1, 300), (1, 3, 300, 1), (1, 1, 1, 1)])
def test_the_gradient_of_a_bias_has_its_shape_and_dtype(variants, shape, dtype):
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


def test_the_gradient_of_a_bias_of_queries_is_that_of_their_log_sum_exp(variants):
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
