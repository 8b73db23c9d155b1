"""`nextdit sample`: draw from a trained model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nextdit_core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from nextdit_core.extrapolation import Extrapolation
    from nextdit_core.pipeline import Pipeline

__all__ = ["sample"]


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--count", default=1, show_default=True, help="Samples of each prompt.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same samples.")
@click.option("--out", default=None, type=click.Path(path_type=Path), help="A file, or a folder.")
@click.option("--size", default=None, help="Such as 16x16; the modality's default otherwise.")
@click.option("--nfe", default=None, type=int, help="Velocity evaluations per sample.")
@click.option("--solver", default=None, help="A flowsolvers solver.")
@click.option("--schedule", default=None, help="A flowsolvers time grid, such as shift:4.")
@click.option("--sde", default=None, help="Sample with noise, such as sigma or sbdm:0.5.")
@click.option("--guidance", default=None, type=float, help="Guidance scale; 1 is none.")
@click.option("--negative-prompt", default="", help="What guidance leads away from.")
@click.option(
    "--guidance-rule",
    default="cfg",
    show_default=True,
    help="cfg, cfg-zero*, apg, renorm or renorm-clip.",
)
@click.option(
    "--guidance-from", default=0.0, show_default=True, help="Time of the first guidance; 0 = noise."
)
@click.option("--guidance-until", default=1.0, show_default=True, help="Time of the last guidance.")
@click.option(
    "--guidance-channels",
    default=None,
    help="Channels of the latent that are guided, such as 0,1,2, or all; as the model says.",
)
@click.option(
    "--zero-until", default=0.0, show_default=True, help="Stand still up to this time (CFG-Zero*)."
)
@click.option(
    "--extrapolate",
    default=None,
    help="Beyond the trained size: time-aware, time-aware-watershed, frequency-aware, ntk, "
    "interpolation, yarn, riflex, or extrapolation, which leaves positions as they are.",
)
@click.option("--trained-size", default=None, help="For --extrapolate; the model's default size.")
@click.option(
    "--extrapolate-by",
    type=click.Choice(["axis", "area"]),
    help="For --extrapolate: each axis by its own ratio (axis, the default), or all alike (area).",
)
@click.option("--watershed", type=float, help="For time-aware-watershed: where it switches; 0.3.")
@click.option(
    "--proportional/--no-proportional",
    default=None,
    help="For --extrapolate: scale attention by the token counts, as is the default.",
)
@click.option(
    "--context-drop",
    default="none",
    show_default=True,
    help="Attend to averages early on, such as 0.5:2: until t = 0.5, of 2x2 tokens.",
)
@click.option(
    "--begin-from",
    default=None,
    type=click.Path(path_type=Path),
    help="A file, such as a picture, to which noise is added; fitted to --size where given.",
)
@click.option(
    "--start",
    type=float,
    help="For --begin-from: the time to begin at, in (0, 1); 0.4. 1 - start is the strength.",
)
@click.option("--batch", default=64, show_default=True, help="Samples computed together.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the backbone's weights.",
)
@click.option("--text-encoder", default=None, help="For Lumina-Next, such as google/gemma-2b.")
@click.option("--autoencoder", default=None, help="For Lumina-Next, such as stabilityai/sdxl-vae.")
@click.option("--ema", is_flag=True, help="Take the authors' averaged weights.")
def sample(
    model: Path,
    prompt: str,
    count: int,
    seed: int,
    out: Path | None,
    size: str | None,
    nfe: int | None,
    solver: str | None,
    schedule: str | None,
    sde: str | None,
    guidance: float | None,
    negative_prompt: str,
    guidance_rule: str,
    guidance_from: float,
    guidance_until: float,
    guidance_channels: str | None,
    zero_until: float,
    extrapolate: str | None,
    trained_size: str | None,
    extrapolate_by: str | None,
    watershed: float | None,
    proportional: bool | None,
    context_drop: str,
    begin_from: Path | None,
    start: float | None,
    batch: int,
    device: str,
    dtype: str,
    text_encoder: str | None,
    autoencoder: str | None,
    ema: bool,
) -> None:
    """Sample MODEL for PROMPT.

    MODEL is a run, a saved model, or a diffusers pipeline of Lumina-Next; or OWNER/NAME of one on
    the Hugging Face hub. The authors' Lumina-Next, or any backbone of it alone, needs
    --text-encoder and --autoencoder.

    PROMPT may be the path of a text file with one prompt per line. With a file as --out, all
    samples go into it. With a folder, each gets a file of its own, and files that exist are
    not sampled again.
    """
    import torch

    from nextdit_core.context_drop import ContextDrop
    from nextdit_core.pipeline import Pipeline
    from nextdit_core.sampling_plan import check_sampling
    from nextdit_core.sde import SDE

    for name, value in (("--count", count), ("--batch", batch), ("--nfe", nfe)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; expected at least 1")
    if start is not None and begin_from is None:
        raise UserError("--start needs --begin-from FILE, to which the noise is added")
    start = 0.0 if begin_from is None else 0.4 if start is None else start
    if begin_from is not None and not 0.0 < start < 1.0:
        raise UserError(f"--start is {start}; expected above 0, noise alone, and below 1, the file")
    drop = ContextDrop.parse(context_drop)
    stochastic = None if sde is None else SDE.parse(sde)
    if sde is not None and solver is not None:
        raise UserError("--solver is of the ODE; leave it or --sde out")
    prompts = _prompts(prompt)
    extent = _size("--size", size)
    beyond = _extrapolation(
        extrapolate,
        {
            "trained_size": _size("--trained-size", trained_size),
            "by": extrapolate_by,
            "watershed": watershed,
            "proportional": proportional,
        },
    )
    rule: dict[str, Any] = {
        "rule": guidance_rule,
        "interval": (guidance_from, guidance_until),
        "zero_until": zero_until,
    }
    if guidance_channels is not None:
        rule["channels"] = _channels(guidance_channels)
    pipe = Pipeline.from_pretrained(
        model,
        device=device,
        dtype=getattr(torch, dtype),
        text_encoder=text_encoder,
        autoencoder=autoencoder,
        ema=ema,
    )
    defaults = pipe.card.sampling
    first, last = pipe.card.objective.sampling_times
    plan = check_sampling(
        solver or defaults["solver"],
        schedule or defaults["schedule"],
        nfe or defaults["nfe"],
        start=max(start, first),
        end=last,
    )
    guided = pipe.guidance(guidance, **rule)
    if extent is not None:
        pipe.modality.positions(extent)
    suffix = pipe.modality.suffix
    target = out if out is not None else Path(f"{_slug(prompts[0])}{suffix}")
    single = target.suffix == suffix and not target.is_dir()
    if target.suffix and not target.is_dir() and not single:
        raise UserError(f"--out {target} does not end in {suffix}, which this modality writes")
    _check_writable(target.parent if single else target)
    jobs = [
        (text, seed + repeat, place)
        for place, text in enumerate(prompts)
        for repeat in range(count)
    ]
    if not single:
        jobs = [job for job in jobs if not (target / _file(*job, suffix)).exists()]
    latent = None
    if begin_from is not None:
        latent, extent = pipe.modality.encode(pipe.modality.read(begin_from, extent)), None
    options: dict[str, Any] = {
        "size": extent,
        "start": start,
        "nfe": nfe,
        "solver": solver,
        "schedule": schedule,
        "sde": stochastic,
        "guidance": guided,
        "extrapolate": beyond,
        "negative_prompt": negative_prompt,
        "context_drop": drop,
    }
    try:
        written = _draw(pipe, jobs, batch, latent, options, target, single, plan.nfe)
    except FloatingPointError as error:  # flowsolvers.NotFiniteError
        said = " ".join(str(error).split())
        raise UserError(f"sampling in {dtype} came to no finite numbers: {said}") from error
    skipped = count * len(prompts) - len(jobs)
    note = f" ({skipped} were there before)" if skipped else ""
    click.echo(f"wrote {written} sample{'s' * (written != 1)} to {target}{note}")


def _draw(
    pipe: Pipeline,
    jobs: Sequence[tuple[str, int, int]],
    batch: int,
    latent: Tensor | None,
    options: dict[str, Any],
    target: Path,
    single: bool,
    nfe: int,
) -> int:
    from nextdit_core.folder import new_file
    from nextdit_core.progress import Progress

    media: list[object] = []
    if not jobs:
        return 0
    # One evaluation of a large model on a CPU takes a while, so these are counted.
    with Progress("sampling", len(jobs) * nfe, unit="evaluation") as progress:
        for begin in range(0, len(jobs), batch):
            some = jobs[begin : begin + batch]
            latents = None if latent is None else [latent] * len(some)

            def tell(evaluations: int, before: int = begin, count: int = len(some)) -> None:
                progress.to(before * nfe + count * min(evaluations, nfe))

            made = pipe(
                [job[0] for job in some],
                seed=[job[1] for job in some],
                latents=latents,
                progress=tell,
                **options,
            )
            tell(nfe)
            if single:
                media += made
                continue
            for one, job in zip(made, some, strict=True):
                with new_file(target / _file(*job, pipe.modality.suffix)) as file:
                    pipe.modality.write([one], file, [job[0]])
    if single:
        with new_file(target) as file:
            pipe.modality.write(media, file, [job[0] for job in jobs])
    return len(jobs)


def _prompts(prompt: str) -> list[str]:
    if not prompt.endswith(".txt"):
        return [prompt]
    try:
        lines = Path(prompt).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read prompts from {prompt}: {error.strerror}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{prompt} holds no prompts; write one per line")
    return prompts


def _size(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        size = tuple(int(part) for part in text.lower().split("x"))
    except ValueError as error:
        raise UserError(f"{name} is {text!r}; expected whole numbers such as 16x16") from error
    if min(size) < 1:
        raise UserError(f"{name} is {text!r}; expected numbers of at least 1")
    return size


def _channels(text: str) -> list[int] | None:
    if text == "all":
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(
            f"--guidance-channels is {text!r}; expected numbers such as 0,1,2, or all"
        ) from error


def _extrapolation(method: str | None, settings: dict[str, Any]) -> Extrapolation | None:
    from nextdit_core.extrapolation import Extrapolation

    given = {name: value for name, value in settings.items() if value is not None}
    if method is not None:
        return Extrapolation(method, **given)
    if given:
        named = {"by": "extrapolate-by", "trained_size": "trained-size"}
        options = " and ".join(f"--{named.get(name, name)}" for name in given)
        raise UserError(f"{options} needs --extrapolate METHOD, such as time-aware")
    return None


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40] or "sample"


def _file(prompt: str, seed: int, place: int, suffix: str) -> str:
    return f"{place:05d}-{_slug(prompt)}-seed{seed}{suffix}"


def _check_writable(folder: Path) -> None:
    """Find out before sampling whether the result can be written."""
    probe = folder / ".nextdit-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror or error}; choose another --out"
        ) from error
