"""Does the site build without a warning, is its code right, and does it say of the backends what they say?"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)  # blocks of "py" are others' code, not run
PAGES_WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs", reason="needs the tools of the site: pip install 'triton-attention[docs]'")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_a_page(page):
    """Its blocks run one after the other, on a GPU if there is one."""
    if "transformers" in page.name:
        pytest.importorskip("transformers", reason="needs Transformers: pip install 'triton-attention[transformers]'")
    names = {"__name__": page.stem}
    for block in BLOCK.findall(page.read_text()):
        block = block if torch.cuda.is_available() else block.replace('device="cuda"', 'device="cpu"')
        exec(compile(block, str(page), "exec"), names)


def test_every_page_of_code_is_found():
    assert {"README.md", "index.md", "pair_bias.md", "transformers.md"} <= {page.name for page in PAGES_WITH_CODE}


def test_the_site_builds_without_a_warning(hooks, tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's advertisement of its successor
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for page in PAGES:
        if page.name != "README.md":
            path = page.relative_to(ROOT / "docs").with_suffix("")
            html = tmp_path / (path if path.name != "index" else path.parent) / "index.html"
            assert html.exists(), page
            assert "merror" not in html.read_text()
    assert "<math" in (tmp_path / "math" / "index.html").read_text()
    assert (tmp_path / "pictures").is_dir()
    assert 'href="https://fonts' not in (tmp_path / "index.html").read_text()


def test_the_support_table_is_what_the_backends_say(hooks):
    lines = hooks.support_table().splitlines()
    assert lines[0] == "| | `hopper` | `portable` |"
    rows = {cells[1]: cells[2:4] for cells in ([cell.strip() for cell in line.split("|")] for line in lines[2:])}
    assert rows["causal"] == rows["packed sequences"] == ["yes", "yes"]
    assert rows["float64"][1].startswith("no: computes in float16, bfloat16 and float32")
    assert rows["rows that start anywhere"][0].startswith("no: reads tiles whose rows")
    assert rows["rows that start anywhere"][1] == "yes"


def test_the_device_table_is_what_the_backends_say(hooks):
    h100, a100, cpu = hooks.device_table().splitlines()[2:]
    assert "| yes | yes | no: no cuda tensor lands here silently" in h100
    assert "| no: runs on NVIDIA GPUs of compute capability 9.0, and an A100 has 8.0 | yes | no" in a100
    assert cpu.endswith("and the tensors are on cpu | yes |")


def test_every_test_that_a_page_names_is_there():
    text = "".join(page.read_text() for page in PAGES)
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) >= 15
    for path, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{name}"
