"""`nextdit demo`: learn to draw handwritten digits, draw some, and count the readable ones."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["demo"]

#: Samples of each digit: those that are counted, and those that are on the picture.
COUNTED, SHOWN = 20, 10


@click.command()
@click.option(
    "--out",
    default="runs/digits",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Run folder; a finished one is only sampled.",
)
@click.option("--seed", default=0, show_default=True, help="Same seed, same samples.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def demo(out: Path, seed: int, overrides: tuple[str, ...]) -> None:
    """Train a small Next-DiT on handwritten digits and sample it.

    Two worker processes on this machine, no download, no GPU. Overrides change keys of the
    recipe, as in nextdit train: workers=1 engine=local.
    """
    import time
    from importlib.resources import as_file, files

    from modality_image.digits import caption, recognise
    from modality_image.sheet import contact_sheet
    from nextdit_core import Pipeline, Recipe, train
    from nextdit_core.folder import new_file
    from nextdit_core.progress import Progress

    begun = time.monotonic()
    with as_file(files("modality_image") / "digits.toml") as file:
        recipe = Recipe.load(file, [f'out="{out.as_posix()}"', *overrides])
    checkpoint = train(recipe)
    run = checkpoint.parent.parent
    pipe = Pipeline.from_pretrained(run, device=recipe.device)
    asked = [digit for digit in range(10) for _ in range(COUNTED)]
    prompts = [caption(digit) for digit in asked]
    with Progress("sampling", pipe.card.sampling["nfe"], unit="evaluation") as progress:
        pictures = pipe(prompts, seed=seed, progress=progress.to)
    recognition = recognise(pictures)
    shown = [i for i in range(len(asked)) if i % COUNTED < SHOWN]
    sheet = contact_sheet([pictures[i] for i in shown], [prompts[i] for i in shown], columns=SHOWN)
    picture = run / "digits.png"
    with new_file(picture) as partial:
        sheet.save(partial)
    click.echo(
        f"model     {checkpoint}\n"
        f"picture   {picture}\n"
        f"reader    reads {recognition.held_out_accuracy:.1%} of real held-out digits\n"
        f"accuracy  {recognition.accuracy(asked):.1%} of {len(asked)} samples are read as the "
        f"digit asked for\n"
        f"time      {time.monotonic() - begun:.1f} s"
    )
