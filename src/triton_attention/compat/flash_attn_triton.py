"""How is attention called in place of the classic flash_attn_triton module? As it was: positional, top-left causal."""

from __future__ import annotations

from torch import Tensor

from triton_attention.api import run
from triton_attention.compat.flash_attn import unpack
from triton_attention.problem import Inputs, Mask


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """softmax(softmax_scale * q k^T + bias) v.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k, v: (batch, seqlen_k, heads, head_dim).
        bias: broadcastable to (batch, heads, seqlen_q, seqlen_k), differentiable.
        causal: key j is visible to query i iff j <= i (top-left aligned).
        softmax_scale: None = 1 / sqrt(head_dim); unlike in the classic module, 0.0 is zero.

    Returns:
        out (batch, seqlen_q, heads, head_dim).

    Raises:
        TypeError, ValueError, NotImplementedError: as `triton_attention.attention`.
    """
    out, _ = run(Inputs(q, k, v, bias), mask=Mask.of(causal, None, top_left=True), softmax_scale=softmax_scale)
    return out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """`flash_attn_func` of k and v stacked in kv (batch, seqlen_k, 2, heads, head_dim), which is not copied."""
    k, v = unpack("kv", kv, 2)
    return flash_attn_func(q, k, v, bias, causal, softmax_scale)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """`flash_attn_func` of q, k and v stacked in qkv (batch, seqlen, 3, heads, head_dim), which is not copied."""
    q, k, v = unpack("qkv", qkv, 3)
    return flash_attn_func(q, k, v, bias, causal, softmax_scale)
