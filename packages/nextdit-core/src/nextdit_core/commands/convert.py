"""`nextdit convert`: a backbone from one layout to another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from nextdit_core.errors import UserError

__all__ = ["convert"]

DTYPES = ("float32", "bfloat16", "float16")


@click.command()
@click.argument("source")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "--layout",
    "layout",
    type=click.Choice(["nextdit", "diffusers", "authors"]),
    required=True,
    help="Layout of DEST.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Number format; as stored by default.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest file.")
@click.option("--ema", is_flag=True, help="Take the authors' averaged weights.")
@click.option("--patch-size", type=int, help="Side of a patch, where SOURCE does not say.")
@click.option("--heads", type=click.IntRange(1), help="Query heads, where no tensor tells them.")
@click.option(
    "--experts-by",
    type=click.Choice(["time", "space"]),
    help="By what experts are chosen, where no tensor tells it.",
)
@click.option(
    "--sample-size",
    type=click.IntRange(1),
    help="Side of the latents that it was trained on; SOURCE's, or for diffusers 128.",
)
def convert(
    source: str,
    dest: Path,
    layout: str,
    dtype: str | None,
    max_shard_size: str,
    ema: bool,
    patch_size: int | None,
    heads: int | None,
    experts_by: Literal["time", "space"] | None,
    sample_size: int | None,
) -> None:
    """Write the backbone of SOURCE to the new folder DEST.

    SOURCE is a saved model, a run, a diffusers pipeline or transformer, an authors' folder, a
    weight file, or OWNER/NAME on the Hugging Face hub; its layout is recognised.
    """
    import torch

    from nextdit_core.checkpoints.checkpoint import open_checkpoint
    from nextdit_core.checkpoints.hub import local_path
    from nextdit_core.checkpoints.load import read_backbone
    from nextdit_core.checkpoints.save import check_savable, layout_name
    from nextdit_core.model_folder import CARD
    from nextdit_core.objective import FlowMatching
    from nextdit_core.saved_model import read_card

    name = layout_name(layout)
    checkpoint = open_checkpoint(
        local_path(source, ema=ema),
        ema=ema,
        patch_size=patch_size,
        heads=heads,
        experts_by=experts_by,
    )
    check_savable(checkpoint.config, dest, name, max_shard_size)
    folder = checkpoint.place.parent
    objective = read_card(folder).objective if (folder / CARD).is_file() else FlowMatching()
    if name != "nextdit" and (objective.path, objective.prediction) != ("linear", "velocity"):
        raise UserError(
            f"{folder} predicts {objective}, and the samplers of layout {layout} take the backbone "
            f"for a velocity on the linear path; convert it --to nextdit"
        )
    click.echo(f"read     {checkpoint.place}: {checkpoint.layout.value}")
    model = read_backbone(checkpoint, dtype=None if dtype is None else getattr(torch, dtype))
    model.save_pretrained(
        dest,
        layout=name,
        max_shard_size=max_shard_size,
        sample_size=sample_size,
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    click.echo(f"written  {dest}: {count:,} parameters, layout {layout}")
    if layout == "nextdit":
        if (folder / CARD).is_file():
            click.echo(f"predicts {objective}, which a backbone alone does not say")
        for line in checkpoint.left_out:
            click.echo(f"left out {line}")
    else:
        pad = "pad_token and " if model.config.classes is None else ""
        click.echo(f"zeros    {pad}the second half of the output; no result depends on them")
