"""How is attention called? The public functions: they bring a call into standard form and hand it to a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_attention import dispatch, reference
from triton_attention.problem import Inputs, Mask, Problem, check_flag, check_tensor

_AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | Any:  # (out, lse) with return_lse
    """Exact attention; the Triton backends never hold its matrix of scores in memory.

        scores = softmax_scale * q k^T
               -> softcap * tanh(scores / softcap)                      if softcap > 0
               - alibi_slopes * |i + seqlen_k - seqlen_q - j| + bias    for query i and key j
               -> -inf                                                  where key j is hidden from query i
        lse    = log(sum over the keys of exp(scores), + exp(sink) if there is one)
        out    = dropout(exp(scores - lse)) v

    Args:
        q: (batch, seqlen_q, heads_q, head_dim); float16, bfloat16, float32 (computed in float32, never tf32 unasked)
            or, on the reference, float64. Any strides: only a last one that is not 1 costs a copy.
        k: (batch, seqlen_k, heads_kv, head_dim), where heads_kv divides heads_q: query head h reads key/value head
            h // (heads_q // heads_kv).
        v: (batch, seqlen_k, heads_kv, head_dim_v). Head dims go from 1 to 256.
        bias: broadcastable to (batch, heads_q, seqlen_q, seqlen_k). float16, bfloat16 or float32, whatever the dtype
            of q, and differentiable: the gradient has the bias's own shape. Or bool: True = may attend.
        causal: hide the keys to the right of the diagonal, which ends at the bottom right:
            key j is visible to query i iff j <= i + seqlen_k - seqlen_q.
        window: (left, right): key j is visible to query i iff
            i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right; None or -1 = unbounded.
        softmax_scale: None = 1 / sqrt(head_dim); 0.0 is zero.
        softcap: bound of the scaled scores; 0.0 = none.
        alibi_slopes: (heads_q,) or (batch, heads_q), float32, not differentiable.
        sink: (heads_q,), a logit per head that joins the softmax's denominator; differentiable.
        dropout_p: rate at which probabilities are dropped, in [0, 1). `torch.manual_seed` reproduces the choice, and
            forward and backward share it.
        deterministic: allow only backends whose gradients are the same bit for bit in every run. "hopper" adds up that
            of q in an order that varies; all its other results are the same each time.
        return_lse: return (out, lse).
        backend: "auto", or the name of the one that must run this; see `explain`. Above head dim 128, and under
            `torch.use_deterministic_algorithms(True)`, the backward pass of "hopper" is that of "portable".

    Returns:
        out (batch, seqlen_q, heads_q, head_dim_v) in the dtype of q (under autocast, in its dtype), and with
        `return_lse` also lse (batch, heads_q, seqlen_q), float32 (float64 for float64 inputs), natural logarithm,
        differentiable. A query that sees no key has out 0, lse -inf (or its sink) and gradient 0.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what it must be and what it is.
        NotImplementedError: no backend runs this; the message has each one's reasons.

    Example:
        >>> q, k, v = (torch.randn(2, 128, 8, 64, requires_grad=True) for _ in range(3))
        >>> bias = torch.zeros(8, 128, 128, requires_grad=True)
        >>> attention(q, k, v, bias=bias, causal=True).sum().backward()
        >>> bias.grad.shape
        torch.Size([8, 128, 128])

    Source: Dao, "FlashAttention-2: Faster attention with better parallelism and work partitioning", 2023.
    """
    check_flag("return_lse", return_lse)
    out, lse = run(
        Inputs(q, k, v, bias, alibi_slopes, sink),
        mask=Mask.of(causal, window),
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=deterministic,
        backend=backend,
    )
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | Any:  # (out, lse) with return_lse
    """Attention over sequences of different lengths, packed one after the other; not there yet.

    q is (total_q, heads_q, head_dim), k and v (total_k, heads_kv, ...); cu_seqlens are int32 (batch + 1,).

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "attention_varlen is not there yet: pad the sequences to one length and give attention(..., bias=mask) "
        "a bool mask (batch, 1, 1, seqlen_k), True where a key exists"
    )


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> dispatch.Explanation:
    """Which backend runs `attention` with these arguments, and why does each other one not? Computes nothing.

    Returns:
        An object that prints as a table. `.backend` is the name of the backend, or None if none runs the call;
        `.reasons` holds each one's reasons, a list that is empty for those that could run it.

    Raises:
        TypeError, ValueError: as `attention`.
    """
    check_flag("return_lse", return_lse)
    _, problem = _standard_form(
        Inputs(q, k, v, bias, alibi_slopes, sink),
        mask=Mask.of(causal, window),
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=deterministic,
    )
    return dispatch.explain(problem, backend)


def run(
    inputs: Inputs,
    *,
    mask: Mask,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call in any of the public forms."""
    inputs, problem = _standard_form(
        inputs,
        mask=mask,
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=deterministic,
    )
    chosen = dispatch.select(problem, backend)
    if problem.batch == 0 or problem.seqlen_q == 0 or problem.seqlen_k == 0:  # there is nothing to launch
        return reference.attention(inputs, problem)
    return chosen.run(inputs, problem)


def _standard_form(
    inputs: Inputs,
    *,
    mask: Mask,
    softmax_scale: float | None,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
) -> tuple[Inputs, Problem]:
    """The call as backends want it: autocast applied, a bias of rank 4, unit last strides, validated."""
    q, k, v, bias, alibi_slopes, sink = inputs
    q, k, v = _autocast(q, k, v)
    if bias is not None:
        check_tensor("bias", bias)
        bias = bias[(None,) * (4 - bias.dim())] if bias.dim() < 4 else bias
    problem = Problem.from_tensors(
        Inputs(q, k, v, bias, alibi_slopes, sink),
        mask=mask,
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=deterministic,
    )
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    return Inputs(q, k, v, bias, alibi_slopes, sink), problem


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of the autocast region, if this is one; as in SDPA it leaves float64 alone."""
    if not isinstance(q, Tensor):  # for the validator to refuse
        return q, k, v
    device = q.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.dtype in _AUTOCAST_DTYPES else tensor
        for tensor in (q, k, v)
    )
