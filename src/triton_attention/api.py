"""How is attention called? The public functions: they bring a call into standard form and hand it to a backend."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triton_attention import dispatch, eager, reference
from triton_attention.problem import Inputs, Mask, Problem, check_flag, check_tensor

_MAX_KNOWN = 4096
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
        dropout_p: rate at which probabilities are dropped, in [0, 1), applied to the nearest of 1/256, 2/256, ...,
            255/256. `torch.manual_seed` reproduces the choice, and forward and backward share it.
        deterministic: make gradients that are the same bit for bit in every run; so does
            `torch.use_deterministic_algorithms(True)`. Up to head dim 128 "hopper" else adds up that of q in an order
            that varies; all its other results, and all of the other backends, are the same each time.
        return_lse: return (out, lse).
        backend: "auto", or the name of the one that must run this; see `explain`.

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
    """`attention` of sequences of different lengths, packed one after the other: each attends to itself alone.

    Sequence i has the rows [cu_seqlens_q[i], cu_seqlens_q[i + 1]) of q and [cu_seqlens_k[i], cu_seqlens_k[i + 1]) of k
    and v. It is computed as `attention` computes batch entry i: positions, and with them the mask, ALiBi, the bias and
    dropout, count from its own first query and key. On a GPU nothing waits for the lengths, and work is for the blocks
    of queries and keys that there are, however uneven the lengths.

    Args:
        q: (total_q, heads_q, head_dim). Any strides, as for `attention`: slices of a packed qkv are not copied.
        k: (total_k, heads_kv, head_dim).
        v: (total_k, heads_kv, head_dim_v).
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), on the device of q: rising from 0. A sequence may have no query
            or no key. Rows from the last boundary on belong to no sequence.
        max_seqlen_q, max_seqlen_k: at least the longest lengths. On a GPU this is not checked; without a bias
            nothing depends on it, and with one nothing outside it is read, whatever the lengths.
        bias: broadcastable to (batch, heads_q, max_seqlen_q, max_seqlen_k), indexed within each sequence. What lies
            beyond a sequence's lengths is not read, and has gradient 0.
        Everything else is as in `attention`, with alibi_slopes (heads_q,) or (batch, heads_q).

    Returns:
        out (total_q, heads_q, head_dim_v), and with `return_lse` also lse (heads_q, total_q). A row that belongs to
        no sequence has out 0, lse -inf and gradient 0.

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention`. What boundaries hold is checked on the CPU.

    Example:
        >>> q, k, v = (torch.randn(10, 8, 64) for _ in range(3))
        >>> boundaries = torch.tensor([0, 3, 10], dtype=torch.int32)  # two sequences, of 3 and 7
        >>> lengths = {"cu_seqlens_q": boundaries, "cu_seqlens_k": boundaries, "max_seqlen_q": 7, "max_seqlen_k": 7}
        >>> attention_varlen(q, k, v, **lengths, causal=True).shape
        torch.Size([10, 8, 64])
    """
    check_flag("return_lse", return_lse)
    check_tensor("cu_seqlens_q", cu_seqlens_q)
    out, lse = run(
        Inputs(q, k, v, bias, alibi_slopes, sink, cu_seqlens_q, cu_seqlens_k),
        mask=Mask.of(causal, window),
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=deterministic,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        backend=backend,
    )
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
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
    """Which backend runs `attention` with these arguments, or with `cu_seqlens_q` `attention_varlen`, and why does each
    other one not? Computes nothing.

    Returns:
        An object that prints as a table. `.backend` is the name of the backend, or None if none runs the call;
        `.reasons` holds each one's reasons, a list that is empty for those that could run it.

    Raises:
        TypeError, ValueError: as `attention`.
    """
    check_flag("return_lse", return_lse)
    _, problem = _standard_form(
        Inputs(q, k, v, bias, alibi_slopes, sink, cu_seqlens_q, cu_seqlens_k),
        mask=Mask.of(causal, window),
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=deterministic,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
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
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call in any of the public forms; of packed sequences iff `inputs` has `cu_seqlens_q`."""
    options = (mask, softmax_scale, softcap, dropout_p, deterministic, max_seqlen_q, max_seqlen_k, backend)
    key = eager.key(inputs, options)
    known = None
    if key is not None:
        try:
            known = _known.get(key)
        except TypeError:  # an option of a wrong type has no hash: for the validator to refuse
            key = None
    if known is not None:
        return known(inputs)
    standard, problem = _standard_form(
        inputs,
        mask=mask,
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=deterministic,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    chosen = dispatch.select(problem, backend)
    sizes = (problem.batch, problem.seqlen_q, problem.seqlen_k, standard.q.shape[0], standard.k.shape[0])
    if any(size == 0 for size in sizes):  # there is nothing to launch
        return reference.attention(standard, problem)
    in_form = all(map(operator.is_, standard, inputs))
    if key is not None and chosen.bind is not None and in_form:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        _known[key] = chosen.bind(problem)
    return chosen.run(standard, problem)


# What runs calls that were validated and dispatched once, and are in standard form as they are.
_known: dict[object, Callable[[Inputs], tuple[Tensor, Tensor]]] = {}


def _standard_form(
    inputs: Inputs,
    *,
    mask: Mask,
    softmax_scale: float | None,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> tuple[Inputs, Problem]:
    """The call as backends want it: autocast applied, a bias of rank 4, unit last strides, validated."""
    q, k, v = _autocast(inputs.q, inputs.k, inputs.v)
    bias = inputs.bias
    if bias is not None:
        check_tensor("bias", bias)
        bias = bias[(None,) * (4 - bias.dim())] if bias.dim() < 4 else bias
    problem = Problem.from_tensors(
        inputs._replace(q=q, k=k, v=v, bias=bias),
        mask=mask,
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=deterministic,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    return inputs._replace(q=q, k=k, v=v, bias=bias), problem


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
