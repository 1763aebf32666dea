"""Does attention behave on a GPU as PyTorch's users expect: streams, graphs, compilation, sizes, errors?"""

import math
import random
from functools import partial
from itertools import accumulate

import pytest
import torch
from hardware import IS_HOPPER, needs_hopper
from torch._dynamo.testing import CompileCounterWithBackend

from triton_attention import attention, attention_varlen, explain, kernel, ops
from triton_attention.testing import Case, check_against_float64, make_inputs, next_dropout_mask
from triton_attention.testing.cases import CAUSAL


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_()


def through_api(inputs, problem, backend="auto"):
    assert problem.mask in ((None, None, False), (None, 0, False))
    causal = problem.mask.right == 0
    return attention(*inputs[:3], bias=inputs.bias, causal=causal, return_lse=True, backend=backend)


def gradients(q, k, v, bias, **keywords):
    out = attention(q, k, v, bias=bias, **keywords)
    return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v, bias))


FASTEST = "hopper" if IS_HOPPER else "portable"  # what "auto" takes for 16-bit tensors
each_backend = pytest.mark.parametrize("backend", [pytest.param("hopper", marks=needs_hopper), "portable"])


def test_auto_takes_the_fastest():
    q = normal(1, 16, 2, 64)
    assert explain(q, q, q).backend == FASTEST
    odd = normal(1, 16, 2, 59)
    assert explain(odd, odd, odd).backend == explain(*3 * [q.float()]).backend == "portable"


def test_the_gpu_is_named_to_hopper():
    q = normal(1, 16, 2, 64)
    reasons = explain(q, q, q).reasons["hopper"]
    assert reasons == [] if IS_HOPPER else "runs on NVIDIA GPUs of compute capability 9.0" in reasons[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [None, "b11k", "1hqk"])
def test_public_function(dtype, bias):
    case = Case(300, 333, 64, heads_q=4, heads_kv=2, mask=CAUSAL, bias=bias, dtype=dtype)
    check = check_against_float64(through_api, *make_inputs(case, "cuda"))
    assert check.good, f"\n{check}"


