"""Which attention probabilities does dropout keep? Counter-based random numbers, whatever the tile that asks.

Philox-4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Seven rounds pass every test of
TestU01's BigCrush there; ten are the default of generators for all purposes. The decision on one probability depends
on the seed and on its (batch, head, query, key) alone: forward and backward, any tiling and any backend agree on it.

    key     = the low and the high 32 bits of the seed
    counter = (key position // 16, query position, batch * heads + head, 0)
    number  = byte j // 8 * 2 + j % 2 of word[j % 8 // 2] for j = key position % 16, the lowest byte being 0
    kept    iff number >= drop_below(dropout_p), which is about dropout_p * 256

So the rate is applied in steps of 1 / 256, and what is kept grows by the factor that belongs to the step: expectations
are exact. Four words decide on sixteen keys, and the keys of a word are those that one thread has where a tensor core
of Hopper leaves a row of the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 7
NUMBERS = 2**8  # that decide on a probability, all equally likely
_WORD = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed, int64 of shape (): `torch.manual_seed` reproduces it, and a captured graph draws anew."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def drop_below(dropout_p: float) -> int:
    """The 8-bit number from which on a probability is kept: of a rate above 0, one from 1 to 255."""
    return min(max(round(dropout_p * NUMBERS), 1), NUMBERS - 1) if dropout_p > 0.0 else 0


def kept_factor(dropout_p: float) -> float:
    """What is kept is multiplied by this, 1 / (1 - the rate that is applied)."""
    return NUMBERS / (NUMBERS - drop_below(dropout_p))


def dropout_mask(
    seed: Tensor, dropout_p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int, first_batch: int = 0
) -> Tensor:
    """The probabilities kept by dropout of rate `dropout_p`: bool (batch, heads, seqlen_q, seqlen_k), True = kept.

    They are those of the batch entries from `first_batch` on.
    """

    def positions(size: int) -> Tensor:
        return torch.arange(size, dtype=torch.int64, device=seed.device)

    # One more than there are: of a single one torch.compile would make a graph for up to sixteen keys alone.
    key_blocks = positions((seqlen_k + 31) // 16)
    queries = positions(seqlen_q)[:, None]
    batch_heads = (first_batch * heads + positions(batch * heads))[:, None, None]
    words = philox_4x32(
        (key_blocks, queries, batch_heads, torch.zeros_like(key_blocks)),
        (seed & _WORD, seed >> 32 & _WORD),
    )
    parts = [word >> 8 * byte & 0xFF for half in (0, 2) for word in words for byte in (half, half + 1)]
    numbers = torch.stack(parts, dim=-1).flatten(-2)[..., :seqlen_k]  # (batch * heads, seqlen_q, seqlen_k)
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
