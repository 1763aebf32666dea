"""Which attention calls are measured, on which data, and how much work is each?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# fwd: the forward pass of a training step (q, k and v require a gradient, the bias does not).
# bwd: the gradients of q, k and v. bwd_db: those and the gradient of the bias.
PASSES = ("fwd", "bwd", "bwd_db")


class Case(NamedTuple):
    """One attention call. A causal case has seqlen_q == seqlen_k, so that the alignment of the mask does not matter.

    bias says along which axes of (batch, heads_q, seqlen_q, seqlen_k) the bias varies: "1hqk" is
    (1, heads_q, seqlen_q, seqlen_k), "b11k" is (batch, 1, 1, seqlen_k), and "none" is no bias.
    """

    group: str
    name: str
    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool = False
    bias: str = "none"
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[self.dtype]

    @property
    def bias_shape(self) -> tuple[int, ...] | None:
        if self.bias == "none":
            return None
        sizes = (self.batch, self.heads_q, self.seqlen_q, self.seqlen_k)
        return tuple(1 if letter == "1" else size for letter, size in zip(self.bias, sizes, strict=True))

    @property
    def passes(self) -> tuple[str, ...]:
        return PASSES[:2] if self.bias == "none" else PASSES

    def flops(self, pass_name: str) -> float:
        """4 b h sq sk d forward (two matrix products), half of it if causal; any backward pass counts 2.5 times as much
        (five products), with or without the gradient of the bias."""
        forward = 4.0 * self.batch * self.heads_q * self.seqlen_q * self.seqlen_k * self.head_dim
        return forward * (0.5 if self.causal else 1.0) * (1.0 if pass_name == "fwd" else 2.5)


class Inputs(NamedTuple):
    """q, grad_out (batch, seqlen_q, heads_q, head_dim), k, v (batch, seqlen_k, heads_kv, head_dim), and Case.bias."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    grad_out: Tensor


def random_inputs(case: Case, device: torch.device) -> Inputs:
    """Standard normal data, the same at every call. Zeros would flatter: they draw less power, so clocks stay high."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=case.torch_dtype, device=device)

    shape_q = (case.batch, case.seqlen_q, case.heads_q, case.head_dim)
    shape_k = (case.batch, case.seqlen_k, case.heads_kv, case.head_dim)
    bias = None if case.bias_shape is None else normal(*case.bias_shape)
    return Inputs(normal(*shape_q), normal(*shape_k), normal(*shape_k), bias, normal(*shape_q))


def _self(group: str, name: str, batch: int, heads: int, seqlen: int, head_dim: int, causal: bool = False) -> Case:
    """Self attention: as many key heads as query heads, as many keys as queries."""
    suffix = " causal" if causal else " full"
    return Case(group, name + suffix, batch, heads, heads, seqlen, seqlen, head_dim, causal)


def _biased(group: str, name: str, batch: int, heads: int, seqlen: int, head_dim: int, bias: str) -> Case:
    return Case(group, f"{name} {bias}", batch, heads, heads, seqlen, seqlen, head_dim, bias=bias)


_CASES = (
    # 16,384 tokens and 2,048 channels in every case
    *(
        _self("main", f"d{head_dim} s{seqlen}", 16384 // seqlen, 2048 // head_dim, seqlen, head_dim, causal)
        for head_dim in (64, 128, 256)
        for seqlen in (1024, 4096, 16384)
        for causal in (False, True)
    ),
    Case("gqa", "d128 s8192 h32/8 causal", 2, 32, 8, 8192, 8192, 128, causal=True),
    *(_self("short", "d64 s512 b64", 64, 16, 512, 64, causal) for causal in (False, True)),
    *(_biased("matrix_bias", f"d{head_dim} s2048", 4, 16, 2048, head_dim, "1hqk") for head_dim in (64, 128)),
    *(_biased("vector_bias", f"d{head_dim} s2048", 4, 16, 2048, head_dim, "b11k") for head_dim in (64, 128)),
    # the pair representation of protein models: n rows of n tokens share one bias
    *(_biased("pair", f"n{n} d32 h4", n, 4, n, 32, "1hqk") for n in (256, 384, 512)),
    *(_self("odd", f"d{head_dim} s2000", 4, 16, 2000, head_dim, causal=True) for head_dim in (40, 80, 96, 160, 192)),
    Case("cross", "d128 sq1024 sk8192", 4, 16, 16, 1024, 8192, 128),
    # tiny: shows on any machine that the whole path works, says nothing about speed
    Case("smoke", "full", 2, 2, 2, 48, 48, 16),
    Case("smoke", "gqa causal", 2, 4, 2, 40, 40, 24, causal=True, dtype="float32"),
    Case("smoke", "cross b11k", 2, 2, 2, 24, 56, 16, bias="b11k"),
    Case("smoke", "1hqk", 3, 2, 2, 32, 32, 16, bias="1hqk", dtype="float32"),
    Case("smoke", "bhqk causal", 2, 2, 2, 32, 32, 8, causal=True, bias="bhqk"),
    Case("smoke", "gqa 1h1k", 3, 4, 2, 32, 32, 16, bias="1h1k"),
)

GROUPS: dict[str, tuple[Case, ...]] = {
    group: tuple(case for case in _CASES if case.group == group)
    for group in dict.fromkeys(case.group for case in _CASES)
}
