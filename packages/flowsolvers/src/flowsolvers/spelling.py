"""Order names by how close they are to one that is not among them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

__all__ = ["closest_first"]


def closest_first(name: str, accepted: Iterable[str]) -> list[str]:
    """Sort names by likeness to a given one, the closest first.

    Args:
        name: What was asked for.
        accepted: What could have been meant.

    Returns:
        All accepted names; case is ignored, and ties are in alphabetical order.

    Example:
        >>> closest_first("midpiont", ["euler", "midpoint"])
        ['midpoint', 'euler']
    """

    def unlikeness(other: str) -> tuple[float, str]:
        return -SequenceMatcher(None, name.lower(), other.lower()).ratio(), other

    return sorted(accepted, key=unlikeness)
