"""How do thousands of kernels compile in reasonable time? In parallel and ahead, into Triton's own cache on disk."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from triton.runtime.driver import driver

from triton_attention.kernel import compile_launch
from triton_attention.testing.fake_device import launches


def precompile(cases):
    """Compile what the cases launch on the current GPU, each variant once."""
    target = driver.active.get_current_target()
    variants = {}
    for case in cases:
        for launch in launches(case, target):
            types = tuple(argument.type for argument in launch.arguments)
            key = (launch.kernel.__name__, types, launch.spec, launch.tile)
            variants.setdefault(key, (case, launch.kernel.__name__))
    work = [(case, name, target) for case, name in variants.values()]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for _ in pool.map(_compile, work, chunksize=8):
            pass
    return len(work)


def _compile(work):
    case, name, target = work
    for launch in launches(case, target):
        if launch.kernel.__name__ == name:
            compile_launch(launch, target)
