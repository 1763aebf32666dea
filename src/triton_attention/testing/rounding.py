"""Which errors does no kernel avoid? Attention in PyTorch that rounds where kernels round, forward and backward.

Matrix products take operands in the dtype of q and accumulate in float32, everything else is float32, and the backward
pass knows the forward's only by out and lse. So its errors are those of the method, also where plain PyTorch in the
same dtype is no measure: scores beyond the range of float16, or rows whose probability is all on one key.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from triton_attention import reference
from triton_attention.philox import kept_factor
from triton_attention.problem import Inputs, Problem
from triton_attention.testing.dropout import next_dropout_mask


def rounded_attention(inputs: Inputs, problem: Problem, first_batch: int = 0) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call, as `reference.attention`; differentiable once."""
    if problem.varlen:
        return reference.each_sequence(inputs, problem, rounded_attention)
    seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
    group = problem.heads_q // problem.heads_kv
    q, k, v = (tensor.float().transpose(1, 2) for tensor in inputs[:3])  # (b, heads, s, d)
    k, v = (tensor.repeat_interleave(group, dim=1) for tensor in (k, v))
    scores = _rounding_gradient(q @ k.mT, problem.dtype) * problem.softmax_scale
    if problem.softcap > 0:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    offset = torch.arange(seqlen_k, device=q.device) - torch.arange(seqlen_q, device=q.device)[:, None]  # (sq, sk)
    if inputs.alibi_slopes is not None:
        distance = (offset - problem.mask.diagonal(seqlen_q, seqlen_k)).abs()
        scores = scores - inputs.alibi_slopes[..., None, None] * distance
    lower, upper = problem.mask.band(seqlen_q, seqlen_k)
    hidden = torch.zeros((), dtype=torch.bool, device=q.device)
    if lower is not None:
        hidden = hidden | (offset < lower)
    if upper is not None:
        hidden = hidden | (offset > upper)
    if inputs.bias is not None and inputs.bias.dtype == torch.bool:
        hidden = hidden | ~inputs.bias
    elif inputs.bias is not None:
        scores = scores + inputs.bias.float()
    scores = scores.masked_fill(hidden, -math.inf)
    kept = torch.ones((), device=q.device)
    if problem.dropout_p > 0:
        mask = next_dropout_mask(inputs.q, inputs.k, problem.dropout_p, first_batch)
        kept = mask * kept_factor(problem.dropout_p)
    sink = scores.new_full((1,), -math.inf) if inputs.sink is None else inputs.sink.float()
    return cast("tuple[Tensor, Tensor]", _Softmax.apply(scores, v, sink, kept, problem.dtype))  # type: ignore[no-untyped-call]


class _Softmax(torch.autograd.Function):
    """(out, lse) of scores, values and sinks; `kept` is what dropout multiplies the probabilities with."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, v: Tensor, sink: Tensor, kept: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        sink = sink[:, None]  # (1 | h, 1)
        shift = sink.expand(scores.shape[:-1])  # (b, h, sq)
        if scores.shape[-1] > 0:
            shift = torch.maximum(scores.amax(dim=-1), shift)
        shift = shift.masked_fill(shift == -math.inf, 0.0)
        weights = torch.exp(scores - shift[..., None])
        total = weights.sum(dim=-1) + torch.exp(sink - shift)
        empty = total == 0
        lse = (shift + torch.log(total)).masked_fill(empty, -math.inf)
        out = ((_rounded(weights, dtype) * kept) @ v) / total.masked_fill(empty, 1.0)[..., None]
        out = out.to(dtype)
        ctx.save_for_backward(scores, v, sink, kept, out, lse)
        return out.transpose(1, 2), lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scores, v, sink, kept, out, lse = ctx.saved_tensors
        dout, dlse = grads[0].transpose(1, 2), grads[1]
        delta = (dout.float() * out.float()).sum(dim=-1) - dlse
        lse = lse.masked_fill(lse == -math.inf, math.inf)  # a query that sees no key has probabilities 0
        weights = torch.exp(scores - lse[..., None])
        dweights = dout.float() @ v.mT
        dscores = weights * (dweights * kept - delta[..., None])
        dv = (_rounded(weights, out.dtype) * kept).mT @ dout.float()
        dsink = (-torch.exp(sink - lse) * delta).sum(dim=(0, 2)).sum_to_size(sink.shape[:1])
        return dscores, dv, dsink, None, None


class _RoundingGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _rounded(grads[0], ctx.dtype), None


def _rounding_gradient(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers, whose gradient is rounded to `dtype`: the operand of the products that make dq and dk."""
    return cast(Tensor, _RoundingGradient.apply(tensor, dtype))  # type: ignore[no-untyped-call]


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 numbers that `dtype` holds."""
    return tensor.to(dtype).float()
