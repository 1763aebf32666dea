"""Is a backend right on random problems of every kind? Thousands of them, forward and backward, against float64.

    python -m triton_attention.testing.fuzz --backend portable --seconds 300    # a campaign
    python -m triton_attention.testing.fuzz --backend portable --seed 12345     # one problem

Inputs lie in buffers of NaN and outputs between bands of a known pattern, so that a read or a write outside of them
shows. A failure is made smaller while it stays one, and told in a line that reproduces it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_attention import api, dispatch
from triton_attention.problem import Inputs, Problem
from triton_attention.testing.guards import GuardedMemory
from triton_attention.testing.tolerance import Check, check_against_float64
from triton_attention.testing.trials import LARGEST_SCORES, TRIALS_OF_A_KIND, Trial, draw, make

_SHRINKING_SECONDS = 60
_STUCK_SECONDS = 180  # longer than any compilation


class Target(NamedTuple):
    """What is tried, and how large its problems may be."""

    backend: str
    device: torch.device
    largest_scores: int = LARGEST_SCORES

    def why_not(self, trial: Trial) -> list[str]:
        """Why the backend does not run a trial."""
        problem = make(trial, "meta").problem._replace(device=self.device)
        explanation = dispatch.explain(problem, self.backend)
        return [] if explanation.backend else explanation.reasons.get(self.backend, ["no backend runs it"])

    def attention(self, inputs: Inputs, problem: Problem) -> tuple[Tensor, Tensor]:
        return api.run(
            inputs,
            mask=problem.mask,
            softmax_scale=problem.softmax_scale,
            softcap=problem.softcap,
            dropout_p=problem.dropout_p,
            deterministic=problem.deterministic,
            max_seqlen_q=problem.seqlen_q if problem.varlen else None,
            max_seqlen_k=problem.seqlen_k if problem.varlen else None,
            backend=self.backend,
        )

    def check(self, trial: Trial) -> tuple[Check, list[str]]:
        """The errors of a trial, and what else is wrong."""
        inputs, problem, buffers = make(trial, self.device)
        before = [buffer.clone() for buffer in buffers]
        with GuardedMemory() as memory:
            check = check_against_float64(
                self.attention, inputs, problem, trial.seed, extreme=True, loss_scale=trial.loss_scale
            )
        wrong = [f"{row.name}: error {row.error:.1e}, allowed {row.allowed:.1e}" for row in check.rows if not row.good]
        if not memory.intact():
            wrong.append("memory around an output was written")
        if not all(map(torch.equal, before, buffers)):
            wrong.append("an input, or memory around it, was written")
        return check, wrong

    def failure(self, trial: Trial) -> str | None:
        """What is wrong with the results of a trial, in a line."""
        try:
            _, wrong = self.check(trial)
        except Exception as error:  # whatever it is, the line that reproduces it is to be told
            return " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return "; ".join(wrong) or None

    def line(self, trial: Trial) -> str:
        """The command that runs a trial again."""
        words = ["python -m triton_attention.testing.fuzz", f"--backend {self.backend} --seed {trial.seed}"]
        if self.largest_scores != LARGEST_SCORES:
            words.append(f"--largest-scores {self.largest_scores}")
        drawn = draw(trial.seed, self.largest_scores).sizes
        if trial.sizes != drawn:
            sizes = trial.sizes._asdict()
            words.append(
                "--sizes " + ",".join(f"{name}={sizes[name]}" for name in sizes if sizes[name] != getattr(drawn, name))
            )
        return " ".join(words)


def shrink(trial: Trial, fails: Callable[[Trial], bool], seconds: float = _SHRINKING_SECONDS) -> Trial:
    """A trial of smaller sizes that fails too, such that none of the steps tried makes it smaller still."""
    end = time.monotonic() + seconds
    while True:
        smaller = next(filter(fails, _smaller(trial, end)), None)
        if smaller is None:
            return trial
        trial = smaller


def _smaller(trial: Trial, end: float) -> Iterator[Trial]:
    for name, size in trial.sizes._asdict().items():
        for value in sorted({1, size // 4, size // 2, size - size // 8, size - 1}):
            if 0 < value < size and time.monotonic() < end:
                yield trial._replace(sizes=trial.sizes._replace(**{name: value}))


class Event(NamedTuple):
    """What a campaign tells: that it begins with a seed, and then what became of it."""

    seed: int
    outcome: str  # "begun", "right", "refused" or "wrong"
    line: str = ""  # of a failure


def campaign(target: Target, kinds: Iterator[int], each: int) -> Iterator[Event]:
    """Try `each` problems of every kind; the rest of a kind is left out after its first failure."""

    def fails(trial: Trial) -> bool:
        return not target.why_not(trial) and target.failure(trial) is not None

    for kind in kinds:
        tried = 0
        for seed in range(kind * TRIALS_OF_A_KIND, kind * TRIALS_OF_A_KIND + each):
            yield Event(seed, "begun")
            trial = draw(seed, target.largest_scores)
            if target.why_not(trial):
                yield Event(seed, "refused")
                if tried == 0 and seed % TRIALS_OF_A_KIND == 9:
                    break  # it is the kind that is refused
                continue
            tried += 1
            if target.failure(trial) is None:
                yield Event(seed, "right")
                continue
            if _device_works(target.device):
                trial = shrink(trial, fails)
            reason = target.failure(trial) or "only at times"
            yield Event(seed, "wrong", f"{target.line(trial)}  # {reason}")
            break


def _device_works(device: torch.device) -> bool:
    """Whether a kernel that failed left the process a device to go on with."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


