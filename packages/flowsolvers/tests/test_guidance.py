"""Guidance: the formula, the order of calls, the errors."""

import math

import pytest
import torch

import flowsolvers as fs


def test_guidance_is_affine_in_the_scale():
    t, x = torch.tensor(0.3), torch.randn(4, dtype=torch.float64)
    cond, uncond = torch.sin, torch.cos
    for scale in (0.0, 1.0, 2.5, 4.0, -1.0):
        v = fs.guided(lambda t, x: cond(x), lambda t, x: uncond(x), scale=scale)(t, x)
        # Ho & Salimans, eq. 6, with w = scale - 1.
        torch.testing.assert_close(v, scale * cond(x) - (scale - 1) * uncond(x))


def test_each_velocity_is_called_once_with_the_same_arguments():
    calls = []

    def record(name):
        def velocity(t, x):
            calls.append((name, t, x))
            return x

        return velocity

    t, x = torch.tensor(0.3), torch.ones(2)
    fs.guided(record("cond"), record("uncond"), scale=4.0)(t, x)
    assert [name for name, _, _ in calls] == ["uncond", "cond"]
    assert all(seen_t is t and seen_x is x for _, seen_t, seen_x in calls)


def test_guided_flow_is_solved_like_any_other():
    # u = -x and c = x with s = 2 is dx/dt = 3x.
    v = fs.guided(lambda t, x: x, lambda t, x: -x, scale=2.0)
    solution = fs.solve(v, torch.ones(1, dtype=torch.float64), nfe=400, solver="rk4")
    assert solution.x.item() == pytest.approx(math.exp(3), rel=1e-7)
    assert solution.nfe == 400


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_not_finite_is_refused(scale):
    with pytest.raises(ValueError, match="finite"):
        fs.guided(lambda t, x: x, lambda t, x: x, scale=scale)


def test_velocities_of_two_shapes_are_refused():
    v = fs.guided(lambda t, x: x, lambda t, x: x[:1], scale=4.0)
    with pytest.raises(ValueError, match=r"\(2,\).*\(1,\)"):
        v(torch.tensor(0.0), torch.ones(2))
