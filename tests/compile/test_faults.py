"""Do compilations survive interruption, a cache that cannot be written, and each other: threads, processes, forks?"""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import triton_attention
from triton_attention import kernel
from triton_attention.testing import Case
from triton_attention.testing.fake_device import TARGETS, launches

TARGET = TARGETS["sm_90"]

# Compilations are compared by their PTX: of one PTX, ptxas makes binaries that can differ.
PROGRAM = """
import builtins, errno, hashlib, os, sys
import torch
import triton_attention
from triton_attention.kernel import compile_launch
from triton_attention.testing import Case
from triton_attention.testing.fake_device import TARGETS, launches

def compiled(head_dim=64):
    target = TARGETS["sm_90"]
    launch = launches(Case(300, 300, head_dim, dtype=torch.bfloat16), target)[0]
    return hashlib.sha256(compile_launch(launch, target).asm["ptx"].encode()).hexdigest()
"""

PLAIN = PROGRAM + "print('begin', flush=True); print(compiled())"


def start(program, cache):
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(
            [os.path.dirname(triton_attention.__path__[0]), os.environ.get("PYTHONPATH", "")]
        ),
    }
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def output(process):
    """The last line of a process that ends well."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out.splitlines()[-1]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What a compilation that nothing disturbs makes."""
    return output(start(PLAIN, tmp_path_factory.mktemp("undisturbed")))


def test_interrupted_compilations_leave_a_cache_that_works(tmp_path, expected):
    for delay, number in ((0.1, signal.SIGINT), (0.7, signal.SIGINT), (0.4, signal.SIGKILL)):
        process = start(PLAIN, tmp_path)
        assert process.stdout.readline() == "begin\n"
        time.sleep(delay)
        process.send_signal(number)
        process.communicate(timeout=200)
    assert output(start(PLAIN, tmp_path)) == expected


def test_processes_that_compile_the_same_at_once(tmp_path, expected):
    processes = [start(PLAIN, tmp_path) for _ in range(4)]
    assert [output(process) for process in processes] == [expected] * 4


READ_ONLY = (
    PROGRAM
    + """
cache = os.environ["TRITON_CACHE_DIR"]
before = compiled()
real_open, real_makedirs = builtins.open, os.makedirs

def refuse(path):
    if os.path.abspath(path).startswith(cache):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

def read_only_open(path, mode="r", *arguments, **keywords):
    if isinstance(path, str) and set(mode) & set("wax+"):
        refuse(path)
    return real_open(path, mode, *arguments, **keywords)

def read_only_makedirs(path, *arguments, **keywords):
    if not os.path.isdir(path):
        refuse(path)
    return real_makedirs(path, *arguments, **keywords)

builtins.open, os.makedirs = read_only_open, read_only_makedirs
assert compiled() == before  # what is there is used
try:
    compiled(128)  # what is not there is refused by the system's own error
    raise SystemExit("the cache was written")
except OSError as error:
    assert error.errno == errno.EROFS
builtins.open, os.makedirs = real_open, real_makedirs
compiled(128)
print("fine")
"""
)


def test_read_only_cache(tmp_path):
    assert output(start(READ_ONLY, tmp_path)) == "fine"


FORK = (
    PROGRAM
    + """
before = compiled()
child = os.fork()
if child == 0:
    q = torch.randn(1, 5, 2, 16, requires_grad=True)
    triton_attention.attention(q, q, q).sum().backward()
    os._exit(0 if compiled() == before and compiled(32) and q.grad.isfinite().all() else 1)
assert os.waitpid(child, 0)[1] == 0
compiled(32)
print("fine")
"""
)


def test_fork_after_import_and_compilation(tmp_path):
    assert output(start(FORK, tmp_path)) == "fine"


def test_threads_that_compile_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = Case(300, 300, 32, dtype=torch.bfloat16)
    many = [*launches(case, TARGET), *launches(case, TARGET, "hopper")] * 2
    with ThreadPoolExecutor(8) as threads:
        compiled = list(threads.map(lambda launch: kernel.compile_launch(launch, TARGET).asm["ptx"], many))
    assert compiled[: len(many) // 2] == compiled[len(many) // 2 :]


def test_an_interrupted_variant_is_compiled_by_the_next_call(monkeypatch):
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_target=lambda: TARGET)
    monkeypatch.setattr(kernel, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(kernel, "_variants", {})
    launch = launches(Case(300, 300, 64, dtype=torch.bfloat16), TARGET)[0]

    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kernel.triton, "compile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kernel.variant(launch)
    assert kernel._variants == {}
    assert kernel.variant(launch) is kernel.variant(launch)