def _work(worker: int, options: argparse.Namespace, events: Any) -> None:
    """A process of a campaign: it has kinds of its own, so that no variant is compiled twice."""
    torch.set_num_threads(1)
    kinds = count(options.seed // TRIALS_OF_A_KIND + worker, options.workers)
    for event in campaign(_target(options), kinds, options.each):
        events.put((worker, event))
        if event.outcome == "wrong" and not _device_works(options.device):
            return


class Tally:
    """The outcomes so far, printed now and then."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.counts = {"right": 0, "wrong": 0, "refused": 0}
        self._printed = self.started

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def add(self, event: Event) -> None:
        if event.outcome in self.counts:
            self.counts[event.outcome] += 1
        if event.outcome == "wrong":
            print(f"FAILED {event.line}", flush=True)

    def progress(self) -> None:
        if time.monotonic() - self._printed >= 10:
            self._printed = time.monotonic()
            print(self, flush=True)

    def __str__(self) -> str:
        return f"{self.seconds:5.0f} s: " + ", ".join(f"{number} {outcome}" for outcome, number in self.counts.items())


def _run_workers(options: argparse.Namespace) -> Tally:
    """The campaign in several processes, ended when the time or the number of problems is reached."""
    context = get_context("spawn")
    events = context.Queue()
    workers = [context.Process(target=_work, args=(i, options, events)) for i in range(options.workers)]
    for worker in workers:
        worker.start()
    tally = Tally()
    latest = dict.fromkeys(range(options.workers), (tally.started, options.seed))  # when it last told of which seed
    target = _target(options)

    def lost(worker: int, what: str) -> None:
        _, seed = latest.pop(worker)
        line = target.line(draw(seed, options.largest_scores))
        tally.add(Event(seed, "wrong", f"{line}  # {what}"))

    def listen() -> None:
        while not events.empty():
            worker, event = events.get()
            tally.add(event)
            latest[worker] = (time.monotonic(), event.seed)

    while latest and not _over(tally, options):
        listen()
        for i, (when, _) in list(latest.items()):
            if workers[i].exitcode == 0:
                del latest[i]  # it has told why
            elif workers[i].exitcode is not None:
                lost(i, f"the process ended with {workers[i].exitcode}")
            elif time.monotonic() - when > _STUCK_SECONDS:
                workers[i].kill()
                lost(i, f"no progress for {_STUCK_SECONDS} s")
        tally.progress()
        time.sleep(0.05)
    listen()
    for process in workers:
        process.kill()
    return tally


def _run_here(options: argparse.Namespace) -> Tally:
    tally = Tally()
    for event in campaign(_target(options), count(options.seed // TRIALS_OF_A_KIND), options.each):
        tally.add(event)
        tally.progress()
        if _over(tally, options):
            break
    return tally


def _over(tally: Tally, options: argparse.Namespace) -> bool:
    done = tally.counts["right"] + tally.counts["wrong"]
    return tally.seconds >= options.seconds or (options.problems is not None and done >= options.problems)


def _run_one(options: argparse.Namespace) -> int:
    """Print a trial and its errors."""
    target = _target(options)
    trial = draw(options.seed, options.largest_scores)
    trial = trial._replace(sizes=trial.sizes._replace(**options.sizes))
    print(*(f"{name:18}{value}" for name, value in trial._asdict().items()), sep="\n")
    reasons = target.why_not(trial)
    if reasons:
        print(f"{options.backend} does not run it:", *reasons, sep="\n  ")
        return 2
    check, wrong = target.check(trial)
    print(check, *wrong, sep="\n")
    return 1 if wrong else 0


def _target(options: argparse.Namespace) -> Target:
    return Target(options.backend, options.device, options.largest_scores)


def _sizes(text: str) -> dict[str, int]:
    return {name: int(size) for name, size in (part.split("=") for part in text.split(","))}


def main(arguments: list[str]) -> int:
    """0: every result was right; 1: one was not; 2: the one problem asked for is refused, or none was tried."""
    parser = argparse.ArgumentParser(prog="python -m triton_attention.testing.fuzz", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--backend", default="portable", help=f"auto, {', '.join(backend.name for backend in dispatch.BACKENDS)}")
    add("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    add("--seed", type=int, default=0, help="the problem, or where a campaign begins (default: %(default)s)")
    add("--sizes", type=_sizes, default={}, help="what to change of the one problem, such as batch=1,seqlen_q=33")
    add("--seconds", type=float, help="run a campaign of this length")
    add("--problems", type=int, help="run a campaign of this many problems")
    add("--each", type=int, default=100, help="problems of a kind, which share kernels (default: %(default)s)")
    add("-n", "--workers", type=int, default=1, help="processes of a campaign (default: %(default)s)")
    add("--largest-scores", type=int, default=LARGEST_SCORES, help="batch * heads * seqlen_q * seqlen_k at most")
    options = parser.parse_args(arguments)
    if not 0 < options.each <= TRIALS_OF_A_KIND:
        parser.error(f"--each must be from 1 to {TRIALS_OF_A_KIND}, got {options.each}")
    if options.seconds is None and options.problems is None:
        return _run_one(options)
    options.seconds = float("inf") if options.seconds is None else options.seconds
    print(f"{options.backend} on {options.device}, from seed {options.seed}", flush=True)
    tally = _run_here(options) if options.workers == 1 else _run_workers(options)
    print(tally)
    if tally.counts["wrong"]:
        return 1
    return 0 if tally.counts["right"] else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
