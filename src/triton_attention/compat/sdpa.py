"""How is attention called in place of torch.nn.functional.scaled_dot_product_attention?"""

from __future__ import annotations

from torch import Tensor

from triton_attention.api import run
from triton_attention.problem import Inputs, Mask, check_flag, check_tensor


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * query key^T + attn_mask) value, as `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: (batch, heads, seqlen_q, head_dim), always 4-d.
        key: (batch, heads_kv, seqlen_k, head_dim); heads_kv = heads, or with `enable_gqa` a divisor of it.
        value: (batch, heads_kv, seqlen_k, head_dim_v).
        attn_mask: broadcastable to (batch, heads, seqlen_q, seqlen_k): bool, True = may attend, or an addend of any
            of float16, bfloat16, float32; its gradient, if it requires one, has its own shape.
        dropout_p: rate at which probabilities are dropped.
        is_causal: key j is visible to query i iff j <= i (top-left aligned); excludes `attn_mask`.
        scale: None = 1 / sqrt(head_dim).
        enable_gqa: allow fewer key/value heads than query heads.

    Returns:
        (batch, heads, seqlen_q, head_dim_v), a transposed view. A query that sees no key has output 0.

    Raises:
        TypeError, ValueError, NotImplementedError: as `triton_attention.attention`.
    """
    check_flag("is_causal", is_causal)
    check_flag("enable_gqa", enable_gqa)
    q, k, v = _transposed("query", query), _transposed("key", key), _transposed("value", value)
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None with is_causal=True, got both")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"key must have the {query.shape[1]} heads of query unless enable_gqa=True, got {key.shape[1]}"
        )
    out, _ = run(
        Inputs(q, k, v, attn_mask),
        mask=Mask.of(is_causal, None, top_left=True),
        softmax_scale=scale,
        dropout_p=dropout_p,
    )
    return out.transpose(1, 2)


def _transposed(name: str, tensor: Tensor) -> Tensor:
    """A (batch, heads, seqlen, head_dim) tensor as (batch, seqlen, heads, head_dim)."""
    check_tensor(name, tensor)
    if tensor.dim() != 4:
        raise ValueError(f"{name} must be (batch, heads, seqlen, head_dim), got {tuple(tensor.shape)}")
    return tensor.transpose(1, 2)
