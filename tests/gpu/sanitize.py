"""Do the kernels touch only what is theirs, initialised, and in order? Asks NVIDIA's compute-sanitizer, and Triton's.

    python tests/gpu/sanitize.py [memcheck racecheck initcheck synccheck consan] [--seconds 1800] [--workers 16]

compute-sanitizer comes with the CUDA toolkit: its tools look at memory outside of allocations (memcheck), unordered
accesses to shared memory (racecheck), memory that is read before it is written (initcheck) and barriers (synccheck).
consan is Triton's concurrency sanitizer: it looks at the order of asynchronous copies, products and barriers in Gluon
kernels, and works with Triton 3.7 and 3.8; the compilers of 3.6 and 3.9 crash in it.

Each case has a process of its own under each tool, several at a time: most of the time goes into instrumenting kernels,
on the host. What the time does not suffice for is named and counts as a failure. synccheck, which takes longest, has
few cases, and initcheck those whose results no TMA stores: it does not see such stores.

racecheck tells of a hazard wherever Triton hands the partitions of a warp-specialised kernel their numbers and
arguments, through shared memory. Where all its accesses belong to such lines it is counted apart, as a hand-over. So is
what one warpgroup hands another by plain stores: a barrier of its warps and then the arrival of one of its threads
order them by PTX's memory model, and racecheck follows the two only one by one.
"""

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck", "consan")
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin", "/usr/local/cuda/compute-sanitizer")
RUN = "--run"  # this script calls itself with it, and the number of a case
FEW = {"initcheck": (14,), "synccheck": (0, 4, 11)}  # numbers of cases; a tool that is not here is asked of all
HAND_OVERS = ("send_bits", "receive_bits")  # functions that store and load what passes between warpgroups
PRINT_LIMIT = 1000  # what is not printed counts as an error
KERNELS = Path(__file__).parents[2] / "src/triton_attention/hopper"


