"""Do the kernels touch only what is theirs, initialised, and in order? Asks NVIDIA's compute-sanitizer, and Triton's.

    python tests/gpu/sanitize.py [memcheck racecheck initcheck synccheck consan]

compute-sanitizer comes with the CUDA toolkit: its tools look at memory outside of allocations (memcheck), unordered
accesses to shared memory (racecheck), memory that is read before it is written (initcheck) and barriers (synccheck).
consan is Triton's concurrency sanitizer: it looks at the order of asynchronous copies, products and barriers in Gluon
kernels, and works with Triton 3.7 and 3.8; the compilers of 3.6 and 3.9 crash in it.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck", "consan")
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin", "/usr/local/cuda/compute-sanitizer")
RUN = "--run"  # this script calls itself with it
SECONDS = 540  # for a tool


def main(tools):
    unknown = set(tools) - set(TOOLS)
    if unknown:
        print(f"tools must be among {', '.join(TOOLS)}, got {', '.join(sorted(unknown))}")
        return 2
    import torch

    if not torch.cuda.is_available():
        print("needs a GPU, and PyTorch sees none: nothing was checked")
        return 2
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("compute-sanitizer was not found in PATH, CUDA_HOME or Python's packages: only consan can be asked")
    if run([], {}) is None:  # compiles; under the tools the kernels then come from Triton's cache
        return 1
    verdicts = []
    for tool in tools or TOOLS:
        if tool == "consan":
            verdicts.append(report(tool, consan_why_not() or run([], {"TRITON_INSTRUMENTATION_MODE": "consan"})))
        elif sanitizer is None:
            verdicts.append(report(tool, "not run: compute-sanitizer was not found"))
        else:
            # Each tensor is an allocation of its own, so that what lies behind it is out of bounds.
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            command = [sanitizer, "--tool", tool, "--print-limit", "10", *only_ours(sanitizer, tool)]
            verdicts.append(report(tool, run(command, environment)))
    return int(not all(verdicts))


def report(tool, outcome):
    """Print what came out of a tool: why it did not run, its output, or None where the kernels failed under it."""
    if outcome is None:
        print(f"{tool}: FAILED, see above")
        return False
    if outcome.startswith("not run"):
        print(f"{tool}: {outcome}")
        return True
    summaries = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", outcome)
    errors = sum(int(one or two) for one, two in summaries)
    if errors or (tool != "consan" and not summaries):
        print(outcome[-6000:])
    print(f"{tool}: {errors} errors" if summaries or tool == "consan" else f"{tool}: FAILED, it printed no summary")
    return errors == 0 and (tool == "consan" or bool(summaries))


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
    return None if version in ("3.7", "3.8") else f"not run: it does not compile our kernels with Triton {version}"


def run(command, environment):
    """What the kernels' run prints under a command, or None where it fails; prints why."""
    started = time.time()
    words = [*command, sys.executable, str(Path(__file__).resolve()), RUN]
    try:
        done = subprocess.run(
            words, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        print(output.decode()[-3000:], f"took more than {SECONDS} s")
        return None
    if done.returncode != 0 or "all ran" not in done.stdout:
        print(done.stdout[-6000:], f"ended with {done.returncode}")
        return None
    print(f"ran for {time.time() - started:.0f} s: {' '.join(words[:-3]) or 'the kernels alone'}")
    return done.stdout


def run_kernels():
    """Every kernel in its main variants, on tensors copied from the CPU."""
    import torch
    import triton

    from triton_attention import dispatch
    from triton_attention.problem import Mask
    from triton_attention.testing import Case, make_inputs
    from triton_attention.testing.cases import CAUSAL, LENGTHS

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    cases = (
        Case(70, 90, 64, mask=CAUSAL, dtype=torch.bfloat16),
        Case(300, 200, 128, heads_q=4, heads_kv=2, dtype=torch.bfloat16),
        Case(300, 304, 64, bias="1hqk", dtype=torch.bfloat16),
        Case(70, 304, 32, batch=3, bias="1hqk", dtype=torch.bfloat16),
        Case(70, 96, 64, bias="bhqk", mask=Mask(40, 3), dtype=torch.float16),
        Case(70, 91, 96, bias="b11k", dtype=torch.bfloat16),
        Case(70, 91, 128, bias="1hq1", mask=CAUSAL, dtype=torch.bfloat16),
        Case(70, 96, 256, bias="1hqk", bias_dtype=torch.bool, mask=CAUSAL, dtype=torch.bfloat16),
        Case(70, 91, 64, softcap=20.0, alibi="h", sink=True, dropout_p=0.2, mask=CAUSAL, dtype=torch.bfloat16),
        Case(70, 91, 256, softcap=20.0, alibi="h", sink=True, mask=CAUSAL, dtype=torch.bfloat16),
        Case(50, 61, 64, lengths=LENGTHS, unused=(5, 40), mask=CAUSAL, dtype=torch.bfloat16),
        Case(50, 61, 256, lengths=LENGTHS, unused=(70, 300), sink=True, dtype=torch.bfloat16),
        Case(35, 47, 59, bias="1hqk", mask=CAUSAL, dtype=torch.float16),
        Case(35, 47, 40, bias="b1qk", dtype=torch.float32),
    )
    for case, deterministic in product(cases, (False, True)):
        inputs, _ = make_inputs(case, "cpu")
        for backend in dispatch.BACKENDS:
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
            print(backend.name, case, all(bool(x.cpu().isfinite().all()) for x in (out, *grads)), flush=True)
    print("all ran")


if __name__ == "__main__":
    if sys.argv[1:] == [RUN]:
        run_kernels()
    else:
        sys.exit(main(sys.argv[1:]))
