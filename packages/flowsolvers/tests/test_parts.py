"""A part of the flow: starts, ends, the way back, jumps, and what is done on the way."""

import io
import math
import time
from itertools import pairwise

import pytest
import torch

import flowsolvers as fs

FORWARD_ONLY = ("dpm2m", "dpm3m", "res2", "res3", "unipc2", "unipc3")
BOTH_WAYS = [name for name in fs.solvers() if name not in FORWARD_ONLY]
GRIDS = [fs.uniform(), fs.shift(4.0), fs.logistic(4.0), fs.shift(2.0) @ fs.cosine()]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_part_of_a_grid_has_the_density_of_the_whole(grid):
    whole = grid.grid(12)
    assert grid.grid(7, start=whole[5]) == pytest.approx(whole[5:], rel=1e-12)
    assert grid.grid(4, start=whole[5], end=whole[9]) == pytest.approx(whole[5:10], rel=1e-12)
    assert grid.grid(4, start=whole[9], end=whole[5]) == pytest.approx(whole[9:4:-1], rel=1e-12)
    assert grid.grid(3, start=0.3, end=0.7)[0] == 0.3
    assert grid.grid(3, start=0.3, end=0.7)[-1] == 0.7


@pytest.mark.parametrize("solver", fs.solvers())
def test_a_solve_in_two_parts_converges_to_the_whole(solver, mixture_flow):
    middle = fs.solve(mixture_flow.velocity, mixture_flow.noise, nfe=120, end=0.4, solver=solver)
    whole = fs.solve(mixture_flow.velocity, middle.x, nfe=120, start=0.4, solver=solver)
    assert (middle.t, whole.t) == (0.4, 1.0)
    error = (whole.x - mixture_flow.data).square().mean().sqrt()
    assert error < (5e-3 if fs.method(solver).order == 1 else 5e-4)


@pytest.mark.parametrize("solver", BOTH_WAYS)
def test_inversion_comes_back_to_the_noise(solver, mixture_flow):
    found = fs.solve(
        mixture_flow.velocity, mixture_flow.data, nfe=240, solver=solver, start=1.0, end=0.0
    )
    error = (found.x - mixture_flow.noise).square().mean().sqrt()
    assert found.t == 0.0
    assert error < (2e-2 if fs.method(solver).order == 1 else 1e-3)
    assert found.plan.steps[0].rows[0].t == 1.0


@pytest.mark.parametrize("solver", FORWARD_ONLY)
def test_exponential_methods_say_that_they_run_one_way(solver):
    with pytest.raises(ValueError, match="from noise to data only"):
        fs.plan(solver, nfe=4, start=1.0, end=0.0)


@pytest.mark.parametrize("solver", fs.solvers())
@pytest.mark.parametrize("nfe", [3, 4, 7, 10, 33])
def test_jumps_end_steps_and_the_budget_is_met(solver, nfe):
    plan = fs.plan(solver, nfe=nfe, schedule=fs.shift(2.0), jumps=(0.3, 0.75, 0.3))
    ends = [step.t_next for step in plan.steps]
    assert plan.nfe == nfe
    assert {0.3, 0.75} < set(ends)
    calls = []

    def velocity(t, x):
        calls.append(t)
        return x.sign()

    fs.solve(velocity, torch.ones(1), plan=plan)
    assert len(calls) == nfe


@pytest.mark.parametrize("solver", ["ab2", "ab4", "pec2", "pec3", "midpoint", "rk4"])
def test_a_velocity_with_a_jump_costs_no_order_when_the_jump_is_known(solver):
    # dx/dt = -x, and from t = 0.45 on dx/dt = 2 x: at t = 1 it is e^(-0.45 + 2 * 0.55).
    @fs.contextual
    def velocity(t, x, *, context=None):
        return 2 * x if context.within(0.45, 1.0) else -x

    x0, exact = torch.ones(1, dtype=torch.float64), math.exp(-0.45 + 2 * 0.55)

    def error(nfe, **options):
        return abs(fs.solve(velocity, x0, nfe=nfe, solver=solver, **options).x.item() - exact)

    order = fs.method(solver).order
    slope = math.log2(error(64, jumps=[0.45]) / error(128, jumps=[0.45]))
    assert slope == pytest.approx(order, abs=0.45)
    assert error(128, jumps=[0.45]) < 0.2 * error(128)


