"""Run torchdiffeq's own test suite with flowsolvers in its place.

    python benchmarks/solvers/peer_suites.py --torchdiffeq ../torchdiffeq

The argument is a checkout of the project; its tests are run as they are, from where they are, and
import `flowsolvers.adapters.torchdiffeq` under the name torchdiffeq. Every test and subtest is
counted: passed, failed, or skipped, which is where it asks for a method that the shim refuses by
name, or where the suite itself skips.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import unittest
import warnings
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

#: The files of torchdiffeq's suite.
FILES = ("api_tests", "event_tests", "gradient_tests", "norm_tests", "odeint_tests")


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
        self.parents: set[str] = set()

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:  # noqa: N802
        """Count a subtest."""
        self.parents.add(test.id())
        self._note(subtest, err)

    def addSuccess(self, test: Any) -> None:  # noqa: N802
        """Count a test without subtests."""
        if test.id() not in self.parents:
            self._note(test, None)

    def addFailure(self, test: Any, err: Any) -> None:  # noqa: N802
        """Count a failed test."""
        self._note(test, err)

    def addError(self, test: Any, err: Any) -> None:  # noqa: N802
        """Count a test that raised."""
        self._note(test, err)

    def addSkip(self, test: Any, reason: str) -> None:  # noqa: N802
        """Count a test that its suite skips."""
        self.counts.skipped[reason] += 1

    def _note(self, test: Any, err: Any) -> None:
        if err is None:
            self.counts.passed += 1
        elif isinstance(err[1], ValueError) and "is not carried" in str(err[1]):
            self.counts.skipped[str(err[1]).split(";")[0]] += 1
        else:
            first = (str(err[1]).strip().splitlines() or [""])[0]
            name = test.id().split(".", 1)[1]
            self.counts.failed.append((name, f"{type(err[1]).__name__}: {first}"[:160]))


def run(checkout: Path, name: str) -> Counts:
    counts = Counts(name)
    begin = time.perf_counter()
    unittest.defaultTestLoader.loadTestsFromName(name).run(Result(counts))
    counts.seconds = time.perf_counter() - begin
    return counts


def report(checkout: Path, found: list[Counts]) -> str:
    commit = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    lines = [
        f"torchdiffeq's suite at {commit or 'a checkout without git'}, torch {torch.__version__}.",
        "",
        "| file | passed | failed | skipped | seconds |",
        "|---|---|---|---|---|",
    ]
    for c in found:
        skipped = sum(c.skipped.values())
        lines.append(
            f"| {c.name}.py | {c.passed} | {len(c.failed)} | {skipped} | {c.seconds:.0f} |"
        )
    lines += ["", "Failed:", ""]
    lines += [f"- {c.name}: {name}: {why}" for c in found for name, why in c.failed] or ["- none"]
    lines += ["", "Skipped:", ""]
    skips = sum((c.skipped for c in found), Counter[str]())
    lines += [f"- {n} times: {why}" for why, n in skips.most_common()] or ["- none"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torchdiffeq", type=Path, required=True, help="a checkout of torchdiffeq")
    parser.add_argument("files", nargs="*", default=FILES, help="files of its suite; all if none")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.modules["torchdiffeq"] = import_module("flowsolvers.adapters.torchdiffeq")
    sys.path.insert(0, str(options.torchdiffeq / "tests"))
    found = [run(options.torchdiffeq, name) for name in options.files]
    print(report(options.torchdiffeq, found))
    return int(any(c.failed for c in found))


if __name__ == "__main__":
    sys.exit(main())
