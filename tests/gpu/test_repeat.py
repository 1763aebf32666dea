"""Is every result the same, bit for bit, each time? A data race, or an order of additions that varies, would show."""

import random
import time

import pytest
import torch
from hardware import needs_hopper

from triton_attention import attention, attention_varlen

REPEATS = 10_000
HEAD_DIMS = (40, 64, 88, 96, 128, 256)


@pytest.fixture(autouse=True)
def _undisturbed():
    torch.use_deterministic_algorithms(False)  # filling memory with NaN would order the launches


def make_inputs(head_dim, batch, heads, seqlen_q, seqlen_k):
    """q, k, v and a bias that the batch shares."""
    torch.manual_seed(head_dim)
    shapes = [(batch, seqlen, heads, head_dim) for seqlen in (seqlen_q, seqlen_k, seqlen_k)]
    shapes.append((1, heads, seqlen_q, seqlen_k))
    return [torch.randn(shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]


def count_differences(run, repeats, before=lambda: None):
    """How often each result of a repeat differs from that of the first run; `before` is called before each."""
    first = run()
    assert all(tensor.isfinite().all() for tensor in first)
    different = torch.zeros(len(first), dtype=torch.int64, device="cuda")
    for _ in range(repeats):
        before()
        different += torch.stack([(one != two).any() for one, two in zip(first, run(), strict=True)])
    return different.tolist()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_repeats_are_bitwise_equal(head_dim, causal):
    leaves = make_inputs(head_dim, batch=2, heads=4, seqlen_q=257, seqlen_k=264)
    dout = torch.randn_like(leaves[0])

    def run():
        q, k, v, bias = leaves
        out = attention(q, k, v, bias=bias, causal=causal, backend="portable")
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    differences = count_differences(run, REPEATS // 2)  # there are two masks
    assert differences == [0] * 5, "repeats that differ in (out, dq, dk, dv, dbias)"


@needs_hopper
@pytest.mark.parametrize("kind", ["causal", "bias"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_repeats_of_the_hopper_forward_are_bitwise_equal(head_dim, kind):
    """More tiles of queries than programs run at once, so that a program computes several, in an order that varies."""
    q, k, v, bias = make_inputs(head_dim, batch=4, heads=16, seqlen_q=513, seqlen_k=520)

    def run():
        with torch.no_grad():
            keywords = {"causal": True} if kind == "causal" else {"bias": bias}
            return attention(q, k, v, **keywords, return_lse=True, backend="hopper")

    assert count_differences(run, REPEATS) == [0, 0], "repeats that differ in (out, lse)"


@needs_hopper
@pytest.mark.parametrize("kind", ["causal", "bias", "own bias", "vector"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_repeats_of_the_hopper_backward_are_bitwise_equal(deterministic, head_dim, kind):
    """But for dq, unless it is to be deterministic: programs add to it in an order that varies. It then differs by the
    rounding of float32 alone."""
    q, k, v, bias = make_inputs(head_dim, batch=2, heads=8, seqlen_q=513, seqlen_k=520)
    if kind == "own bias":
        bias = bias.detach().repeat(2, 1, 1, 1).requires_grad_()
    if kind == "vector":
        bias = bias.detach()[:, :, :1].clone().requires_grad_()
    keywords = {"causal": True} if kind == "causal" else {"bias": bias}
    leaves = (q, k, v) if kind == "causal" else (q, k, v, bias)
    out = attention(q, k, v, **keywords, deterministic=deterministic, backend="hopper")
    dout = torch.randn_like(out)
    dq_first, *_ = torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def run():
        dq, *others = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        if deterministic:
            return dq, *others
        torch.testing.assert_close(dq, dq_first, rtol=1.6e-2, atol=1e-3)
        return others

    differences = count_differences(run, REPEATS // 8)  # there are four kinds, and two ways
    assert not any(differences), f"repeats that differ in (dq if deterministic, dk, dv, dbias): {differences}"


@needs_hopper
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_repeats_of_the_hopper_backward_of_packed_sequences_are_bitwise_equal(deterministic, head_dim):
    """The same; some sequences have no query, no key, or fewer than a block, and some rows no sequence has."""
    starts_q = torch.tensor([0, 513, 513, 540, 1100, 1101], dtype=torch.int32, device="cuda")
    starts_k = torch.tensor([0, 520, 600, 600, 700, 1300], dtype=torch.int32, device="cuda")
    torch.manual_seed(head_dim)
    leaves = [
        torch.randn(total, 8, head_dim, device="cuda").bfloat16().requires_grad_() for total in (1200, 1400, 1400)
    ]
    how = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "max_seqlen_q": 560, "max_seqlen_k": 600}
    out = attention_varlen(*leaves, **how, causal=True, deterministic=deterministic, backend="hopper")
    dout = torch.randn_like(out)
    dq_first, *_ = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    assert not dq_first[1101:].any()

    def run():
        dq, *others = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        if deterministic:
            return dq, *others
        torch.testing.assert_close(dq, dq_first, rtol=1.6e-2, atol=1e-3)
        return others

    differences = count_differences(run, REPEATS // 8)
    assert not any(differences), f"repeats that differ in (dq if deterministic, dk, dv): {differences}"


class Load:
    """Other streams that are busy at times: matrix products beside the kernels, copies of memory, and pauses, so that
    programs start late, share multiprocessors and caches, and see the clock go up and down."""

    def __init__(self):
        self.random = random.Random(0)
        self.streams = torch.cuda.Stream(), torch.cuda.Stream()
        self.matrix = torch.randn(1536, 1536, device="cuda").bfloat16()
        self.product = torch.empty_like(self.matrix)
        self.memory = torch.empty(2, 64 << 20, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()

    def __call__(self):
        kind = self.random.randrange(4)
        if kind == 0:
            with torch.cuda.stream(self.streams[0]):
                for _ in range(self.random.randrange(4)):
                    torch.mm(self.matrix, self.matrix, out=self.product)
        if kind == 1:
            with torch.cuda.stream(self.streams[1]):
                self.memory[0].copy_(self.memory[1])
        if kind == 2:
            torch.cuda._sleep(self.random.randrange(100_000))  # cycles of a kernel that occupies one program
        if self.random.random() < 0.005:
            torch.cuda.synchronize()
            time.sleep(0.02)  # clocks fall


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("backend", [pytest.param("hopper", marks=needs_hopper), "portable"])
def test_repeats_under_load_are_bitwise_equal(backend, head_dim, causal):
    leaves = make_inputs(head_dim, batch=2, heads=8, seqlen_q=513, seqlen_k=520)
    dout = torch.randn_like(leaves[0])

    def run():
        q, k, v, bias = leaves
        out, lse = attention(q, k, v, bias=bias, causal=causal, return_lse=True, backend=backend)
        dq, *others = torch.autograd.grad(out, leaves, dout)
        if backend == "hopper" and head_dim <= 128:  # adds up dq in an order that varies
            return out.detach(), lse.detach(), *others
        return out.detach(), lse.detach(), *others, dq

    differences = count_differences(run, REPEATS // 10, Load())
    assert not any(differences), f"repeats that differ in (out, lse, dk, dv, dbias, dq): {differences}"
