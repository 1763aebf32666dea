"""What tensors does a case stand for? Standard normal ones, in the case's layout, with a row or two fully masked."""

from __future__ import annotations

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

    batch, dtype = case.batch, case.dtype
    heads_kv = case.heads_kv or case.heads_q
    head_dim_v = case.head_dim_v or case.head_dim
    if case.layout == "packed":
        packed = normal(batch, case.seqlen_q, 3, case.heads_q, case.head_dim, dtype=dtype)
        q, k, v = packed.unbind(2)
    elif case.layout == "bhsd":
        q = normal(batch, case.heads_q, case.seqlen_q, case.head_dim, dtype=dtype).transpose(1, 2)
        k = normal(batch, heads_kv, case.seqlen_k, case.head_dim, dtype=dtype).transpose(1, 2)
        v = normal(batch, heads_kv, case.seqlen_k, head_dim_v, dtype=dtype).transpose(1, 2)
    else:
        q = normal(batch, case.seqlen_q, case.heads_q, case.head_dim, dtype=dtype)
        k = normal(batch, case.seqlen_k, heads_kv, case.head_dim, dtype=dtype)
        v = normal(batch, case.seqlen_k, heads_kv, head_dim_v, dtype=dtype)
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
    inputs = Inputs(q, k, v, bias, slopes, sink)
    problem = Problem.from_tensors(
        inputs,
        mask=case.mask,
        softmax_scale=case.softmax_scale,
        softcap=case.softcap,
        dropout_p=case.dropout_p,
        deterministic=False,
    )
    return inputs, problem
