"""Are wrong calls of GPU tensors refused as on the CPU: in the same words, nothing launched, no memory changed?"""

import importlib.util
from pathlib import Path

import pytest
import torch
import triton

from triton_attention import attention

# By its path: a folder has tests of the same names as this one.
_spec = importlib.util.spec_from_file_location(
    "wrong_calls_on_the_cpu", Path(__file__).resolve().parents[1] / "unit" / "test_bad_input.py"
)
on_the_cpu = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(on_the_cpu)

# What a GPU backend runs, or does not look at because it would have to wait for the GPU, is no refusal there.
ONLY_ON_THE_CPU = ("by-portable", "by-hopper", "must rise from 0", "at least the length of every sequence")


def to_gpu(value, message):
    """A tensor where a number should be stays: the message shows it."""
    is_there = isinstance(value, torch.Tensor) and value.device.type == "cpu" and repr(value) not in message
    return value.cuda() if is_there else value


def bytes_of(tensor):
    return tensor.detach().flatten().view(torch.uint8)


def is_for_gpus(row):
    return not any(words in f"{row.name} {row.message}" for words in ONLY_ON_THE_CPU)


@pytest.fixture(scope="module")
def rows():
    found = []
    for row in filter(is_for_gpus, on_the_cpu.TABLE):
        arguments = {name: to_gpu(value, row.message) for name, value in row.arguments.items()}
        found.append(row._replace(arguments=arguments, message=row.message.replace("cpu", "cuda:0")))
    return found


def dense_tensors(rows):
    values = {id(value): value for row in rows for value in row.arguments.values()}
    return [x for x in values.values() if isinstance(x, torch.Tensor) and x.is_cuda and on_the_cpu.is_dense(x)]


def test_wrong_calls_launch_nothing_and_change_nothing(rows):
    torch.use_deterministic_algorithms(False)
    assert len(rows) >= 80
    tensors = dense_tensors(rows)
    before = [bytes_of(tensor).clone() for tensor in tensors]
    launches = []
    triton.knobs.runtime.launch_enter_hook.add(launches.append)
    torch.cuda.synchronize()
    try:
        for row in rows:
            on_the_cpu.refuse(row)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for row in rows:
                on_the_cpu.refuse(row)
            torch.cuda.synchronize()
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(launches.append)
    assert not launches
    assert [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA] == []
    assert all(map(torch.equal, before, map(bytes_of, tensors)))


def test_a_right_call_is_right_after_wrong_ones(rows):
    arguments = {name: on_the_cpu.RIGHT[name] for name in ("q", "k", "v")}
    expected = attention(**arguments)
    for row in rows:
        on_the_cpu.refuse(row)
    torch.testing.assert_close(attention(**{name: x.cuda() for name, x in arguments.items()}).cpu(), expected)
