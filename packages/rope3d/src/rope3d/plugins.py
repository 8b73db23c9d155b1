"""Plug-ins: what installed distributions offer in an entry-point group, imported when named."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

__all__ = ["installed", "load", "origin", "refresh", "table"]


@cache
def installed(group: str) -> dict[str, EntryPoint]:
    """List what all installed distributions offer in a group, importing none of it.

    Args:
        group: Name of the entry-point group.

    Returns:
        Entry points by name, in alphabetical order.

    Raises:
        RuntimeError: Two distributions claim one name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        other = found.setdefault(entry.name, entry)
        if origin(other) != origin(entry):
            raise RuntimeError(
                f"two distributions claim the backend {entry.name!r}: {origin(other)} and "
                f"{origin(entry)}; uninstall one of them"
            )
    return found


@cache
def load(group: str, name: str, members: tuple[str, ...], variable: str) -> Any:
    """Import what an entry point names, and check that it has what the group demands.

    Args:
        group: Name of the entry-point group.
        name: A name that `installed` lists.
        members: Attributes that the object must have.
        variable: The environment variable that may name it, for the error.

    Returns:
        The object.

    Raises:
        ValueError: The name is not installed.
        ImportError: It failed to import, or lacks a member.
        RuntimeError: Two distributions claim one name.
    """
    entries = installed(group)
    if name not in entries:
        raise ValueError(
            f"unknown backend {name!r}; installed: {', '.join(entries) or 'none'}; install the "
            f"distribution that offers it, or choose another by argument or {variable}"
        )
    entry = entries[name]
    failed = f"backend {name!r} of {origin(entry)} failed to load from {entry.value}"
    try:
        found = entry.load()
    except Exception as error:  # whatever a stranger's module may raise
        raise ImportError(f"{failed}: {type(error).__name__}: {error}") from error
    missing = [member for member in members if not hasattr(found, member)]
    if missing:
        raise ImportError(f"{failed}: {type(found).__name__} lacks {', '.join(missing)}")
    return found


def refresh() -> None:
    """Forget what was found and imported."""
    installed.cache_clear()
    load.cache_clear()


def origin(entry: EntryPoint) -> str:
    """Name the distribution and its version, as in `rope3d 0.1.0`."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "unknown"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Write rows in columns as wide as their longest cell.

    >>> print(table([("name", "why"), ("reference", "named")]))
    name       why
    reference  named
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
