"""`nextdit modalities`: what is installed, from where, and what is not."""

from __future__ import annotations

import click

__all__ = ["modalities"]


@click.command()
def modalities() -> None:
    """List modalities and the other parts, with the distribution that brings each."""
    from nextdit_core import registry

    rows = [("KIND", "NAME", "DISTRIBUTION", "VERSION", "STATE")]
    for group, kind in registry.GROUPS.items():
        if group == "nextdit.commands":
            continue
        found = registry.parts(group)
        rows += [
            (kind, part.name, part.distribution, part.version, "installed")
            for part in found.values()
        ]
        rows += [
            (kind, name, package, "-", f"missing: pip install {package}")
            for name, package in registry.KNOWN.get(group, {}).items()
            if name not in found
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*padded, row[4]]))
