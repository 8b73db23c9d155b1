"""What the tables of this folder share."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def table(rows: list[tuple[str, ...]]) -> str:
    """Write rows, the first of them the head, in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def versions(*names: str) -> str:
    """Name the installed versions."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)
