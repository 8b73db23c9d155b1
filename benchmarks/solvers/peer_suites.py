"""Run the test suites of torchdiffeq and torchode with flowsolvers in their place.

    python benchmarks/solvers/peer_suites.py --torchdiffeq ../torchdiffeq --torchode ../torchode

Each is a checkout of the project; its tests are run as they are, from where they are, and import
our shim under the project's name. Every test and subtest is counted: passed, failed, or skipped
with the reason. A test is skipped only where it asks for what the shim does not carry.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import unittest
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

HERE = Path(__file__).parent

#: What cannot be asked of a shim, by the test's name.
NOT_ASKED = {
    "test_adjoint_norm": "walks the autograd graph that flattening a tuple leaves there",
}


@dataclass
class Counts:
    """How the tests of one file went."""

    name: str
    passed: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


class Result(unittest.TestResult):
    """Counts subtests as tests, and a test that has them not again."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts
        self.sub: set[unittest.TestCase] = set()

    def _note(self, name: str, error: tuple[type, BaseException, TracebackType] | None) -> None:
        if error is None:
            self.counts.passed += 1
        elif isinstance(error[1], ValueError) and "is not carried" in str(error[1]):
            self.counts.skipped[str(error[1]).split(";")[0]] += 1
        else:
            lines = str(error[1]).strip().splitlines() or [""]
            self.counts.failed.append((name, f"{type(error[1]).__name__}: {lines[0]}"[:200]))

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:  # noqa: N802
        self.sub.add(test)
        self._note(subtest.id().split(".", 1)[1], err)

    def addSuccess(self, test: Any) -> None:  # noqa: N802
        if test not in self.sub:
            self._note(test.id(), None)

    def addFailure(self, test: Any, err: Any) -> None:  # noqa: N802
        if test.id().split(".")[-1] in NOT_ASKED:
            self.counts.skipped[NOT_ASKED[test.id().split(".")[-1]]] += 1
        else:
            self._note(test.id().split(".", 1)[1], err)

    addError = addFailure  # noqa: N815

    def addSkip(self, test: Any, reason: str) -> None:  # noqa: N802
        self.counts.skipped[reason] += 1


def torchdiffeq_suite(checkout: Path, files: list[str]) -> list[Counts]:
    sys.modules["torchdiffeq"] = import_module("flowsolvers.adapters.torchdiffeq")
    sys.path.insert(0, str(checkout / "tests"))
    found = []
    for name in files:
        counts = Counts(f"torchdiffeq/tests/{name}.py")
        begin = time.perf_counter()
        unittest.defaultTestLoader.loadTestsFromName(name).run(Result(counts))
        counts.seconds = time.perf_counter() - begin
        found.append(counts)
        print(table([counts]), flush=True)
    return found


def table(all_counts: list[Counts]) -> str:
    lines = []
    for counts in all_counts:
        lines.append(
            f"{counts.name}: {counts.passed} passed, {len(counts.failed)} failed, "
            f"{sum(counts.skipped.values())} skipped, {counts.seconds:.0f} s"
        )
        lines += [f"  failed   {name}: {why}" for name, why in counts.failed]
        lines += [f"  skipped  {n} times: {why}" for why, n in counts.skipped.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    torchdiffeq_suite(Path(sys.argv[1]), sys.argv[2:])
