"""Is a result right? err <= 2 x err(PyTorch in the same dtype) + rounding, every error measured against float64.

PyTorch's own error on the very same inputs says how well they can be treated in that dtype: nothing is tuned by hand.
Where it has none by luck, the rounding of out in the backward pass takes its place: see `_roundings_of_delta`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from triton_attention import reference
from triton_attention.philox import kept_factor
from triton_attention.problem import Inputs, Problem
from triton_attention.testing.dropout import next_dropout_mask
from triton_attention.testing.rounding import rounded_attention

Attention = Callable[[Inputs, Problem], tuple[Tensor, Tensor]]  # -> (out, lse)


class Row(NamedTuple):
    """The largest error of one result, that of PyTorch in the same dtype, and what is allowed."""

    name: str
    error: float
    baseline: float
    allowed: float

    @property
    def good(self) -> bool:
        return self.error <= self.allowed  # False for a NaN


class Check(NamedTuple):
    """The errors of out, lse, and the gradients; str() of it is a table."""

    rows: Sequence[Row]

    @property
    def good(self) -> bool:
        return all(row.good for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'':6}{'error':>10}{'PyTorch':>10}{'allowed':>10}"]
        for row in self.rows:
            verdict = "ok" if row.good else "WRONG"
            lines.append(f"{row.name:6}{row.error:10.1e}{row.baseline:10.1e}{row.allowed:10.1e}  {verdict}")
        return "\n".join(lines)


def check_against_float64(
    attention: Attention,
    inputs: Inputs,
    problem: Problem,
    seed: int = 0,
    *,
    extreme: bool = False,
    loss_scale: float = 1.0,
) -> Check:
    """Run `attention` forward and backward (through out and lse) and compare with the reference in float64.

    `attention` takes (inputs, problem) and returns (out, lse), such as `triton_attention.reference.attention`. The
    gradients of out and lse are standard normal, times `loss_scale`.

    `extreme` is for inputs of any size. There plain PyTorch may overflow or, where a softmax picks one key, be exact by
    luck: its error is then the larger one of its own and of `rounded_attention`, and the rounding is also that of
    the float32 terms that cancel.
    """
    generator = torch.Generator(problem.device).manual_seed(seed)
    *batch, seqlen_q, heads, _ = inputs.q.shape  # of packed sequences without a batch
    dout = torch.randn(*batch, seqlen_q, heads, problem.head_dim_v, generator=generator, device=problem.device)
    dout = (loss_scale * dout).to(problem.dtype)
    dlse = loss_scale * torch.randn(*batch, heads, seqlen_q, generator=generator, device=problem.device)

    def results(function: Attention, like: Inputs) -> dict[str, Tensor]:
        torch.manual_seed(seed)  # the same dropout for each
        out, lse = function(like, problem._replace(dtype=like.q.dtype))
        wanted = {
            f"d{name}": tensor for name, tensor in like._asdict().items() if tensor is not None and tensor.requires_grad
        }
        finite = lse.masked_fill(lse == -math.inf, 0.0)
        loss_gradients = [dout.to(out.dtype), dlse.to(lse.dtype)]
        gradients = torch.autograd.grad([out, finite], list(wanted.values()), loss_gradients)
        return {"out": out.detach(), "lse": lse.detach(), **dict(zip(wanted, gradients, strict=True))}

    exact_inputs = _copies(inputs, torch.float64)
    bias = _whole_bias(exact_inputs.bias, problem).requires_grad_()  # its gradient is that of every score
    exact_inputs = exact_inputs._replace(bias=bias)
    ours = results(attention, inputs)
    functions: list[Attention] = [same_dtype_attention, rounded_attention] if extreme else [same_dtype_attention]
    plain = [results(function, _copies(inputs)) for function in functions]
    of_float32 = _sizes_in_float32(inputs, problem, dout, dlse) if extreme else {}
    exact = results(reference.attention, exact_inputs)
    of_dscores = _roundings_of_dscores(inputs, problem, exact["dbias"]) if extreme else {}
    torch.manual_seed(seed)
    of_delta = _roundings_of_delta(inputs, problem, _probabilities(exact_inputs, problem), exact["out"] * dout)
    if inputs.bias is None or not inputs.bias.requires_grad:
        exact.pop("dbias", None)

    rows = []
    for name, true in exact.items():
        scale = _largest(true)
        if name == "dbias" and inputs.bias is not None:
            scale = _largest(_root_sum_square(true, inputs.bias.shape))
            true = true.sum_to_size(inputs.bias.shape)
        coarser = max(torch.finfo(tensor.dtype).eps for tensor in (ours[name], inputs.q if name == "dbias" else dout))
        # The relative error of the hardware's logarithm is 2^-22 (PTX ISA, lg2.approx), that of float32 2^-23.
        epsilon = 2 * torch.finfo(torch.float32).eps if name == "lse" else coarser
        if name.startswith("d"):  # the probabilities were made anew from an lse in float32, whose rounding scales them
            epsilon += torch.finfo(torch.float32).eps * _largest(exact["lse"])
        baseline = max(filter(math.isfinite, (_error(result[name], true) for result in plain)), default=math.nan)
        rounding = epsilon * max(scale, torch.finfo(ours[name].dtype).smallest_normal)
        if extreme:
            cancelling, terms = of_float32[name]
            rounding += torch.finfo(torch.float32).eps * (cancelling + math.sqrt(terms) * scale)
            rounding += of_dscores.get(name, 0.0)
        expected = max(2 * baseline, of_delta.get(name, 0.0))
        rows.append(Row(name, _error(ours[name], true), baseline, expected + rounding))
    return Check(rows)


def same_dtype_attention(inputs: Inputs, problem: Problem, first_batch: int = 0) -> tuple[Tensor, Tensor]:
    """Attention as one writes it in PyTorch, every matrix in the dtype of q: the baseline for errors."""
    if problem.varlen:
        return reference.each_sequence(inputs, problem, same_dtype_attention)
    q, k, v, bias, slopes, sink = inputs[:6]
    group = problem.heads_q // problem.heads_kv
    k, v = (tensor.repeat_interleave(group, dim=2) for tensor in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q * problem.softmax_scale, k)
    if problem.softcap > 0.0:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    hidden = torch.zeros((), dtype=torch.bool, device=problem.device)
    if bias is not None and bias.dtype == torch.bool:
        hidden = ~bias
    elif bias is not None:
        hidden = bias == -math.inf
        scores = scores + bias.masked_fill(hidden, 0.0).to(scores.dtype)
    offset = torch.arange(problem.seqlen_k, device=problem.device)
    offset = offset - torch.arange(problem.seqlen_q, device=problem.device)[:, None]  # (sq, sk)
    if slopes is not None:
        distance = (offset - problem.mask.diagonal(problem.seqlen_q, problem.seqlen_k)).abs()
        scores = scores - (slopes[..., None, None] * distance).to(scores.dtype)
    lower, upper = problem.mask.band(problem.seqlen_q, problem.seqlen_k)
    if lower is not None:
        hidden = hidden | (offset < lower)
    if upper is not None:
        hidden = hidden | (offset > upper)
    scores = scores.masked_fill(hidden, -math.inf)
    if sink is not None:  # one more key, whose value is 0
        scores = torch.cat((scores, sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)), dim=-1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 0, 0, 1))
    empty = (scores == -math.inf).all(dim=-1)  # (b, h, sq)
    weights = scores.masked_fill(empty[..., None], 0.0).softmax(dim=-1).masked_fill(empty[..., None], 0.0)
    lse = scores.float().logsumexp(dim=-1).masked_fill(empty, -math.inf)
    if problem.dropout_p > 0.0:
        kept = next_dropout_mask(q, inputs.k, problem.dropout_p, first_batch)
        kept = torch.nn.functional.pad(kept, (0, weights.shape[-1] - kept.shape[-1]))  # the sink's value is 0
        weights = weights.masked_fill(~kept, 0.0) * kept_factor(problem.dropout_p)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def _sizes_in_float32(inputs: Inputs, problem: Problem, dout: Tensor, dlse: Tensor) -> dict[str, tuple[float, float]]:
    """How large each result could be if its terms did not cancel, and how many there are: what is rounded in float32.

    A score has the size |q| |k|, its error scales a probability, and dscores = probability (dout v - dout out + dlse).
    Errors of different queries do not know each other.
    """
    q, k, v = (tensor.nan_to_num() for tensor in inputs[:3])  # packed ones may have rows of NaN that no sequence has
    bias, slopes = inputs.bias, inputs.alibi_slopes
    rows = problem.heads_q // problem.heads_kv * problem.seqlen_q
    scale = abs(problem.softmax_scale)
    score = 1 + scale * _longest(q) * _longest(k)
    if bias is not None and bias.dtype != torch.bool:
        score += _largest(bias.double())
    if slopes is not None:
        score += _largest(slopes) * (problem.seqlen_q + problem.seqlen_k)
    dscore = score * (_longest(dout) * _longest(v) + _largest(dlse))
    sums = problem.batch * problem.heads_q * problem.seqlen_q * problem.seqlen_k / (1 if bias is None else bias.numel())
    return {
        "out": (score * _largest(v), problem.seqlen_k),
        "lse": (score, 1),
        "dq": (dscore * scale * _largest(k), problem.seqlen_k),
        "dk": (dscore * scale * _largest(q) * math.sqrt(rows), rows),
        "dv": (score * _largest(dout) * math.sqrt(rows), rows),
        "dbias": (dscore * math.sqrt(sums), sums),
        "dsink": (dscore * math.sqrt(problem.batch * problem.seqlen_q), problem.batch * problem.seqlen_q),
    }


def _whole_bias(bias: Tensor | None, problem: Problem) -> Tensor:
    """A bias in its full shape, as numbers; zeros in the place of none."""
    full = (problem.batch, problem.heads_q, problem.seqlen_q, problem.seqlen_k)
    if bias is None:
        return torch.zeros(full, dtype=torch.float64, device=problem.device)
    if bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=torch.float64).masked_fill(~bias, -math.inf)
    return bias.detach().expand(full).contiguous()


def _roundings_of_dscores(inputs: Inputs, problem: Problem, dscores: Tensor) -> dict[str, float]:
    """How far dq and dk are moved by rounding `dscores` (batch, heads_q, seqlen_q, seqlen_k) to the dtype of q.

    Each is rounded by half an epsilon at most, and errors of different numbers do not know each other, but those of
    equal ones do: four times that of the root of the sum of squares.
    """
    group = problem.heads_q // problem.heads_kv
    q, k = inputs[:2]
    if problem.varlen:
        q = _padded(q, inputs.cu_seqlens_q, problem.seqlen_q)
        k = _padded(k, inputs.cu_seqlens_k, problem.seqlen_k)
    q, k = (tensor.detach().double().square() for tensor in (q, k))
    squares = dscores.square()
    dq = torch.einsum("bhqk,bkhd->bqhd", squares, k.repeat_interleave(group, dim=2))
    dk = torch.einsum("bhqk,bqhd->bkhd", squares, q).unflatten(2, (problem.heads_kv, group)).sum(dim=3)
    unit = 2 * torch.finfo(inputs.q.dtype).eps * abs(problem.softmax_scale)
    return {"dq": unit * math.sqrt(_largest(dq)), "dk": unit * math.sqrt(_largest(dk))}


def _probabilities(inputs: Inputs, problem: Problem) -> Tensor:
    """softmax(scores), before dropout, in the dtype of `inputs`, whose bias has its full shape and wants a gradient."""
    assert inputs.bias is not None  # for the type checker
    _, lse = reference.attention(inputs, problem._replace(dtype=inputs.q.dtype))
    return torch.autograd.grad(lse.masked_fill(lse == -math.inf, 0.0).sum(), inputs.bias)[0]


def _roundings_of_delta(inputs: Inputs, problem: Problem, probabilities: Tensor, products: Tensor) -> dict[str, float]:
    """How far gradients are moved because out is rounded before the backward pass reads it.

    dscores = probability (dout v kept - delta) with delta = sum of `products` = dout out over the head dimension. A
    query that sees one key has delta = dout v kept: the terms cancel in truth, while out is rounded and dout v is not.
    Plain PyTorch, which keeps the probabilities, may find 0 there.

    A rounding has a standard deviation of epsilon / sqrt(12) at most, and those of different numbers do not know each
    other. So out's move delta by epsilon times the norm of the products at most, 3.5 standard deviations. The partial
    sums of both terms, dout v and delta, are rounded in float32: another sqrt(head_dim_v) times that of float32.
    All dscores of a query share this error, each times its probability; those of different queries have others.

    `probabilities` are (batch, heads_q, seqlen_q, seqlen_k), before dropout.
    """
    q, k = inputs[:2]
    unit = torch.finfo(q.dtype).eps + math.sqrt(problem.head_dim_v) * torch.finfo(torch.float32).eps
    of_rows = unit * products.norm(dim=-1, keepdim=True)  # (batch, seqlen_q, heads_q, 1)
    if problem.varlen:
        q, of_rows = (_padded(tensor, inputs.cu_seqlens_q, problem.seqlen_q) for tensor in (q, of_rows))
        k = _padded(k, inputs.cu_seqlens_k, problem.seqlen_k)
    of_rows = of_rows.transpose(1, 2)  # (batch, heads_q, seqlen_q, 1)
    seen = probabilities.sum(dim=-1, keepdim=True)
    of_rows = of_rows.masked_fill(seen == 0, 0.0)  # out is 0, or the row is not there
    of_dscores = probabilities * of_rows
    q, k = q.detach().double() * of_rows.transpose(1, 2), k.detach().double()
    group = problem.heads_q // problem.heads_kv
    dq = torch.einsum("bhqk,bkhd->bqhd", of_dscores, k.repeat_interleave(group, dim=2))
    dk = torch.einsum("bhqk,bqhd->bkhd", probabilities.square(), q.square()).unflatten(2, (problem.heads_kv, group))
    sizes = {
        "dq": abs(problem.softmax_scale) * _largest(dq),
        "dk": abs(problem.softmax_scale) * math.sqrt(_largest(dk.sum(dim=3))),
        "dsink": _largest((of_rows * (1 - seen)).norm(dim=(0, 2))),
    }
    if inputs.bias is not None:
        sizes["dbias"] = _largest(_root_sum_square(of_dscores, inputs.bias.shape))
    return sizes


def _padded(packed: Tensor, cu_seqlens: Tensor | None, longest: int) -> Tensor:
    """(total, heads, dim) as (batch, longest, heads, dim), with finite numbers of others behind a sequence."""
    assert cu_seqlens is not None  # for the type checker
    rows = cu_seqlens[:-1, None] + torch.arange(longest, device=packed.device)
    return packed[rows.clamp(max=packed.shape[0] - 1)].nan_to_num()


def _longest(tensor: Tensor) -> float:
    """The largest norm of a row."""
    return float(tensor.detach().double().norm(dim=-1).max())


def _copies(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """The same numbers, in another dtype if one is given, as new leaves; a mask and boundaries stay what they are."""
    return Inputs._make(
        tensor
        if tensor is None or not tensor.is_floating_point()
        else tensor.detach().to(dtype or tensor.dtype).requires_grad_(tensor.requires_grad)
        for tensor in inputs
    )


def _error(result: Tensor, true: Tensor) -> float:
    """The largest error; NaN where infinities differ."""
    same = result.double() == true  # infinities among them
    return _largest((result.double() - true).masked_fill(same, 0.0))


def _largest(tensor: Tensor) -> float:
    finite = tensor.masked_fill(tensor == -math.inf, 0.0)
    return finite.abs().max().item() if tensor.numel() else 0.0


def _root_sum_square(gradient: Tensor, shape: torch.Size) -> Tensor:
    """How large a sum of roundings is: those of one row share an error and add up, those of different rows do not."""
    rows = gradient.abs()
    if shape[3] == 1:
        rows = rows.sum(dim=3, keepdim=True)
    return rows.square().sum_to_size(shape).sqrt()
