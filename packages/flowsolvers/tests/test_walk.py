"""A plan driven from outside: the same answer as `solve`, and a clean start anywhere."""

from __future__ import annotations

import pytest
import torch
from scipy.integrate import solve_ivp

import flowsolvers as fs
from flowsolvers.adapters.walk import Walk, from_evaluation


def _times(plan: fs.Plan) -> list[float]:
    return [row.t for step in plan.steps for row in step.rows]


@pytest.mark.parametrize("nfe", [1, 2, 7, 18])
@pytest.mark.parametrize("solver", fs.solvers())
def test_a_walk_arrives_where_solve_does(solver, nfe, mixture_flow) -> None:
    plan = fs.plan(solver, nfe=nfe, schedule=fs.shift(3.0))
    walk = Walk(plan, mixture_flow.noise)
    for t in _times(plan):
        assert not walk.done
        walk.advance(mixture_flow.velocity(torch.tensor(t, dtype=torch.float64), walk.point))
    assert walk.done
    expected = fs.solve(mixture_flow.velocity, mixture_flow.noise, plan=plan).x
    assert (walk.point - expected).abs().max() < 1e-12


def test_a_walk_at_its_end_wants_no_more() -> None:
    walk = Walk(fs.plan("euler", nfe=1), torch.zeros(1))
    walk.advance(torch.ones(1))
    with pytest.raises(ValueError, match="at its end"):
        walk.advance(torch.ones(1))


@pytest.mark.parametrize("anew", [True, False], ids=["laid out anew", "past as a line"])
@pytest.mark.parametrize("solver", fs.solvers())
def test_a_straight_flow_is_followed_exactly_from_every_evaluation(solver, anew) -> None:
    plan = fs.plan(solver, nfe=9, schedule=fs.cosine())
    x, v = torch.tensor([0.5, -2.0]).double(), torch.tensor([1.0, 3.0]).double()
    for first, t in list(enumerate(_times(plan)))[1:]:
        fresh = from_evaluation(plan, first) if anew else None
        if anew and fresh is None:
            continue
        walk = Walk(plan, x, first) if fresh is None else Walk(fresh, x)
        for _ in range(9 - first):
            walk.advance(v)
        assert walk.done
        assert (walk.point - (x + (1.0 - t) * v)).abs().max() < 1e-12


@pytest.mark.parametrize(
    "solver", ["ab2", "ab3", "pec2", "pec3", "res2", "unipc2", "midpoint", "rk4"]
)
def test_a_start_in_the_middle_converges(solver) -> None:
    """On dx/dt = x·cos(5t) from about t = 1/2, against scipy."""

    def field(t: float, x: float) -> float:
        return x * torch.cos(torch.tensor(5.0 * t, dtype=torch.float64)).item()

    errors: list[float] = []
    for nfe in (64, 128, 256):
        plan = fs.plan(solver, nfe=nfe)
        fresh = from_evaluation(plan, nfe // 2)
        assert (fresh is None) == (solver in ("ab3", "pec3"))  # they begin with shorter steps
        times, x = _times(plan)[nfe // 2 :], torch.ones(1, dtype=torch.float64)
        exact = solve_ivp(field, (times[0], 1.0), [1.0], rtol=1e-12, atol=1e-12).y[0, -1]
        walk = Walk(plan, x, nfe // 2) if fresh is None else Walk(fresh, x)
        for t in times:
            walk.advance(walk.point * torch.cos(torch.tensor(5.0 * t, dtype=torch.float64)))
        errors.append(abs(walk.point.item() - exact))
    assert errors[2] < errors[0] / 12  # second order is 16


def test_moved_elements_start_over_and_others_do_not() -> None:
    plan = fs.plan("pec2", nfe=6)
    times = _times(plan)

    def velocity(t: float, x: torch.Tensor) -> torch.Tensor:
        return torch.cos(3.0 * x + t)

    walk, untouched = (Walk(plan, torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    for i, t in enumerate(times):
        untouched.advance(velocity(t, untouched.point))
        if i == 3:
            moved = torch.tensor([True, False])
            point = torch.where(moved, 5.0, walk.point)
            walk.advance(velocity(t, point), point, moved)
        else:
            walk.advance(velocity(t, walk.point))
    assert walk.point[1] == untouched.point[1]
    alone = Walk(plan, torch.full((1,), 5.0, dtype=torch.float64), 3)
    for t in times[3:]:
        alone.advance(velocity(t, alone.point))
    assert abs(walk.point[0] - alone.point[0]) < 1e-14
