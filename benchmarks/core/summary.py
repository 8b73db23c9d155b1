"""What the tables of this folder share: how they begin, and where they go."""

from __future__ import annotations

import argparse
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"


def options(description: str, rounds: int, *, run: bool = False) -> argparse.ArgumentParser:
    """Offer what every script here takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--write", action="store_true", help="also to benchmarks/results/")
    if run:
        parser.add_argument("--run", type=Path, help="a trained model; the demo's is runs/digits")
    return parser


def head(*others: str) -> str:
    """Say where and with what it was measured."""
    lines = [
        f"- date: {datetime.now(UTC):%Y-%m-%d}",
        f"- machine: {platform.processor() or platform.machine()}, one thread",
        f"- versions: torch {torch.__version__}, diffusers {version('diffusers')}",
        *others,
    ]
    return "\n".join(lines)


def load(when: str = "at the start") -> str:
    """Say how busy the machine is."""
    return f"- load average {when}: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def table(rows: list[tuple[str, ...]]) -> str:
    """Write rows, the first of them the head, in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def finish(parts: list[str], name: str, *, write: bool) -> int:
    """Print a report, and write it where that was asked for."""
    text = "\n\n".join(parts)
    print(text)
    if write:
        file = RESULTS / f"{name}--{datetime.now(UTC):%Y-%m-%d}.md"
        file.write_text(text + "\n", encoding="utf-8")
        print(f"written to {file}")
    return 0
