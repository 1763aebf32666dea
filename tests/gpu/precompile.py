"""How do a thousand kernels compile in reasonable time? In parallel and ahead, into Triton's own cache on disk."""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from multiprocessing import get_context

from matrix import all_runs
from triton.runtime.driver import driver

from triton_attention.kernel import compile_launch
from triton_attention.testing.fake_device import launches


def main():
    started = time.time()
    target = driver.active.get_current_target()
    runs = sorted((run for run in all_runs() if not run.why_not), key=what_differs)
    groups = [list(group) for _, group in groupby(runs, key=what_differs)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        variants = sum(pool.map(compile_all, groups, [target] * len(groups)))
    print(f"compiled {variants} variants in {time.time() - started:.0f} s")


def what_differs(run):
    """Runs that differ in this share no variant, or few."""
    return run.backend, run.case.head_dim, str(run.case.mask), str(run.case.dtype)


def compile_all(runs, target):
    """Compile what the runs launch on the target, each variant once."""
    seen = set()
    for run in runs:
        for launch in launches(run.case, target, run.backend):
            types = tuple(argument.type for argument in launch.arguments)
            variant = (launch.kernel.__name__, types, launch.spec, launch.tile)
            if variant not in seen:
                seen.add(variant)
                compile_launch(launch, target)
    return len(seen)


if __name__ == "__main__":
    main()
