"""How fast is each provider on each case, given that its results are right?"""

from __future__ import annotations

import argparse
import csv
import functools
import gc
import importlib.metadata
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.cases import GROUPS, PASSES, Case, Inputs, random_inputs
from benchmarks.correctness import Reference, reference
from benchmarks.measure import copy_gb_per_s, matmul_ceiling_tflops, peak_extra_mib, time_call
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.rows import COLUMNS, Row, tables

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str]) -> int:
    """0; 1 if `ours` was wrong or raised; 2 if no case was chosen or the device was lost."""
    options = _parse(arguments)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    groups = options.group or (["smoke"] if device.type == "cpu" else [group for group in GROUPS if group != "smoke"])
    cases = [case for group in groups for case in GROUPS[group] if options.match.search(f"{case.group} {case.name}")]
    if not cases:
        print(f"no case of {','.join(groups)} matches {options.match.pattern!r}")
        return 2
    dtypes = sorted({case.dtype for case in cases})
    machine = Machine.of(device, options.seconds_per_case, dtypes, options.commit)
    print(machine.describe())
    output = options.output or RESULTS / _default_name(machine)
    output.parent.mkdir(parents=True, exist_ok=True)
    providers = [PROVIDERS[name] for name in options.providers]
    try:
        rows = run(cases, providers, options.passes, machine, options.seconds_per_case, output)
    except DeviceLostError as lost:
        print(f"stopped: {lost}; the rows so far are in {output}")
        return 2
    print(tables(rows))
    print(f"\n{len(rows)} rows in {output}")
    failed = [row for row in rows if row["provider"] == "ours" and row["status"] in ("wrong", "error")]
    if failed:
        print(f"ours FAILED in {len(failed)} of them")
    return 1 if failed else 0


class DeviceLostError(RuntimeError):
    """A kernel broke the CUDA context: nothing more can be measured in this process."""


class Machine(NamedTuple):
    """Where the numbers come from, and what they may reach there."""

    device: torch.device
    name: str
    torch_version: str
    triton_version: str
    cuda_version: str
    commit: str
    ceilings: dict[str, float]  # dtype -> TFLOP/s of a large matrix product
    copy_gb_per_s: float

    @classmethod
    def of(cls, device: torch.device, seconds: float, dtypes: Sequence[str], commit: str | None = None) -> Machine:
        on_gpu = device.type == "cuda"
        try:
            triton = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            triton = "none"
        return cls(
            device=device,
            name=torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.processor() or platform.machine()}",
            torch_version=torch.__version__,
            triton_version=triton,
            cuda_version=(torch.version.cuda or torch.version.hip or "none") if on_gpu else "none",
            commit=commit or commit_of_this_folder(),
            ceilings={dtype: matmul_ceiling_tflops(getattr(torch, dtype), device, seconds) for dtype in dtypes},
            copy_gb_per_s=copy_gb_per_s(device, seconds),
        )

    def describe(self) -> str:
        ceilings = [f"{dtype} matmul {tflops:.4g} TFLOP/s" for dtype, tflops in self.ceilings.items()]
        ceilings.append(f"copy {self.copy_gb_per_s:.4g} GB/s read and written")
        versions = f"torch {self.torch_version}, triton {self.triton_version}, cuda {self.cuda_version}"
        return f"{self.name}; {versions}; commit {self.commit}\nceilings: {', '.join(ceilings)}"


