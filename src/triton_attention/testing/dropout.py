"""Which probabilities will dropout keep? The mask of the next call, for those who check or repeat one."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_attention.philox import draw_seed, dropout_mask


def next_dropout_mask(q: Tensor, k: Tensor, dropout_p: float, first_batch: int = 0) -> Tensor:
    """What the next call of `attention(q, k, v, dropout_p=dropout_p)` on that device keeps, on every backend.

    Args:
        q, k: (batch, seqlen_q, heads_q, head_dim) and (batch, seqlen_k, heads_kv, head_dim).
        dropout_p: rate, in (0, 1).
        first_batch: which entry of its batch the first one of q is: a sequence that a call packs with others has a
            number there, and here is a batch of one.

    Returns:
        bool (batch, heads_q, seqlen_q, seqlen_k), True = kept. The generator is left as it was.
    """
    devices = [q.device] if q.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        seed = draw_seed(q.device)
    batch, seqlen_q, heads_q, _ = q.shape
    return dropout_mask(seed, dropout_p, batch, heads_q, seqlen_q, k.shape[1], first_batch)
