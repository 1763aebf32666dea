"""Are results right beyond 2^31 elements, 65,535 blocks and a million keys? Sampled rows against float64."""

import fcntl
import math
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import NamedTuple

import pytest
import torch
from hardware import needs_hopper
from torch import Tensor

from triton_attention import api, attention
from triton_attention.testing import Case, check_against_float64, make_inputs
from triton_attention.testing.cases import CAUSAL

DEVICE = "cuda"
ROWS = 40  # of each sample
each_backend = pytest.mark.parametrize("backend", [pytest.param("hopper", marks=needs_hopper), "portable"])


@pytest.fixture(autouse=True)
def _no_poison():
    """Filling gigabytes with NaN takes longer than computing them."""
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def memory_for_billions():
    """25 GB of GPU memory, one test at a time whatever the number of processes; skips where there is less."""
    with open(Path(gettempdir()) / "triton-attention-large-tests.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < 25:
            pytest.skip("needs 25 GB of free GPU memory")
        yield
        torch.cuda.empty_cache()


def normal(*shape):
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_()


class Computed(NamedTuple):
    """A call, bottom-right causal or full, and everything that came out of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    causal: bool
    dout: Tensor
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None


def compute(q, k, v, bias=None, causal=False, backend="auto"):
    out, lse = attention(q, k, v, bias=bias, causal=causal, return_lse=True, backend=backend)
    dout = torch.randn_like(out)
    leaves = [q, k, v, *([] if bias is None else [bias])]
    grads = torch.autograd.grad(out, leaves, dout)
    tensors = [None if x is None else x.detach() for x in (q, k, v, bias)]
    return Computed(*tensors, causal, dout, out.detach(), lse.detach(), *grads, *([None] if bias is None else []))


def check_queries(computed, start, head):
    """out, lse, dq and dbias of ROWS queries of a head: a problem of its own, with the keys up to the last of them."""
    part = slice(start, start + ROWS)
    seqlen_q, seqlen_k = computed.q.shape[1], computed.k.shape[1]
    keys = slice(0, seqlen_k - seqlen_q + start + ROWS if computed.causal else seqlen_k)
    head_kv = head // (computed.q.shape[2] // computed.k.shape[2])

    def results(dtype):
        q = computed.q[:, part, head, None].to(dtype).requires_grad_()
        k, v = (x[:, keys, head_kv, None].to(dtype) for x in (computed.k, computed.v))
        leaves, bias = [q], None
        if computed.bias is not None:
            bias = computed.bias[:, head, None, part, keys].to(dtype).requires_grad_()
            leaves.append(bias)
        scores = torch.einsum("bqhd,bkhd->bhqk", q * q.shape[3] ** -0.5, k)
        scores = scores if bias is None else scores + bias
        if computed.causal:
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=DEVICE).triu(scores.shape[3] - ROWS + 1)
            scores = scores.masked_fill(later, -math.inf)
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)
        grads = torch.autograd.grad(out, leaves, computed.dout[:, part, head, None].to(dtype))
        return out.detach(), scores.detach().logsumexp(dim=-1), *grads

    ours = [computed.out[:, part, head, None], computed.lse[:, head, None, part], computed.dq[:, part, head, None]]
    if computed.dbias is not None:
        ours.append(computed.dbias[:, head, None, part, keys])
    compare(("out", "lse", "dq", "dbias"), ours, results(torch.float64), results(torch.bfloat16))


def check_keys(computed, start, head_kv):
    """dk and dv of ROWS keys of a key head, from out and lse of all queries that see them."""
    part = slice(start, start + ROWS)
    seqlen_q, seqlen_k, scale = computed.q.shape[1], computed.k.shape[1], computed.q.shape[3] ** -0.5
    group = computed.q.shape[2] // computed.k.shape[2]
    heads = slice(head_kv * group, (head_kv + 1) * group)
    k, v = (x[0, part, head_kv].double() for x in (computed.k, computed.v))

    def results(rounded):
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for begin in range(0, seqlen_q, 2**17):
            rows = slice(begin, begin + 2**17)
            q, dout, out = (x[0, rows, heads].double() for x in (computed.q, computed.dout, computed.out))
            scores = scale * q @ k.T  # (queries, heads of the group, keys)
            if computed.causal:
                queries = torch.arange(begin, begin + len(q), device=DEVICE)[:, None, None] + seqlen_k - seqlen_q
                scores = scores.masked_fill(torch.arange(start, start + ROWS, device=DEVICE) > queries, -math.inf)
            weights = torch.exp(scores - computed.lse[0, heads, rows].T[..., None])
            dscores = weights * (dout @ v.T - (dout * out).sum(dim=-1, keepdim=True))
            if rounded:
                weights, dscores = (x.bfloat16().double() for x in (weights, dscores))
            dv += torch.einsum("qhk,qhd->kd", weights, dout)
            dk += scale * torch.einsum("qhk,qhd->kd", dscores, q)
        return dk, dv

    ours = [computed.dk[0, part, head_kv], computed.dv[0, part, head_kv]]
    compare(("dk", "dv"), ours, results(False), [x.bfloat16() for x in results(True)])


def compare(names, ours, exact, plain):
    """The rule of `check_against_float64`."""
    for name, one, true, other in zip(names, ours, exact, plain, strict=False):
        assert one.shape == true.shape
        error, baseline = ((x.double() - true).abs().max().item() for x in (one, other))
        epsilon = torch.finfo(one.dtype).eps
        assert error <= 2 * baseline + epsilon * true.abs().max().item(), (name, error, baseline)


@each_backend
def test_bias_and_its_gradient(memory_for_billions, backend):
    heads, seqlen = 16, 16384
    bias = normal(1, heads, seqlen, seqlen)
    assert bias.numel() > 2**31
    computed = compute(*(normal(1, seqlen, heads, 64) for _ in range(3)), bias, backend=backend)
    for start in (0, 8000, seqlen - ROWS):
        for head in (0, heads - 1):  # the last head lies beyond 2^31
            check_queries(computed, start, head)


@each_backend
def test_queries(memory_for_billions, backend):
    seqlen, heads, heads_kv, head_dim = 2**20 + 77, 16, 8, 128  # more queries a key head are too many for float32
    q, k, v = normal(1, seqlen, heads, head_dim), *(normal(1, 72, heads_kv, head_dim) for _ in range(2))
    assert q.numel() > 2**31
    computed = compute(q, k, v, backend=backend)
    for start in (0, seqlen // 2, seqlen - ROWS):
        check_queries(computed, start, heads - 1)
    for start in (0, 72 - ROWS):
        check_keys(computed, start, heads_kv - 1)


@each_backend
def test_keys(memory_for_billions, backend):
    seqlen, heads, head_dim = 2**20 + 77, 16, 128
    q, k, v = normal(1, 72, heads, head_dim), *(normal(1, seqlen, heads, head_dim) for _ in range(2))
    assert k.numel() > 2**31
    computed = compute(q, k, v, causal=True, backend=backend)
    for start in (0, 72 - ROWS):
        check_queries(computed, start, heads - 1)
    for start in (0, seqlen // 2, seqlen - ROWS):
        check_keys(computed, start, heads - 1)


@each_backend
def test_a_million_positions(backend):
    seqlen = 2**20
    computed = compute(*(normal(1, seqlen, 1, 64) for _ in range(3)), causal=True, backend=backend)
    for start in (0, 65_500, seqlen // 2 + 13, seqlen - ROWS):
        check_queries(computed, start, 0)
        check_keys(computed, start, 0)


@each_backend
@pytest.mark.parametrize(
    "sizes", [{"batch": 70_000, "heads_q": 1}, {"batch": 1, "heads_q": 70_000, "heads_kv": 35_000}]
)
@pytest.mark.parametrize("bias", [None, "b11k", "1hq1"])
def test_more_heads_than_a_grid_axis_holds(backend, sizes, bias):
    case = Case(5, 8, 16, mask=CAUSAL, bias=bias, dtype=torch.float16, **sizes)

    def run(inputs, problem, backend):
        return api.run(inputs, mask=problem.mask, softmax_scale=problem.softmax_scale, backend=backend)

    check = check_against_float64(partial(run, backend=backend), *make_inputs(case, DEVICE))
    assert check.good, f"\n{check}"
