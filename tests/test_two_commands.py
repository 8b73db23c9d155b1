"""The README's two commands, on a fresh clone with nothing set up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    place = tmp_path_factory.mktemp("fresh") / "clone"
    subprocess.run(["git", "clone", "-q", str(root), str(place)], check=True)
    return place


def _hatch(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Those of the environment that runs this test would steer the new one.
    steering = ("HATCH", "UV_", "VIRTUAL_ENV", "PYTHONPATH")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(steering)}
    hatch = os.environ.get("HATCH_EXECUTABLE") or shutil.which("hatch") or _beside(clone)
    return subprocess.run(
        [hatch, *arguments], cwd=clone, env=clean, capture_output=True, text=True, timeout=1700
    )


def _beside(clone: Path) -> str:
    hatch = Path(__file__).parents[1] / ".ci" / "tools" / "bin" / "hatch"
    if not hatch.exists():
        pytest.skip("hatch is not on the path; install it with: pip install hatch")
    return str(hatch)


def test_the_readme_states_them(root: Path) -> None:
    readme = (root / "README.md").read_text()
    ci = (root / ".ci" / "run").read_text()
    for command in ("hatch run demo", "hatch test"):
        assert f"\n{command}\n" in readme
        assert f" {command}\n" in ci


def test_the_first_trains_and_draws_and_again_only_draws(clone: Path) -> None:
    run = _hatch(clone, "run", "demo")
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    (accuracy,) = re.findall(r"accuracy +(\d+\.\d)%", run.stdout)
    (reader,) = re.findall(r"reads (\d+\.\d)% of real", run.stdout)
    (seconds,) = re.findall(r"time +(\d+\.\d) s", run.stdout)
    assert float(reader) >= 97
    assert float(accuracy) >= 90
    assert float(seconds) <= 240
    picture = clone / "runs" / "digits" / "digits.png"
    before = picture.read_bytes()

    begun = time.monotonic()
    again = _hatch(clone, "run", "demo")
    assert again.returncode == 0, again.stderr
    assert "training" not in again.stderr
    assert re.findall(r"accuracy +(\d+\.\d)%", again.stdout) == [accuracy]
    assert picture.read_bytes() == before
    assert time.monotonic() - begun < 90


def test_the_second_sets_up_and_runs_tests(clone: Path) -> None:
    """One package stands for all: this test is itself run by the whole command."""
    run = _hatch(clone, "test", "packages/rope3d")
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout)
