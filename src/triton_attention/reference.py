"""What is exact attention? The specification, in plain PyTorch: every other backend is checked against it.

It materialises the scores, so that it needs O(seqlen_q * seqlen_k) memory; autograd differentiates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_attention.philox import draw_seed, dropout_mask, kept_factor
from triton_attention.problem import Inputs, Problem


def attention(inputs: Inputs, problem: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) of a validated call.

        scores[i, j] = softmax_scale * q[i] . k[j]
                     -> softcap * tanh(scores / softcap)       if softcap > 0
                     - alibi_slope * |i + diagonal - j|        diagonal = seqlen_k - seqlen_q, or 0 if top-left aligned
                     + bias[i, j]
                     -> -inf where the mask or a bool bias hides key j from query i
        lse[i]       = log(sum over j of exp(scores[i, j]) + exp(sink))
        out[i]       = sum over j of dropout(exp(scores[i, j] - lse[i])) v[j]

    out is (batch, seqlen_q, heads_q, head_dim_v) in the dtype of q; lse, the natural logarithm with the sink in it, is
    (batch, heads_q, seqlen_q) in the dtype that everything is computed in: float64 for float64 inputs, else float32.
    A query that sees no key has out 0, lse -inf (with a sink: lse = sink), and gradient 0. Query head h reads the
    key/value head h // (heads_q // heads_kv). Dropout keeps what `philox.dropout_mask` says, scaled by
    `philox.kept_factor`, and leaves lse as it is. Differentiable, any number of times, in all inputs but alibi_slopes.

    Of packed sequences each is computed alone, with its part of the bias, and as batch entry i for slopes and dropout;
    out is (total_q, heads_q, head_dim_v) and lse (heads_q, total_q). Rows that no sequence has get out 0 and lse -inf.
    """
    seed = draw_seed(problem.device) if problem.dropout_p > 0 else None
    if not problem.varlen:
        return _attention(inputs, problem, 0, seed)
    sizes = (problem.batch, problem.seqlen_q, problem.seqlen_k, inputs.q.shape[0], inputs.k.shape[0])
    if torch.compiler.is_compiling() and all(size > 0 for size in sizes):
        return _padded(inputs, problem, seed)
    return each_sequence(inputs, problem, partial(_attention, seed=seed))


