"""Which attention probabilities does dropout keep? Counter-based random numbers, whatever the tile that asks.

Philox-4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Seven rounds pass every test of
TestU01's BigCrush there; ten are the default of generators for all purposes. The decision on one probability depends
on the seed and on its (batch, head, query, key) alone: forward and backward, any tiling and any backend agree on it.

    key     = the low and the high 32 bits of the seed
    counter = (key position // 8, query position, batch * heads + head, 0)
    number  = the low, if the key position is odd the high 16 bits of word[key position % 8 // 2]
    kept    iff number >= drop_below(dropout_p), which is round(dropout_p * 2**16)
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 7
_WORD = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed, int64 of shape (): `torch.manual_seed` reproduces it, and a captured graph draws anew."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def drop_below(dropout_p: float) -> int:
    """The 16-bit number from which on a probability is kept."""
    return min(round(dropout_p * 2**16), 2**16 - 1)


def dropout_mask(
    seed: Tensor, dropout_p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int, first_batch: int = 0
) -> Tensor:
    """The probabilities kept by dropout of rate `dropout_p`: bool (batch, heads, seqlen_q, seqlen_k), True = kept.

    They are those of the batch entries from `first_batch` on.
    """

    def positions(size: int) -> Tensor:
        return torch.arange(size, dtype=torch.int64, device=seed.device)

    key_blocks = positions((seqlen_k + 7) // 8)
    queries = positions(seqlen_q)[:, None]
    batch_heads = (first_batch * heads + positions(batch * heads))[:, None, None]
    words = philox_4x32(
        (key_blocks, queries, batch_heads, torch.zeros_like(key_blocks)),
        (seed & _WORD, seed >> 32 & _WORD),
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    numbers = torch.stack(halves, dim=-1).flatten(-2)[..., :seqlen_k]  # (batch * heads, seqlen_q, seqlen_k)
    return (numbers >= drop_below(dropout_p)).view(batch, heads, seqlen_q, seqlen_k)


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for a counter of four and a key of two, each as int64 in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = k0 + _KEY_STEPS[0] & _WORD
        k1 = k1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product, which int64 holds modulo 2**64: its sign bit is only a bit."""
    product = multiplier * word
    return product >> 32 & _WORD, product & _WORD
