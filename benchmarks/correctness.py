"""Are a provider's results right, on the very case that is to be timed?

Some heads of some batch elements are enough: no other element of q, k, v or the bias reaches their results. They are
computed in float64 and, to know what the data type permits, in the case's own dtype, both by eager PyTorch. A result
passes if its largest error and its root mean square error are each at most

    2 x (the same error of eager PyTorch in the same dtype) + half a unit in the last place

The largest error finds a wrong element; the root mean square finds wrong rows of small values, such as the late rows of
a causal case, whose outputs average many keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, random_inputs


class Part(NamedTuple):
    """Which batch elements and heads are compared: the last ones, where a wrong offset shows."""

    batch: slice
    heads_q: slice
    heads_kv: slice

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """This part of an input or a result; a broadcast axis (size 1) of the bias stays whole."""
        if name in ("bias", "dbias"):
            return tensor[self.batch, self.heads_q]  # (batch, heads, seqlen_q, seqlen_k)
        heads = self.heads_kv if name in ("k", "v", "dk", "dv") else self.heads_q
        return tensor[self.batch, :, heads]  # (batch, seqlen, heads, head_dim)


class Size(NamedTuple):
    """The size of a tensor of errors: its largest element and its root mean square."""

    largest: float
    rms: float

    @classmethod
    def of(cls, tensor: Tensor) -> Size:
        return cls(tensor.abs().max().item(), tensor.square().mean().sqrt().item())


class Reference(NamedTuple):
    """What the results of `case` must be, within `limits`, in the `part` that was computed."""

    case: Case  # the case asked for, or a smaller one in its place
    inputs: Inputs
    part: Part
    exact: dict[str, Tensor]  # float64; keys out, dq, dk, dv, dbias
    limits: dict[str, Size]

    def why_wrong(self, results: dict[str, Tensor]) -> str | None:
        """Every result that is out of its limits, with its errors, or None."""
        reasons = []
        for name, result in results.items():
            part, exact = self.part.of(name, result), self.exact[name]
            if part.shape != exact.shape:
                reasons.append(f"{name}: shape of the compared part {tuple(part.shape)}, must be {tuple(exact.shape)}")
                continue
            error = Size.of(part.double() - exact)
            limit = self.limits[name]
            if not (error.largest <= limit.largest and error.rms <= limit.rms):  # a NaN fails as well
                reasons.append(
                    f"{name}: largest error {error.largest:.2e} (limit {limit.largest:.2e}), "
                    f"rms {error.rms:.2e} (limit {limit.rms:.2e})"
                )
        return "; ".join(reasons) or None


def reference(case: Case, inputs: Inputs) -> Reference:
    """The reference of a case; of a smaller one (same head_dim, bias pattern and mask) where float64 would not fit."""
    if _score_elements(case) > _score_limit(inputs.q.device):
        case = _shrunken(case)
        inputs = random_inputs(case, inputs.q.device)
    part = _independent_part(case)
    exact = _eager(case, inputs, part, torch.float64)
    rounded = _eager(case, inputs, part, case.torch_dtype)
    limits = {}
    for name, value in exact.items():
        eager, size = Size.of(rounded[name].double() - value), Size.of(value)
        half_ulp = torch.finfo(case.torch_dtype).eps / 2  # relative
        limits[name] = Size(2 * eager.largest + half_ulp * size.largest, 2 * eager.rms + half_ulp * size.rms)
    return Reference(case, inputs, part, exact, limits)


def _eager(case: Case, inputs: Inputs, part: Part, dtype: torch.dtype) -> dict[str, Tensor]:
    """softmax(q k^T / sqrt(head_dim) + bias) v and its gradients, step by step in `dtype`."""
    q, k, v = (
        part.of(name, tensor).to(dtype).requires_grad_()
        for name, tensor in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v))
    )
    leaves = {"dq": q, "dk": k, "dv": v}
    group = case.heads_q // case.heads_kv
    # (batch, heads_q, seqlen, head_dim) from here on
    k_m, v_m = (tensor.transpose(1, 2).repeat_interleave(group, dim=1) for tensor in (k, v))
    scores = (q * case.head_dim**-0.5).transpose(1, 2) @ k_m.transpose(-1, -2)
    if inputs.bias is not None:
        leaves["dbias"] = part.of("bias", inputs.bias).to(dtype).requires_grad_()
        scores = scores + leaves["dbias"]
    if case.causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    out = (scores.softmax(-1) @ v_m).transpose(1, 2)
    del scores  # long sequences: each of these fills gigabytes
    grads = torch.autograd.grad(out, tuple(leaves.values()), part.of("grad_out", inputs.grad_out).to(dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def _independent_part(case: Case) -> Part:
    """One key head and its query heads of one batch element; all of an axis over which the bias gradient is summed."""
    shared_batch, shared_heads = case.bias[0] == "1", case.bias[1] == "1"
    group = case.heads_q // case.heads_kv
    return Part(
        batch=slice(None) if shared_batch else slice(-1, None),
        heads_q=slice(None) if shared_heads else slice(-group, None),
        heads_kv=slice(None) if shared_heads else slice(-1, None),
    )


def _score_elements(case: Case) -> int:
    part = _independent_part(case)
    batch = len(range(case.batch)[part.batch])
    heads = len(range(case.heads_q)[part.heads_q])
    return batch * heads * case.seqlen_q * case.seqlen_k


def _score_limit(device: torch.device) -> int:
    """Elements of the score matrix for which float64 is worth it; autograd holds about eight matrices of this size."""
    if device.type != "cuda":
        return 2**22
    return int(torch.cuda.get_device_properties(device).total_memory) // (2 * 8 * torch.float64.itemsize)


def _shrunken(case: Case) -> Case:
    """At most 512 tokens, 2 batch elements, and 2 heads or one GQA group."""
    group = case.heads_q // case.heads_kv
    heads_kv = min(case.heads_kv, 2) if group == 1 else 1
    return case._replace(
        batch=min(case.batch, 2),
        heads_q=heads_kv * group,
        heads_kv=heads_kv,
        seqlen_q=min(case.seqlen_q, 512),
        seqlen_k=min(case.seqlen_k, 512),
    )
