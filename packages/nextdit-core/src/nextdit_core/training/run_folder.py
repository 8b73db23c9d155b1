"""The folder of one run: recipe, loss curve, events and checkpoints.

recipe.toml      the settings, as resolved
metrics.jsonl    one row per optimiser step
events.jsonl     starts (with the workers' process ids), checkpoints, stops
tensorboard/     the same numbers, where the recipe asks for them
failure.txt      why the last start ended, where another try would fail in the same way
checkpoints/     step_00000100/, ... : each a saved model with a training/ folder inside
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from nextdit_core.errors import UserError
from nextdit_core.folder import cannot_write, write_text
from nextdit_core.model_folder import CHECKPOINTS, newest_checkpoint
from nextdit_core.recipe import Recipe

__all__ = ["RunFolder", "step_of"]

#: Recipe keys that may change between two starts of one run; all others shape the curve.
MAY_CHANGE = {
    "out",
    "steps",
    "sampling",
    "log_every",
    "peak_tflops",
    "tensorboard",
    "checkpoint_every",
    "keep_checkpoints",
    "engine",
    "workers",
    "address",
    "device",
    "max_failures",
    "text_cache",
}

#: More than the longest row of the loss curve.
ROW_BYTES = 4096


def step_of(checkpoint: Path) -> int:
    """Read the step from a checkpoint folder's name."""
    return int(checkpoint.name.removeprefix("step_"))


class RunFolder:
    """Read and write a run folder.

    Args:
        path: The folder; relative paths are taken from the working directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.recipe_file = self.path / "recipe.toml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.events_file = self.path / "events.jsonl"
        self.stop_file = self.path / "stop-requested"
        self.failure_file = self.path / "failure.txt"
        self.board_folder = self.path / "tensorboard"

    def open(self, recipe: Recipe) -> None:
        """Make the folder, or check that it belongs to this recipe.

        Args:
            recipe: What is about to be trained.

        Raises:
            UserError: The folder is not writable, holds something else, or belongs to a run
                with other settings. Nothing in it was changed then.
        """
        try:
            if self.path.exists() and not self.recipe_file.exists() and any(self.path.iterdir()):
                raise UserError(
                    f"{self.path} is not empty and holds no run; choose another folder: out=..."
                )
            if self.recipe_file.exists():
                self._check_same(recipe)
            (self.path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            self.stop_file.unlink(missing_ok=True)
            self.failure_file.unlink(missing_ok=True)
            write_text(self.recipe_file, tomli_w.dumps(recipe.to_dict()))
        except OSError as error:
            raise UserError(
                f"cannot write to run folder {self.path}: {error.strerror or error}; choose "
                f"another folder: out=..."
            ) from error

    def recipe(self) -> Recipe:
        """Read the recipe of the run.

        Raises:
            UserError: There is no run here.
        """
        return Recipe.load(self.recipe_file)

    def _check_same(self, recipe: Recipe) -> None:
        try:
            # Through a recipe, so that keys which are newer than the run have their defaults.
            before = Recipe.load(self.recipe_file)
        except UserError as error:
            raise UserError(
                f"{self.recipe_file} is damaged, or of a newer nextdit-core: {error}; choose "
                f"another folder: out=..."
            ) from error
        before, now = _flat(before.to_dict()), _flat(recipe.to_dict())
        for key in sorted(before.keys() | now.keys()):
            if key.split(".")[0] not in MAY_CHANGE and before.get(key) != now.get(key):
                raise UserError(
                    f"{self.path} holds a run with {key} = {before.get(key)!r}, and this recipe "
                    f"has {now.get(key)!r}; choose another folder: out=..."
                )

    def checkpoint(self, step: int) -> Path:
        """Name the checkpoint folder of a step."""
        return self.path / CHECKPOINTS / f"step_{step:08d}"

    def newest(self) -> Path | None:
        """Find the newest complete checkpoint, or None."""
        return newest_checkpoint(self.path)

    def finished(self, recipe: Recipe) -> Path | None:
        """Find the checkpoint of the recipe's last step, or None where training has to go on.

        Raises:
            UserError: The folder belongs to a run with other settings.
        """
        newest = self.newest()
        if newest is None or not self.recipe_file.exists():
            return None
        self._check_same(recipe)
        return newest if step_of(newest) >= recipe.steps else None

    def fail(self, why: str) -> None:
        """Leave word of an error that another try would meet again."""
        write_text(self.failure_file, why)

    def failure(self) -> str | None:
        """Read what `fail` left since the run was last opened, or None."""
        try:
            return self.failure_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def prune(self, keep: int) -> None:
        """Remove all but the newest checkpoints and what interrupted writes left behind."""
        folders = sorted((self.path / CHECKPOINTS).glob("step_*"))
        for folder in folders[:-keep]:
            shutil.rmtree(folder, ignore_errors=True)
        for partial in (self.path / CHECKPOINTS).glob(".step_*.partial-*"):
            shutil.rmtree(partial, ignore_errors=True)

    def rows(self) -> list[dict[str, Any]]:
        """Read the loss curve; a last row that was cut off is left out."""
        return _read_rows(self.metrics_file)

    def last_row(self) -> dict[str, Any] | None:
        """Read the newest row of the loss curve without reading the others."""
        try:
            with self.metrics_file.open("rb") as stream:
                stream.seek(0, os.SEEK_END)
                stream.seek(max(0, stream.tell() - ROW_BYTES))
                lines = stream.read().split(b"\n")
        except FileNotFoundError:
            return None
        return json.loads(lines[-2]) if len(lines) > 2 else None

    def events(self) -> list[dict[str, Any]]:
        """Read the events."""
        return _read_rows(self.events_file)

    def rewind(self, step: int) -> None:
        """Drop what was written of the steps after the one that a run resumes from.

        A checkpoint among them is one that is incomplete: otherwise the run would resume there.
        """
        for folder in (self.path / CHECKPOINTS).glob("step_*"):
            if step_of(folder) > step:
                shutil.rmtree(folder)
        rows = [row for row in self.rows() if row["step"] <= step]
        write_text(self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to the loss curve."""
        _append(self.metrics_file, rows)

    def event(self, name: str, **values: Any) -> None:
        """Add one event with the time of day."""
        _append(self.events_file, [{"event": name, "time": round(time.time(), 3), **values}])


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name the values of nested sections with dots, as overrides do."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _append(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in rows))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise cannot_write(file, error) from error


def _read_rows(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
