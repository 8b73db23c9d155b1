"""`nextdit train`: run a recipe."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["train"]


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--address", help="Cluster to connect to, for engines that have one.")
def train(recipe: Path, overrides: tuple[str, ...], address: str | None) -> None:
    """Train a model from a TOML recipe; run it again to resume.

    Overrides change single keys: steps=2000 model.width=128 engine=ray workers=2.
    """
    from nextdit_core.recipe import Recipe

    extra = () if address is None else (f'address="{address}"',)
    run_recipe(Recipe.load(recipe, [*overrides, *extra]))


def run_recipe(recipe: object) -> None:
    """Train with the recipe's engine and say where the result lies."""
    from nextdit_core import registry
    from nextdit_core.recipe import Recipe
    from nextdit_core.training.run_folder import RunFolder

    assert isinstance(recipe, Recipe)
    engine = registry.load("nextdit.engines", recipe.engine)()
    run = RunFolder(recipe.out)
    try:
        engine.train(recipe)
    except KeyboardInterrupt:
        newest = run.newest()
        kept = f"the last checkpoint is {newest}" if newest else "no checkpoint was written yet"
        click.echo(f"stopped; {kept}. The same command resumes.", err=True)
        raise
    newest = run.newest()
    click.echo(f"trained: {newest}")