def test_the_edges_of_an_interval_of_guidance_are_jumps():
    velocity = fs.guided(lambda t, x: x, lambda t, x: -x, scale=3.0, interval=(0.21, 0.68))
    x0 = torch.ones(1, dtype=torch.float64)
    # dx/dt is x, within the interval -x + 3 (x + x) = 5 x, and x again.
    exact = math.exp(0.21 + 5 * 0.47 + 0.32)
    solution = fs.solve(velocity, x0, nfe=240, solver="pec2")
    assert {0.21, 0.68} < {step.t_next for step in solution.plan.steps}
    assert solution.x.item() == pytest.approx(exact, rel=2e-4)
    inside = sum(
        0.21 <= (step.t + step.t_next) / 2 <= 0.68
        for step in solution.plan.steps
        for _ in step.rows
    )
    assert solution.rows == 240 + inside
    few = fs.solve(velocity, x0, nfe=3, solver="euler")  # too few for parts of their own
    assert [step.t_next for step in few.plan.steps] == pytest.approx([1 / 3, 2 / 3, 1])


def test_a_prompt_switch_halfway_is_a_jump():
    @fs.contextual
    def velocity(t, x, *, context=None):
        return x if context.within(0.5, 1.0) else 2 * x

    x0 = torch.ones(1, dtype=torch.float64)
    x = fs.solve(velocity, x0, nfe=96, solver="pec2", jumps=[0.5]).x
    assert x.item() == pytest.approx(math.exp(1.5), rel=2e-4)


def test_on_step_sees_every_step_and_may_stop(mixture_flow):
    seen = []

    def stop(event):
        seen.append((event.step, event.steps, event.t, event.evaluations))
        if event.step == 2:
            event.stop()

    solution = fs.solve(
        mixture_flow.velocity, mixture_flow.noise, nfe=12, solver="midpoint", on_step=stop
    )
    assert seen == [(0, 6, 1 / 6, 2), (1, 6, 1 / 3, 4), (2, 6, 0.5, 6)]
    assert (solution.t, solution.nfe, solution.rows) == (0.5, 6, 6)
    half = fs.solve(mixture_flow.velocity, mixture_flow.noise, nfe=6, solver="midpoint", end=0.5)
    torch.testing.assert_close(solution.x, half.x, rtol=1e-14, atol=1e-14)


def test_on_step_may_replace_the_state():
    def replace(event):
        event.x = torch.full_like(event.x, 10.0) if event.step == 1 else event.x

    x = fs.solve(
        lambda t, x: torch.ones_like(x), torch.zeros(2), nfe=4, solver="euler", on_step=replace
    ).x
    assert x.tolist() == [10.5, 10.5]
    with pytest.raises(ValueError, match=r"after step 0 by one of shapes \[\(3,\)\]"):
        fs.solve(
            lambda t, x: x,
            torch.zeros(2),
            nfe=4,
            on_step=lambda event: setattr(event, "x", torch.zeros(3)),
        )


@pytest.mark.parametrize("solver", ["euler", "heun", "pec2", "res2", "unipc2"])
def test_the_preview_of_a_straight_flow_is_its_data(solver):
    noise, data = torch.randn(2, 5, dtype=torch.float64).unbind()
    previews = []
    fs.solve(
        lambda t, x: data - noise,
        noise,
        nfe=8,
        solver=solver,
        on_step=lambda event: previews.append(event.data()),
    )
    for preview in previews:
        torch.testing.assert_close(preview, data, rtol=0, atol=1e-13)


@pytest.mark.parametrize("path", [fs.GVP(), fs.VP()])
@pytest.mark.parametrize("solver", ["euler", "pec2", "res2"])
def test_the_preview_on_a_curved_path_is_its_data(path, solver):
    """Of one sample the velocity is that of its own path wherever the solver is on it."""
    noise, data = torch.randn(2, 5, dtype=torch.float64).unbind()
    seen = []

    def velocity(t, x):  # of data that are one point: determined by x
        return path.convert(data, t, x, "data", "velocity")

    fs.solve(
        velocity,
        noise,
        nfe=8,
        solver=solver,
        end=0.9,
        on_step=lambda event: seen.append((event.data(path), event.data())),
    )
    for right, straight in seen:
        torch.testing.assert_close(right, data, rtol=0, atol=1e-12)
        assert (straight - data).abs().max() > 1e-3


