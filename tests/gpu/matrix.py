"""Which problems does the GPU suite try? The classic matrix of head dimensions, lengths, masks, biases and dtypes."""

from itertools import product

import torch

from triton_attention.testing import CASES, Case
from triton_attention.testing.cases import CAUSAL, FULL

HEAD_DIMS = (40, 48, 59, 64, 80, 88, 96, 111, 128, 160, 192, 224, 256)
LENGTHS = (
    (113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1024, 1024), (1023, 1024), (1024, 1023),
    (2048, 2048), (1, 239), (3, 799), (127, 512), (127, 513),
)  # fmt: skip
BIASES = (None, "1h1k", "1hqk", "b11k", "b1qk", "bhqk")
DTYPES = (torch.float16, torch.bfloat16)

MATRIX = [
    Case(seqlen_q, seqlen_k, head_dim, mask=mask, bias=bias, dtype=dtype)
    for head_dim, mask, bias, dtype, (seqlen_q, seqlen_k) in product(HEAD_DIMS, (FULL, CAUSAL), BIASES, DTYPES, LENGTHS)
]
ALL = [*MATRIX, *CASES]