def each_sequence(
    inputs: Inputs, problem: Problem, attend: Callable[[Inputs, Problem, int], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """(out, lse) of packed sequences from those of each one: `attend` is given it as a batch of one, and its number.

    Where sequences begin has to be known on the host, which waits for the device.
    """
    q, k, v, bias, slopes, _, cu_seqlens_q, cu_seqlens_k = inputs
    assert cu_seqlens_q is not None  # for the type checker
    assert cu_seqlens_k is not None
    outs, lses = [], []
    boundaries = zip(pairwise(_on_host(cu_seqlens_q)), pairwise(_on_host(cu_seqlens_k)), strict=True)
    for i, ((start_q, end_q), (start_k, end_k)) in enumerate(boundaries):
        seqlen_q, seqlen_k = end_q - start_q, end_k - start_k
        sequence = Inputs(q[None, start_q:end_q], k[None, start_k:end_k], v[None, start_k:end_k], sink=inputs.sink)
        if bias is not None:
            shared = bias if bias.shape[0] == 1 else bias[i, None]
            sequence = sequence._replace(bias=shared[:, :, :seqlen_q, :seqlen_k])
        if slopes is not None:
            sequence = sequence._replace(alibi_slopes=slopes if slopes.dim() == 1 else slopes[i, None])
        alone = problem._replace(batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, varlen=False)
        out, lse = attend(sequence, alone, i)
        outs.append(out[0])
        lses.append(lse[0])
    unused = q.shape[0] - sum(out.shape[0] for out in outs)
    dtype = torch.float64 if problem.dtype == torch.float64 else torch.float32
    nothing = q[:0].sum() + k[:0].sum() + v[:0].sum()  # 0, and differentiable even if there is no sequence
    outs.append(nothing.expand(unused, problem.heads_q, problem.head_dim_v))
    lses.append(q.new_full((problem.heads_q, unused), -math.inf, dtype=dtype))
    return torch.cat(outs), torch.cat(lses, dim=1)


def _on_host(cu_seqlens: Tensor) -> list[int]:
    """What boundaries hold. Those on the meta device hold nothing: there all sequences are empty, and shapes right."""
    starts: list[int] = [0] * cu_seqlens.shape[0] if cu_seqlens.is_meta else cu_seqlens.tolist()
    return starts


def _padded(inputs: Inputs, problem: Problem, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of packed sequences from a batch of padded ones, for `torch.compile`: a graph cannot ask for lengths.

    It takes the memory of `batch` matrices of scores, each of the longest lengths.
    """
    q, k, v, _, _, _, cu_seqlens_q, cu_seqlens_k = inputs
    assert cu_seqlens_q is not None  # for the type checker
    assert cu_seqlens_k is not None

    def rows(cu_seqlens: Tensor, seqlen: int) -> tuple[Tensor, Tensor]:
        """(batch, seqlen): the row of a position, and whether its sequence has it."""
        row = cu_seqlens[:-1, None] + torch.arange(seqlen, device=cu_seqlens.device)
        return row, row < cu_seqlens[1:, None]

    (row_q, exists_q), (row_k, exists_k) = rows(cu_seqlens_q, problem.seqlen_q), rows(cu_seqlens_k, problem.seqlen_k)
    q, k, v = (
        tensor[row.clamp(max=tensor.shape[0] - 1)].masked_fill(~exists[..., None, None], 0)
        for tensor, row, exists in ((q, row_q, exists_q), (k, row_k, exists_k), (v, row_k, exists_k))
    )
    length_q, length_k = ((ends[1:] - ends[:-1])[:, None, None, None] for ends in (cu_seqlens_q, cu_seqlens_k))
    seen = exists_q[:, None, :, None] & exists_k[:, None, None, :]
    out, lse = _attention(inputs._replace(q=q, k=k, v=v), problem, 0, seed, _Lengths(length_q, length_k, seen))

    row = torch.arange(inputs.q.shape[0], device=problem.device)
    sequence = torch.bucketize(row, cu_seqlens_q[1:], right=True)
    unused = sequence == problem.batch
    sequence = sequence.clamp(max=problem.batch - 1)
    position = (row - cu_seqlens_q[sequence]).clamp(max=problem.seqlen_q - 1)
    out = out[sequence, position].masked_fill(unused[:, None, None], 0)
    lse = lse.transpose(1, 2)[sequence, position].masked_fill(unused[:, None], -math.inf)
    return out, lse.mT


class _Lengths(NamedTuple):
    """Of the sequences of a padded batch."""

    q: Tensor  # (b, 1, 1, 1)
    k: Tensor
    seen: Tensor  # (b, 1, sq, sk): that both the query and the key exist


def _attention(
    inputs: Inputs, problem: Problem, first_batch: int, seed: Tensor | None, lengths: _Lengths | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of a batch of equal lengths, or of padded ones, whose entries dropout counts from `first_batch`."""
    b, h, hk, seqlen_q, seqlen_k = problem.batch, problem.heads_q, problem.heads_kv, problem.seqlen_q, problem.seqlen_k
    rows = h // hk * seqlen_q  # the queries of all heads that share a key/value head
    dtype = torch.float64 if problem.dtype == torch.float64 else torch.float32
    with _without_autocast(problem.device):
        q, k, v = (tensor.to(dtype).transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))  # (b, heads, s, d)
        q = (problem.softmax_scale * q).reshape(b, hk, rows, problem.head_dim)
        scores = (q @ k.mT).view(b, h, seqlen_q, seqlen_k)
        weights, lse = _softmax(_modified(scores, inputs, problem, lengths), inputs.sink)
        if seed is not None:
            kept = dropout_mask(seed, problem.dropout_p, b, h, seqlen_q, seqlen_k, first_batch)
            weights = weights.masked_fill(~kept, 0) * kept_factor(problem.dropout_p)
        out = (weights.view(b, hk, rows, seqlen_k) @ v).view(b, h, seqlen_q, problem.head_dim_v)
        return out.to(problem.dtype).transpose(1, 2).contiguous(), lse


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Matrix products of float32 in float32. The meta device knows no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _modified(scores: Tensor, inputs: Inputs, problem: Problem, lengths: _Lengths | None) -> Tensor:
    """The scores after softcap, ALiBi, bias and mask: (b, h, sq, sk)."""
    seqlens: Any = (problem.seqlen_q, problem.seqlen_k) if lengths is None else (lengths.q, lengths.k)
    if problem.softcap > 0:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)

    queries = torch.arange(problem.seqlen_q, device=problem.device)[:, None]
    keys = torch.arange(problem.seqlen_k, device=problem.device)
    offset = keys - queries  # (sq, sk)
    if inputs.alibi_slopes is not None:
        distance = (offset - problem.mask.diagonal(*seqlens)).abs()
        slopes = inputs.alibi_slopes.to(scores.dtype)[..., None, None]  # (h, 1, 1) or (b, h, 1, 1)
        scores = scores - slopes * distance

    if inputs.bias is not None:
        if inputs.bias.dtype == torch.bool:
            scores = scores.masked_fill(~inputs.bias, -math.inf)
        else:
            scores = scores + inputs.bias.to(scores.dtype)

    lower, upper = problem.mask.band(*seqlens)
    if lower is not None:
        scores = scores.masked_fill(offset < lower, -math.inf)
    if upper is not None:
        scores = scores.masked_fill(offset > upper, -math.inf)
    return scores if lengths is None else scores.masked_fill(~lengths.seen, -math.inf)


def _softmax(scores: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(scores) (b, h, sq, sk) and lse (b, h, sq).

    Where nothing is visible, the probabilities are 0 and lse -inf, and all gradients are 0.
    """
    b, h, seqlen_q, seqlen_k = scores.shape
    logits = scores.new_full((1, 1), -math.inf) if sink is None else sink.to(scores.dtype)[:, None]  # (1 | h, 1)

    # The largest logit of a row: it cancels out of the result, so that no gradient has to pass through it.
    shift = logits.detach().expand(b, h, seqlen_q)
    if seqlen_k > 0:
        shift = torch.maximum(shift, scores.detach().amax(dim=-1))
    shift = shift.masked_fill(shift == -math.inf, 0)

    weights = torch.exp(scores - shift[..., None])
    total = weights.sum(dim=-1) + torch.exp(logits - shift)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    lse = (shift + torch.log(total)).masked_fill(empty, -math.inf)
    return weights / total[..., None], lse
