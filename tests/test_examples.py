"""The scripts in examples/, run as they are."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image as Pillow

from nextdit_core import Tokens


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


def test_lumina_next_is_sampled_in_ten_lines(
    root: Path,
    lumina_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = root / "examples" / "sample_lumina_next.py"
    code = script.read_text("utf-8").split('"""')[2]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(script), str(lumina_folder), "a red fox"])
    found = runpy.run_path(str(script))
    (expected,) = found["pipe"]("a red fox", nfe=20, schedule="shift:4", seed=7)
    with Pillow.open(tmp_path / "lumina.png") as picture:
        assert picture.tobytes() == expected.tobytes()
    assert "64 x 64 pixels in lumina.png" in capsys.readouterr().out


def test_three_kinds_of_token_share_a_trunk(root: Path) -> None:
    """Each loss falls in one packed batch, and no kind sees another."""
    pytest.importorskip("sklearn")
    found = runpy.run_path(str(root / "examples" / "train_three_kinds.py"))
    curves = found["train"](120)
    first, last = (
        {k: sum(c[s]) / 20 for k, c in curves.items()} for s in (slice(20), slice(-20, None))
    )
    assert set(curves) == {"digits", "sounds", "points"}
    for kind, loss in last.items():
        assert loss < 0.85 * first[kind], (kind, first, last)

    torch.manual_seed(0)
    model, random = found["ThreeKinds"](), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=random)
    batch, times = {}, {}
    for kind, (make, _) in found["KINDS"].items():
        batch[kind] = Tokens.pack([Tokens(v, p, (len(v),)) for v, p in make(2, random)])
        times[kind] = torch.rand(2, generator=random)
    with torch.no_grad():
        together = model(batch, times)
        for kind in batch:
            alone = model({kind: batch[kind]}, {kind: times[kind]})[kind]
            assert (together[kind] - alone).abs().max() <= 1e-5