def main(arguments):
    options = parse(arguments)
    import torch

    if not torch.cuda.is_available():
        print("needs a GPU, and PyTorch sees none: nothing was checked")
        return 2
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("compute-sanitizer was not found in PATH, CUDA_HOME or Python's packages: only consan can be asked")
    started = time.monotonic()
    run = partial(run_case, end=started + options.seconds)
    numbers = range(len(make_cases()))
    checks = {tool: check_of(tool, sanitizer) for tool in options.tools or TOOLS}
    with ThreadPoolExecutor(options.workers) as pool:
        # Compiles: under the tools the kernels then come from Triton's cache. One that hangs leaves time for others.
        alone = list(pool.map(partial(run, command=[], environment={}, end=started + options.seconds / 3), numbers))
        verdicts = [report("the kernels alone", numbers, alone, lambda output: 0)]
        asked = {
            tool: [pool.submit(run, number, check.command, check.environment) for number in FEW.get(tool, numbers)]
            for tool, check in checks.items()
            if check.why_not is None
        }
        for tool, check in checks.items():
            if check.why_not is None:
                outcomes = [future.result() for future in asked[tool]]
                verdicts.append(report(tool, FEW.get(tool, numbers), outcomes, check.count_errors))
            else:
                print(f"{tool}: not run: {check.why_not}")
    return int(not all(verdicts))


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tools", nargs="*", help=f"of {', '.join(TOOLS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=1800, help="for everything (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="cases at a time (default: %(default)s)")
    options = parser.parse_args(arguments)
    unknown = set(options.tools) - set(TOOLS)
    if unknown:
        parser.error(f"tools must be among {', '.join(TOOLS)}, got {', '.join(sorted(unknown))}")
    return options


class Check(NamedTuple):
    """How a tool is asked, and how many errors its output tells of (None: it does not say); or why it is not asked."""

    command: list[str]
    environment: dict[str, str]
    count_errors: Callable[[str], int | None]
    why_not: str | None = None


def check_of(tool, sanitizer):
    if tool == "consan":  # what it finds ends the process
        return Check([], {"TRITON_INSTRUMENTATION_MODE": "consan"}, lambda output: 0, consan_why_not())
    if sanitizer is None:
        return Check([], {}, count_summaries, "compute-sanitizer was not found")
    command = [sanitizer, "--tool", tool, "--print-limit", str(PRINT_LIMIT), "--show-backtrace", "no"]
    command += only_ours(sanitizer, tool)
    # Each tensor is an allocation of its own, so that what lies behind it is out of bounds.
    return Check(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, count_summaries)


def count_summaries(output):
    """Errors and hazards, but for hand-overs; None where the tool tells of no number."""
    summaries = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warning", output)
    if not summaries:
        return None
    return sum(int(number or 0) for numbers in summaries for number in numbers) - count_hand_overs(output)


def count_hand_overs(output):
    """Hazards of which every access is in a line that hands partitions what they work on."""
    lines = hand_over_lines()
    hazards = re.findall(r"Race reported between .*(?:\n=+ +and .*)*", output)
    return sum(all(place_of(access) in lines for access in hazard.split("\n")) for hazard in hazards)


def place_of(access):
    """(file, line) of an access, None where it is not told."""
    place = re.search(r" in (?:.*/)?(\w+\.py):(\d+)", access)
    return place and (place[1], int(place[2]))


def hand_over_lines():
    """(file, line) of the head of each warp-specialised kernel, of `gl.warp_specialize` and the `if`s around it, and of
    what HAND_OVERS do."""
    return {
        (path.name, node.lineno)
        for path in KERNELS.glob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.stmt) and (function.name in HAND_OVERS or any(map(specializes, ast.walk(node))))
    }


def specializes(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "warp_specialize"


class Outcome(NamedTuple):
    """What a case printed, and why it did not end well."""

    output: str
    seconds: float
    failure: str | None


def report(tool, numbers, outcomes, count_errors):
    """Print what came out of a tool for these cases, and return whether all of it was good."""
    errors, right = 0, 0
    cases = make_cases()
    for case, outcome in zip((cases[number] for number in numbers), outcomes, strict=True):
        found = None if outcome.failure else count_errors(outcome.output)
        errors += found or 0
        right += found == 0
        if found != 0:
            print(outcome.output[-3000:])
            print(f"{tool}: {case}: {outcome.failure or found or 'it printed no summary'}")
    longest = max(outcome.seconds for outcome in outcomes)
    print(f"{tool}: {errors} errors, {right} of {len(outcomes)} cases right, {longest:.0f} s at most", flush=True)
    hand_overs = sum(count_hand_overs(outcome.output) for outcome in outcomes)
    if hand_overs:
        print(f"{tool}: {hand_overs} hazards where partitions are handed what they work on")
    return right == len(outcomes)


def find_sanitizer():
    places = [os.environ.get("CUDA_HOME", "") + "/bin", *PLACES]
    places += [str(path) for folder in sys.path for path in Path(folder).glob("nvidia/*/bin")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def only_ours(sanitizer, tool):
    """Leave PyTorch's kernels out, whose instrumentation takes minutes; initcheck must see what they write."""
    if tool == "initcheck":
        return []
    options = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    known = [option for option in ("--kernel-name", "--kernel-regex") if option in options]
    return [known[0], "kns=attention"] if known else []


def consan_why_not():
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    return None if version in ("3.7", "3.8") else f"it does not compile our kernels with Triton {version}"


def run_case(number, command, environment, end):
    """Run a case under a command, until a time at most."""
    started = time.monotonic()
    if started >= end:
        return Outcome("", 0.0, "not begun: the time was up")
    words = [*command, sys.executable, str(Path(__file__).resolve()), RUN, str(number)]
    process = subprocess.Popen(
        words, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,  # a tool has the case in a process of its own, which is to end with it
    )  # fmt: skip
    failure = None
    try:
        output, _ = process.communicate(timeout=end - started)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        failure = "the time was up"
    if failure is None and (process.returncode != 0 or "all ran" not in output):
        failure = f"ended with {process.returncode}"
    return Outcome(output, time.monotonic() - started, failure)


def make_cases():
    """Every kernel in its main variants."""
    import torch

    from triton_attention.problem import Mask
    from triton_attention.testing import Case
    from triton_attention.testing.cases import CAUSAL, LENGTHS

    return (
        Case(70, 90, 64, mask=CAUSAL, dtype=torch.bfloat16),
        Case(300, 200, 128, heads_q=4, heads_kv=2, dtype=torch.bfloat16),
        Case(300, 304, 64, bias="1hqk", dtype=torch.bfloat16),
        Case(70, 304, 32, batch=3, bias="1hqk", dtype=torch.bfloat16),
        Case(70, 96, 64, bias="bhqk", mask=Mask(40, 3), dtype=torch.float16),
        Case(70, 91, 96, bias="b11k", dtype=torch.bfloat16),
        Case(70, 91, 128, bias="1hq1", mask=CAUSAL, dtype=torch.bfloat16),
        Case(70, 96, 256, bias="1hqk", bias_dtype=torch.bool, mask=CAUSAL, dtype=torch.bfloat16),
        Case(70, 91, 64, softcap=20.0, alibi="h", sink=True, dropout_p=0.2, mask=CAUSAL, dtype=torch.bfloat16),
        Case(70, 91, 256, softcap=20.0, alibi="h", sink=True, dropout_p=0.2, mask=CAUSAL, dtype=torch.bfloat16),
        Case(70, 96, 64, bias="1hqk", softcap=20.0, alibi="h", dropout_p=0.2, mask=CAUSAL, dtype=torch.bfloat16),
        Case(50, 61, 64, lengths=LENGTHS, unused=(5, 40), mask=CAUSAL, dtype=torch.bfloat16),
        Case(50, 61, 256, lengths=LENGTHS, unused=(70, 300), sink=True, dtype=torch.bfloat16),
        Case(35, 47, 59, bias="1hqk", mask=CAUSAL, dtype=torch.float16),
        Case(35, 47, 40, bias="b1qk", dtype=torch.float32),
    )


def run_kernels(case):
    """A case on every backend that takes it, on tensors copied from the CPU."""
    import torch
    import triton

    from triton_attention import dispatch
    from triton_attention.testing import make_inputs

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    inputs, _ = make_inputs(case, "cpu")
    for backend, deterministic in product(dispatch.BACKENDS, (False, True)):
        if deterministic and backend.name != "hopper":  # whose backward is another one then
            continue
        leaves = inputs._make(x if x is None else x.detach().cuda().requires_grad_(x.requires_grad) for x in inputs)
        problem = make_inputs(case, "meta")[1]._replace(device=leaves.q.device, deterministic=deterministic)
        if backend.name == "reference" or backend.why_not(problem):
            continue
        out, _ = backend.run(leaves, problem)
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        grads = torch.autograd.grad(out, wanted, torch.ones(out.shape, dtype=out.dtype).cuda())
        torch.cuda.synchronize()
        assert all(bool(x.cpu().isfinite().all()) for x in (out, *grads))
        print(backend.name, case, flush=True)
    print("all ran")


if __name__ == "__main__":
    if sys.argv[1:2] == [RUN]:
        run_kernels(make_cases()[int(sys.argv[2])])
    else:
        sys.exit(main(sys.argv[1:]))
