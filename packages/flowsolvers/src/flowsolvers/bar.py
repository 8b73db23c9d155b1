"""Progress of a solve: a bar on a terminal, plain lines where output is piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from flowsolvers.watch import Reached

__all__ = ["progress"]


def progress(
    what: str = "sampling", *, file: TextIO | None = None
) -> Callable[[Reached[Any]], None]:
    """Make an `on_step` that shows how far a solve is.

    Args:
        what: What is being done.
        file: Where to write; standard error when None.

    Returns:
        For `solve(..., on_step=progress())`. On a terminal it draws a bar with tqdm; elsewhere it
        prints a line at every tenth of the steps.

    Raises:
        ImportError: There is a terminal, and tqdm is not installed.

    Example:
        >>> import sys, torch
        >>> from flowsolvers import solve
        >>> show = progress("digits", file=sys.stdout)
        >>> x0 = torch.ones(2)
        >>> _ = solve(lambda t, x: x, x0, nfe=2, on_step=show)  # doctest: +ELLIPSIS
        digits: step 1 of 2, ... s
        digits: step 2 of 2, ... s
    """
    stream = sys.stderr if file is None else file
    return _bar(what, stream) if stream.isatty() else _lines(what, stream)


def _bar(what: str, stream: TextIO) -> Callable[[Reached[Any]], None]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("a progress bar needs tqdm: pip install flowsolvers[progress]") from error
    bars: list[Any] = []

    def show(event: Reached[Any]) -> None:
        if event.step == 0 or not bars:
            bars[:] = [tqdm(total=event.steps, desc=what, unit="step", file=stream)]
        bars[0].update(event.step + 1 - bars[0].n)
        if event.step + 1 == event.steps or event.stopped:
            bars[0].close()

    return show


def _lines(what: str, stream: TextIO) -> Callable[[Reached[Any]], None]:
    begun = time.monotonic()

    def show(event: Reached[Any]) -> None:
        done, before, total = event.step + 1, event.step, event.steps
        if done * 10 // total > before * 10 // total:
            seconds = time.monotonic() - begun
            print(f"{what}: step {done} of {total}, {seconds:.1f} s", file=stream, flush=True)

    return show
