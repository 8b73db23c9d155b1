"""The subjects that `benchmarks/gpu/run.py` times, one file for each."""

from __future__ import annotations

from importlib import import_module

import contest


def table(subject: str, rounds: int, deadline: float, *, smoke: bool) -> list[str]:
    """Hold the contests of a subject and give its title and table as Markdown."""
    contests = import_module(subject).contests(smoke=smoke)
    title = f"## {subject.capitalize()}, bfloat16, median of {rounds} rounds"
    return [title, contest.table(contests, rounds, deadline, smoke=smoke)]
