"""`nextdit train`: run a recipe."""

from __future__ import annotations

import os
from pathlib import Path

import click

__all__ = ["command"]


@click.command("train")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--address", help="Cluster to connect to, for engines that have one.")
def command(recipe: Path, overrides: tuple[str, ...], address: str | None) -> None:
    """Train a model from a TOML recipe; run it again to resume.

    Overrides change single keys: steps=2000 model.width=128 engine=ray workers=2.
    """
    from nextdit_core.recipe import Recipe
    from nextdit_core.training.run import train

    extra = () if address is None else (f'address="{address}"',)
    checkpoint = train(Recipe.load(recipe, [*overrides, *extra]))
    if os.environ.get("RANK", "0") == "0":  # torchrun runs this command once per rank
        click.echo(f"trained: {checkpoint}")
