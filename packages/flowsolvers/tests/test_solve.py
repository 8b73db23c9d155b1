"""solve: accuracy against others' numbers, dtypes, no waiting, memory, errors."""

import gc
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flowsolvers as fs

RUNGE_KUTTA = [name for name in fs.solvers() if isinstance(fs.method(name), fs.Tableau)]
GRIDS = [fs.uniform(), fs.shift(4.0), fs.cosine()]


def euler(f, t, x, h):
    return x + h * f(t, x)


def midpoint(f, t, x, h):
    return x + h * f(t + h / 2, x + h / 2 * f(t, x))


def heun(f, t, x, h):
    k1 = f(t, x)
    k2 = f(t + h, x + h * k1)
    return x + h / 2 * (k1 + k2)


def ralston(f, t, x, h):
    k1 = f(t, x)
    k2 = f(t + 2 * h / 3, x + 2 * h / 3 * k1)
    return x + h / 4 * (k1 + 3 * k2)


def heun3(f, t, x, h):
    k1 = f(t, x)
    k2 = f(t + h / 3, x + h / 3 * k1)
    k3 = f(t + 2 * h / 3, x + 2 * h / 3 * k2)
    return x + h / 4 * (k1 + 3 * k3)


def kutta3(f, t, x, h):
    k1 = f(t, x)
    k2 = f(t + h / 2, x + h / 2 * k1)
    k3 = f(t + h, x - h * k1 + 2 * h * k2)
    return x + h / 6 * (k1 + 4 * k2 + k3)


def ralston3(f, t, x, h):
    k1 = f(t, x)
    k2 = f(t + h / 2, x + h / 2 * k1)
    k3 = f(t + 3 * h / 4, x + 3 * h / 4 * k2)
    return x + h / 9 * (2 * k1 + 3 * k2 + 4 * k3)


def ssprk3(f, t, x, h):  # in Shu and Osher's form, of convex combinations of Euler steps
    x1 = x + h * f(t, x)
    x2 = 3 / 4 * x + 1 / 4 * (x1 + h * f(t + h, x1))
    return 1 / 3 * x + 2 / 3 * (x2 + h * f(t + h / 2, x2))


def rk4(f, t, x, h):
    k1 = f(t, x)
    k2 = f(t + h / 2, x + h / 2 * k1)
    k3 = f(t + h / 2, x + h / 2 * k2)
    k4 = f(t + h, x + h * k3)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def rk38(f, t, x, h):
    k1 = f(t, x)
    k2 = f(t + h / 3, x + h * k1 / 3)
    k3 = f(t + 2 * h / 3, x + h * (k2 - k1 / 3))
    k4 = f(t + h, x + h * (k1 - k2 + k3))
    return x + h / 8 * (k1 + 3 * k2 + 3 * k3 + k4)


TEXTBOOK = [euler, midpoint, heun, ralston, heun3, kutta3, ralston3, ssprk3, rk4, rk38]