def run(
    cases: Sequence[Case],
    providers: Sequence[Provider],
    passes: Sequence[str],
    machine: Machine,
    seconds: float,
    output: Path,
) -> list[Row]:
    """Measure every provider on every pass of every case, printing and writing each row as soon as it is known."""
    total = sum(pass_name in passes for case in cases for pass_name in case.passes) * len(providers)
    rows: list[Row] = []
    begin = time.monotonic()
    with open(output, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for case in cases:
            inputs = random_inputs(case, machine.device)
            # computed when the first provider needs it, and kept for the others
            case_reference = functools.cache(functools.partial(reference, case, inputs))
            for pass_name in (name for name in case.passes if name in passes):
                for provider in providers:
                    row = _measure(provider, case, pass_name, inputs, case_reference, machine, seconds)
                    writer.writerow(row)
                    file.flush()
                    rows.append(row)
                    elapsed = time.monotonic() - begin
                    print(f"[{len(rows):3d}/{total} {elapsed:4.0f} s] {_progress(row)}", flush=True)
                    if row["status"] != "refused":
                        _clean_up(machine.device)
    return rows


def _measure(
    provider: Provider,
    case: Case,
    pass_name: str,
    inputs: Inputs,
    case_reference: Callable[[], Reference],
    machine: Machine,
    seconds: float,
) -> Row:
    """The row of one provider. Whatever goes wrong in it costs this row only."""
    row = dict.fromkeys(COLUMNS, "")
    row |= {column: str(value) for column, value in case._asdict().items()}
    row |= {"provider": provider.name, "pass": pass_name, "ceiling_tflops": f"{machine.ceilings[case.dtype]:.6g}"}
    row |= {"device": machine.name, "torch": machine.torch_version, "triton": machine.triton_version}
    row |= {"cuda": machine.cuda_version, "commit": machine.commit}
    row |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}

    def without_a_time(status: str, reason: str) -> Row:
        return row | {"status": status, "reason": " ".join(reason.split())[:500]}

    try:
        refusal = provider.why_not(case, pass_name, machine.device)
        if refusal is not None:
            return without_a_time("refused", refusal)
        row["version"] = provider.version()
        prepared = provider.prepare(case, pass_name, inputs)
        expected = case_reference()
        smaller = expected.case != case
        checked = provider.prepare(expected.case, pass_name, expected.inputs) if smaller else prepared
        wrong = expected.why_wrong(checked.results())
        if wrong is not None:
            return without_a_time("wrong", wrong)
        peak = peak_extra_mib(prepared.run, machine.device)
        timing = time_call(prepared.run, machine.device, seconds)
    except NotImplementedError as refused:
        return without_a_time("refused", str(refused))
    except Exception as error:
        return without_a_time("error", f"{type(error).__name__}: {error}")
    tflops = case.flops(pass_name) / timing.p50_ms / 1e9
    row |= {percentile: f"{value:.6g}" for percentile, value in timing._asdict().items()}
    row |= {"tflops": f"{tflops:.6g}", "share_of_ceiling": f"{tflops / machine.ceilings[case.dtype]:.4g}"}
    row |= {"status": "ok", "peak_extra_mib": "" if peak is None else f"{peak:.6g}"}
    if smaller:
        row["reason"] = f"results checked on {expected.case.batch} x {expected.case.seqlen_q} tokens"
    return row


def _clean_up(device: torch.device) -> None:
    """Give memory back, so that a row does not suffer from the one before it."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLostError(f"after the last row the device answers {error}") from error


def _progress(row: Row) -> str:
    what = f"{row['group']} {row['name']} {row['pass']}: {row['provider']}"
    if row["status"] == "ok":
        return f"{what} {float(row['tflops']):.4g} TFLOP/s, {float(row['p50_ms']):.4g} ms"
    return f"{what} {row['status']}: {row['reason']}"


def commit_of_this_folder() -> str:
    """What git says of the measured sources."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or not a repository
        return "unknown"
    return done.stdout.strip()


def _default_name(machine: Machine) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", machine.name.lower()).strip("-")
    return f"{device}_{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.csv"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks run",
        description="Measure attention providers; a provider whose results are wrong gets no time.",
    )

    def names(known: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            chosen = text.split(",")
            unknown = [name for name in chosen if name not in known]
            if unknown:
                raise argparse.ArgumentTypeError(f"must be among {','.join(known)}, got {','.join(unknown)}")
            return chosen

        return parse

    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add(
        "--group",
        type=names(list(GROUPS)),
        help=f"comma list of {', '.join(GROUPS)} (default: all but smoke; smoke on a CPU)",
    )
    add("--match", type=re.compile, default="", help="regular expression for 'GROUP NAME' of a case")
    add(
        "--providers",
        type=names(list(PROVIDERS)),
        default=list(PROVIDERS),
        help=f"comma list of {', '.join(PROVIDERS)}",
    )
    add("--passes", type=names(PASSES), default=list(PASSES), help=f"comma list of {', '.join(PASSES)}")
    add("--seconds-per-case", type=float, default=0.3, help="time for each measurement (default: %(default)s)")
    add("--output", type=Path, help="CSV to write, replacing what is there (default: a new one in benchmarks/results/)")
    add("--commit", help="what the rows say was measured (default: what git says of this folder)")
    add("--device", default=default_device, help="cpu, cuda or cuda:N (default: %(default)s)")
    return parser.parse_args(arguments)