def test_float32_is_not_tf32():
    case = Case(512, 512, 64, dtype=torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        inputs, problem = make_inputs(case, "cuda")
        out, _ = through_api(inputs, problem)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    exact = attention(*(x.double() for x in inputs[:3]), backend="reference")
    assert (out - exact).abs().max() < 1e-5  # tf32 has an error of about 1e-3 here


def test_stream_that_is_not_the_default():
    q, k, v, bias = normal(2, 300, 4, 64), normal(2, 300, 4, 64), normal(2, 300, 4, 64), normal(1, 4, 300, 300)
    expected = gradients(q, k, v, bias)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # some 50 ms: work launched elsewhere would run before it
        late = [x.detach().clone().requires_grad_() for x in (q, k, v, bias)]
        results = gradients(*late)
    stream.synchronize()
    assert all(torch.equal(one, two) for one, two in zip(expected, results, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_the_current_one():
    q = torch.randn(1, 100, 2, 64, device="cuda:1", dtype=torch.bfloat16)
    expected = attention(*(x.to("cuda:0") for x in (q, q, q)))
    assert torch.equal(attention(q, q, q).cpu(), expected.cpu())


def test_cuda_graph_of_forward_and_backward():
    torch.use_deterministic_algorithms(False)
    q, k, v, bias = normal(2, 200, 4, 64), normal(2, 200, 4, 64), normal(2, 200, 4, 64), normal(1, 4, 200, 200)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(q, k, v, bias, causal=True)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(q, k, v, bias, causal=True)
    with torch.no_grad():
        for tensor in (q, k, v, bias):
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    expected = gradients(q, k, v, bias, causal=True)
    assert all(torch.equal(one, two) for one, two in zip(expected, replayed, strict=True))


def test_make_graphed_callables():
    torch.use_deterministic_algorithms(False)
    q, k, v = (normal(2, 200, 4, 64) for _ in range(3))
    graphed = torch.cuda.make_graphed_callables(lambda q, k, v: attention(q, k, v, causal=True), (q, k, v))
    q, k, v = (normal(2, 200, 4, 64) for _ in range(3))
    expected = torch.autograd.grad(attention(q, k, v, causal=True).sum(), (q, k, v))
    results = torch.autograd.grad(graphed(q, k, v).sum(), (q, k, v))
    assert all(torch.equal(one, two) for one, two in zip(expected, results, strict=True))


def test_torch_compile_with_dynamic_length_compiles_once():
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    def loss(q, k, v, bias):
        return attention(q * 2, k, v, bias=bias, causal=True).float().square().sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for seqlen in (128, 200, 333):
        q, k, v, bias = *(normal(2, seqlen, 4, 64) for _ in range(3)), normal(1, 4, seqlen, seqlen)
        expected = torch.autograd.grad(loss(q, k, v, bias), (q, k, v, bias))
        results = torch.autograd.grad(compiled(q, k, v, bias), (q, k, v, bias))
        for one, two in zip(expected, results, strict=True):
            torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 3


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden", [-1e7, -1e8, -1e9, -1e10, -1e20, -3e38])
def test_keys_hidden_by_a_large_negative_bias(backend, dtype, hidden):
    """Whole blocks of keys, which some rows begin with; and all keys of some queries, where everything stays finite."""
    torch.use_deterministic_algorithms(False)
    leaves = [torch.randn(2, 608, 2, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
    sees = torch.ones(2, 1, 608, 608, device="cuda", dtype=torch.bool)
    sees[0, :, :, 304:], sees[1, :, :, :304], sees[:, :, :7] = False, False, False
    dout = torch.randn(2, 608, 2, 64, device="cuda", dtype=dtype)
    dout[:, :7] = 0.0
    results = []
    for bias in (torch.zeros(sees.shape, device="cuda").masked_fill(~sees, hidden), sees):
        out = attention(*leaves, bias=bias, backend=backend)
        assert out.isfinite().all()
        results.append((out[:, 7:], *torch.autograd.grad(out, leaves, dout)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [0.1, 1.0, 4.0, 16.0])
def test_a_softcap_of_models(backend, dtype, magnitude):
    """Gemma 2's, for scores of a thousandth of the cap and for those far beyond it."""
    inputs, problem = make_inputs(Case(300, 333, 256, heads_q=4, heads_kv=2, softcap=50.0, dtype=dtype), "cuda")
    inputs = inputs._replace(q=(inputs.q.detach() * magnitude).requires_grad_())
    run = partial(ops.attention, backend=backend)
    check = check_against_float64(run, inputs, problem)
    assert check.good, f"\n{check}"


@each_backend
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("step", [-30.0, -2.0, 2.0, 30.0])
def test_a_maximum_that_rises_slowly_or_at_once(backend, head_dim, step):
    """The output is rescaled for some steps of a maximum, and not for others; rows differ in when."""

    def through_api(inputs, problem):
        return attention(*inputs[:3], return_lse=True, backend=backend)

    inputs, problem = make_inputs(Case(200, 700, head_dim, heads_q=2), "cuda")
    q, k = inputs.q.detach().clone(), inputs.k.detach().clone()
    q[..., 0] = torch.arange(200, device="cuda").remainder(3)[:, None]
    k[..., 0] = torch.arange(700, device="cuda").div(64, rounding_mode="floor")[:, None] * step * head_dim**0.5
    inputs = inputs._replace(q=q.requires_grad_(), k=k.requires_grad_())
    check = check_against_float64(through_api, inputs, problem)
    assert check.good, f"\n{check}"


@each_backend
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("magnitude", [1e2, 1e4, 1e8])
def test_gradients_are_finite_however_large_scores_are(backend, magnitude, with_bias, deterministic, request):
    """Those of weights that a rounding of lse would take for more than 1."""
    if magnitude == 1e8 and not with_bias:  # beyond 2**32 a rounding of the maximum is more than exp2 takes
        request.node.add_marker(pytest.mark.xfail(reason="scores beyond 4e9 overflow", strict=True))
    torch.use_deterministic_algorithms(False)
    q, k = (torch.randn(2, 304, 2, 64, device="cuda").mul(magnitude).bfloat16().requires_grad_() for _ in range(2))
    leaves = [q, k, normal(2, 304, 2, 64), *([normal(1, 2, 304, 304)] if with_bias else [])]
    keywords = {"bias": leaves[3]} if with_bias else {}
    out = attention(*leaves[:3], **keywords, causal=True, deterministic=deterministic, backend=backend)
    gradients = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert all(x.isfinite().all() for x in (out, *gradients))


def test_torch_compile_with_cuda_graphs():
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()

    def loss(q, k, v, bias):
        return attention(q * 2, k, v, bias=bias, causal=True).float().square().sum()

    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # warms up, records, replays
        leaves = *(normal(2, 200, 4, 64) for _ in range(3)), normal(1, 4, 200, 200)
        torch.compiler.cudagraph_mark_step_begin()
        results = [x.clone() for x in torch.autograd.grad(compiled(*leaves), leaves)]
        for one, two in zip(results, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)


def test_inference_mode_no_grad_and_autocast():
    q = torch.randn(2, 100, 4, 64, device="cuda")
    expected = attention(q.bfloat16(), q.bfloat16(), q.bfloat16())
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(attention(q, q, q), expected)
    with torch.no_grad():
        assert torch.equal(attention(q.bfloat16(), q.bfloat16(), q.bfloat16()), expected)


@each_backend
def test_packed_views_are_not_copied(backend):
    qkv = torch.randn(4, 1024, 3, 8, 64, device="cuda", dtype=torch.bfloat16)
    attention(*qkv.unbind(2), backend=backend)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attention(*qkv.unbind(2), backend=backend)
    results = out.numel() * 2 + 4 * 8 * 1024 * 4
    assert torch.cuda.max_memory_allocated() - before <= results + 4096


def test_no_matrix_of_scores_is_stored():
    torch.use_deterministic_algorithms(False)
    q, k, v = (normal(1, 4096, 4, 64) for _ in range(3))
    bias = normal(1, 1, 4096, 4096)
    gradients(q, k, v, bias)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(attention(q, k, v, bias=bias).sum(), (q, k, v, bias))
    extra = torch.cuda.max_memory_allocated() - before
    linear = 12 * q.numel() * 2  # out, its gradient, dq, dk, dv, and two numbers a row, generously
    assert extra <= bias.numel() * 2 + linear


@each_backend
def test_64_lengths_compile_two_variants_a_pass_at_most(backend):
    lengths = random.Random(0).sample(range(500, 4001), 64)
    known = set(kernel._variants)
    for seqlen in lengths:
        q, k, v = (normal(1, seqlen, 3, 72) for _ in range(3))
        torch.autograd.grad(attention(q, k, v, causal=True, backend=backend).sum(), (q, k, v))
    new = [key for key in kernel._variants if key not in known]
    per_kernel = {name: sum(key[0] == name for key in new) for name in {key[0] for key in new}}
    assert max(per_kernel.values(), default=0) <= 2, per_kernel


def far_apart(head_dim, offset=0):
    """Rows 2^25 elements apart: 100 of them span 3.4e9 elements, beyond 2^31."""
    seqlen, stride = 100, 2**25
    storage = torch.empty((seqlen - 1) * stride + offset + head_dim, device="cuda", dtype=torch.bfloat16)
    rows = storage.as_strided((1, seqlen, 1, head_dim), (stride, stride, head_dim, 1), offset)
    return rows.copy_(torch.randn(rows.shape, device="cuda"))


@each_backend
def test_strides_beyond_32_bits(backend):
    wide = far_apart(64)
    dense = wide.contiguous()
    for causal in (False, True):
        out = attention(wide, wide, wide, causal=causal, backend=backend)
        assert torch.equal(out, attention(dense, dense, dense, causal=causal, backend=backend))


def test_strides_beyond_32_bits_between_rows_that_are_not_aligned():
    wide = far_apart(59, offset=1)  # read by pointers
    assert torch.equal(attention(wide, wide, wide), attention(*3 * [wide.contiguous()]))


@needs_hopper
@pytest.mark.parametrize(("offset", "odd"), [(1, 0), (0, 1)])
def test_compiled_graph_gives_rows_that_are_not_aligned_to_portable(offset, odd):
    """A compiled graph asks no strides, so that it may bring hopper tensors that it does not take."""
    torch._dynamo.reset()
    storage = torch.randn(50_000, device="cuda").bfloat16()
    view = storage.as_strided((2, 100, 3, 64), (20_000 + odd, 192, 64, 1), offset)
    assert explain(view, view, view).backend == "portable"
    compiled = torch.compile(lambda q: attention(q, q, q, backend="hopper"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(view), attention(view, view, view, backend="portable"))


@pytest.mark.parametrize("seqlen_q", [50, 256])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param("hopper", torch.float16, marks=needs_hopper),
        ("portable", torch.float16),
        ("portable", torch.float32),
    ],
)
def test_dropout_keeps_what_the_reference_keeps(backend, dtype, seqlen_q):
    """With equal scores no probability is 0 by itself, and unit vectors say between which query and key it is."""
    q, k = (torch.zeros(2, seqlen, 4, 64, device="cuda", dtype=dtype) for seqlen in (seqlen_q, 256))
    unit_rows = torch.eye(256, device="cuda", dtype=dtype)[:, None].expand(2, 256, 4, 256)
    v = unit_rows.clone().requires_grad_()
    expected = next_dropout_mask(q, k, 0.3)
    out = attention(q, k, v, dropout_p=0.3, backend=backend)
    assert torch.equal(out.transpose(1, 2) != 0, expected)
    (dv,) = torch.autograd.grad(out, v, unit_rows[:, :seqlen_q])  # (2, keys, 4, queries)
    assert torch.equal(dv.permute(0, 2, 3, 1)[:, :, :seqlen_q] != 0, expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_dropout_follows_the_generator_and_shares_its_mask_with_the_backward(mode):
    """With CUDA graphs, too, which mode reduce-overhead makes."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    q, k = (torch.zeros(1, 64, 1, 64, device="cuda", dtype=torch.float16) for _ in range(2))
    v = torch.eye(64, device="cuda", dtype=torch.float16)[None, :, None].requires_grad_()
    compiled = torch.compile(lambda q, k, v: attention(q * 2, k, v, dropout_p=0.5), mode=mode, fullgraph=True)

    def kept(seed):
        torch.manual_seed(seed)
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(q, k, v)
        forward = out[0, :, 0].detach() != 0
        (dv,) = torch.autograd.grad(out, v, torch.eye(64, device="cuda", dtype=torch.float16)[None, :, None])
        assert torch.equal(forward, dv[0, :, 0].T != 0)
        return forward

    masks = [kept(seed) for seed in (0, 1, 2, 0, 1, 2)]  # warms up, records, replays
    assert torch.equal(torch.stack(masks[:3]), torch.stack(masks[3:]))
    assert not torch.equal(masks[0], masks[1])
    assert 0.4 < torch.stack(masks).float().mean() < 0.6


@needs_hopper
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "others",
    [
        {},
        {"softcap": 3.0, "alibi": "h", "sink": True},
        {"lengths": ((333, 408), (70, 30), (0, 65), (5, 0), (129, 64))},
        {"lengths": ((333, 408), (200, 200), (1, 70)), "softcap": 3.0, "alibi": "h", "sink": True},
    ],
    ids=["alone", "beside-all", "packed", "packed-beside-all"],
)
@pytest.mark.parametrize("bias", [None, "1hqk", "bhqk", "b11k"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_gradients_with_dropout(head_dim, bias, others, deterministic):
    """Several blocks of keys and of queries, in part masked, for each kernel of the Hopper backward."""
    case = Case(333, 408, head_dim, heads_q=4, heads_kv=2, mask=CAUSAL, bias=bias, dropout_p=0.2, **others)

    def on_hopper(inputs, problem):
        return ops.attention(inputs, problem._replace(deterministic=deterministic), "hopper")

    check = check_against_float64(on_hopper, *make_inputs(case, "cuda"))
    assert check.good, f"\n{check}"


def test_dropout_in_a_cuda_graph_draws_anew_and_shares_its_mask_with_the_backward():
    torch.use_deterministic_algorithms(False)
    q, k = (torch.zeros(1, 64, 1, 64, device="cuda", dtype=torch.float16) for _ in range(2))
    v = torch.eye(64, device="cuda", dtype=torch.float16)[None, :, None].requires_grad_()

    def kept():
        out = attention(q, k, v, dropout_p=0.5)
        (dv,) = torch.autograd.grad(out, v, torch.eye(64, device="cuda", dtype=torch.float16)[None, :, None])
        return out[0, :, 0].detach() != 0, dv[0, :, 0].T != 0

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kept()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward, backward = kept()
    replays = []
    for _ in range(2):
        graph.replay()
        assert torch.equal(forward, backward)
        replays.append(forward.clone())
    assert not torch.equal(*replays)


def packed(lengths, heads_q=4, heads_kv=4, head_dim=64, dtype=torch.bfloat16):
    """q, k, v of these lengths along queries and keys, and how they are packed."""
    total = sum(lengths)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    tensors = [normal(total, heads, head_dim, dtype=dtype) for heads in (heads_q, heads_kv, heads_kv)]
    longest = max(lengths)
    how = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return tensors, how


def parts(tensor, lengths):
    return [part[None] for part in tensor.split(lengths)]


@pytest.mark.parametrize(
    ("backend", "head_dim"),
    [
        *(pytest.param("hopper", head_dim, marks=needs_hopper) for head_dim in (64, 256)),
        ("portable", 64),
        ("portable", 59),
    ],
)
def test_one_long_sequence_among_short_ones(backend, head_dim):
    lengths = [4096, *range(1, 64)]
    random.Random(0).shuffle(lengths)
    leaves, how = packed(lengths, heads_kv=2, head_dim=head_dim)
    out, lse = attention_varlen(*leaves, **how, causal=True, return_lse=True, backend=backend)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, dout)
    expected = [
        (*attention(*tensors, causal=True, return_lse=True, backend=backend), tensors, part)
        for *tensors, part in zip(*(parts(x, lengths) for x in (*leaves, dout)), strict=True)
    ]
    close = partial(torch.testing.assert_close, rtol=2e-2, atol=1e-2)
    close(out, torch.cat([one[0][0] for one in expected]))
    close(lse, torch.cat([one[1][0] for one in expected], dim=1))
    each = [torch.autograd.grad(one[0], one[2], one[3]) for one in expected]
    for one, two in zip(gradients, zip(*each, strict=True), strict=True):
        close(one, torch.cat(two, dim=1)[0])


@each_backend
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_what_is_not_finite_stays_in_its_sequence(
    backend, head_dim, value, dropout_p, with_bias, deterministic
):  # fmt: skip
    torch.use_deterministic_algorithms(False)
    leaves, how = packed([100, 77, 300], head_dim=head_dim)
    bias = normal(3, 4, 304, 304) if with_bias else None
    how |= {"bias": bias, "max_seqlen_q": 304, "max_seqlen_k": 304, "dropout_p": dropout_p, "backend": backend}
    how["deterministic"] = deterministic

    def results():
        torch.manual_seed(0)
        out = attention_varlen(*leaves, **how, causal=True)
        wanted = leaves if bias is None else [*leaves, bias]
        return out.detach(), *torch.autograd.grad(out.float().sin().sum(), wanted)

    expected = results()
    with torch.no_grad():
        for tensor in leaves:
            tensor[100:177] = value
        if bias is not None:
            bias[1] = value
    actual = results()
    assert actual[0][100:177].isnan().any()
    close = partial(torch.allclose, rtol=1.6e-2, atol=1e-3)
    same = (torch.equal, torch.equal if deterministic else close, torch.equal, torch.equal)
    for equal, one, two in zip(same, actual[:4], expected[:4], strict=True):
        assert equal(one[:100], two[:100])
        assert equal(one[177:], two[177:])
    if bias is not None:
        assert torch.equal(actual[4][[0, 2]], expected[4][[0, 2]])


@each_backend
@pytest.mark.parametrize("plain", [True, False])
def test_nothing_waits_for_the_lengths(backend, plain):
    torch.use_deterministic_algorithms(False)
    leaves, how = packed([100, 77, 304])
    how["backend"] = backend
    if not plain:
        bias, sink = normal(3, 4, 304, 304), normal(4)
        how |= {"bias": bias, "alibi_slopes": torch.rand(4, device="cuda"), "sink": sink, "dropout_p": 0.1}
        leaves += [bias, sink]

    def results():
        out = attention_varlen(*leaves[:3], **how)
        return torch.autograd.grad(out.float().square().sum(), leaves)

    results()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        results()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_graph_of_packed_sequences_follows_their_lengths(deterministic):
    torch.use_deterministic_algorithms(False)
    leaves, how = packed([100, 77, 300])
    how |= {"max_seqlen_q": 477, "max_seqlen_k": 477, "deterministic": deterministic}

    def results():
        out = attention_varlen(*leaves, **how, causal=True)
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results()
    for lengths in ([0, 400, 77], [1, 2, 3]):  # the second leaves rows that no sequence has
        how["cu_seqlens_q"].copy_(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))
        graph.replay()
        (out, dq, *others), (out_now, dq_now, *others_now) = captured, results()
        assert all(map(torch.equal, (out, *others), (out_now, *others_now)))
        assert torch.equal(dq, dq_now) if deterministic else torch.allclose(dq, dq_now, rtol=1.6e-2, atol=1e-3)


@each_backend
@pytest.mark.parametrize("sizes", [(0, 5, 8), (2, 0, 8), (2, 5, 0), (0, 0, 0)], ids=str)
def test_empty(backend, sizes):
    """Nothing is launched, and nothing is left in a state of failure."""
    batch, seqlen_q, seqlen_k = sizes
    leaves = [normal(batch, seqlen, 4, 64) for seqlen in (seqlen_q, seqlen_k, seqlen_k)]
    leaves.append(normal(1, 4, seqlen_q, seqlen_k))
    out, lse = attention(*leaves[:3], bias=leaves[3], causal=True, return_lse=True, backend=backend)
    assert torch.equal(out, torch.zeros_like(leaves[0]))
    assert torch.equal(lse, torch.full((batch, 4, seqlen_q), -math.inf, device="cuda"))
    for gradient, leaf in zip(torch.autograd.grad(out.sum(), leaves, materialize_grads=True), leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))
    starts = torch.zeros(batch + 1, dtype=torch.int32, device="cuda")
    how = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 0, "max_seqlen_k": 0}
    rows = normal(seqlen_q, 4, 64), *(normal(seqlen_k, 4, 64) for _ in range(2))
    assert torch.equal(attention_varlen(*rows, **how, backend=backend), torch.zeros_like(rows[0]))
    torch.cuda.synchronize()


def test_double_on_a_gpu_is_refused_unless_the_reference_is_asked():
    q = torch.randn(1, 8, 2, 16, device="cuda", dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="float64"):
        attention(q, q, q)
    attention(q, q, q, backend="reference")