@pytest.mark.parametrize("grid", [*GRIDS, fs.sigmoid()], ids=str)
@pytest.mark.parametrize("step", TEXTBOOK, ids=lambda step: step.__name__)
def test_trajectory_equals_the_textbook(step, grid, mixture_flow):
    stages = fs.method(step.__name__).stages
    seen = []

    def velocity(t, x):
        seen.append(x)
        return mixture_flow.velocity(t, x)

    x1 = fs.solve(velocity, mixture_flow.noise, nfe=6 * stages, solver=step.__name__, schedule=grid)
    states = [*seen[::stages], x1.x]
    x = mixture_flow.noise
    times = torch.tensor(grid.grid(6), dtype=torch.float64)
    for t, t_next, state in zip(times[:-1], times[1:], states[1:], strict=True):
        x = step(mixture_flow.velocity, t, x, t_next - t)
        torch.testing.assert_close(state, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("solver", RUNGE_KUTTA)
def test_measured_order_is_the_nominal_one(solver, grid, mixture_flow):
    method = fs.method(solver)
    steps = np.array([64, 96, 128, 192]) if method.order > 2 else np.array([128, 192, 256, 384])
    errors = []
    for n in steps:
        x = fs.solve(
            mixture_flow.velocity,
            mixture_flow.noise,
            nfe=int(n) * method.stages,
            solver=solver,
            schedule=grid,
        ).x
        errors.append((x - mixture_flow.data).square().mean().sqrt().item())
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(method.order, abs=0.15)


@pytest.mark.parametrize("solver", RUNGE_KUTTA)
def test_linear_flow_is_the_truncated_exponential(solver):
    # On dx/dt = x a method of order p = stages makes each step Σ_{k≤p} h^k / k!.
    method = fs.method(solver)
    assert method.order == method.stages
    x = fs.solve(
        lambda t, x: x, torch.ones(1, dtype=torch.float64), nfe=5 * method.stages, solver=solver
    ).x
    step = sum(0.2**k / math.factorial(k) for k in range(method.order + 1))
    assert x.item() == pytest.approx(step**5, rel=1e-14)


# The exponential ones take velocities apart by 1 / (1 - t) and put them together again.
@pytest.mark.parametrize("solver", fs.solvers())
@pytest.mark.parametrize("nfe", [1, 3, 7, 10])
def test_straight_flow_is_exact_for_every_budget(solver, nfe):
    noise, data = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    x = fs.solve(lambda t, x: data - noise, noise, nfe=nfe, solver=solver, schedule=fs.sigmoid()).x
    tolerance = 1e-14 if solver in RUNGE_KUTTA else 1e-13
    torch.testing.assert_close(x, data, rtol=0, atol=tolerance)


@pytest.mark.parametrize("solver", fs.solvers())
@pytest.mark.parametrize("nfe", [1, 2, 3, 5, 8, 23])
def test_velocity_is_called_nfe_times_at_the_plans_times(solver, nfe):
    times = []

    def velocity(t, x):
        times.append(t)
        return x

    solution = fs.solve(velocity, torch.ones(2), nfe=nfe, solver=solver)
    assert solution.nfe == len(times) == nfe
    rows = [row.t for step in fs.plan(solver, nfe=nfe).steps for row in step.rows]
    torch.testing.assert_close(torch.stack(times), torch.tensor(rows), rtol=0, atol=0)
    assert {(t.shape, t.dtype) for t in times} == {((), torch.float32)}


@pytest.mark.parametrize(
    ("dtype", "state"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("model", [torch.bfloat16, torch.float32, torch.float64])
def test_state_has_its_own_dtype_and_the_model_sees_that_of_x0(dtype, state, model):
    seen = set()

    def velocity(t, x):
        seen.add((t.dtype, x.dtype))
        return (-x).to(model)

    x0 = torch.ones(3, dtype=dtype)
    assert fs.solve(velocity, x0, nfe=4).x.dtype == state
    assert seen == {(state, dtype)}
    assert x0.equal(torch.ones(3, dtype=dtype))


def test_rounding_of_a_bfloat16_model_does_not_grow_with_the_number_of_steps(mixture_flow):
    def bfloat16_model(t, x):
        return mixture_flow.velocity(t.double(), x.bfloat16().double()).bfloat16()

    errors = []
    for nfe in (30, 300):
        exact = fs.solve(mixture_flow.velocity, mixture_flow.noise, nfe=nfe, solver="euler").x
        rounded = fs.solve(bfloat16_model, mixture_flow.noise.float(), nfe=nfe, solver="euler").x
        errors.append((rounded - exact).square().mean().sqrt().item() / exact.std().item())
    assert errors[0] < 3e-3
    assert errors[1] < errors[0]


class NoWaiting(TorchDispatchMode):
    """Refuse what makes the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ), f"{func} reads a device value"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", fs.solvers())
def test_nothing_reads_a_value_from_the_device(solver):
    x0 = torch.ones(3)
    with NoWaiting():
        fs.solve(lambda t, x: x * t, x0, nfe=9, solver=solver)
    with NoWaiting(), pytest.raises(AssertionError, match="reads a device value"):
        x0.sum().item()
    x = fs.solve(lambda t, x: x * t, torch.ones(3, device="meta"), nfe=9, solver=solver).x
    assert (x.device.type, x.shape) == ("meta", (3,))


@pytest.mark.parametrize("solver", fs.solvers())
def test_live_state_is_at_most_order_plus_three(solver):
    shape = (3, 5, 7, 11)  # one that nothing else in this process has
    peak = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            live = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == shape]
            peak = max(peak, len({o.data_ptr() for o in live}))
            return out

    plan = fs.plan(solver, nfe=24)
    gc.freeze()  # hides what lived before from gc.get_objects
    try:
        with Count():
            fs.solve(lambda t, x: x.neg(), torch.ones(shape), plan=plan)
    finally:
        gc.unfreeze()
    assert 0 < peak - 1 <= fs.method(solver).order + 3  # x0 is the caller's


@pytest.mark.parametrize("solver", fs.solvers())
def test_loop_compiles_into_one_graph(solver):
    plan = fs.plan(solver, nfe=8)

    def sample(x):
        return fs.solve(lambda t, x: x * t - 1, x, plan=plan).x

    torch._dynamo.reset()
    x0 = torch.randn(4)
    compiled = torch.compile(sample, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x0), sample(x0), rtol=0, atol=0)


@pytest.mark.parametrize("solver", fs.solvers())
def test_gradients_flow_when_the_caller_records_them(solver):
    factor = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x0 = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def sample(x, factor):
        return fs.solve(lambda t, x: factor * x.sin() + t, x, nfe=9, solver=solver).x

    assert torch.autograd.gradcheck(sample, (x0, factor))
    with torch.no_grad():
        assert not sample(x0, factor).requires_grad


def test_a_plan_made_before_gives_the_same():
    x0 = torch.randn(5)
    plan = fs.Plan.from_json(fs.plan("rk4", nfe=10, schedule=fs.shift(4.0)).to_json())
    by_names = fs.solve(lambda t, x: x.cos(), x0, nfe=10, solver="rk4", schedule=fs.shift(4.0))
    by_plan = fs.solve(lambda t, x: x.cos(), x0, plan=plan)
    assert by_plan.x.equal(by_names.x)
    assert by_plan.nfe == 10


def test_auto_is_the_default():
    x0 = torch.randn(5)
    default = fs.solve(lambda t, x: x.cos(), x0, nfe=6)
    assert default.x.equal(fs.solve(lambda t, x: x.cos(), x0, nfe=6, solver="auto").x)
    assert (default.plan.solver, default.plan.schedule) == ("auto", "auto:6")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither nfe nor plan"),
        ({"solver": "rk4"}, "neither nfe nor plan"),
        ({"plan": fs.plan(nfe=2), "nfe": 2}, "not both"),
        ({"plan": fs.plan(nfe=2), "solver": "midpoint"}, "not both"),
        ({"plan": fs.plan(nfe=2), "schedule": fs.uniform()}, "not both"),
        ({"nfe": 0}, "at least 1"),
        ({"nfe": 4, "solver": ""}, "unknown solver ''"),
        ({"nfe": 4, "schedule": "shift:4"}, "must be a Schedule"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fs.solve(lambda t, x: x, torch.ones(2), **options)


def test_a_velocity_of_another_shape_is_refused_at_the_first_evaluation():
    calls = []

    def velocity(t, x):
        calls.append(t)
        return x.sum(-1, keepdim=True)

    with pytest.raises(ValueError, match=r"shape \(2, 1\) for x of shape \(2, 3\)"):
        fs.solve(velocity, torch.ones(2, 3), nfe=8)
    assert len(calls) == 1


def test_an_integer_state_is_refused():
    with pytest.raises(ValueError, match=r"torch\.int64; convert it"):
        fs.solve(lambda t, x: x, torch.ones(2, dtype=torch.int64), nfe=2)


@pytest.mark.parametrize("solver", ["euler", "rk4", "pec2"])
def test_a_contextual_velocity_is_told_where_it_stands(solver):
    seen = []

    @fs.contextual
    def velocity(t, x, *, context=None):
        seen.append((t.item(), context))
        return x.cos()

    solution = fs.solve(velocity, torch.ones(2, dtype=torch.float64), nfe=8, solver=solver)
    contexts = [context for _, context in seen]
    assert [context.t for context in contexts] == [t for t, _ in seen]
    assert [context.evaluation for context in contexts] == list(range(8))
    assert [context.is_last for context in contexts] == [False] * 7 + [True]
    steps = fs.plan(solver, nfe=8).steps
    places = [(n, i) for n, step in enumerate(steps) for i in range(len(step.rows))]
    assert [(context.step, context.stage) for context in contexts] == places
    assert {context.steps for context in contexts} == {len(steps)}
    assert solution.rows == solution.nfe == 8


def test_guidance_in_an_interval_of_time_spends_no_rows_outside():
    calls = []

    def unconditional(t, x):
        calls.append(t.item())
        return -x

    velocity = fs.guided(lambda t, x: x, unconditional, scale=4.0, interval=(0.25, 0.75))
    solution = fs.solve(velocity, torch.ones(2, dtype=torch.float64), nfe=8, solver="euler")
    assert calls == [0.25, 0.375, 0.5, 0.625, 0.75][: len(calls)]
    assert len(calls) in (4, 5)  # the interval may hold its end or not
    assert solution.rows == 8 + len(calls)
