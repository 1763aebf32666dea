"""Does the package run nothing that a caller passes, and write nothing outside of Triton's cache?"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import triton_attention

PACKAGE = Path(triton_attention.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

RUNS_TEXT = {"eval", "exec", "compile", "__import__"}  # as bare names; a kernel's `compile_launch` is something else
READS_OBJECTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml"}
LOADS = {("torch", "load"), ("torch", "save"), ("numpy", "load"), ("os", "system"), ("os", "popen"), ("ctypes", "CDLL")}
STARTS_PROGRAMS = {"testing/fake_device.py"}  # ptxas and cuobjdump, by lists of words and never through a shell


def names(path, kind):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind)]


def id_of(path):
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=id_of)
def test_nothing_is_evaluated_or_unpickled(path):
    called = {call.func.id for call in names(path, ast.Call) if isinstance(call.func, ast.Name)}
    assert not called & RUNS_TEXT
    imported = {alias.name.split(".")[0] for node in names(path, ast.Import) for alias in node.names}
    imported |= {(node.module or "").split(".")[0] for node in names(path, ast.ImportFrom)}
    assert not imported & READS_OBJECTS
    reached = {(node.value.id, node.attr) for node in names(path, ast.Attribute) if isinstance(node.value, ast.Name)}
    assert not reached & LOADS
    assert "subprocess" not in imported or id_of(path) in STARTS_PROGRAMS
    assert not [call for call in names(path, ast.Call) if any(keyword.arg == "shell" for keyword in call.keywords)]


def test_the_search_finds_what_it_looks_for(tmp_path):
    for text in (
        "eval('1')",
        "import pickle",
        "from yaml import load",
        "import torch\ntorch.load('x')",
        "f(shell=True)",
    ):
        bad = tmp_path / "bad.py"
        bad.write_text(text)
        with pytest.raises(AssertionError):
            test_nothing_is_evaluated_or_unpickled(bad)


ROOT = Path(__file__).resolve().parents[2]
FOR_OTHERS = {"integrations/transformers.py": {"transformers"}}  # by which alone it is imported


@pytest.mark.parametrize("path", MODULES, ids=id_of)
def test_pytorch_and_triton_are_all_that_is_imported(path):
    imported = {alias.name for node in names(path, ast.Import) for alias in node.names}
    imported |= {node.module for node in names(path, ast.ImportFrom) if node.module}
    packages = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert packages <= {"torch", "triton", "triton_attention"} | FOR_OTHERS.get(id_of(path), set())


def test_pytorch_and_triton_are_all_that_is_installed_in_versions_that_were_tried():
    needed = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S).group(1)
    needed = re.findall(r"""^ *["']([\w-]+)""", needed, re.M)
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert needed == ["torch", "triton"]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+(; .+)?", line) for line in pinned)
    assert len(set(pinned)) == len(pinned)
    assert {*needed} <= {line.split("==")[0] for line in pinned}


AUDITED = """
import os, sys, tempfile
import torch, triton
allowed = [os.environ["TRITON_CACHE_DIR"], tempfile.gettempdir(), os.devnull]
wrong, programs = [], set()

def audit(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = flags is not None and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if not writes or isinstance(path, int):
            return
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
        path = arguments[0]
    elif event in ("os.rename", "os.link", "os.symlink"):
        path = arguments[1]
    elif event in ("socket.connect", "socket.getaddrinfo", "os.system"):
        wrong.append((event, arguments))
        return
    elif event == "subprocess.Popen":
        programs.add(os.path.basename(os.fsdecode(arguments[0])))
        return
    else:
        return
    path = os.path.abspath(os.fsdecode(path))
    if not any(path.startswith(place) for place in allowed):
        wrong.append((event, path))

sys.addaudithook(audit)
import triton_attention, triton_attention.compat.sdpa, triton_attention.cli
from triton_attention.testing import Case
from triton_attention.testing.fake_device import TARGETS, compile_for, launches

q, k, v = (torch.randn(2, 9, 4, 8, requires_grad=True) for _ in range(3))
bias = torch.zeros(4, 9, 9, requires_grad=True)
triton_attention.attention(q, k, v, bias=bias, causal=True).sum().backward()
triton_attention.cli.main(["info"])
for backend in ("portable", "hopper"):
    for launch in launches(Case(300, 304, 64, bias="1hqk", dtype=torch.bfloat16), TARGETS["sm_90"], backend):
        compile_for(launch, TARGETS["sm_90"])
print("WRONG", wrong)
print("PROGRAMS", sorted(programs))
print("LEFT", sorted(os.listdir(tempfile.gettempdir())))
"""


def test_nothing_is_written_outside_of_the_cache(tmp_path):
    """Nor anything left in the folder for temporary files, nor asked of the network."""
    pytest.importorskip("triton")
    folders = {name: tmp_path / name for name in ("cache", "temporary", "home", "work")}
    for folder in folders.values():
        folder.mkdir()
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(folders["cache"]),
        "TORCHINDUCTOR_CACHE_DIR": str(folders["cache"] / "inductor"),  # PyTorch makes it, used or not
        "TMPDIR": str(folders["temporary"]),
        "HOME": str(folders["home"]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", AUDITED], env=environment, cwd=folders["work"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wrong, programs, left = done.stdout.splitlines()[-3:]
    assert wrong == "WRONG []"
    assert programs == "PROGRAMS ['cuobjdump', 'ptxas']"
    assert left == "LEFT []"
    assert any(folders["cache"].iterdir())
    assert not any(folders["home"].iterdir())
    assert not any(folders["work"].iterdir())
