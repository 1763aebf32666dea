"""Is the wheel small, whole, and right where nothing else of the repository is?"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

pytest.importorskip("setuptools", minversion="77", reason="the wheel is built by setuptools 77 or newer")

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "triton_attention"


def run(*command, cwd=None):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what it is made of, by the tools that are here: nothing is downloaded."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "src" / "triton_attention", ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(target), str(source))
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The bin folder of an environment with the wheel, PyTorch and Triton of the surrounding one, and nothing more."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    python = folder / "bin" / "python"
    options = ("--no-deps", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel))
    inside = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    around = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    (inside / "surrounding.pth").write_text("\n".join(around) + "\n")  # .pth files in these folders are not followed
    return python.parent


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < 1_000_000


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert names == {str(path.relative_to(PACKAGE.parent)) for path in files}
    assert "triton_attention/py.typed" in names


def test_check_passes_where_the_wheel_is_installed(environment, tmp_path):
    where = run(
        str(environment / "python"), "-c", "import triton_attention; print(triton_attention.__file__)", cwd=tmp_path
    )
    assert Path(where).is_relative_to(environment.parent)
    table = run(str(environment / "triton-attention"), "check", "--device", "cpu", cwd=tmp_path)
    assert " ok, 0 WRONG, 0 refused" in table


def test_the_version_is_that_of_the_package(environment, wheel, tmp_path):
    version = run(str(environment / "triton-attention"), "--version", cwd=tmp_path).split()[-1]
    assert wheel.name.startswith(f"triton_attention-{version}-")
