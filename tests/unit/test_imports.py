"""Do imports point one way, and does importing the package need no Triton and no time?"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import triton_attention

PACKAGE = Path(triton_attention.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in PACKAGE.rglob("*.py")
}

# Who may import whom, lazily or not. A row holds for a module and, where they have no row of their own, for the modules
# below it; "" is the package itself.
ARROWS = {
    "": {"api"},
    "__main__": {"cli"},
    "cli": {"", "dispatch", "problem", "testing"},
    "api": {"dispatch", "eager", "problem", "reference"},
    "compat": {"api", "compat", "problem"},
    "integrations": {"api", "problem"},
    "integrations.pytorch": {"dispatch", "ops", "problem"},
    "dispatch": {"hopper.support", "ops", "portable.support", "problem", "reference"},
    "eager": set(),
    "ops": {"eager", "hopper.launch", "philox", "portable.launch", "problem"},
    "hopper.support": {"problem"},
    "hopper": {"_compat", "arguments", "blocks", "eager", "hopper", "kernel", "packed", "philox", "problem", "recipes"},
    "portable.support": {"problem"},
    "portable": {"arguments", "blocks", "kernel", "packed", "philox", "portable", "problem"},
    "recipes": {"kernel", "ready"},
    "ready": set(),
    "kernel": {"arguments"},
    "_compat": set(),
    "arguments": {"problem"},
    "blocks": set(),
    "packed": {"blocks", "kernel"},
    "reference": {"philox", "problem"},
    "philox": set(),
    "problem": set(),
    "testing": {
        "",
        "api",
        "dispatch",
        "hopper",
        "kernel",
        "ops",
        "philox",
        "portable",
        "problem",
        "reference",
        "testing",
    },
}
MAY_IMPORT_TRITON = {"_compat", "cli", "hopper", "kernel", "packed", "portable", "ready", "recipes", "testing"}


def row_of(module, rows):
    """The longest of `rows` that is the module itself or above it."""
    above = [row for row in rows if row == module or (row and module.startswith(row + "."))]
    return max(above, key=len, default=None)


def imported_names(path, module):
    """Dotted names that a file imports, at its top or inside functions."""
    package = ["triton_attention", *module.split(".")]
    package = [part for part in package if part]
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*origin, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def imports_of(module):
    """Modules of this package that a module imports."""
    for name in imported_names(MODULES[module], module):
        root, _, rest = name.partition(".")
        if root == "triton_attention":
            while rest not in MODULES:  # the last part is a name in a module
                rest = rest.rpartition(".")[0]
            yield rest


def test_the_walk_sees_imports():
    assert {"ops", "reference", "hopper.support", "problem"} <= set(imports_of("dispatch"))  # ops: inside a function
    assert "api" in set(imports_of(""))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows(module):
    row = row_of(module, ARROWS)
    assert row is not None, f"{module} has no row in ARROWS"
    wrong = [name for name in imports_of(module) if row_of(name, ARROWS[row]) is None]
    assert not wrong, f"{module} must not import {wrong}: its row is {row!r}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_kernels_import_triton(module):
    imports_triton = any(name.split(".")[0] == "triton" for name in imported_names(MODULES[module], module))
    assert not imports_triton or row_of(module, MAY_IMPORT_TRITON) is not None


def run_python(code):
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_TRITON = """
import sys

class WithoutTriton:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [WithoutTriton(finder) for finder in sys.meta_path]
try:
    import triton
except ImportError:
    pass
else:
    raise SystemExit("Triton is not hidden")

import torch
import triton_attention
import triton_attention.compat.flash_attn, triton_attention.compat.flash_attn_triton, triton_attention.compat.sdpa

q, k, v = (torch.randn(2, 9, 4, 8, requires_grad=True) for _ in range(3))
bias = torch.zeros(4, 9, 9, requires_grad=True)
triton_attention.attention(q, k, v, bias=bias, causal=True).sum().backward()
assert bias.grad.shape == bias.shape
reasons = triton_attention.explain(q, k, v).reasons
print(all("triton is not installed" in reasons[backend] for backend in ("hopper", "portable")))
"""


def test_works_without_triton():
    assert run_python(WITHOUT_TRITON) == "True\n"


IMPORT_TIME = """
import sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import triton_attention
print(time.perf_counter() - start)
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
assert "triton_attention" in loaded and "triton" not in loaded
"""


def test_importing_takes_no_time():
    assert min(float(run_python(IMPORT_TIME)) for _ in range(3)) < 0.2  # seconds


def test_public_names():
    assert sorted(triton_attention.__all__) == ["__version__", "attention", "attention_varlen", "explain"]
    assert all(hasattr(triton_attention, name) for name in triton_attention.__all__)
    assert (PACKAGE / "py.typed").exists()
