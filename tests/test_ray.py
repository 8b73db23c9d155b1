"""Training on Ray: workers that die, stop, or change in number."""

from __future__ import annotations

import json
import os
import signal
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

STEPS = 60


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of the demo, shortened."""
    from importlib.resources import files

    text = (files("modality_image") / "digits.toml").read_text()
    changes = {"steps": STEPS, "log_every": 5, "checkpoint_every": 20, "keep_checkpoints": 9}
    lines = [line for line in text.splitlines() if line.split(" ")[0] not in changes]
    short = "\n".join([f"{key} = {value}" for key, value in changes.items()] + lines)
    path = tmp_path_factory.mktemp("recipe") / "digits.toml"
    path.write_text(short)
    return path


def _curve(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["step"] for row in rows})
    return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers that nothing happened to."""
    from nextdit_core import Recipe, train

    run = tmp_path_factory.mktemp("runs") / "whole"
    train(Recipe.load(recipe, [f'out="{run}"']))
    assert sorted(_curve(run)) == list(range(1, STEPS + 1))
    return run


def test_a_killed_worker_leaves_no_trace_in_the_curve(
    recipe: Path, uninterrupted: Path, tmp_path: Path, start: Any
) -> None:
    running = start(recipe, tmp_path / "killed")
    running.wait_for_step(30)
    (begun,) = [row for row in running.rows("events.jsonl") if row["event"] == "start"]
    os.kill(begun["workers"][1]["pid"], signal.SIGKILL)
    assert running.end() == 0, running.log.read_text()
    starts = [row["step"] for row in running.rows("events.jsonl") if row["event"] == "start"]
    assert starts[0] == 0
    assert starts[1] in (20, 40)
    assert _curve(tmp_path / "killed") == _curve(uninterrupted)
    last = f"checkpoints/step_{STEPS:08d}/backbone/model.safetensors"
    assert (tmp_path / "killed" / last).read_bytes() == (uninterrupted / last).read_bytes()


def test_ctrl_c_on_two_workers_and_resume_on_one(
    recipe: Path, uninterrupted: Path, tmp_path: Path, start: Any
) -> None:
    run = tmp_path / "stopped"
    running = start(recipe, run)
    running.wait_for_step(25)
    running.interrupt()
    assert running.end() == 130, running.log.read_text()
    assert "The same command resumes" in running.log.read_text()
    stopped = max(_curve(run))
    assert 25 <= stopped < STEPS
    assert (run / f"checkpoints/step_{stopped:08d}/complete.json").is_file()

    rest = start(recipe, run, "engine=local", "workers=1")
    assert rest.end() == 0, rest.log.read_text()
    one, two = _curve(run), _curve(uninterrupted)
    assert one.keys() == two.keys()
    assert max(abs(one[step] - two[step]) for step in two) <= 1e-6


def test_an_error_of_the_user_is_one_line_and_not_retried(
    recipe: Path, tmp_path: Path, start: Any
) -> None:
    running = start(recipe, tmp_path / "wild", "optimizer.lr=1e30", "optimizer.warmup_steps=0")
    assert running.end() == 2, running.log.read_text()
    last = running.log.read_text().splitlines()[-1]
    assert last.startswith("nextdit: error: the loss of step ")
    assert "Lower optimizer.lr" in last
    starts = [row for row in running.rows("events.jsonl") if row["event"] == "start"]
    assert len(starts) == 1


def test_frozen_text_is_cached_by_all_workers_from_relative_folders(
    recipe: Path, letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nextdit_core import Recipe, train

    monkeypatch.chdir(tmp_path)
    options = tomllib.loads(recipe.read_text()) | {
        "text_encoder": "transformers",
        "text_encoder_options": {"model": letters.name},
        "text_cache": "cache",
        "steps": 10,
    }
    curves = []
    for engine, workers in (("ray", 2), ("local", 1)):
        run = {"out": engine, "engine": engine, "workers": workers}
        train(Recipe.from_dict(options | run))
        curves.append(_curve(tmp_path / engine))
        assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 11  # ten digits and ""
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    events = (tmp_path / "local" / "events.jsonl").read_text()
    assert '"made": 0, "captions": 11' in events


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["all weights", "lora"])
def test_tuning_on_two_workers_is_tuning_on_one_with_one_log(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any] | None
) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    from nextdit_core import Recipe, train

    monkeypatch.chdir(tmp_path)
    values = tomllib.loads(recipe.read_text()) | {"steps": 5, "engine": "local", "workers": 1}
    train(Recipe.from_dict(values | {"out": "base"}))
    del values["model"]
    values |= {"init_from": "base", "tensorboard": True, "steps": 10}
    if lora is not None:
        values["lora"] = lora
    rows = []
    for engine, workers in (("ray", 2), ("local", 1)):
        train(Recipe.from_dict(values | {"out": engine, "engine": engine, "workers": workers}))
        run = tmp_path / engine
        rows.append([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
        assert len(list((run / "tensorboard").iterdir())) == 1  # the first worker's
        log = accumulator.EventAccumulator(str(run / "tensorboard"))
        log.Reload()
        shown = {event.step: event.value for event in log.Scalars("train/loss")}
        assert shown == pytest.approx(_curve(run), rel=1e-6)
    assert [row["loss"] for row in rows[0]] == pytest.approx(
        [row["loss"] for row in rows[1]], abs=1e-5
    )
    done = [
        [row["tflops"] * row["step_seconds"] for row in some if "tflops" in row] for some in rows
    ]
    assert len(done[0]) == 2
    assert done[0] == pytest.approx(done[1], rel=1e-4)  # of all workers together
