"""Flows to choose a default on: Gaussian mixtures drawn from a seed, none of them in `flows`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from flows import Flow
from torch import Generator, Tensor

#: Guidance of the flows in turn, 0 = none; drawn uniformly between the two.
_GUIDANCE = ((0.0, 0.0), (1.5, 4.0), (0.0, 0.0), (4.0, 8.0))


@dataclass(frozen=True)
class Draw:
    """A mixture, how it is guided, and where its flow starts.

    Args:
        name: Layout, modes x dimensions, guidance.
        means: `[modes, dimensions]`.
        deviations: `[modes, dimensions]`.
        weights: `[modes]`, of any sum.
        scale: Of the guidance, u + scale (c - u); 0 is none.
        classes: Mode k is of class k modulo this number, and so is sample k.
        noise: `[samples, dimensions]`.
    """

    name: str
    means: Tensor
    deviations: Tensor
    weights: Tensor
    scale: float
    classes: int
    noise: Tensor

    def flow(self) -> Flow:
        """Give it alone, for solvers that take one flow."""
        stack = Stack([self])
        return Flow(self.name, lambda t, x: stack.velocity(t, x[None])[0], self.noise)


class Stack:
    """The velocities of many draws at once, filled up to the largest of them.

    By matrix products: with V = t² s² + (1-t)² and g = (t s² - (1-t)) / V of each mode,
    v = Σ_k r_k (mu_k - t g_k mu_k) + (Σ_k r_k g_k) x. What fills up stays 0.
    """

    def __init__(self, draws: list[Draw]) -> None:
        modes = max(len(draw.means) for draw in draws)
        dimensions = max(draw.means.shape[1] for draw in draws)
        self.draws = draws
        self.means, self.variances, self.noise = (
            torch.stack([_filled(part, rows, dimensions, fill) for part in parts])
            for parts, rows, fill in (
                ([draw.means for draw in draws], modes, 0.0),
                ([draw.deviations.square() for draw in draws], modes, 1.0),
                ([draw.noise for draw in draws], len(draws[0].noise), 0.0),
            )
        )
        logs = [_filled(draw.weights.log()[:, None], modes, 1, -math.inf) for draw in draws]
        self.log_weights = torch.stack(logs).mT
        sample = torch.arange(len(draws[0].noise))[:, None]
        same = [sample % d.classes == torch.arange(modes) % d.classes for d in draws]
        self.other_class = torch.stack(same).logical_not()
        self.scale = torch.tensor([draw.scale for draw in draws], dtype=torch.float64)[
            :, None, None
        ]
        self.guided = bool(self.scale.any())

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """Give dx/dt for x `[draws, samples, dimensions]` in float64."""
        variance = t * t * self.variances + (1 - t) ** 2
        scaled = self.means / variance
        distance = x.square() @ variance.reciprocal().mT - 2 * t * (x @ scaled.mT)
        constant = t * t * (self.means * scaled).sum(-1) + variance.log().sum(-1)
        logits = self.log_weights - 0.5 * (distance + constant[:, None])
        slope = (t * self.variances - (1 - t)) / variance
        posterior = logits.softmax(-1)
        if self.guided:
            own = logits.masked_fill(self.other_class, -math.inf).softmax(-1)
            posterior = posterior + self.scale * (own - posterior)
        return posterior @ (self.means - t * slope * self.means) + (posterior @ slope) * x

    def deviation(self, x: Tensor) -> Tensor:
        """Give the standard deviation of each draw's x, `[draws]`."""
        return torch.stack(
            [one[:, : d.means.shape[1]].std() for one, d in zip(x, self.draws, strict=True)]
        )

    def errors(self, x: Tensor, answer: Tensor) -> Tensor:
        """Give each draw's root mean square error over the deviation of its answer, `[draws]`."""
        dimensions = torch.tensor([draw.means.shape[1] for draw in self.draws])
        square = (x - answer).square().mean(1).sum(-1) / dimensions
        return square.sqrt() / self.deviation(answer)


