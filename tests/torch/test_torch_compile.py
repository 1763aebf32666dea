"""Does torch.compile trace every face of the Triton kernels as one graph, once for all lengths, with equal results?"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from triton_attention import attention, attention_varlen
from triton_attention.compat import flash_attn, flash_attn_triton
from triton_attention.compat.sdpa import scaled_dot_product_attention
from triton_attention.portable import launch

# numpy's, in rows beyond the last query
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning:triton")

LENGTHS = [(5, 8), (7, 9), (10, 13)]  # (seqlen_q, seqlen_k)


@pytest.fixture(autouse=True)
def _compile_afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Face(NamedTuple):
    """A function that returns a tensor or a tuple of them, and the shapes of its arguments for two lengths."""

    function: Callable
    shapes: Callable[[int, int], tuple[tuple[int, ...], ...]]


def bshd(seqlen_q, seqlen_k, heads_q=1):
    """q, k and v."""
    return (1, seqlen_q, heads_q, 16), (1, seqlen_k, 1, 16), (1, seqlen_k, 1, 16)


def grouped_bshd(seqlen_q, seqlen_k):
    return bshd(seqlen_q, seqlen_k, heads_q=2)


def grouped_bhsd(seqlen_q, seqlen_k):
    return (1, 2, seqlen_q, 16), (1, 1, seqlen_k, 16), (1, 1, seqlen_k, 16)


def with_bias(*bias_axes):
    """q, k, v and a bias whose shape has "q" and "k" for the lengths."""
    return lambda q, k: (*grouped_bshd(q, k), tuple({"q": q, "k": k}.get(axis, axis) for axis in bias_axes))


def masked(q, k, v, mask):
    return attention(q, k, v, bias=mask > -1.0)


def under_autocast(q, k, v):
    with torch.autocast("cpu", dtype=torch.float16):
        return attention(q, k, v)


def biased_sdpa(q, k, v, bias):
    return scaled_dot_product_attention(q, k, v, bias, scale=0.3, enable_gqa=True)


def with_sink(seqlen_q, seqlen_k):
    return *grouped_bshd(seqlen_q, seqlen_k), (2,)


def capped(q, k, v, sink):
    return attention(q, k, v, softcap=2.0, alibi_slopes=torch.tensor([0.1, 0.2]), sink=sink, causal=True)


FACES = {
    "attention": Face(attention, grouped_bshd),
    "lse": Face(partial(attention, causal=True, return_lse=True), grouped_bshd),
    "bias": Face(lambda q, k, v, bias: attention(q, k, v, bias=bias, causal=True), with_bias(1, 2, "q", "k")),
    "bias of keys": Face(lambda q, k, v, bias: attention(q, k, v, bias=bias), with_bias("k")),
    "mask": Face(masked, with_bias(1, 1, 1, "k")),
    "softcap, ALiBi, sink": Face(capped, with_sink),
    "autocast": Face(under_autocast, bshd),
    "deterministic": Face(partial(attention, deterministic=True), bshd),
    "flash_attn": Face(partial(flash_attn.flash_attn_func, causal=True), bshd),
    "flash_attn, probs": Face(
        lambda q, k, v: flash_attn.flash_attn_func(q, k, v, 0.0, None, False, (4, 0), return_attn_probs=True)[:2], bshd
    ),
    "flash_attn, kv": Face(flash_attn.flash_attn_kvpacked_func, lambda q, k: ((1, q, 1, 16), (1, k, 2, 1, 16))),
    "flash_attn, qkv": Face(flash_attn.flash_attn_qkvpacked_func, lambda q, k: ((1, q, 3, 1, 16),)),
    "flash_attn_triton": Face(
        lambda q, k, v, bias: flash_attn_triton.flash_attn_func(q, k, v, bias, True), with_bias(1, 1, "q", "k")
    ),
    "flash_attn_triton, kv": Face(
        flash_attn_triton.flash_attn_kvpacked_func, lambda q, k: ((1, q, 1, 16), (1, k, 2, 1, 16))
    ),
    "flash_attn_triton, qkv": Face(flash_attn_triton.flash_attn_qkvpacked_func, lambda q, k: ((1, q, 3, 1, 16),)),
    "sdpa": Face(partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True), grouped_bhsd),
    "sdpa, bias": Face(biased_sdpa, lambda q, k: (*grouped_bhsd(q, k), (q, k))),
}


def make_leaves(face, seqlen_q, seqlen_k):
    return [torch.randn(shape, requires_grad=True) for shape in face.shapes(seqlen_q, seqlen_k)]


def results(function, leaves) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What it returns, and the gradients through all of it."""
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum(output.float().square().sum() for output in outputs)
    return outputs, torch.autograd.grad(total, leaves, materialize_grads=True)


def assert_equals_eager(compiled, face, lengths):
    leaves = make_leaves(face, *lengths)
    torch.testing.assert_close(results(compiled, leaves), results(face.function, leaves))


