"""Fitted time grids: quantiles in closed form, and a smaller error."""

import math

import numpy as np
import pytest
import torch

import flowsolvers as fs


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("power", [2, 4])
def test_times_are_quantiles_of_the_velocitys_change(order, power):
    # v = t^q: F' is t^((q - 1)/(p + 1)), so F = t^a with a = 1 + (q - 1)/(p + 1).
    times = np.linspace(0, 1, 2001)
    velocities = torch.from_numpy(times**power)[:, None].expand(-1, 3)
    grid = fs.fitted(times, velocities, order=order, points=8, floor=1e-6).grid(8)
    exact = np.linspace(0, 1, 9) ** (1 / (1 + (power - 1) / (order + 1)))
    np.testing.assert_allclose(grid, exact, atol=2e-4)


def test_a_fit_to_a_model_sees_its_trajectories():
    # v = x gives dv/dt = e^t, and F of order 1 is e^(t/2) up to a line.
    fit = fs.fit_schedule(lambda t, x: x, torch.ones(4), nfe=200, points=4)
    exact = [2 * math.log1p(u * math.expm1(0.5)) for u in np.linspace(0, 1, 5)]
    np.testing.assert_allclose(fit.grid(4), exact, atol=2e-4)
    assert fs.schedule(str(fit)) == fit


@pytest.mark.parametrize("nfe", [8, 16, 32])
@pytest.mark.parametrize(("solver", "ratio"), [("euler", 0.97), ("midpoint", 0.79)])
def test_a_fitted_grid_makes_the_error_smaller(mixture_flow, solver, ratio, nfe):
    velocity, noise = mixture_flow.velocity, mixture_flow.noise
    fit = fs.fit_schedule(velocity, noise[:16], nfe=60, order=fs.method(solver).order)

    def error(schedule):
        x = fs.solve(velocity, noise, nfe=nfe, solver=solver, schedule=schedule).x
        return (x - mixture_flow.data).square().mean().sqrt().item()

    assert error(fit) < ratio * error(fs.uniform())


def test_a_velocity_that_stands_still_gives_even_steps():
    still = fs.fitted([0.0, 0.4, 1.0], torch.ones(3, 2), points=4)
    assert still.grid(4) == fs.uniform().grid(4)


@pytest.mark.parametrize(
    ("times", "velocities", "options", "message"),
    [
        ([0.0, 1.0], torch.ones(2), {}, "at least 3"),
        ([0.0, 0.5, 1.0], torch.ones(2), {}, "3 times and 2"),
        ([0.0, 0.5, 0.4], torch.ones(3), {}, "increase"),
        ([0.0, 0.5, 1.1], torch.ones(3), {}, "increase"),
        ([0.0, 0.5, 1.0], torch.tensor([0.0, math.nan, 0.0]), {}, "finite"),
        ([0.0, 0.5, 1.0], torch.ones(3), {"order": 0}, "order"),
        ([0.0, 0.5, 1.0], torch.ones(3), {"points": 0}, "points"),
        ([0.0, 0.5, 1.0], torch.ones(3), {"floor": 0.0}, "floor"),
    ],
)
def test_bad_trajectories_are_refused(times, velocities, options, message):
    with pytest.raises(ValueError, match=message):
        fs.fitted(times, velocities, **options)
    with pytest.raises(ValueError, match="nfe"):
        fs.fit_schedule(lambda t, x: x, torch.ones(1), nfe=2)