def stacks(draws: list[Draw]) -> list[Stack]:
    """Put draws of about the same size together."""
    groups: dict[tuple[bool, int], list[Draw]] = {}
    for draw in draws:
        modes, dimensions = draw.means.shape
        groups.setdefault((modes > 24, math.ceil(math.log2(dimensions)) // 2), []).append(draw)
    return [Stack(group) for _, group in sorted(groups.items())]


def _filled(tensor: Tensor, rows: int, columns: int, value: float) -> Tensor:
    filled = torch.full((rows, columns), value, dtype=torch.float64)
    filled[: tensor.shape[0], : tensor.shape[1]] = tensor
    return filled


def drawn(seed: int, count: int, samples: int = 96) -> list[Draw]:
    """Draw flows, a quarter of them guided by 1.5 to 4 and a quarter by 4 to 8.

    The layouts of the modes take turns: points in few dimensions, circles, lattices, curves of
    many narrow modes, spectra of up to 256 dimensions, modes that are long in a direction of their
    own. The data's deviation is 0.7 to 1.4, its mean is not 0, and the weights are unequal. In
    half of the guided ones each mode is a class, in the others there are up to four classes.

    Args:
        seed: Of everything that is drawn.
        count: How many; the first ones do not depend on it.
        samples: Of each.

    Returns:
        What was drawn.
    """
    return [_draw(seed, index, samples) for index in range(count)]


def _draw(seed: int, index: int, samples: int) -> Draw:
    random = Generator().manual_seed(1_000_003 * (seed + 1) + index)
    layout = _LAYOUTS[index % len(_LAYOUTS)]
    means, deviations = _scaled(*layout(random), random)
    modes, dimensions = means.shape
    weights = 0.3 + torch.rand(modes, generator=random, dtype=torch.float64)
    noise = torch.randn(samples, dimensions, generator=random, dtype=torch.float64)
    scale = _between(*_GUIDANCE[index // len(_LAYOUTS) % len(_GUIDANCE)], random)
    classes = modes if _between(0, 1, random) < 0.5 else min(4, modes)
    name = f"{layout.__name__.strip('_')}-{modes}x{dimensions}"
    if scale:
        name += f"-cfg{scale:.1f}-of-{classes}"
    return Draw(name, means, deviations, weights, scale, classes, noise)


def _plane(random: Generator) -> tuple[Tensor, Tensor]:
    modes, dimensions = _integer(2, 14, random), _integer(2, 4, random)
    means = torch.randn(modes, dimensions, generator=random, dtype=torch.float64)
    return means, _near(_between(0.08, 0.5, random), means, random)


def _circle(random: Generator) -> tuple[Tensor, Tensor]:
    modes = (3, 5, 6, 11, 13, 17)[_integer(0, 5, random)]
    angle = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes) + 0.3
    radii = 1.0 + 0.5 * torch.rand(modes, generator=random, dtype=torch.float64)
    means = radii[:, None] * torch.stack((angle.cos(), angle.sin()), dim=-1)
    return means, _near(_between(0.05, 0.3, random), means, random)


def _lattice(random: Generator) -> tuple[Tensor, Tensor]:
    dimensions = _integer(2, 3, random)
    side = _integer(2, 4 if dimensions == 2 else 3, random)
    line = torch.linspace(-1.0, 1.0, side, dtype=torch.float64)
    means = torch.cartesian_prod(*[line] * dimensions)
    return means, _near(_between(0.05, 0.3, random), means, random)


def _curve(random: Generator) -> tuple[Tensor, Tensor]:
    """A closed curve of many narrow modes, in 2 to 12 dimensions."""
    dimensions = _integer(2, 12, random)
    u = torch.linspace(0.0, 2 * math.pi, 49, dtype=torch.float64)[:-1, None]
    shape = (3, 1, dimensions)
    cosines, sines = (torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(2))
    means = torch.zeros(len(u), dimensions, dtype=torch.float64)
    for frequency, (a, b) in enumerate(zip(cosines, sines, strict=True), start=1):
        means = means + (a * (frequency * u).cos() + b * (frequency * u).sin()) / frequency
    return means, _near(_between(0.06, 0.25, random), means, random)


def _spectrum(random: Generator) -> tuple[Tensor, Tensor]:
    """Directions with variances j^-power; a share of them is within a mode."""
    modes, dimensions = _integer(2, 24, random), round(2 ** _between(3, 8, random))
    power, share = _between(0.0, 2.0, random), _between(0.1, 0.7, random)
    scale = torch.arange(1, dimensions + 1, dtype=torch.float64) ** (-power / 2)
    scale = scale / scale.square().mean().sqrt()
    means = torch.randn(modes, dimensions, generator=random, dtype=torch.float64) * scale
    spread = 0.4 + 1.2 * torch.rand(modes, 1, generator=random, dtype=torch.float64)
    return means * math.sqrt(1 - share), scale * math.sqrt(share) * spread


def _long(random: Generator) -> tuple[Tensor, Tensor]:
    """Modes with a width of their own in every direction."""
    modes, dimensions = _integer(3, 9, random), _integer(2, 8, random)
    means = torch.randn(modes, dimensions, generator=random, dtype=torch.float64)
    exponents = torch.rand(modes, dimensions, generator=random, dtype=torch.float64)
    return means, 0.04 * 20.0**exponents


_LAYOUTS = (_plane, _spectrum, _circle, _long, _spectrum, _lattice, _curve)


def _scaled(means: Tensor, deviations: Tensor, random: Generator) -> tuple[Tensor, Tensor]:
    """Give the data a deviation of 0.7 to 1.4, and a mean."""
    centred = means - means.mean(0)
    factor = 0.7 * 2.0 ** _between(0, 1, random)
    factor /= (centred.square() + deviations.square()).mean().sqrt().item()
    mean = 0.2 * torch.randn(means.shape[1], generator=random, dtype=torch.float64)
    return centred * factor + mean, deviations * factor


def _near(deviation: float, means: Tensor, random: Generator) -> Tensor:
    """Deviations around one number, for each mode its own."""
    factors = 0.7 + 0.6 * torch.rand(len(means), 1, generator=random, dtype=torch.float64)
    return (deviation * factors).expand_as(means)


def _between(low: float, high: float, random: Generator) -> float:
    return low + (high - low) * torch.rand((), generator=random, dtype=torch.float64).item()


def _integer(low: int, high: int, random: Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=random).item())
