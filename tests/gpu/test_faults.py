"""Does the GPU go on after a call that ran out of memory, and do threads, processes, forks and devices keep apart?"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from hardware import needs_hopper

import triton_attention
from triton_attention import attention

each_backend = pytest.mark.parametrize("backend", [pytest.param("hopper", marks=needs_hopper), "portable"])
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def leaves(seqlen=300, head_dim=64, heads=4, device="cuda", seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(2, seqlen, heads, head_dim)] * 3 + [(1, heads, seqlen, (seqlen + 7) // 8 * 8)]
    q, k, v, bias = (torch.randn(shape, generator=generator, device=device).bfloat16() for shape in shapes)
    return [tensor.requires_grad_() for tensor in (q, k, v, bias[..., :seqlen])]


def results(tensors, backend="auto", causal=True):
    q, k, v, bias = tensors
    out = attention(q, k, v, bias=bias, causal=causal, backend=backend)
    return out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))


def equal(some, others):
    """Whether two results are the same bit for bit, but for dq, which hopper adds up in no fixed order."""
    (out, dq, *grads), (other_out, other_dq, *other_grads) = some, others
    pairs = zip((out, *grads), (other_out, *other_grads), strict=True)
    same = all(torch.equal(one, other.to(one.device)) for one, other in pairs)
    return same and torch.allclose(dq, other_dq.to(dq.device), rtol=2e-2, atol=1e-4)


class MemoryLimit:
    """No memory for this process beyond what it has; what is free of that, in pieces of 32 MiB or more, is taken."""

    def __enter__(self):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        self.taken = []
        with suppress(torch.OutOfMemoryError):
            while True:
                self.taken.append(torch.empty(32 << 20, dtype=torch.uint8, device="cuda"))

    def __exit__(self, *exception):
        self.taken.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)


@each_backend
def test_out_of_memory_in_the_forward(backend):
    torch.use_deterministic_algorithms(False)
    expected = results(leaves(), backend)
    q, k, v = (torch.randn(1, 1 << 16, 16, 128, device="cuda").bfloat16().requires_grad_() for _ in range(3))
    with MemoryLimit(), pytest.raises(torch.OutOfMemoryError):
        attention(q, k, v, backend=backend)
    del q, k, v
    assert equal(expected, results(leaves(), backend))


@each_backend
def test_out_of_memory_in_the_backward(backend):
    torch.use_deterministic_algorithms(False)
    expected = results(leaves(), backend)
    tensors = [torch.randn(1, 1 << 15, 16, 128, device="cuda").bfloat16().requires_grad_() for _ in range(3)]
    out = attention(*tensors, causal=True, backend=backend)
    dout = torch.randn_like(out)
    with MemoryLimit(), pytest.raises(torch.OutOfMemoryError):
        torch.autograd.grad(out, tensors, dout, retain_graph=True)
    assert equal(expected, results(leaves(), backend))
    grads = torch.autograd.grad(out, tensors, dout)  # of the same graph
    again = torch.autograd.grad(attention(*tensors, causal=True, backend=backend), tensors, dout)
    assert equal((out, *grads), (out, *again))


@each_backend
def test_threads_that_call_at_once(backend):
    """Some compile the same variants, on streams of their own."""
    torch.use_deterministic_algorithms(False)
    calls = [(seqlen, head_dim, seed) for seed in range(4) for seqlen, head_dim in ((200, 48), (77, 48), (513, 104))]

    def call(arguments):
        seqlen, head_dim, seed = arguments
        with torch.cuda.stream(torch.cuda.Stream()):
            tensors = leaves(seqlen, head_dim, seed=seed)
            found = [results(tensors, backend) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        assert all(equal(found[0], one) for one in found)
        return found[0]

    with ThreadPoolExecutor(8) as threads:
        at_once = list(threads.map(call, calls))
    assert all(equal(one, call(arguments)) for one, arguments in zip(at_once, calls, strict=True))


PROGRAM = """
import torch
import triton_attention

def call(head_dim=64):
    q = torch.linspace(-1, 1, 2 * 99 * 2 * head_dim, device="cuda").view(2, 99, 2, head_dim).bfloat16().requires_grad_()
    out = triton_attention.attention(q, q, q, causal=True)
    return out.float().sum().item(), torch.autograd.grad(out.float().square().sum(), q)[0].float().sum().item()
"""


def start(program, cache):
    path = os.pathsep.join([os.path.dirname(triton_attention.__path__[0]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", PROGRAM + program]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output(process):
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, f"{err}\nafter it had printed: {out}"  # did it end badly, or only at its end?
    return out


def test_processes_that_share_an_empty_cache(tmp_path):
    outputs = [output(process) for process in [start("print(call(), call(40))", tmp_path) for _ in range(4)]]
    assert outputs == outputs[:1] * 4


FORK = """
import os
child = os.fork()  # PyTorch permits it until CUDA is used
if child == 0:
    print(call(), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(call())
"""


def test_fork_after_import(tmp_path):
    child, parent = output(start(FORK, tmp_path)).splitlines()
    assert child == parent


FORK_AFTER_CUDA = """
import os
call()
child = os.fork()
if child == 0:
    try:
        call()
    except RuntimeError as error:  # PyTorch's own
        os._exit(0 if "forked subprocess" in str(error) else 2)
    os._exit(3)
assert os.waitpid(child, 0)[1] == 0
call()
print("fine")
"""


def test_fork_after_use_is_refused_by_pytorch_and_harms_nothing(tmp_path):
    assert output(start(FORK_AFTER_CUDA, tmp_path)) == "fine\n"


@needs_two_gpus
@each_backend
def test_each_device_computes_the_same(backend):
    first, second = (results(leaves(304, device=f"cuda:{index}"), backend) for index in range(2))
    assert [tensor.device.index for tensor in second] == [1] * 5
    assert equal(
        results([x.detach().to("cuda:1").requires_grad_() for x in leaves(304, device="cuda:0")], backend), first
    )


@needs_two_gpus
@each_backend
def test_threads_on_two_devices(backend):
    torch.use_deterministic_algorithms(False)
    # Of rows of 16 bytes and multiples, which are as wide on the other device.
    tensors = [[x.detach().to(f"cuda:{index}").requires_grad_() for x in leaves(304)] for index in range(2)]
    expected = results(tensors[0], backend)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda index: [results(tensors[index], backend) for _ in range(50)], range(2)))
    assert all(equal(expected, one) for of_device in found for one in of_device)
    assert torch.cuda.current_device() == 0


@needs_two_gpus
def test_tensors_on_two_devices_are_refused():
    q = torch.randn(1, 8, 2, 16, device="cuda:0")
    with pytest.raises(ValueError, match="k must be on the device of q, cuda:0, got cuda:1"):
        attention(q, q.to("cuda:1"), q)
