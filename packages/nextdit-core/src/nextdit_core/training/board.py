"""The numbers of a run for TensorBoard (the extra `tensorboard`)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nextdit_core.errors import UserError
from nextdit_core.folder import cannot_write

__all__ = ["Board", "check_board"]

#: Where rows go, by key; what stands in none of these is not shown.
_TAGS = {
    **{key: f"train/{key}" for key in ("loss", "grad_norm", "lr", "epoch", "skipped")},
    **{
        key: f"speed/{key}"
        for key in (
            "step_seconds",
            "samples_per_second",
            "tokens_per_second",
            "data_wait",
            "tflops",
            "mfu",
        )
    },
}
_PREFIX = "events.out.tfevents."


def check_board() -> None:
    """Find out whether TensorBoard is there, before any work.

    Raises:
        UserError: It is not installed.
    """
    if find_spec("tensorboard") is None:
        raise UserError("tensorboard=true needs it: pip install 'nextdit-core[tensorboard]'")


class Board:
    """Write rows as scalars to an event log that a resumed run continues.

    Args:
        folder: Of the log.
        step: Where the run stands. What an earlier start logged of later steps is not shown.

    Raises:
        UserError: The folder cannot be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        _wait_for_a_name_of_its_own(folder)
        try:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        except OSError as error:
            raise cannot_write(folder, error) from error

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows, each with its `step`.

        Raises:
            UserError: They cannot be written.
        """
        try:
            for row in rows:
                for key in _TAGS.keys() & row.keys():
                    self._writer.add_scalar(_TAGS[key], float(row[key]), row["step"])
            self._writer.flush()
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def close(self) -> None:
        """Close the log."""
        self._writer.close()


def _wait_for_a_name_of_its_own(folder: Path) -> None:
    """Wait for the next second, if need be.

    Readers take the files of a log in the order of their names, which begin with the second.
    """
    seconds = [file.name.removeprefix(_PREFIX)[:10] for file in folder.glob(f"{_PREFIX}*")]
    newest = max((int(one) for one in seconds if one.isdigit()), default=0)
    now = time.time()
    if now < newest + 1 < now + 2:
        time.sleep(newest + 1 - now)
