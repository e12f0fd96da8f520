"""Every example that needs no data runs, small, as its reader would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize("name", [p.stem for p in sorted(EXAMPLES.glob("*.py")) if "--smoke" in p.read_text()])
def test_example_runs(name, tmp_path):
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), "--smoke"]
    if "--plot" in (EXAMPLES / f"{name}.py").read_text():
        command += ["--plot", str(tmp_path / "picture.png")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    if "--plot" in command:
        assert (tmp_path / "picture.png").stat().st_size > 10_000
