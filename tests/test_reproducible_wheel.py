"""Is the wheel the same, byte for byte, wherever it is built, and is in it what should be?"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("Makefile", "pyproject.toml", "README.md", "LICENSE", ".ci", "src")

pytestmark = [
    pytest.mark.skipif(shutil.which("git") is None, reason="needs git"),
    pytest.mark.skipif(int(version("setuptools").split(".")[0]) < 77, reason="needs setuptools 77"),
]


def build(folder, umask):
    """The wheel of a repository of these files, with a commit of a fixed time, in a folder."""
    folder.mkdir()
    for name in FILES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, folder / name)
    (folder / "src/triton_attention/left_over.py").write_text("not in git")
    (folder / ".gitignore").write_text("left_over.py\n")
    who = {f"GIT_{role}_{what}": "test" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    when = {f"GIT_{role}_DATE": "2024-05-06T07:08:09Z" for role in ("AUTHOR", "COMMITTER")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "MAKE"))}
    for command in (
        ["git", "init", "--quiet"],
        ["git", "add", "."],
        ["git", "commit", "--quiet", "-m", "all"],
        ["make", "wheel", f"PYTHON={sys.executable}"],
    ):
        done = subprocess.run(
            command, cwd=folder, env=environment | who | when, umask=umask, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    assert f"{hashlib.sha256(wheel.read_bytes()).hexdigest()}  {wheel.name}" in done.stdout
    return wheel


def test_two_builds_are_the_same_bytes_and_hold_the_package_alone(tmp_path):
    one, two = build(tmp_path / "one", 0o022), build(tmp_path / "a longer name", 0o077)
    assert one.name == two.name
    assert one.read_bytes() == two.read_bytes()
    names = zipfile.ZipFile(one).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"triton_attention"}
    package = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == package
    assert "triton_attention/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
