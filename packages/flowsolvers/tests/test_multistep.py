"""Multistep methods: textbook weights, the schedulers of diffusers, measured orders, budgets."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import flowsolvers as fs
from flowsolvers.adams import PEC, Adams
from flowsolvers.exponential import DPMSolver, Exponential, UniPC
from flowsolvers.interpolation import integrals

MULTISTEP = [name for name in fs.solvers() if not isinstance(fs.method(name), fs.Tableau)]
GRIDS = [fs.uniform(), fs.shift(4.0), fs.sigmoid(0.5, 4.0, 4.0)]


def test_weights_on_equal_steps_are_those_of_the_textbooks() -> None:
    bashforth = {2: (3, -1, 2), 3: (23, -16, 5, 12), 4: (55, -59, 37, -9, 24)}
    moulton = {2: (5, 8, -1, 12), 3: (9, 19, -5, 1, 24)}
    for k, (*numbers, denominator) in bashforth.items():
        weights = integrals([float(-j) for j in range(k)], 0.0, 1.0)
        assert weights == pytest.approx(np.array(numbers) / denominator, abs=1e-14)
    for k, (*numbers, denominator) in moulton.items():
        weights = integrals([float(1 - j) for j in range(k + 1)], 0.0, 1.0)
        assert weights == pytest.approx(np.array(numbers) / denominator, abs=1e-14)


@pytest.mark.parametrize("r", [0.25, 1.0, 3.0])
def test_adams_of_order_2_has_its_closed_form(r) -> None:
    h, h_prev = 0.2, 0.2 / r
    _, step = Adams(2).lay_out(2, lambda n: (0.0, h_prev, h_prev + h))
    assert step.weights == pytest.approx((-h * r / 2, h * (1 + r / 2)), abs=1e-15)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_pec_equals_the_method_written_out(order, grid, mixture_flow) -> None:
    """With numpy's polynomials for the weights."""

    def weights(nodes, t, t_next):
        found = []
        for j, node in enumerate(nodes):
            others = [other for i, other in enumerate(nodes) if i != j]
            integral = np.poly1d(others, r=True).integ() / np.prod(
                [node - x for x in others] or [1]
            )
            found.append(float(integral(t_next) - integral(t)))
        return found

    n, v = 7, mixture_flow.velocity
    times = grid.grid(n)
    x, known = mixture_flow.noise, []
    known.append((times[0], v(torch.tensor(times[0]), x)))
    for i, (t, t_next) in enumerate(pairwise(times)):
        recent = known[-order:]
        predict = weights([s for s, _ in recent], t, t_next)
        point = x + sum(w * u for w, (_, u) in zip(predict, recent, strict=True))
        if i == n - 1:
            x = point
            break
        known.append((t_next, v(torch.tensor(t_next, dtype=torch.float64), point)))
        recent = known[-order - 1 :]
        correct = weights([s for s, _ in recent], t, t_next)
        x = x + sum(w * u for w, (_, u) in zip(correct, recent, strict=True))
    ours = fs.solve(v, mixture_flow.noise, nfe=n, solver=f"pec{order}", schedule=grid)
    torch.testing.assert_close(ours.x, x, atol=1e-12, rtol=0)


@pytest.mark.parametrize("grid", [fs.uniform(), fs.sigmoid(0.5, 6.0, 6.0), fs.cosine()], ids=str)
@pytest.mark.parametrize("solver", ["ab2", "ab3", "ab4", "pec1", "pec2", "pec3"])
def test_measured_order_is_the_nominal_one(solver, grid, mixture_flow) -> None:
    errors = []
    for nfe in (128, 192, 256, 384):
        x = fs.solve(
            mixture_flow.velocity, mixture_flow.noise, nfe=nfe, solver=solver, schedule=grid
        ).x
        errors.append((x - mixture_flow.data).square().mean().sqrt().item())
    slope = -np.polyfit(np.log([128, 192, 256, 384]), np.log(errors), 1)[0]
    assert slope == pytest.approx(fs.method(solver).order, abs=0.15)


