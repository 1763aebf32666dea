"""What can be asked from a shell? What is installed here, whether results are right here, and how fast they are."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib import import_module

import torch

from triton_attention import __version__, dispatch, explain
from triton_attention.problem import Mask
from triton_attention.testing import Case, check_against_float64, make_inputs
from triton_attention.testing.cases import CAUSAL, CAUSAL_TOP_LEFT

RESULTS = ("out", "lse", "dq", "dk", "dv", "dbias")
CHECKED = {  # lengths are above a block of 128; a bias that varies along the keys has rows of multiples of 16 bytes
    "plain": Case(130, 130, dtype=torch.bfloat16),
    "causal": Case(130, 130, mask=CAUSAL),
    "causal from top left": Case(130, 201, mask=CAUSAL_TOP_LEFT, dtype=torch.bfloat16),
    "window": Case(200, 200, mask=Mask(64, 16)),
    "grouped-query heads": Case(130, 136, 128, batch=1, heads_q=4, heads_kv=2, mask=CAUSAL, dtype=torch.bfloat16),
    "few queries": Case(3, 301),
    "queries without keys": Case(201, 77, mask=CAUSAL),
    "odd head dims": Case(130, 130, 59, 33),
    "head dim 256": Case(130, 130, 256, batch=1, mask=CAUSAL, dtype=torch.bfloat16),
    "bias of a key": Case(130, 136, bias="b11k", dtype=torch.bfloat16),
    "bias of a query": Case(130, 136, bias="1hq1"),
    "bias of a pair": Case(130, 136, mask=CAUSAL, bias="1hqk", dtype=torch.bfloat16),
    "bias in float32": Case(130, 136, bias="bhqk", bias_dtype=torch.float32),
    "boolean mask": Case(130, 136, bias="b1qk", bias_dtype=torch.bool),
    "float32": Case(130, 130, mask=CAUSAL, dtype=torch.float32),
    "float32 and a bias": Case(130, 136, 40, bias="1hqk", dtype=torch.float32),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; `arguments` are those after the program's name (None = the shell's). Returns the exit code."""
    parser = argparse.ArgumentParser(prog="triton-attention", description="FlashAttention in Python and Triton")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="versions, GPUs, and which backend runs a typical call")
    check_parser = commands.add_parser(
        "check",
        help="compare results on this machine with float64",
        description="Compare outputs and gradients with float64. The exit code is 0 if all that ran are right, else 1. "
        "A case that is refused is no error, unless nothing ran at all.",
    )
    check_parser.add_argument("--device", type=_device, help="default: cuda if there is a GPU, else cpu")
    check_parser.add_argument(
        "--backend", default="auto", choices=["auto", *(backend.name for backend in dispatch.BACKENDS)]
    )
    bench_parser = commands.add_parser("bench", help="measure: the same as python -m benchmarks, from the repository")
    bench_parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of python -m benchmarks")

    chosen = parser.parse_args(arguments)
    if chosen.command == "info":
        return info()
    if chosen.command == "check":
        return check(chosen.device or _default_device(), chosen.backend)
    return bench(chosen.arguments)


def info() -> int:
    """Print versions, GPUs, and the table of `explain` for a typical call."""
    if torch.version.hip is not None:
        toolkit = "ROCm", torch.version.hip
    else:
        toolkit = "CUDA", torch.version.cuda or "none: this PyTorch is for CPUs"
    rows = [
        ("triton_attention", __version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _triton_version()),
        toolkit,
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        size = f"{gpu.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{index}", f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {size}"))
    for name, value in rows:
        print(f"{name:18}{value}")
    q, k, v = torch.empty(3, 1, 1024, 8, 64, dtype=torch.bfloat16, device=_default_device())
    print(f"\n{explain(q, k, v)}")
    return 0


def check(device: torch.device, backend: str) -> int:
    """Print the errors of every case of CHECKED; 0 if they are all within what `check_against_float64` allows."""
    print(f"Largest errors against float64 on {_name(device)}:\n")
    print(f"{'case':22}{'dtype':10}{'backend':11}{''.join(f'{name:9}' for name in RESULTS)}".rstrip())
    verdicts = [_check_case(name, case, device, backend) for name, case in CHECKED.items()]
    print("\n" + ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("ok", "WRONG", "refused")))
    return int("WRONG" in verdicts or "ok" not in verdicts)


def bench(arguments: list[str]) -> int:
    """Hand the arguments to the benchmarks, which are in the repository and not in the wheel."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as for python -m, which an installed script is not
    try:
        benchmarks = import_module("benchmarks.__main__")
    except ModuleNotFoundError as error:
        if error.name not in ("benchmarks", "benchmarks.__main__"):
            raise  # they are here, and something that they need is not
        print(
            "triton-attention bench: the benchmarks are a folder of the repository that is not installed with the "
            "package; run this command in the repository's root",
            file=sys.stderr,
        )
        return 2
    return int(benchmarks.main(arguments))


def _check_case(name: str, case: Case, device: torch.device, backend: str) -> str:
    """Print a case's line, and what it takes to understand one that is not ok. Returns the verdict."""
    print(f"{name:22}{str(case.dtype).removeprefix('torch.'):10}", end="", flush=True)  # compiling can take a while
    inputs, problem = make_inputs(case, device)
    try:
        chosen = dispatch.select(problem, backend)
    except NotImplementedError as error:
        _, *reasons = str(error).splitlines()
        print("refused", *reasons, sep="\n")
        return "refused"
    result = check_against_float64(chosen.run, inputs, problem)
    verdict = "ok" if result.good else "WRONG"
    shown = dict.fromkeys(RESULTS, "") | {row.name: f"{row.error:.1e}" for row in result.rows}
    print(f"{chosen.name:11}{''.join(f'{error:9}' for error in shown.values())}{verdict}")
    if not result.good:
        print(f"  {case}", *(f"  {line}" for line in str(result).splitlines()), sep="\n")
    return verdict


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device(text: str) -> torch.device:
    """A device that computes here, for argparse."""
    try:
        torch.zeros((), device=text).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # AssertionError: a PyTorch for CPUs
        raise argparse.ArgumentTypeError(f"must be a device that computes here, got {text!r}") from error
    return torch.device(text)


def _name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _triton_version() -> str:
    """Of the Triton that kernels would import: its distribution has other names too."""
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)
