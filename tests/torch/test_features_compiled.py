"""Does torch.compile trace every feature as one graph for all lengths, on the reference, with equal results?

What the Triton backends run is in test_torch_compile.py; what they do not run yet is the reference's, and is here.
"""

from functools import partial

import pytest
import torch

from triton_attention import attention, attention_varlen
from triton_attention.compat.flash_attn import flash_attn_func

LENGTHS = [(5, 8), (7, 9), (10, 13)]  # (seqlen_q, seqlen_k)
reference = partial(attention, backend="reference")


def with_slopes(q, k, v):
    return reference(q, k, v, alibi_slopes=torch.tensor([0.5, 0.25]), causal=True)


def with_sink(q, k, v, sink):
    return reference(q, k, v, sink=sink, causal=True, return_lse=True)


def with_everything(q, k, v, sink, bias):
    slopes = torch.tensor([[0.5, 0.25]])
    return reference(q, k, v, bias=bias, sink=sink, alibi_slopes=slopes, softcap=2.0, window=(6, 1), softmax_scale=0.3)


FEATURES = {  # a function, and whether it takes a sink, and a bias
    "window": (partial(reference, window=(3, 1), return_lse=True), False, False),
    "softcap": (partial(reference, softcap=2.0, causal=True, return_lse=True), False, False),
    "softcap, flash_attn": (partial(flash_attn_func, softcap=2.0, causal=True, window_size=(4, 0)), False, False),
    "alibi": (with_slopes, False, False),
    "sink": (with_sink, True, False),
    "everything": (with_everything, True, True),
}


@pytest.fixture(autouse=True)
def _compile_afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _portable_runs_on_the_cpu():
    """Not here: "auto" chooses the reference, as for any user's CPU tensors."""


def results(function, leaves):
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum(output.square().sum() for output in outputs)
    return outputs, torch.autograd.grad(total, leaves)


@pytest.mark.parametrize(("function", "takes_sink", "takes_bias"), FEATURES.values(), ids=FEATURES)
def test_one_graph_for_all_lengths(function, takes_sink, takes_bias):
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen_q, seqlen_k in LENGTHS:
            shapes = [(1, seqlen_q, 2, 16), (1, seqlen_k, 1, 16), (1, seqlen_k, 1, 16)]
            shapes += [(2,)] * takes_sink + [(1, 2, seqlen_q, seqlen_k)] * takes_bias
            leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
            torch.testing.assert_close(results(compiled, leaves), results(function, leaves))


PACKED = {"plain": {}, "causal, softcap": {"causal": True, "softcap": 2.0}, "window": {"window": (2, 1)}}


@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
def test_packed_sequences_are_one_graph_for_all_lengths(options):
    """With an empty sequence, one without keys, rows that no sequence has, and NaN wherever nothing is read."""

    def packed(q, k, v, bias, sink, slopes, starts_q, starts_k):
        return attention_varlen(
            q, k, v, bias=bias, alibi_slopes=slopes, sink=sink, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k,
            max_seqlen_q=bias.shape[2], max_seqlen_k=bias.shape[3], return_lse=True, **options,
        )  # fmt: skip

    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen_q, seqlen_k in ((11, 23), (17, 29), (14, 33)):
            starts_q = torch.tensor([0, 2, seqlen_q, seqlen_q, seqlen_q + 1], dtype=torch.int32)
            starts_k = torch.tensor([0, 4, seqlen_k, seqlen_k + 1, seqlen_k + 1], dtype=torch.int32)
            shapes = (seqlen_q + 3, 2, 16), (seqlen_k + 2, 1, 16), (seqlen_k + 2, 1, 16)
            leaves = [torch.randn(shape) for shape in (*shapes, (4, 1, seqlen_q, seqlen_k), (2,))]
            for rows in leaves[:3]:
                rows[-1] = float("nan")
            leaves[3][0, :, 2:], leaves[3][0, :, :, 4:] = float("nan"), float("nan")
            leaves = [leaf.requires_grad_() for leaf in leaves]
            slopes, outcomes = torch.rand(4, 2), []
            for function in (compiled, packed):
                out, lse = function(*leaves, slopes, starts_q, starts_k)
                total = out.square().sum() + torch.where(lse.isinf(), 0.0, lse).sum()
                outcomes.append((out, lse, *torch.autograd.grad(total, leaves)))
            torch.testing.assert_close(*outcomes)
            assert all(gradient.isfinite().all() for gradient in outcomes[0][2:])


def test_dropout_of_packed_sequences_is_one_graph():
    """Compiled and eager draw different seeds: out is linear in v, with one mask in both passes."""

    def packed(q, k, v, starts):
        lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": len(q), "max_seqlen_k": len(q)}
        return attention_varlen(q, k, v, **lengths, dropout_p=0.5)

    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    q, k, v, dout = (torch.randn(12, 2, 16) for _ in range(4))
    out = compiled(q, k, v.requires_grad_(), torch.tensor([0, 5, 12], dtype=torch.int32))
    (dv,) = torch.autograd.grad(out, v, dout)
    torch.testing.assert_close((dout * out).sum(), (dv * v).sum())
