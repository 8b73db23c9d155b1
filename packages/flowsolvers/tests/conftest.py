"""Flows whose solution somebody else computes."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


def _mixture(means: Tensor, deviations: Tensor, weights: Tensor) -> Callable[..., Tensor]:
    """E[data - noise | x_t] of a Gaussian mixture, for x_t = (1 - t)·noise + t·data, x [B, D]."""
    m, s2, log_w = means.double(), deviations.double() ** 2, weights.double().log()
    dim = m.shape[-1]

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        var = t * t * s2 + (1 - t) ** 2
        offset = x[:, None] - t * m
        logits = log_w - offset.square().sum(-1) / (2 * var) - 0.5 * dim * var.log()
        each = m + ((t * s2 - (1 - t)) / var)[:, None] * offset
        return (logits.softmax(-1)[..., None] * each).sum(1)

    return velocity


def _flow(dim: int, begin: float, end: float) -> SimpleNamespace:
    from scipy.integrate import solve_ivp  # absent where only GPU tests run

    means = torch.tensor([[-1.2, 0.5], [0.9, -0.7], [0.4, 1.1]])[:, :dim]
    velocity = _mixture(means, torch.tensor([0.5, 0.6, 0.4]), torch.tensor([0.4, 0.35, 0.25]))
    noise = torch.randn(48, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def field(t: float, y: Any) -> Any:
        x = torch.from_numpy(y).view(noise.shape)
        return velocity(torch.tensor(t, dtype=torch.float64), x).flatten().numpy()

    start = noise.flatten().numpy()
    answer = solve_ivp(field, (begin, end), start, method="DOP853", rtol=1e-13, atol=1e-13)
    data = torch.from_numpy(answer.y[:, -1]).view(noise.shape)
    return SimpleNamespace(velocity=velocity, noise=noise, data=data)


@pytest.fixture(scope="session", params=[1, 2], ids=["1-D mixture", "2-D mixture"])
def mixture_flow(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A mixture's velocity, 48 noises and where scipy's DOP853 says that they end."""
    return _flow(request.param, 0.0, 1.0)


@pytest.fixture(scope="session")
def inner_flow() -> SimpleNamespace:
    """The same in the plane, from t = 0.05 to 0.95."""
    return _flow(2, 0.05, 0.95)
