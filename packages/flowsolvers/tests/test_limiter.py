"""Limiters: the formula, samples and leaves alone, order, gradients, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch

import flowsolvers as fs
from flowsolvers.adams import predict_correct
from flowsolvers.plan import Limiter, Row, Step


def _plan(steps, strength):
    times = fs.uniform().grid(steps)
    return fs.Plan("limited", "uniform", predict_correct(times, [2.0] * steps, limit=strength))


def _shapes():
    yield "rows", (3, 4)
    yield "images", (3, 2, 5, 4)
    yield "scalars", (3,)
    yield "one number", ()


@pytest.mark.parametrize("shape", [shape for _, shape in _shapes()], ids=[n for n, _ in _shapes()])
@pytest.mark.parametrize("strength", [0.7, 8.0])
def test_two_steps_are_the_formula(shape, strength):
    """Adams-Bashforth's second step by hand, in numpy, one sample after the other."""
    random = torch.Generator().manual_seed(1)
    x, v0, v1 = (torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(3))
    steps = (
        Step(0.0, 0.5, (Row(0.0, ()),), (0.5,)),
        Step(0.5, 1.0, (Row(0.5, ()),), (-0.25, 0.75), limiter=Limiter(-1, -2, strength)),
    )
    found = fs.solve(lambda t, x: v1 if t else v0, x, plan=fs.Plan("ab2", "uniform", steps)).x
    rows = 1 if not shape else shape[0]
    a, b, y = (part.numpy().reshape(rows, -1) for part in (v0, v1, x))
    for sample, result in enumerate(found.numpy().reshape(rows, -1)):
        old, new = a[sample], b[sample]
        s = np.sum((new - old) ** 2) / (2 * (np.sum(new**2) + np.sum(old**2)))
        rest = (-0.25 * old + 0.75 * new) - 0.5 * new
        expected = y[sample] + 0.5 * old + 0.5 * new + rest / (1 + (strength * s) ** 4)
        np.testing.assert_allclose(result, expected, rtol=1e-14, atol=1e-14)


def test_samples_and_leaves_do_not_see_one_another(mixture_flow):
    plan, x, velocity = fs.plan(nfe=6), mixture_flow.noise, mixture_flow.velocity
    together = fs.solve(velocity, x, plan=plan).x
    alone = torch.cat([fs.solve(velocity, one[None], plan=plan).x for one in x])
    assert (together - alone).abs().max() < 1e-13
    tree = {"a": x, "b": x[:5]}
    both = fs.solve(lambda t, s: {k: velocity(t, v) for k, v in s.items()}, tree, plan=plan).x
    assert (both["a"] - together).abs().max() < 1e-13
    assert (both["b"] - together[:5]).abs().max() < 1e-13


@pytest.mark.parametrize("strength", [0.0, 1.0, 4.0])
def test_no_order_is_lost_unless_the_velocity_vanishes(mixture_flow, strength):
    steps, errors = (48, 64, 96, 128), []
    for count in steps:
        x = fs.solve(mixture_flow.velocity, mixture_flow.noise, plan=_plan(count, strength)).x
        errors.append((x - mixture_flow.data).square().mean().sqrt().item())
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    if strength and mixture_flow.noise.shape[1] == 1:  # in one dimension it changes its sign
        assert order == pytest.approx(2.0, abs=0.3)
    else:
        assert order == pytest.approx(3.0, abs=0.3)


def test_a_stiff_flow_stays_where_eulers_method_does():
    """dx/dt = -12 x in steps of 1/8: Euler's factor is -1/2, and of order 3 it explodes."""
    x = torch.ones(1, 1, dtype=torch.float64)

    def last(plan):
        return fs.solve(lambda t, x: -12.0 * x, x, plan=plan).x.abs().item()

    assert last(fs.plan("euler", nfe=8)) == pytest.approx(0.5**8)
    assert last(_plan(8, 0.0)) > 10.0
    assert last(_plan(8, 4.0)) < 0.1


def test_gradients_through_a_limiter_are_those_of_differences():
    plan = _plan(3, 2.0)

    def solution(x):
        return fs.solve(lambda t, x: torch.sin(3.0 * x) - t, x, plan=plan).x

    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.autograd.gradcheck(solution, x.requires_grad_())
    zero = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    still = fs.solve(lambda t, x: 0.0 * x, zero, plan=plan).x
    (gradient,) = torch.autograd.grad(still.sum(), zero)
    assert (gradient == 1.0).all()  # no 0/0 where nothing moves


def test_a_limited_plan_is_written_read_and_printed():
    plan = fs.plan(nfe=5)
    assert any(step.limiter for step in plan.steps)
    assert fs.Plan.from_json(plan.to_json()) == plan
    assert "less as v2 parts from v1" in str(plan)
    data = json.loads(plan.to_json())
    data["steps"][1]["limiter"]["other"] = -9
    with pytest.raises(ValueError, match=r"not a plan .*limiter must be of two of the"):
        fs.Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("limiter", "scale", "message"),
    [
        (Limiter(-1, -3, 1.0), 1.0, "two of the 2 evaluations"),
        (Limiter(0, -1, 1.0), 1.0, "two of the 2 evaluations"),
        (Limiter(-1, -2, -1.0), 1.0, "not negative"),
        (Limiter(-1, -2, math.nan), 1.0, "not finite"),
        (Limiter(-1, -2, 1.0), 0.5, "cannot be"),
    ],
)
def test_limiters_that_mean_nothing_are_refused(limiter, scale, message):
    with pytest.raises(ValueError, match=message):
        Step(0.0, 1.0, (Row(0.0, ()), Row(0.5, (0.5,))), (0.5, 0.5), scale, limiter)
