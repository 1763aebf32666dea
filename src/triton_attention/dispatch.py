"""Which backend runs a problem, and why does each other one not?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from triton_attention import reference
from triton_attention.hopper import support as hopper_support
from triton_attention.portable import support as portable_support
from triton_attention.problem import Inputs, Problem


class Backend(NamedTuple):
    """One way to compute attention."""

    name: str
    why_not: Callable[[Problem], list[str]]  # every reason, in words, why it does not run a problem; [] = it runs it
    run: Callable[[Inputs, Problem], tuple[Tensor, Tensor]]  # (out, lse)
    # What runs plain calls (see `eager`) of a problem whose tensors have one layout; None: `run` does as well.
    bind: Callable[[Problem], Callable[[Inputs], tuple[Tensor, Tensor]]] | None = None


def _run_operator(inputs: Inputs, problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    from triton_attention import ops  # here, because it is what loads Triton

    return ops.attention(inputs, problem, backend)


def _bind_launcher(problem: Problem, backend: str) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    from triton_attention import ops

    return ops.bind(problem, backend)


def _reference_why_not(problem: Problem) -> list[str]:
    """The reference runs every problem, but unasked only those that no accelerator was meant to run."""
    if problem.device.type in ("cpu", "meta"):
        return []
    return [f"no {problem.device.type} tensor lands here silently: backend='reference' runs it in O(seqlen^2) memory"]


BACKENDS: tuple[Backend, ...] = (  # in order of preference
    *(
        Backend(name, support.why_not, partial(_run_operator, backend=name), partial(_bind_launcher, backend=name))
        for name, support in (("hopper", hopper_support), ("portable", portable_support))
    ),
    Backend("reference", _reference_why_not, reference.attention),
)


def select(problem: Problem, backend: str = "auto") -> Backend:
    """The backend of that name, or with "auto" the first in BACKENDS that runs the problem. No name falls back.

    Raises:
        ValueError: there is no backend of that name.
        NotImplementedError: what was asked for does not run the problem; the message has all reasons.
    """
    candidates = _candidates(backend)
    for candidate in candidates:
        if not _why_not(candidate, problem, backend):
            return candidate
    reasons = [
        f"\n  {candidate.name}: {reason}"
        for candidate in candidates
        for reason in _why_not(candidate, problem, backend)
    ]
    raise NotImplementedError(
        f"no backend runs this call (backend={backend!r}: {_describe(problem)}):{''.join(reasons)}"
    )


def explain(problem: Problem, backend: str = "auto") -> Explanation:
    """What `select` would answer, and every backend's reasons; computes nothing."""
    reasons = {candidate.name: _why_not(candidate, problem, backend) for candidate in BACKENDS}
    chosen = next((candidate.name for candidate in _candidates(backend) if not reasons[candidate.name]), None)
    return Explanation(problem, chosen, reasons)


class Explanation(NamedTuple):
    """Which backend runs a problem (None = none does), and each one's reasons not to; str() of it is a table."""

    problem: Problem
    backend: str | None
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        rows = [("", "backend", "runs", "reasons")]
        for name, reasons in self.reasons.items():
            first, *others = reasons or [""]
            rows.append(("->" if name == self.backend else "", name, "no" if reasons else "yes", first))
            rows.extend(("", "", "", reason) for reason in others)
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([_describe(self.problem), *lines])


def _candidates(backend: str) -> tuple[Backend, ...]:
    if backend == "auto":
        return BACKENDS
    candidates = tuple(candidate for candidate in BACKENDS if candidate.name == backend)
    if not candidates:
        known = ", ".join(repr(candidate.name) for candidate in BACKENDS)
        raise ValueError(f"backend must be 'auto', {known}, got {backend!r}")
    return candidates


def _why_not(candidate: Backend, problem: Problem, backend: str) -> list[str]:
    """The candidate's reasons, given what was asked for."""
    return [] if candidate.name == backend == "reference" else candidate.why_not(problem)


def _describe(problem: Problem) -> str:
    """One line that says what was asked."""
    mask, bias = problem.mask, problem.bias
    words = [
        f"batch {problem.batch}",
        f"heads {problem.heads_q} / {problem.heads_kv}",
        f"seqlen {'up to ' if problem.varlen else ''}{problem.seqlen_q} x {problem.seqlen_k}",
        f"head dim {problem.head_dim} / {problem.head_dim_v}",
        f"{problem.dtype} on {problem.device}",
    ]
    if mask.left is not None or mask.right is not None:
        words.append("causal" if mask == (None, 0, mask.top_left) else f"window ({mask.left}, {mask.right})")
        words[-1] += " from the top left" if mask.top_left else ""
    if bias is not None:
        sizes = (problem.batch, problem.heads_q, problem.seqlen_q, problem.seqlen_k)
        shape = tuple(1 if broadcast else size for broadcast, size in zip(bias.broadcast, sizes, strict=True))
        words.append(f"bias {shape} {bias.dtype}{' with gradient' if bias.needs_grad else ''}")
    words += [name for name in ("alibi", "sink", "deterministic") if getattr(problem, name)]
    words += [f"{name} {getattr(problem, name):g}" for name in ("softcap", "dropout_p") if getattr(problem, name)]
    words.append("forward and backward" if problem.needs_grad else "forward")
    return ", ".join(words)