def test_the_trajectory_is_the_states_at_the_steps_ends(mixture_flow):
    solution = fs.solve(
        mixture_flow.velocity, mixture_flow.noise, nfe=9, solver="pec2", trajectory=True
    )
    assert len(solution.trajectory) == 10
    assert solution.trajectory[0].equal(mixture_flow.noise)
    assert solution.trajectory[-1].equal(solution.x)
    assert solution.plan.times == pytest.approx([i / 9 for i in range(10)])
    assert fs.solve(mixture_flow.velocity, mixture_flow.noise, nfe=9).trajectory is None


def test_the_estimate_of_heun_is_the_difference_to_euler():
    x0 = torch.tensor([1.0, 2.0], dtype=torch.float64)
    solution = fs.solve(lambda t, x: x, x0, nfe=2, solver="heun", estimate=True)
    # One step of 1: Euler gives 2 x0, Heun 2.5 x0; rms of 0.5 x0.
    assert solution.errors.tolist() == [pytest.approx(0.5 * math.sqrt(2.5))]


def test_the_estimate_follows_the_true_error(mixture_flow):
    sums = []
    for nfe in (10, 20, 40, 80):
        solution = fs.solve(
            mixture_flow.velocity, mixture_flow.noise, nfe=nfe, solver="pec2", estimate=True
        )
        assert solution.errors.shape == (nfe,)
        assert solution.errors[:-1].isfinite().all()
        assert solution.errors[-1].isnan()  # the last step has no prediction
        sums.append(solution.errors[:-1].sum().item())
    slopes = [math.log2(a / b) for a, b in pairwise(sums)]
    assert slopes[-1] == pytest.approx(2.0, abs=0.3)  # the predictor has order 2


@pytest.mark.parametrize("size", [3, 5000])
@pytest.mark.parametrize("options", [{}, {"check": True}, {"trajectory": True}])
def test_nan_names_the_step_and_leaves_the_last_good_state(size, options):
    def velocity(t, x):
        return torch.where(t > 0.55, x * math.nan, torch.ones_like(x))

    with pytest.raises(fs.NotFiniteError) as caught:
        fs.solve(velocity, torch.zeros(size), nfe=10, solver="euler", **options)
    error = caught.value
    assert (error.step, error.evaluation, error.t) == (6, 6, pytest.approx(0.6))
    torch.testing.assert_close(error.x, torch.full((size,), 0.6))
    for part in ("step 6 of 10", "evaluation 6 of 10", "t=0.6"):
        assert part in str(error)
    x = fs.solve(lambda t, x: torch.ones_like(x), error.x, nfe=4, start=error.t).x  # go on
    torch.testing.assert_close(x, torch.ones(size))


def test_a_slow_model_is_not_asked_again_after_nan():
    calls = []

    def velocity(t, x):
        calls.append(t)
        time.sleep(0.002)
        return x * math.nan if len(calls) == 3 else x

    with pytest.raises(fs.NotFiniteError, match="step 2 of 10"):
        fs.solve(velocity, torch.ones(4096), nfe=10, solver="euler")
    assert len(calls) == 3


def test_an_overflow_in_a_step_is_told_from_a_bad_evaluation():
    huge = torch.finfo(torch.float64).max
    with pytest.raises(fs.NotFiniteError, match="evaluations were finite"):
        fs.solve(
            lambda t, x: torch.full_like(x, huge),
            torch.full((2,), huge, dtype=torch.float64),
            nfe=1,
            solver="euler",
        )


def test_a_large_but_finite_state_is_no_error():
    x = fs.solve(lambda t, x: torch.zeros_like(x), torch.full((4,), 1e38), nfe=2).x
    assert x.tolist() == torch.full((4,), 1e38).tolist()


def test_nobody_looks_when_told_not_to():
    x = fs.solve(lambda t, x: x * math.nan, torch.zeros(2), nfe=4, check=False).x
    assert x.isnan().all()


