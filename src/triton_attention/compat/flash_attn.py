"""How is attention called in place of flash_attn 2.8? Its names, argument order and defaults, and a keyword `bias`.

The mask's diagonal ends at the bottom right. Tensors are (batch, seqlen, heads, head_dim), and packed ones are taken
apart by views. Every function raises the errors of `triton_attention.attention`. That for key/value caches is not there
yet: it raises NotImplementedError.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from triton_attention.api import run
from triton_attention.problem import Inputs, Mask, check_flag, check_tensor


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    bias: Tensor | None = None,
) -> Tensor | Any:  # (out, lse, None) with return_attn_probs
    """softmax(softmax_scale * q k^T + bias) v, with what the arguments add to it.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim).
        k, v: (batch, seqlen_k, heads_kv, head_dim), where heads_kv divides heads_q.
        dropout_p: rate at which probabilities are dropped.
        softmax_scale: None = 1 / sqrt(head_dim).
        causal: key j is visible to query i iff j <= i + seqlen_k - seqlen_q.
        window_size: (left, right): key j is visible to query i iff
            i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right; -1 = unbounded.
        softcap: bound of the scaled scores, softcap * tanh(scores / softcap); 0.0 = none.
        alibi_slopes: (heads_q,) or (batch, heads_q), float32: adds -slope * |i + seqlen_k - seqlen_q - j|.
        deterministic: gradients are the same bit for bit in every run.
        return_attn_probs: return (out, lse, None): the probabilities are never in memory.
        bias: broadcastable to (batch, heads_q, seqlen_q, seqlen_k), differentiable, or a bool mask.

    Returns:
        out (batch, seqlen_q, heads_q, head_dim_v); lse (batch, heads_q, seqlen_q), natural logarithm.
    """
    check_flag("return_attn_probs", return_attn_probs)
    out, lse = run(
        Inputs(q, k, v, bias, alibi_slopes),
        mask=Mask.of(causal, window_size, name="window_size"),
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=deterministic,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    bias: Tensor | None = None,
) -> Tensor | Any:  # (out, lse, None) with return_attn_probs
    """`flash_attn_func` of k and v stacked in kv (batch, seqlen_k, 2, heads_kv, head_dim)."""
    k, v = unpack("kv", kv, 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        bias=bias,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    bias: Tensor | None = None,
) -> Tensor | Any:  # (out, lse, None) with return_attn_probs
    """`flash_attn_func` of q, k and v stacked in qkv (batch, seqlen, 3, heads, head_dim)."""
    q, k, v = unpack("qkv", qkv, 3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        bias=bias,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    bias: Tensor | None = None,
) -> Tensor | Any:
    """`flash_attn_func` of sequences of different lengths, packed one after the other: see `attention_varlen`.

    Args:
        q: (total_q, heads_q, head_dim).
        k, v: (total_k, heads_kv, head_dim).
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), where sequences begin and the last one ends.
        max_seqlen_q, max_seqlen_k: at least the longest lengths.
        block_table: must be None; keys and values in pages are not there yet.
        bias: broadcastable to (batch, heads_q, max_seqlen_q, max_seqlen_k), indexed within each sequence;
            differentiable, or a bool mask.
        Everything else is as in `flash_attn_func`.

    Returns:
        out (total_q, heads_q, head_dim_v); lse (heads_q, total_q), natural logarithm.

    Raises:
        NotImplementedError: `block_table` is not None.
    """
    if block_table is not None:
        raise NotImplementedError(
            "block_table is not there yet: give flash_attn_varlen_func k and v as contiguous rows, without pages"
        )
    check_flag("return_attn_probs", return_attn_probs)
    check_tensor("cu_seqlens_q", cu_seqlens_q)
    out, lse = run(
        Inputs(q, k, v, bias, alibi_slopes, None, cu_seqlens_q, cu_seqlens_k),
        mask=Mask.of(causal, window_size, name="window_size"),
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=deterministic,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    bias: Tensor | None = None,
) -> Tensor | Any:
    """`flash_attn_varlen_func` of k and v stacked in kv (total_k, 2, heads_kv, head_dim)."""
    k, v = unpack("kv", kv, 2, "total_k")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        bias=bias,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    bias: Tensor | None = None,
) -> Tensor | Any:
    """`flash_attn_varlen_func` of q, k and v stacked in qkv (total, 3, heads, head_dim)."""
    q, k, v = unpack("qkv", qkv, 3, "total")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        bias=bias,
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    bias: Tensor | None = None,
) -> Tensor | Any:
    """Not there yet: q (batch, seqlen_q, heads_q, head_dim), caches (batch, seqlen_cache, heads_kv, head_dim)."""
    raise NotImplementedError(
        "flash_attn_with_kvcache is not there yet: give flash_attn_func the filled part of the cache, "
        "k_cache[:, :seqlen] and v_cache[:, :seqlen], and for lengths that differ a bool bias (batch, 1, 1, seqlen_k)"
    )


def unpack(name: str, packed: Tensor, count: int, rows: str = "batch, seqlen") -> tuple[Tensor, ...]:
    """The `count` tensors stacked behind the axes `rows` of `packed`, as views, whose gradient is stacked at once."""
    check_tensor(name, packed)
    axis = len(rows.split(", "))
    if packed.dim() != axis + 3 or packed.shape[axis] != count:
        raise ValueError(f"{name} must be ({rows}, {count}, heads, head_dim), got {tuple(packed.shape)}")
    return packed.unbind(axis)
