"""What the engine does without starting Ray; tests/test_ray.py has the rest."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nextdit_core import Recipe, UserError, registry
from nextdit_core.training.run_folder import RunFolder
from nextdit_ray import RayEngine
from nextdit_ray.engine import _cause, _interrupts


def test_it_is_found_by_name() -> None:
    assert registry.load("nextdit.engines", "ray") is RayEngine


def test_a_recipe_that_does_not_fit_is_refused_before_ray_starts(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(
        {"out": str(tmp_path / "run"), "modality": "no such", "dataset": "none", "engine": "ray"}
    )
    with pytest.raises(UserError, match="unknown modality 'no such'"):
        RayEngine().train(recipe)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_a_request_that_workers_see(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    with _interrupts(run) as count:
        assert not run.stop_file.exists()
        signal.raise_signal(signal.SIGINT)
        assert count == [1]
        assert run.stop_file.exists()
        signal.raise_signal(signal.SIGINT)
        assert count == [2]
    assert signal.getsignal(signal.SIGINT) is before


def test_the_cause_is_the_last_line_of_the_first_failed_worker() -> None:
    group = Exception()
    group.worker_failures = {1: RuntimeError("Traceback ...\nRuntimeError: connection closed")}
    assert _cause(group) == "RuntimeError: connection closed"
    assert _cause(ValueError("no such node")) == "no such node"
    assert _cause(KeyError()) == "KeyError"


def test_importing_the_engine_loads_no_ray() -> None:
    code = "import sys, nextdit_ray; print('ray' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"
