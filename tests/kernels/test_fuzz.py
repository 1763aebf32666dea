"""Are the portable kernels right on random problems, and do they stay inside their tensors? In Triton's interpreter."""

import warnings
from itertools import count, islice

import pytest
import torch

from triton_attention import dispatch
from triton_attention.testing import fuzz
from triton_attention.testing.trials import TRIALS_OF_A_KIND, draw, make

PORTABLE = next(backend for backend in dispatch.BACKENDS if backend.name == "portable")


def why_not(problem):
    """The interpreter multiplies bfloat16 matrices wrongly."""
    reasons = PORTABLE.why_not(problem._replace(device=torch.device("cuda")))
    return [*reasons, *(["wrong in the interpreter"] if problem.dtype == torch.bfloat16 else [])]


def runs_here(kind):
    return not why_not(make(draw(kind * TRIALS_OF_A_KIND), "meta").problem)


@pytest.mark.parametrize("kind", list(islice(filter(runs_here, count()), 30)))
def test_random_problems(monkeypatch, kind):
    monkeypatch.setattr(dispatch, "BACKENDS", (PORTABLE._replace(why_not=why_not),))
    target = fuzz.Target("portable", torch.device("cpu"), largest_scores=1500)
    with warnings.catch_warnings():  # numpy's, where a row sees no key
        warnings.simplefilter("ignore", RuntimeWarning)
        *_, event = fuzz.campaign(target, iter([kind]), each=1)
    assert event.outcome == "right", event.line