@pytest.mark.parametrize("face", FACES.values(), ids=FACES)
def test_one_graph_for_all_lengths(monkeypatch, face):
    run_forward = Mock(wraps=launch.forward)
    monkeypatch.setattr(launch, "forward", run_forward)
    compiled = torch.compile(face.function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in LENGTHS:
            assert_equals_eager(compiled, face, lengths)
    assert run_forward.call_count == 2 * len(LENGTHS)  # compiled and eager, and no other backend


def packed_rows(seqlen_q, seqlen_k):
    """q, k and v of two sequences: the first has 2 queries and 2 keys, the second these lengths."""
    return (seqlen_q + 2, 2, 16), (seqlen_k + 2, 1, 16), (seqlen_k + 2, 1, 16)


def varlen(q, k, v, *further, starts_q, starts_k, max_seqlen_q, max_seqlen_k):
    """The further one is a bias, or a sink, which then has ALiBi beside it."""
    (further,) = further
    features = {"bias": further} if further.dim() > 1 else {"sink": further, "alibi_slopes": torch.tensor([0.1, 0.2])}
    return attention_varlen(
        q, k, v, **features, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, causal=True, softcap=2.0,
    )  # fmt: skip


def in_order(function):
    """Of flash_attn's functions for packed sequences, which take boundaries and lengths by position."""
    return lambda *leaves, starts_q, starts_k, max_seqlen_q, max_seqlen_k: function(
        *leaves, starts_q, starts_k, max_seqlen_q, max_seqlen_k, causal=True
    )


def of_qkv(qkv, *, starts_q, starts_k, max_seqlen_q, max_seqlen_k):
    return flash_attn.flash_attn_varlen_qkvpacked_func(qkv, starts_q, max_seqlen_q, window_size=(4, 0))


PACKED_FACES = {
    "bias": Face(varlen, lambda q, k: (*packed_rows(q, k), (2, q, k))),
    "ALiBi, sink": Face(varlen, lambda q, k: (*packed_rows(q, k), (2,))),
    "flash_attn": Face(in_order(flash_attn.flash_attn_varlen_func), packed_rows),
    "flash_attn, kv": Face(
        in_order(flash_attn.flash_attn_varlen_kvpacked_func), lambda q, k: ((q + 2, 1, 16), (k + 2, 2, 1, 16))
    ),
    "flash_attn, qkv": Face(of_qkv, lambda q, k: ((q + 2, 3, 1, 16),)),
}


@pytest.mark.parametrize("face", PACKED_FACES.values(), ids=PACKED_FACES)
def test_packed_sequences_are_one_graph_for_all_lengths(face):
    compiled = torch.compile(face.function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen_q, seqlen_k in LENGTHS:
            starts_q, starts_k = (torch.tensor([0, 2, n + 2], dtype=torch.int32) for n in (seqlen_q, seqlen_k))
            sizes = {"starts_q": starts_q, "starts_k": starts_k, "max_seqlen_q": seqlen_q, "max_seqlen_k": seqlen_k}
            leaves = make_leaves(face, seqlen_q, seqlen_k)
            outcomes = [results(partial(function, **sizes), leaves) for function in (compiled, face.function)]
            torch.testing.assert_close(*outcomes)


def test_dropout_is_one_graph_whose_passes_share_their_mask():
    """Of the compiled function alone: `aot_eager` draws other seeds than an eager call."""

    def dropped(q, k, v):
        return attention(q, k, v, dropout_p=0.5)

    compiled = torch.compile(dropped, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen_q, seqlen_k in LENGTHS:
            q, k = torch.zeros(1, seqlen_q, 1, 16), torch.zeros(1, seqlen_k, 1, 16)
            v, dout = (torch.eye(16)[None, :seqlen, None].clone() for seqlen in (seqlen_k, seqlen_q))
            out = compiled(q, k, v.requires_grad_())
            (dv,) = torch.autograd.grad(out, v, dout)
            kept = out[0, :, 0, :seqlen_k]  # the probabilities that were kept
            torch.testing.assert_close(dv[0, :, 0, :seqlen_q].T, kept)
            assert 0 < (kept != 0).sum() < seqlen_q * seqlen_k


def test_two_graphs_where_nothing_is_said_of_lengths():
    """By default the first lengths are constants, and the second make them symbols, for all others."""
    face = FACES["bias"]
    compiled = torch.compile(face.function, fullgraph=True, backend="aot_eager")
    for lengths in LENGTHS[:2]:
        assert_equals_eager(compiled, face, lengths)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_equals_eager(compiled, face, LENGTHS[2])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    face = FACES["lse"]
    compiled = torch.compile(face.function, fullgraph=True, dynamic=True, backend="aot_eager")
    with mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in LENGTHS:
            leaves = make_leaves(face, *lengths)
            outputs = compiled(*leaves)
            torch.testing.assert_close(outputs, face.function(*leaves))
            assert not any(output.requires_grad for output in outputs)
