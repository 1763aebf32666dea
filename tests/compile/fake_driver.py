"""What reaches the CUDA driver where there is none? A stand-in for libcuda that writes launches down.

Run as a program, with the folder of the stand-in: compares launches of the Hopper backend that were prepared with those
that go Triton's public way, and prints how many.
"""

import ctypes
import random
import re
import subprocess
import sys
from pathlib import Path

_SOURCE = """
#include <string.h>
typedef unsigned long long u64;
struct {
  int launches, encoded, count, sizes[256];
  unsigned grid[3], threads, shared;
  u64 stream;
  unsigned char parameters[256][128];
} log_;
struct config { unsigned grid[3], block[3], shared; void *stream; };
int cuLaunchKernelEx(struct config *config, void *function, void **parameters, void **extra) {
  log_.launches++;
  memcpy(log_.grid, config->grid, sizeof log_.grid);
  log_.threads = config->block[0];
  log_.shared = config->shared;
  log_.stream = (u64)config->stream;
  for (int i = 0; i < log_.count; i++) memcpy(log_.parameters[i], parameters[i], log_.sizes[i]);
  return 0;
}
int cuTensorMapEncodeTiled(void *map, int type, unsigned rank, void *address, u64 *sizes, u64 *strides, unsigned *box,
                           unsigned *steps, int interleave, int swizzle, int promotion, int fill) {
  unsigned char *bytes = memset(map, 0, 128);
  log_.encoded++;
  memcpy(bytes, &address, 8);
  bytes[8] = type, bytes[9] = rank, bytes[10] = swizzle, bytes[11] = fill;
  for (unsigned i = 0; i < rank; i++) memcpy(bytes + 16 + 8 * i, sizes + i, 8), bytes[96 + i] = box[i];
  for (unsigned i = 0; i + 1 < rank; i++) memcpy(bytes + 56 + 8 * i, strides + i, 8);
  return 0;
}
int cuPointerGetAttribute(u64 *data, int attribute, u64 address) { *data = address; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "stand-in"; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)2; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)3; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
"""


def build(folder: Path) -> None:
    """Write libcuda.so.1 with every function of the driver that the installed Triton names."""
    import triton

    backend = Path(triton.__file__).parent / "backends/nvidia"
    text = "".join((backend / name).read_text() for name in ("driver.c", "driver.py"))
    written = re.findall(r"^int (cu\w+)", _SOURCE, re.M)
    names = {name for name in re.findall(r"\bcu[A-Z]\w+\b", text) if not name.endswith(("_t", "Handle"))} - {*written}
    (folder / "cuda.c").write_text(_SOURCE + "".join(f"int {name}() {{ return 0; }}\n" for name in sorted(names)))
    command = ["cc", "-w", "-shared", "-fPIC", "-o", "libcuda.so.1", "cuda.c"]
    subprocess.run(command, cwd=folder, check=True)


class Log(ctypes.Structure):
    """The last launch, and how many there were."""

    _fields_ = (
        ("launches", ctypes.c_int),
        ("encoded", ctypes.c_int),
        ("count", ctypes.c_int),
        ("sizes", ctypes.c_int * 256),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_ulonglong),
        ("parameters", (ctypes.c_ubyte * 128) * 256),
    )


def activate(folder: Path, stream: int) -> Log:
    """Make Triton's driver for NVIDIA active, over the stand-in: an H100 whose current stream is this one."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: stream

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    return Log.in_dll(ctypes.CDLL(str(folder / "libcuda.so.1")), "log_")


_BYTES = {"*": 8, "i1": 1, "i32": 4, "i64": 8, "fp32": 4}


def sizes(signature: object) -> list[int]:
    """How many bytes each parameter of a kernel has, where Triton passes a descriptor as map, sizes and strides."""
    if isinstance(signature, tuple):
        return [size for item in signature for size in sizes(item)]
    name = str(signature)
    if name == "constexpr":
        return []
    if name.startswith("tensordesc"):
        rank = name.split("]")[0].count(",") + 1
        return [128, *[4] * rank, *[8] * rank]
    return [_BYTES["*" if name.startswith("*") else name]]


def main(folder: Path) -> None:
    import torch

    from triton_attention import kernel, recipes
    from triton_attention.hopper import launch
    from triton_attention.problem import NO_EXTRAS, Mask
    from triton_attention.ready import ready

    log = activate(folder, stream=77)

    def seen(compiled, start, *arguments):
        """What the driver is told by a launch."""
        log.sizes[:] = [*(known := sizes(tuple(compiled.src.signature.values()))), *[0] * (256 - len(known))]
        log.count = len(known)
        before = log.launches
        start(*arguments)
        assert log.launches == before + 1
        parameters = [bytes(log.parameters[i][:size]) for i, size in enumerate(known)]
        return tuple(log.grid), log.threads, log.shared, log.stream, parameters

    def compare(planned):
        compiled, values = kernel.variant(planned), recipes._values(planned)
        public = seen(compiled, compiled[(planned.programs, 1, 1)], *values)
        prepared, encoded = ready(compiled, planned.programs, values), log.encoded
        items = [item for argument in prepared.arguments for item in argument]
        assert seen(compiled, prepared.start, 77, items) == public
        assert seen(compiled, prepared.start, 78, items)[3] == 78
        assert log.encoded == encoded, "the launch was not prepared"

    def compare_in_other_company(launcher):
        """Addresses that come again, with others than before, are put together from what is known of each."""
        draw, known = random.Random(0), [[(1 + 16 * i + j) << 20 for i in range(32)] for j in range(3)]
        for addresses in (*known, *(list(map(draw.choice, zip(*known, strict=True))) for _ in range(5))):
            compiled, values = launcher._compiled, [maker.make(addresses) for maker in launcher._makers]
            public, encoded = seen(compiled, compiled[(launcher._programs, 1, 1)], *values), log.encoded
            assert seen(compiled, launcher.start, addresses, 77) == public
        assert log.encoded == encoded, "what was known was made again"

    q, k, v = (x.bfloat16() for x in torch.randn(3, 2, 300, 3, 96))
    dout, out, lse = torch.zeros_like(q), torch.zeros_like(q), torch.zeros(2, 3, 300)
    plans = []
    for bias in (None, torch.randn(1, 3, 300, 304)[..., :300], torch.randn(2, 1, 1, 300), torch.zeros(1, 1, 300, 1)):
        for mask in (Mask(), Mask(None, 0)):
            plans.append(launch.plan_forward(q, k, v, bias, mask, 0.1, 8))
            call = (dout, lse, q, k, v, bias, out, lse, mask, 0.1)
            for deterministic in (False, True):
                plans.append(launch.plan_backward(*call, bias is not None, NO_EXTRAS, deterministic, 8))
    launches = [launch for plan in plans for launch in recipes._launches(plan)]
    for planned in launches:
        compare(planned)
    numbers = (Mask(None, 0), 0.1, False, NO_EXTRAS, False, 8)
    for make, given in (
        (lambda *tensors: launch.plan_forward(*tensors, Mask(None, 0), 0.1, 8), (q, k, v, None)),
        (lambda *tensors: launch.plan_backward(*tensors, *numbers), (dout, None, q, k, v, None, out, lse)),
    ):
        for launcher in recipes.Recipe.of(make, given)._launches:
            compare_in_other_company(launcher)
    print(len(launches))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
