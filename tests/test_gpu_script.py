"""The script for CUDA machines, where there is none."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Start it in a process that sees no GPU."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_says_that_there_is_no_device_and_measures_nothing() -> None:
    done = run()
    assert done.returncode == 3
    assert done.stdout == "no CUDA device: nothing measured\n"


def test_explains_its_options() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "--minutes" in done.stdout
