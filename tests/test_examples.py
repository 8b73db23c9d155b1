"""The scripts in examples/, run as they are."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest


def test_an_sd3_pipeline_is_sampled_in_20_lines(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("diffusers")
    script = root / "examples" / "sample_sd3_with_flowsolvers.py"
    lines = script.read_text("utf-8").splitlines()
    assert sum(bool(line.strip()) and not line.startswith(("#", '"""')) for line in lines) <= 20
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(script))
    assert found["image"].size == (16, 16)
    assert (tmp_path / "sd3.png").stat().st_size > 0
    assert found["pipe"].scheduler.step_index == 10
    assert "pec2 on shift:3@uniform: 10 evaluations in 10 steps" in capsys.readouterr().out
