"""Which problems does the GPU suite try, and on which backends? The classic matrix of head dims, lengths and biases."""

from itertools import product
from typing import NamedTuple

import torch

from triton_attention import dispatch
from triton_attention.testing import CASES, Case, make_inputs
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
BACKENDS = {backend.name: backend for backend in dispatch.BACKENDS if backend.name != "reference"}


class Run(NamedTuple):
    """A case on a backend, and why the backend does not run it on the GPU of this machine."""

    backend: str
    case: Case
    deterministic: bool
    why_not: list[str]

    def __str__(self):
        return f"{self.backend}-{self.case}{'-deterministic' if self.deterministic else ''}"


def all_runs():
    """Every case on every backend, those that are refused among them; without a GPU that is each.

    Hopper's backward is another one if it is to be deterministic: of the classic matrix every second case is, of the
    rest all are tried both ways.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "meta")
    for i, case in enumerate(ALL):
        _, problem = make_inputs(case, "meta")
        for name, backend in BACKENDS.items():
            why_not = backend.why_not(problem._replace(device=device))
            for deterministic in (False, True):
                both = name == "hopper" and i >= len(MATRIX)
                if both or deterministic == (name == "hopper" and i % 2 == 1):
                    yield Run(name, case, deterministic, why_not)
