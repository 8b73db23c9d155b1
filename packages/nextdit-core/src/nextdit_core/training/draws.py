"""What is random about one sample, drawn from the seed and the sample's own number.

Neither the rank that handles a sample nor its neighbours in the batch enter, so any number of
workers draws the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

import flowsolvers
from nextdit_core.errors import UserError

__all__ = ["Draw", "TimeDistribution", "draw", "generator", "time_shift"]

TimeDistribution = Literal["uniform", "lognorm"]
TIME_DISTRIBUTIONS = get_args(TimeDistribution)


def generator(seed: int, *path: int | str) -> torch.Generator:
    """Make a CPU generator for one purpose.

    Args:
        seed: The run's or request's seed.
        path: Names and numbers that tell this purpose from all others.

    Returns:
        A generator whose stream depends on all of them.

    >>> a, b = generator(0, "noise", 7), generator(0, "noise", 7)
    >>> torch.equal(torch.randn(3, generator=a), torch.randn(3, generator=b))
    True
    """
    key = repr((seed, *path)).encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


@dataclass(frozen=True)
class Draw:
    """The random part of one training sample.

    Args:
        t: Time in [0, 1], 0 = noise.
        drop_caption: Whether the caption is replaced by the empty one.
        noise: `[tokens, token_dim]`, standard normal.
    """

    t: float
    drop_caption: bool
    noise: Tensor


def draw(
    seed: int,
    epoch: int,
    index: int,
    shape: Sequence[int],
    *,
    time_distribution: TimeDistribution = "uniform",
    shift: str = "none",
    caption_dropout: float = 0.0,
) -> Draw:
    """Draw time, caption dropout and noise for one sample of one epoch.

    Args:
        seed: The run's seed.
        epoch: From 0.
        index: The sample's number in the dataset.
        shape: `(tokens, token_dim)`.
        time_distribution: "uniform", or "lognorm": the logistic of a standard normal.
        shift: How times move towards noise, by the number of tokens; see `time_shift`.
        caption_dropout: Probability of the empty caption, for classifier-free guidance.

    Returns:
        The draw; the same for the same arguments.
    """
    source = generator(seed, "train", epoch, index)
    if time_distribution == "uniform":
        t = torch.rand((), generator=source, dtype=torch.float64)
    else:
        t = torch.sigmoid(torch.randn((), generator=source, dtype=torch.float64))
    moved = time_shift(shift, shape[0])
    drop = torch.rand((), generator=source, dtype=torch.float64)
    noise = torch.randn(tuple(shape), generator=source)
    time = float(t) if moved is None else moved(float(t))
    return Draw(time, bool(drop < caption_dropout), noise)


def time_shift(name: str, tokens: int) -> flowsolvers.Schedule | None:
    """Say how training times move for a sample of some tokens.

    The more tokens, the less one level of noise hides of what they say together, so that larger
    samples train nearer to noise.

    Args:
        name: "none"; "flux", by the line of FLUX.1 and Lumina-Image 2.0; "sd3:N", by the square
            root of the ratio to N tokens; or a time grid of flowsolvers, such as "shift:3", for
            all sizes alike.
        tokens: Of the sample.

    Returns:
        What maps a time drawn to a time used, or None for no change.

    Raises:
        UserError: The name says nothing of this.

    Source: Esser et al., arXiv 2403.03206, eq. 23; FLUX.1 (Black Forest Labs, 2024).

    >>> print(time_shift("sd3:256", 1024))
    shift:2
    """
    if name == "none":
        return None
    if name == "flux":
        return flowsolvers.flux_shift(tokens)
    try:
        if name.startswith("sd3:"):
            return flowsolvers.sd3_shift(tokens, int(name.removeprefix("sd3:")))
        return flowsolvers.schedule(name)
    except ValueError as error:
        raise UserError(
            f"time_shift is {name!r}; expected none, flux, sd3:TOKENS such as sd3:256, or a time "
            f"grid such as shift:3 ({error})"
        ) from error
