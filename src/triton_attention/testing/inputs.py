"""What tensors does a case stand for? Standard normal ones, in the case's layout, with a row or two fully masked.

Packed sequences are followed by rows of NaN that none of them has.
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor

from triton_attention.problem import Inputs, Problem
from triton_attention.testing.cases import Case


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Inputs, Problem]:
    """Tensors that require gradients (a bool mask does not), and their problem."""
    device = torch.device(device)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    dtype = case.dtype
    heads_kv = case.heads_kv or case.heads_q
    head_dim_v = case.head_dim_v or case.head_dim
    batch, cu_seqlens_q, cu_seqlens_k = case.batch, None, None
    axes_q: tuple[int, ...] = (case.batch, case.seqlen_q)
    axes_k: tuple[int, ...] = (case.batch, case.seqlen_k)
    if case.lengths is not None:
        batch = len(case.lengths)
        lengths_q, lengths_k = zip(*case.lengths, strict=True)
        cu_seqlens_q, cu_seqlens_k = _boundaries(lengths_q, device), _boundaries(lengths_k, device)
        axes_q, axes_k = (sum(lengths_q) + case.unused[0],), (sum(lengths_k) + case.unused[1],)

    if case.layout == "packed":
        packed = normal(*axes_q, 3, case.heads_q, case.head_dim, dtype=dtype)
        q, k, v = packed.unbind(-3)
    elif case.layout == "bhsd":
        *batch_axes, rows_q, rows_k = *axes_q, axes_k[-1]
        q = normal(*batch_axes, case.heads_q, rows_q, case.head_dim, dtype=dtype).transpose(-3, -2)
        k = normal(*batch_axes, heads_kv, rows_k, case.head_dim, dtype=dtype).transpose(-3, -2)
        v = normal(*batch_axes, heads_kv, rows_k, head_dim_v, dtype=dtype).transpose(-3, -2)
    else:
        q = normal(*axes_q, case.heads_q, case.head_dim, dtype=dtype)
        k = normal(*axes_k, heads_kv, case.head_dim, dtype=dtype)
        v = normal(*axes_k, heads_kv, head_dim_v, dtype=dtype)
    if case.lengths is not None:
        for tensor, unused in ((q, case.unused[0]), (k, case.unused[1]), (v, case.unused[1])):
            tensor[tensor.shape[0] - unused :] = math.nan
    bias = None
    if case.bias is not None:
        bias_dtype = case.bias_dtype or dtype
        if bias_dtype == torch.bool:
            bias = normal(*case.bias_shape, dtype=torch.float32) > -0.5
            bias[0, 0, 0] = case.bias == "1111"  # the first query of the first head sees nothing
        else:
            bias = normal(*case.bias_shape, dtype=bias_dtype).requires_grad_()
    q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
    slopes = sink = None
    if case.alibi is not None:
        slopes_shape = (batch, case.heads_q) if case.alibi == "bh" else (case.heads_q,)
        slopes = 0.1 * normal(*slopes_shape, dtype=torch.float32)
    if case.sink:
        sink = normal(case.heads_q, dtype=dtype).requires_grad_()
    inputs = Inputs(q, k, v, bias, slopes, sink, cu_seqlens_q, cu_seqlens_k)
    problem = Problem.from_tensors(
        inputs,
        mask=case.mask,
        softmax_scale=case.softmax_scale,
        softcap=case.softcap,
        dropout_p=case.dropout_p,
        deterministic=False,
        max_seqlen_q=case.seqlen_q,
        max_seqlen_k=case.seqlen_k,
    )
    return inputs, problem


def _boundaries(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
