"""The subjects that `benchmarks/gpu/run.py` times, one file for each."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import contest


def tables(subjects: Sequence[str], rounds: int, *, smoke: bool) -> str:
    """Hold the contests of each subject and give their tables as Markdown."""
    parts: list[str] = []
    for subject in subjects:
        contests = import_module(subject).contests(smoke=smoke)
        parts.append(f"## {subject.capitalize()}, bfloat16, median of {rounds} rounds")
        parts.append(contest.table(contests, rounds, smoke=smoke))
    return "\n\n".join(parts)