# Where log-SNR is infinite, at 0 and 1, their error is h² log h at best.
@pytest.mark.parametrize("grid", [fs.uniform(), fs.sigmoid(0.5, 6.0, 6.0), fs.cosine()], ids=str)
@pytest.mark.parametrize("solver", ["dpm2m", "dpm3m", "res2", "res3", "unipc2", "unipc3"])
def test_exponential_methods_have_their_order_between_the_ends(solver, grid, inner_flow) -> None:
    errors, steps = [], (256, 384, 512)
    for nfe in steps:
        x = fs.solve(
            inner_flow.velocity,
            inner_flow.noise,
            nfe=nfe,
            solver=solver,
            schedule=grid,
            start=0.05,
            end=0.95,
        ).x
        errors.append((x - inner_flow.data).square().mean().sqrt().item())
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(fs.method(solver).order, abs=0.15)


@pytest.mark.parametrize("solver", MULTISTEP)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 5, 8, 23])
def test_budget_is_met_and_each_evaluation_is_at_its_time(solver, grid, nfe) -> None:
    plan = fs.plan(solver, nfe=nfe, schedule=grid)
    assert plan.nfe == nfe
    times = [row.t for step in plan.steps for row in step.rows]
    assert times == sorted(times)
    assert plan.steps[0].t == 0.0
    assert plan.steps[-1].t_next == 1.0
    # A flow that stands still stays, and constant velocity moves by the time that passes.
    for step in plan.steps:
        assert step.scale == pytest.approx(1.0 - sum(step.weights)) or step.scale == 1.0


def scheduler_like(name: str, sigmas: torch.Tensor, **options):
    """A scheduler of diffusers on given sigmas, with times that are not rounded to integers."""
    diffusers = pytest.importorskip("diffusers", reason="the peer is diffusers")
    scheduler = getattr(diffusers, name)(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, **options
    )
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas
    scheduler.timesteps = sigmas[:-1] * 1000
    scheduler.set_begin_index(0)
    return scheduler


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("nfe", [4, 10, 20])
@pytest.mark.parametrize(
    ("method", "name", "options"),
    [
        (UniPC(2), "UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}),
        (
            UniPC(2, "bh1", last_lower_order=True),
            "UniPCMultistepScheduler",
            {"solver_order": 2, "solver_type": "bh1"},
        ),
        (UniPC(3), "UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh2"}),
        (
            DPMSolver(),
            "DPMSolverMultistepScheduler",
            {"solver_order": 2, "algorithm_type": "dpmsolver++"},
        ),
    ],
    ids=["unipc2", "unipc2-bh1", "unipc3", "dpm2m"],
)
def test_equals_the_scheduler_of_diffusers(method, name, options, nfe, mixture_flow) -> None:
    # log-SNR is infinite at both ends: theirs starts late, and bh1 gives NaN at t = 1.
    end = 0.999 if "bh1" in options.values() else 1.0
    times = (0.001, *fs.sigmoid(0.5, 4.0, 4.0).grid(nfe)[1:-1], end)
    plan = fs.Plan(name, "sigmoid", method.lay_out(nfe, lambda n: times))
    sigmas = 1.0 - torch.tensor(times, dtype=torch.float64)
    scheduler = scheduler_like(name, sigmas, final_sigmas_type="zero", **options)
    x = mixture_flow.noise
    for t, timestep in zip(times[:-1], scheduler.timesteps, strict=True):
        v = mixture_flow.velocity(torch.tensor(t, dtype=torch.float64), x)
        x = scheduler.step(-v, timestep, x, return_dict=False)[0].double()
    ours = fs.solve(mixture_flow.velocity, mixture_flow.noise, plan=plan).x
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adams(5), "1 to 4"),
        (lambda: PEC(0), "1 to 3"),
        (lambda: UniPC(4), "1 to 3"),
        (lambda: UniPC(2, "bh3"), "'bh3'"),
        (lambda: Exponential(2, "snr"), "'snr'"),
    ],
)
def test_what_is_no_method_is_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
