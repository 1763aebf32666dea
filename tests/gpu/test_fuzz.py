"""Are some random problems right on this GPU? `make fuzz-gpu` tries thousands."""

import pytest
import torch
from hardware import needs_hopper

from triton_attention.testing import fuzz


@pytest.mark.parametrize("backend", [pytest.param("hopper", marks=needs_hopper), "portable"])
@pytest.mark.parametrize("kind", range(24))  # 4 and 21 are of packed sequences
def test_random_problems(kind, backend):
    events = list(fuzz.campaign(fuzz.Target(backend, torch.device("cuda")), iter([kind]), each=15))
    wrong = [event.line for event in events if event.outcome == "wrong"]
    assert not wrong, "\n".join(wrong)
