"""The default solver: the budget, consistency, order, and how it stands on guided flows."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import flowsolvers as fs

GRIDS = [None, fs.uniform(), fs.shift(4.0), fs.logistic(4.0)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("nfe", range(1, 70))
def test_the_budget_is_met_and_every_step_is_consistent(nfe, grid):
    plan = fs.plan("auto", nfe=nfe, schedule=grid)
    assert plan.nfe == nfe
    for step in plan.steps:
        assert math.fsum(step.weights) == pytest.approx(step.t_next - step.t, rel=1e-12)
        for row in step.rows:
            assert math.fsum(row.weights) == pytest.approx(row.t - step.t, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("nfe", [1, 3, 4, 9, 30])
def test_its_own_grid_parses_back_and_can_be_entered_late(nfe):
    plan = fs.plan("auto", nfe=nfe)
    assert plan.schedule == f"auto:{nfe}"
    assert fs.schedule(plan.schedule).grid(nfe) == pytest.approx(plan.times, rel=1e-12)
    late = fs.plan("auto", nfe=nfe, start=0.4)
    assert late.times[0] == 0.4
    assert all(t < t_next for t, t_next in pairwise(late.times))
    assert fs.plan("auto", nfe=nfe, start=1.0, end=0.0).times[-1] == 0.0


def test_it_converges_with_order_four(mixture_flow):
    steps, errors = (192, 256, 384, 512), []
    for nfe in steps:
        x = fs.solve(mixture_flow.velocity, mixture_flow.noise, nfe=nfe).x
        errors.append((x - mixture_flow.data).square().mean().sqrt().item())
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(4.0, abs=0.3)


def _guided(scale):
    """Eight modes on a circle, each sample guided to its own."""
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    means = 1.3 * torch.stack([angle.cos(), angle.sin()], -1)
    mode = torch.arange(256) % 8

    def velocity(t, x):
        variance = t * t * 0.04 + (1 - t) ** 2
        slope = (t * 0.04 - (1 - t)) / variance
        each = means + slope * (x[:, None] - t * means)
        share = (-(x[:, None] - t * means).square().sum(-1) / (2 * variance)).softmax(-1)
        u = (share[..., None] * each).sum(1)
        return u + scale * (each[torch.arange(256), mode] - u) if scale else u

    noise = torch.randn(256, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return velocity, noise


@pytest.mark.parametrize("scale", [0.0, 2.0, 4.0])
@pytest.mark.parametrize("nfe", [10, 16, 20, 30])
def test_it_is_nearer_than_midpoint_and_euler(scale, nfe):
    velocity, noise = _guided(scale)
    exact = fs.solve(velocity, noise, nfe=2000, solver="rk4").x

    def error(**options):
        return (fs.solve(velocity, noise, nfe=nfe, **options).x - exact).square().mean().sqrt()

    assert error() < error(solver="midpoint")
    assert error() < error(solver="euler")
