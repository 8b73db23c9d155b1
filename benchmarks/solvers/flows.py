"""Flows whose velocity has a closed form: Gaussian mixtures, plain and guided."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flow:
    """A velocity, where it starts, and where it should end.

    Args:
        name: Of the problem.
        velocity: `velocity(t, x)` in the dtype of x.
        noise: `[samples, dimensions]`, float64.
    """

    name: str
    velocity: Callable[[Tensor, Tensor], Tensor]
    noise: Tensor


class Mixture:
    """Σ_k w_k N(mu_k, diag s_k²), and its marginal velocity on the linear path.

    V_k = t² s_k² + (1-t)²;  v_k = mu_k + (t s_k² - (1-t)) / V_k (x - t mu_k);  v = Σ r_k v_k, with
    r_k the posterior of the mode under x_t.
    """

    def __init__(self, means: Tensor, deviations: Tensor, weights: Tensor | None = None) -> None:
        self.means, self.variances = means.double(), deviations.double().square()
        modes = len(means)
        self.log_weights = (
            torch.full((modes,), -math.log(modes), dtype=torch.float64)
            if weights is None
            else (weights.double() / weights.double().sum()).log()
        )

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """Give the marginal velocity."""
        t, x64 = t.double(), x.double()
        variance = t * t * self.variances + (1 - t) ** 2
        offset = x64[:, None] - t * self.means
        logits = self.log_weights - 0.5 * (offset.square() / variance + variance.log()).sum(-1)
        each = self.means + (t * self.variances - (1 - t)) / variance * offset
        return (logits.softmax(-1)[..., None] * each).sum(1).to(x.dtype)

    def of_mode(self, mode: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Give the velocity under the condition that sample i is of mode[i]."""
        t, x64 = t.double(), x.double()
        means, variances = self.means[mode], self.variances[mode]
        variance = t * t * variances + (1 - t) ** 2
        v = means + (t * variances - (1 - t)) / variance * (x64 - t * means)
        return v.to(x.dtype)


def ring(modes: int = 8, deviation: float = 0.12) -> Mixture:
    """Modes on a circle, of unit variance in each direction."""
    angle = torch.arange(modes) * (2 * math.pi / modes)
    radius = math.sqrt(2 * (1 - deviation**2))
    means = radius * torch.stack((angle.cos(), angle.sin()), dim=-1)
    return Mixture(means, torch.full((modes, 2), deviation))


def spectrum(dimensions: int, modes: int, power: float, share: float, seed: int) -> Mixture:
    """Modes whose directions have variances j^-power; `share` of them is within a mode."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, dimensions + 1, dtype=torch.float64) ** (-power / 2)
    scale = scale / scale.square().mean().sqrt()
    draw = torch.randn(modes, dimensions, generator=generator, dtype=torch.float64)
    means = draw * scale * math.sqrt(1 - share)
    spread = torch.rand(modes, 1, generator=generator, dtype=torch.float64) + 0.5
    return Mixture(means, scale * math.sqrt(share) * spread)


def grid(side: int, deviation: float) -> Mixture:
    """Modes on a square grid."""
    line = torch.linspace(-1.5, 1.5, side)
    return Mixture(torch.cartesian_prod(line, line), torch.full((side * side, 2), deviation))


def stretched(seed: int) -> Mixture:
    """Modes in the plane, long in one direction."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(5, 2, generator=generator)
    deviations = torch.tensor([[0.5, 0.04], [0.05, 0.4], [0.2, 0.2], [0.03, 0.3], [0.6, 0.1]])
    return Mixture(means, deviations, torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15]))


def guided(mixture: Mixture, scale: float, samples: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Guide each sample to a mode of its own, u + scale (c - u)."""
    mode = torch.arange(samples) % len(mixture.means)

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        unconditional = mixture.velocity(t, x)
        return unconditional + scale * (mixture.of_mode(mode, t, x) - unconditional)

    return velocity


def published() -> list[Flow]:
    """The four flows of the bench set."""
    flows: list[Flow] = []
    for name, mixture, samples in (
        ("ring2d", ring(), 1024),
        ("gmm64", spectrum(64, 10, 1.0, 0.3, 0), 512),
    ):
        noise = _noise(samples, mixture, 1)
        flows.append(Flow(name, mixture.velocity, noise))
        flows.append(Flow(f"{name}-cfg4", guided(mixture, 4.0, samples), noise))
    return flows


def held_out(seed: int = 0) -> list[Flow]:
    """Nine others: a grid, stretched modes, 16 to 256 dimensions, guidance of 2, 3, 4 and 7."""
    found: list[Flow] = []
    for name, mixture, scale, samples in (
        ("grid25", grid(5, 0.1), 0.0, 512),
        ("stretched", stretched(seed + 1), 0.0, 512),
        ("gmm16", spectrum(16, 6, 0.5, 0.2, seed + 2), 0.0, 512),
        ("gmm64-flat", spectrum(64, 20, 0.0, 0.5, seed + 3), 0.0, 256),
        ("gmm256", spectrum(256, 8, 1.5, 0.3, seed + 4), 0.0, 128),
        ("grid25-cfg2", grid(5, 0.1), 2.0, 512),
        ("gmm16-cfg3", spectrum(16, 6, 0.5, 0.2, seed + 2), 3.0, 512),
        ("gmm256-cfg4", spectrum(256, 8, 1.5, 0.3, seed + 4), 4.0, 128),
        ("stretched-cfg7", stretched(seed + 1), 7.0, 512),
    ):
        noise = _noise(samples, mixture, seed + 10)
        velocity = guided(mixture, scale, samples) if scale else mixture.velocity
        found.append(Flow(name, velocity, noise))
    return found


def _noise(samples: int, mixture: Mixture, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, mixture.means.shape[1], generator=generator, dtype=torch.float64)