def test_vmap_over_a_solve_works():
    x0 = torch.randn(5, 3)
    found = torch.vmap(lambda x: fs.solve(lambda t, x: x.sin(), x, nfe=6, solver="pec2").x)(x0)
    torch.testing.assert_close(found, fs.solve(lambda t, x: x.sin(), x0, nfe=6, solver="pec2").x)


def test_image_to_image_goes_on_from_the_data_with_noise(mixture_flow):
    start = 0.6
    x = fs.Linear().interpolate(mixture_flow.data, mixture_flow.noise, start)
    seen = []

    def velocity(t, x):
        seen.append(t.item())
        return mixture_flow.velocity(t, x)

    found = fs.solve(velocity, x, nfe=8, solver="pec2", schedule=fs.shift(2.0), start=start)
    assert seen[0] == start
    assert found.nfe == 8
    exact = fs.solve(mixture_flow.velocity, x, nfe=400, solver="rk4", start=start).x
    torch.testing.assert_close(found.x, exact, rtol=0, atol=1e-2)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "pec2", "unipc2"])
@pytest.mark.parametrize("path", [fs.Linear(), fs.GVP()], ids=["linear", "gvp"])
def test_inpainting_arrives_at_what_is_known(solver, path):
    generator = torch.Generator().manual_seed(0)
    known, noise = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    mask = torch.zeros(6, 6, dtype=torch.float64)
    mask[:3] = 1
    seen = []

    def model(t, x):
        seen.append((t, x))
        return x.flip(-2).cos()  # what is unknown depends on what is known

    velocity = fs.inpainted(model, known, noise, mask, path=path)
    x = fs.solve(velocity, noise, nfe=40, solver=solver).x
    tolerance = 1e-12 if isinstance(path, fs.Linear) else (0.1 if solver == "euler" else 0.01)
    torch.testing.assert_close(x[:, :3], known[:, :3], rtol=0, atol=tolerance)
    for t, point in seen:  # the model sees the known part with the noise of its time
        torch.testing.assert_close(point[:, :3], path.interpolate(known, noise, t)[:, :3])
    free = fs.solve(lambda t, x: x.flip(-2).cos(), noise, nfe=40, solver=solver).x
    assert (x[:, 3:] - free[:, 3:]).abs().max() > 0.1  # it was filled in to fit


def test_inpainting_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="mask must broadcast"):
        fs.inpainted(lambda t, x: x, torch.ones(2, 3), torch.ones(2, 3), torch.ones(4))


def test_progress_prints_lines_where_there_is_no_terminal():
    out = io.StringIO()
    fs.solve(
        lambda t, x: x, torch.ones(1), nfe=20, solver="euler", on_step=fs.progress("a", file=out)
    )
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("a: step 2 of 20")
    assert lines[-1].startswith("a: step 20 of 20")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.5, "end": 0.5}, "two times"),
        ({"start": -0.1}, "two times"),
        ({"end": 1.5}, "two times"),
        ({"jumps": [1.2]}, r"jumps must be times in \[0, 1\]"),
        ({"jumps": [0.1, 0.2, 0.3, 0.4, 0.5]}, "too few for 6 parts"),
        ({"start": 0.3, "schedule": fs.terminal(0.1)}, "depends on the number of steps"),
    ],
)
def test_parts_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fs.solve(lambda t, x: x, torch.ones(2), nfe=4, **options)


def test_a_velocity_unlike_x_is_named_with_its_evaluation():
    def velocity(t, x):
        return x if t < 0.6 else x[0]

    with pytest.raises(
        ValueError, match=r"shape \(\) for x of shape \(2,\) at evaluation 3 of 4, t=0.75"
    ):
        fs.solve(velocity, torch.ones(2), nfe=4, solver="euler")
    with pytest.raises(ValueError, match=r"torch.int64 at evaluation 0"):
        fs.solve(lambda t, x: x.long(), torch.ones(2), nfe=4)
    with pytest.raises(ValueError, match=r"a tensor on meta for x on cpu"):
        fs.solve(lambda t, x: x.to("meta"), torch.ones(2), nfe=4)
