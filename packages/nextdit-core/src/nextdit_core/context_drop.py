"""Time-aware Context Drop: early in sampling, attend to averages of neighbouring tokens.

Source: Lumina-Next (arXiv 2406.18583) §2, "Time-Aware Context Drop"; training-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextdit_core.errors import UserError
from nextdit_core.tokens import Tokens

__all__ = ["ContextDrop", "Pooling"]

#: Tokens along (time or view, row, column) that become one.
Factor = tuple[int, int, int]


@dataclass(frozen=True)
class Pooling:
    """Which keys and values of a batch are averaged, on the device.

    Args:
        members: `[cells, most]` int64: the tokens of each cell, filled up with its first.
        weights: `[cells, most, 1, 1]`: 1 / count for each member and 0 for what fills up, or None
            where all cells have as many members.
        lengths: Cells of each sample, on the host.
    """

    members: Tensor
    weights: Tensor | None
    lengths: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Average `[total_tokens, heads, head_dim]` to `[cells, heads, head_dim]`."""
        parts = x[self.members]
        if self.weights is None:
            return parts.mean(1)
        return (parts * self.weights.to(x.dtype)).sum(1)


@dataclass(frozen=True)
class ContextDrop:
    """By how much keys and values are pooled, by the time.

    The self attention of every block then reads one key and one value for each cell of the token
    grid, while every token still asks. Keys are averaged after their rotation, so that the score of
    a cell is the mean of its members' scores. The attention's cost falls by the number of tokens
    in a cell; what it misses is detail, of which there is none yet near t = 0.

    Args:
        schedule: Pairs of a time and a factor, the times rising: up to that time, tokens are pooled
            by that factor. From the last time on nothing is pooled. A factor is a number, for rows
            and columns alike (for time, where there is but one axis), or one for each of time or
            view, row and column.

    Raises:
        UserError: Times do not rise within (0, 1], or a factor is not a positive whole number.

    Source: Lumina-Next (arXiv 2406.18583) §2. The paper gives no schedule; this one is ours.

    >>> ContextDrop(((0.1, 4), (0.5, 2))).factor(0.3)
    (1, 2, 2)
    >>> str(ContextDrop.parse("0.1:4,0.5:1x2x2"))
    '0.1:4,0.5:1x2x2'
    """

    schedule: tuple[tuple[float, int | Factor], ...] = ((0.3, 2),)

    def __post_init__(self) -> None:
        """Check times and factors."""
        before = 0.0
        for until, factor in self.schedule:
            if not before < until <= 1.0:
                raise UserError(
                    f"context drop until t={until!r} after t={before!r}; times must rise within "
                    f"(0, 1]"
                )
            before = until
            numbers = (factor,) if isinstance(factor, int) else factor
            if len(numbers) not in (1, 3) or not all(
                isinstance(n, int) and n >= 1 for n in numbers
            ):
                raise UserError(
                    f"context drop by {factor!r}; expected a whole number of at least 1, or three: "
                    f"(time or view, row, column)"
                )

    @classmethod
    def parse(cls, text: str) -> ContextDrop:
        """Read what `str` writes: "0.1:4,0.5:2" or "0.5:1x2x2"; "none" is no drop.

        Args:
            text: Pairs of a time and a factor.

        Returns:
            The schedule.

        Raises:
            UserError: It does not say that.
        """
        if text == "none":
            return cls(())
        pairs: list[tuple[float, int | Factor]] = []
        try:
            for part in text.split(","):
                until, _, factor = part.partition(":")
                numbers = tuple(int(n) for n in factor.split("x"))
                if len(numbers) == 3:
                    pairs.append((float(until), (numbers[0], numbers[1], numbers[2])))
                else:
                    (number,) = numbers
                    pairs.append((float(until), number))
        except ValueError as error:
            raise UserError(
                f"context drop {text!r}; expected pairs of a time and a factor, such as 0.5:2 or "
                f"0.1:4,0.5:1x2x2"
            ) from error
        return cls(tuple(pairs))

    def __str__(self) -> str:
        """Write it as `parse` reads it."""
        pairs = [
            f"{until:g}:{factor if isinstance(factor, int) else 'x'.join(map(str, factor))}"
            for until, factor in self.schedule
        ]
        return ",".join(pairs) or "none"

    def factor(self, t: float, axes: int = 2) -> Factor:
        """Say by how much is pooled at a time.

        Args:
            t: In [0, 1], 0 = noise.
            axes: Position axes in use, as in `NextDiTConfig`.

        Returns:
            For (time or view, row, column); ones where nothing is pooled.
        """
        for until, factor in self.schedule:
            if t < until:
                if not isinstance(factor, int):
                    return factor
                return (factor, 1, 1) if axes == 1 else (1, factor, factor)
        return (1, 1, 1)

    def poolings(self, tokens: Tokens, axes: int = 2) -> dict[Factor, Pooling | None]:
        """Find the cells of a batch for every factor that may come; once for a request.

        Where there is a schedule, positions are read to the host, which waits for the device.

        Args:
            tokens: The batch; its values are not looked at.
            axes: Position axes in use.

        Returns:
            By factor; None where nothing is pooled.
        """
        found: dict[Factor, Pooling | None] = {(1, 1, 1): None}
        if not self.schedule:
            return found
        positions = tokens.positions.cpu().split(tokens.lengths)
        for until, _ in self.schedule:
            factor = self.factor(until - 1e-9, axes)
            if factor not in found:
                found[factor] = _pooling(positions, factor, tokens.positions.device)
        return found


def _pooling(positions: Sequence[Tensor], factor: Factor, device: torch.device) -> Pooling | None:
    """Put the tokens of each sample whose positions lie in one box of a lattice together."""
    cells: list[Tensor] = []
    lengths: list[int] = []
    begin = 0
    for sample in positions:
        if len(sample):
            corner = sample.min(0).values
            boxes = ((sample - corner) / torch.tensor(factor)).floor()
            _, owner = boxes.unique(dim=0, return_inverse=True)
            order = owner.argsort(stable=True) + begin
            members = order.split(owner.bincount().tolist())
            cells += members
            lengths.append(len(members))
        else:
            lengths.append(0)
        begin += len(sample)
    counts = torch.tensor([len(members) for members in cells])
    if not len(cells) or counts.max() == 1:
        return None
    filled = torch.nn.utils.rnn.pad_sequence(cells, batch_first=True, padding_value=-1)
    real = filled >= 0
    filled = torch.where(real, filled, filled[:, :1])
    weights = None
    if not real.all():
        weights = (real / counts[:, None])[..., None, None].to(device)
    return Pooling(filled.to(device), weights, tuple(lengths))
