"""How long does a call take, how much memory does it need, and what can the device do at most?"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Call = Callable[[], object]


class Timing(NamedTuple):
    """Percentiles of the repetitions, in milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float


def time_call(call: Call, device: torch.device, seconds: float) -> Timing:
    """Time a call for about `seconds`, a quarter of it to warm up: with CUDA events, each repetition after a flush of
    the L2 cache; on the CPU with a clock. At least 5 repetitions, however long they take."""
    call()  # whatever is compiled or allocated at the first call
    _, total = _host_and_total_seconds(call, device)
    for _ in range(min(1000, int(seconds / 4 / total))):
        call()
    time_repetitions = _cuda_milliseconds if device.type == "cuda" else _cpu_milliseconds
    milliseconds = time_repetitions(call, device, seconds * 3 / 4)
    deciles = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return Timing(p20_ms=deciles[1], p50_ms=deciles[4], p80_ms=deciles[7])


def peak_extra_mib(call: Call, device: torch.device) -> float | None:
    """Memory that a call needs at its peak beyond what is there before it, its results included; CUDA only."""
    if device.type != "cuda":
        return None
    gc.collect()
    _synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    _synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def matmul_ceiling_tflops(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """What a large matrix product of standard normal data reaches: the ceiling of any attention kernel."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / time_call(lambda: a @ b, device, seconds).p50_ms / 1e9


def copy_gb_per_s(device: torch.device, seconds: float) -> float:
    """Memory bandwidth of a large copy; each byte counts twice, read and written."""
    size = 2**30 if device.type == "cuda" else 2**25
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / time_call(lambda: target.copy_(source), device, seconds).p50_ms / 1e6


def _cpu_milliseconds(call: Call, device: torch.device, seconds: float) -> list[float]:
    _, total = _host_and_total_seconds(call, device)
    return [_host_and_total_seconds(call, device)[1] * 1e3 for _ in range(_repetitions(seconds, total))]


def _cuda_milliseconds(call: Call, device: torch.device, seconds: float) -> list[float]:
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)
    buffer.zero_()
    host, total = _host_and_total_seconds(call, device)
    _, flush = _host_and_total_seconds(buffer.zero_, device)
    # The GPU must not wait for the host within a repetition: while it flushes, the host queues the call. A short call
    # that takes the host long needs several flushes for that.
    flushes = min(100, 1 + int(1.5 * host / flush))
    repetitions = _repetitions(seconds, total + flushes * flush)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    for start, end in events:
        for _ in range(flushes):
            buffer.zero_()
        start.record()
        call()
        end.record()
    _synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def _repetitions(seconds: float, each: float) -> int:
    return max(5, min(1000, int(seconds / each)))


def _host_and_total_seconds(call: Call, device: torch.device) -> tuple[float, float]:
    """Time until the call returns, and until the device is done."""
    _synchronize(device)
    begin = time.perf_counter()
    call()
    returned = time.perf_counter()
    _synchronize(device)
    return returned - begin, time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
