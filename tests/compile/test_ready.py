"""Does a launch that was prepared tell the driver what a launch by Triton's public way tells it?"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_driver import build

import triton_attention


@pytest.mark.skipif(
    shutil.which("cc") is None, reason="Triton compiles its launchers with a C compiler, and none is here"
)
def test_a_prepared_launch_is_the_public_one(tmp_path):
    build(tmp_path)
    path = os.pathsep.join([str(Path(triton_attention.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PYTHONPATH": path,
        "LD_LIBRARY_PATH": str(tmp_path),
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_INTERPRET": "0",
    }
    program = Path(__file__).with_name("fake_driver.py")
    done = subprocess.run([sys.executable, program, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 30
