"""The event log, read back by TensorBoard's own reader."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nextdit_core import Recipe, UserError, train
from nextdit_core.training.board import Board
from nextdit_core.training.run_folder import RunFolder

Make = Callable[..., Recipe]
Scalars = dict[str, list[tuple[int, float]]]

pytest.importorskip("tensorboard", reason="tensorboard is not installed")


@pytest.fixture
def read() -> Callable[[Path], Scalars]:
    """Read a log as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def scalars(folder: Path) -> Scalars:
        found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        found.Reload()
        return {
            tag: [(event.step, event.value) for event in found.Scalars(tag)]
            for tag in found.Tags()["scalars"]
        }

    return scalars


def _raw_steps(folder: Path) -> list[int]:
    """List the steps of all losses in the files, those that are not shown included."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [
        event.step
        for file in sorted(folder.iterdir())
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tag == "train/loss"
    ]


def _rows(run: Recipe, key: str) -> list[tuple[int, float]]:
    rows = RunFolder(run.out).rows()
    return [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows if key in row]


def test_the_log_holds_the_rows(recipe: Make, read: Callable[[Path], Scalars]) -> None:
    run = recipe(tensorboard=True, peak_tflops=1.0)
    train(run)
    shown = read(RunFolder(run.out).board_folder)
    for tag in ("loss", "grad_norm", "lr", "epoch"):
        assert shown[f"train/{tag}"] == _rows(run, tag)
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 13))
    for tag in ("step_seconds", "samples_per_second", "tokens_per_second", "data_wait"):
        assert shown[f"speed/{tag}"] == _rows(run, tag)
    assert shown["speed/mfu"] == _rows(run, "mfu")
    assert [step for step, _ in shown["speed/tflops"]] == [2, 4, 6, 8, 10, 12]


def test_a_resumed_run_continues_the_log_and_no_step_is_there_twice(
    recipe: Make, read: Callable[[Path], Scalars]
) -> None:
    run = recipe(tensorboard=True)
    train(run)
    folder = RunFolder(run.out)
    (folder.checkpoint(12) / "complete.json").unlink()  # as if writing had been cut off
    longer = recipe(tensorboard=True, steps=16)
    train(longer)  # from step 8
    assert _raw_steps(folder.board_folder) == [*range(1, 13), *range(9, 17)]
    shown = read(folder.board_folder)
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 17))
    assert shown["train/loss"] == _rows(longer, "loss")
    assert shown["speed/tflops"] == _rows(longer, "tflops")


def test_the_log_may_be_switched_on_later(recipe: Make, read: Callable[[Path], Scalars]) -> None:
    train(recipe(steps=4))
    assert not RunFolder(recipe().out).board_folder.exists()
    train(recipe(steps=8, tensorboard=True))
    train(recipe(steps=12))
    shown = read(RunFolder(recipe().out).board_folder)
    assert [step for step, _ in shown["train/loss"]] == [5, 6, 7, 8]


def test_starts_within_one_second_are_read_in_their_order(
    tmp_path: Path, read: Callable[[Path], Scalars]
) -> None:
    for start in range(3):
        board = Board(tmp_path, start)
        board.write([{"step": start + 1, "loss": float(start)}, {"step": start + 2, "loss": -1.0}])
        board.close()
    assert read(tmp_path)["train/loss"] == [(1, 0.0), (2, 1.0), (3, 2.0), (4, -1.0)]


def test_without_tensorboard_the_way_to_get_it_is_told(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "nextdit_core.training.board.find_spec",
        lambda name: None if name == "tensorboard" else real(name),
    )
    run = recipe(tensorboard=True)
    with pytest.raises(UserError, match=r"pip install 'nextdit-core\[tensorboard\]'"):
        train(run)
    assert not Path(run.out).exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*tensorboard"):
        Board(tmp_path / "tensorboard", 0)


def test_training_without_it_does_not_import_it(recipe: Make, toy: Path) -> None:
    run = recipe(steps=1)
    code = (
        f"import sys; sys.path.insert(0, {str(toy)!r})\n"
        "from nextdit_core import Recipe, train\n"
        f"train(Recipe.from_dict({run.to_dict()!r}))\n"
        "print('tensorboard' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
