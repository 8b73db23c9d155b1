"""Progress of long work: a bar on a terminal, plain lines where output is piped."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

__all__ = ["Progress"]


class Progress:
    """Count towards a total.

    On a terminal this is a tqdm bar on standard error. Elsewhere it prints a line at the
    start, at every tenth of the total and at the end.

    Args:
        what: What is being done.
        total: How much there is to do.
        done: How much was done before.
        unit: What is counted.
        note: Shown until the first count.
    """

    def __init__(
        self, what: str, total: int, *, done: int = 0, unit: str = "step", note: str = ""
    ) -> None:
        self.what, self.total, self.done, self.unit = what, total, done, unit
        self._begun = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True)
            self._bar.set_postfix_str(note)
        else:
            self._line(note)

    def to(self, done: int, note: str = "") -> None:
        """Say how much is done by now.

        Args:
            done: Out of `total`; going back is allowed (work that was lost and is redone).
            note: Shown beside the count, such as "loss 0.512".
        """
        before, self.done = self.done, done
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - before)
        elif done < before or done * 10 // self.total > before * 10 // self.total:
            self._line(note)

    def _line(self, note: str) -> None:
        seconds = time.monotonic() - self._begun
        text = f"{self.what}: {self.done}/{self.total} {self.unit}s, {seconds:.1f} s"
        print(f"{text}, {note}" if note else text, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        """Start."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
