"""What a user did that cannot work, said in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "accepted", "unknown_name"]


class UserError(ValueError):
    """An error that the caller can repair: what was wrong, what was expected, what to do.

    The command line prints it as one line and exits with code 2.
    """


def accepted(name: str, names: Iterable[str]) -> list[str]:
    """Order the accepted names, closest to what was typed first.

    Args:
        name: What was typed.
        names: What would have been accepted.

    Returns:
        The names; those that resemble `name` first, the rest in alphabetical order.

    >>> accepted("imge", ["audio", "image"])
    ['image', 'audio']
    """
    ordered = sorted(names)
    close = difflib.get_close_matches(name, ordered, n=len(ordered) or 1, cutoff=0.5)
    return close + [other for other in ordered if other not in close]


def unknown_name(kind: str, name: str, names: Iterable[str], fix: str = "") -> UserError:
    """Make the error for a name that nothing answers to.

    Args:
        kind: What the name stands for, such as "modality".
        name: What was typed.
        names: What would have been accepted.
        fix: What to do besides choosing an accepted name.

    Returns:
        The error, to be raised by the caller.
    """
    choices = ", ".join(accepted(name, names)) or "none"
    return UserError(f"unknown {kind} {name!r}; accepted: {choices}" + (f"; {fix}" if fix else ""))
