"""The shim in torchdiffeq's place: its own results, closed forms, gradients."""

import math

import pytest
import torch
from torch import nn

import flowsolvers as fs
from flowsolvers.adapters.torchdiffeq import (
    METHODS,
    odeint,
    odeint_adjoint,
    odeint_dense,
    odeint_event,
)
from flowsolvers.adapters.torchdiffeq.adams import bashforth, moulton

DOUBLE = torch.float64
ADAMS = ["explicit_adams", "implicit_adams"]
#: At order 11 the explicit one amplifies rounding from step to step, torchdiffeq's own as well.
STABLE = {"explicit_adams": {"max_order": 5}}
GRID = ["euler", "midpoint", "heun2", "heun3", "rk4", *ADAMS, "fixed_adams"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=DOUBLE)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            self.linear.weight.copy_(torch.randn(3, 3, dtype=DOUBLE, generator=generator))
            self.linear.bias.zero_()

    def forward(self, t, y):
        return torch.tanh(self.linear(y)) * (1 + torch.sin(3 * t))


@pytest.fixture
def theirs():
    return pytest.importorskip("torchdiffeq")


@pytest.fixture
def y0():
    return torch.randn(4, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


FORWARD, BACKWARD = [0.0, 0.3, 1.0, 2.0], [2.0, 1.1, 1.0, -0.1]


@pytest.mark.parametrize("times", [FORWARD, BACKWARD])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"step_size": 0.07},
        {"step_size": 0.07, "interp": "cubic", "perturb": True},
        {"grid_constructor": lambda f, y, t: torch.linspace(t[0], t[-1], 13, dtype=DOUBLE)},
    ],
    ids=["t", "step", "cubic", "constructor"],
)
@pytest.mark.parametrize("method", GRID)
@pytest.mark.filterwarnings("ignore:.*did not converge")  # on the coarsest grid, there as here
def test_methods_on_a_grid_are_torchdiffeqs(theirs, y0, method, options, times):
    t = torch.tensor(times, dtype=DOUBLE)
    options = options | STABLE.get(method, {})
    expected = theirs.odeint(Net(), y0, t, method=method, options=dict(options))
    found = odeint(Net(), y0, t, method=method, options=options)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("order", [2, 3, 4, 5, 8, 12])
@pytest.mark.parametrize("method", ADAMS)
@pytest.mark.filterwarnings("ignore:max_order is below 4")
def test_adams_methods_are_torchdiffeqs_at_every_order(theirs, y0, method, order):
    t = torch.tensor([0.0, 0.3, 0.7], dtype=DOUBLE)  # 14 steps: each order is met
    net, calls = Net(), []

    def counted(t, y):
        calls.append(t)
        return net(t, y)

    options = {"step_size": 0.05, "max_order": order}
    arguments = {"method": method, "options": options, "rtol": 1e-4, "atol": 1e-4}
    expected = theirs.odeint(counted, y0, t, **arguments)
    count = len(calls)
    calls.clear()
    found = odeint(counted, y0, t, **arguments)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert len(calls) == count


@pytest.mark.parametrize("method", ADAMS)
def test_adams_methods_have_torchdiffeqs_gradients(theirs, y0, method):
    t = torch.tensor(FORWARD, dtype=DOUBLE)
    found = []
    for solve in (theirs.odeint, odeint):
        net, start = Net(), y0.clone().requires_grad_()
        options = {"step_size": 0.1, "max_order": 5}
        states = solve(net, start, t, method=method, options=options, rtol=1e-3, atol=1e-3)
        states.square().sum().backward()
        found.append((start.grad, net.linear.weight.grad))
    torch.testing.assert_close(found[1], found[0], atol=1e-11, rtol=0)


@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")
def test_iterations_that_do_not_converge_are_said_and_are_torchdiffeqs(theirs, y0):
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    arguments = {"method": "implicit_adams", "options": {"step_size": 0.05, "max_iters": 2}}
    expected = theirs.odeint(lambda t, y: -9 * y, y0, t, **arguments)
    with pytest.warns(UserWarning, match="did not converge at t=") as told:
        found = odeint(lambda t, y: -9 * y, y0, t, **arguments)
    assert len(told) == 18  # all steps but the first two, of the 3/8 rule
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("count", range(3, 12))
def test_weights_of_adams_integrate_every_polynomial_of_their_degree(count):
    for weights, newest in ((bashforth(count), 0.0), (moulton(count), 1.0)):
        for degree in range(count):
            terms = [w * (newest - i) ** degree for i, w in enumerate(weights)]
            size = math.fsum(map(abs, terms))
            assert abs(math.fsum(terms) - 1 / (degree + 1)) < 1e-15 * size
    assert bashforth(4) == pytest.approx([55 / 24, -59 / 24, 37 / 24, -9 / 24], rel=1e-15)


@pytest.mark.parametrize("times", [FORWARD, BACKWARD])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize(
    "options",
    [{}, {"first_step": 0.3, "max_step": 0.4, "safety": 0.8}, {"step_t": [0.5, 1.5]}],
    ids=["plain", "limits", "step_t"],
)
def test_dopri5_is_torchdiffeqs_at_every_tolerance(theirs, y0, tolerance, times, options):
    t = torch.tensor(times, dtype=DOUBLE)
    options = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in options.items()}
    arguments = {"rtol": tolerance, "atol": tolerance, "method": "dopri5", "options": options}
    calls = []

    def counted(t, y):
        calls.append(t)
        return net(t, y)

    net = Net()
    expected = theirs.odeint(counted, y0, t, **arguments)
    count = len(calls)
    calls.clear()
    found = odeint(counted, y0, t, **arguments)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    assert len(calls) == count


@pytest.mark.parametrize("method", ["bosh3", "dopri8"])
def test_where_a_pair_interpolates_otherwise_it_is_nearer_to_the_solution(theirs, y0, method):
    t = torch.tensor(FORWARD, dtype=DOUBLE)
    exact = odeint(Net(), y0, t, rtol=1e-11, atol=1e-11, method="dopri8")
    arguments = {"rtol": 1e-6, "atol": 1e-6, "method": method}
    ours = (odeint(Net(), y0, t, **arguments) - exact).square().mean().sqrt().item()
    other = (theirs.odeint(Net(), y0, t, **arguments) - exact).square().mean().sqrt().item()
    assert ours < 0.1 * other


@pytest.mark.parametrize("method", METHODS)
def test_tuples_and_trees_are_solved_together(y0, method):
    t = torch.tensor(FORWARD, dtype=DOUBLE)
    net, other = Net(), torch.ones(2, dtype=DOUBLE)
    options = {"step_size": 0.05} if method in GRID else None
    arguments = {"method": method, "options": options, "rtol": 1e-6, "atol": 1e-6}
    state, decay = odeint(lambda t, y: (net(t, y[0]), -y[1]), (y0, other), t, **arguments)
    assert (state.shape, decay.shape) == ((4, 4, 3), (4, 2))
    alone = odeint(net, y0, t, **arguments)
    torch.testing.assert_close(state, alone, atol=1e-12 if options else 1e-4, rtol=0)
    named = odeint(lambda t, y: {"a": net(t, y["a"])}, {"a": y0}, t, **arguments)
    torch.testing.assert_close(named["a"], alone, atol=1e-12, rtol=0)


def test_tolerances_for_each_tensor_are_torchdiffeqs(theirs, y0):
    t = torch.tensor(FORWARD, dtype=DOUBLE)
    net, other = Net(), torch.ones(2, dtype=DOUBLE)
    arguments = {"rtol": (1e-3, 1e-5), "atol": (1e-4, 1e-6)}

    def flow(t, y):
        return net(t, y[0]), -y[1]

    found = odeint(flow, (y0, other), t, **arguments)
    for ours, expected in zip(found, theirs.odeint(flow, (y0, other), t, **arguments), strict=True):
        # Those of theirs are rounded to float32.
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=0)


def test_a_norm_of_ones_own_steers_the_steps_as_there(theirs, y0):
    t = torch.tensor(FORWARD, dtype=DOUBLE)
    options = {"norm": lambda y: 10 * y.abs().max()}
    found = odeint(Net(), y0, t, rtol=1e-5, atol=1e-5, options=options)
    expected = theirs.odeint(Net(), y0, t, rtol=1e-5, atol=1e-5, options=options)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5", "dopri8"])
def test_a_jump_that_is_told_costs_less(method):
    def count(options):
        times = []

        def flow(t, y):
            times.append(t.item())
            return -0.5 * y if t < 0.5 else y**2

        found = odeint(
            flow,
            torch.tensor([0.5, 0.9], dtype=DOUBLE),
            torch.tensor([0.0, 1.0], dtype=DOUBLE),
            method=method,
            rtol=1e-6,
            atol=1e-6,
            options=options,
        )
        return len(times), found[-1]

    after = torch.tensor([0.5, 0.9], dtype=DOUBLE) * math.exp(-0.25)
    told, found = count({"jump_t": torch.tensor([0.5])})
    torch.testing.assert_close(found, after / (1 - 0.5 * after), atol=1e-4, rtol=0)
    assert told < count({})[0]


@pytest.mark.parametrize(
    ("interface", "method"), [(odeint, "dopri5"), (odeint, "rk4"), (odeint_adjoint, "dopri5")]
)
@pytest.mark.parametrize("times", [FORWARD[::2], BACKWARD[::2]])
def test_gradients_are_those_of_finite_differences(y0, interface, method, times):
    t = torch.tensor(times, dtype=DOUBLE, requires_grad=True)
    # A cubic is so near to the solution that its end's slope is the velocity.
    options = {"step_size": 0.05, "interp": "cubic"} if method == "rk4" else {}

    def end(y0, t, weight):
        def flow(t, y):
            return torch.tanh(y @ weight.T) * (1 + torch.sin(3 * t))

        arguments = {"rtol": 1e-8, "atol": 1e-8, "method": method, "options": options}
        if interface is odeint_adjoint:
            arguments["adjoint_params"] = [weight]
        return interface(flow, y0, t, **arguments)

    y = y0[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(end, (y, t, Net().linear.weight), atol=1e-4, rtol=1e-3)


def test_adjoint_is_torchdiffeqs(theirs, y0):
    t = torch.tensor(FORWARD, dtype=DOUBLE)
    grads = []
    for interface in (odeint_adjoint, theirs.odeint_adjoint):
        net, y = Net(), y0.clone().requires_grad_()
        time = t.clone().requires_grad_()
        interface(net, y, time, rtol=1e-6, atol=1e-6).square().sum().backward()
        grads.append([y.grad, time.grad, *(p.grad for p in net.parameters())])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


def test_adjoint_of_a_tuple_and_its_seminorm(y0):
    t = torch.tensor(FORWARD, dtype=DOUBLE)
    other = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    net = Net()
    counts = {}
    for norm in (None, "seminorm"):
        calls = []

        def flow(t, y, calls=calls):
            calls.append(t)
            return net(t, y[0]), -y[1]

        y = y0.clone().requires_grad_()
        found = odeint_adjoint(
            flow,
            (y, other),
            t,
            adjoint_params=list(net.parameters()),
            rtol=1e-8,
            atol=1e-8,
            adjoint_options={"norm": norm} if norm else None,
        )
        calls.clear()
        (found[0][-1].sum() + found[1][-1].sum()).backward()
        counts[norm] = len(calls)
        torch.testing.assert_close(
            other.grad, torch.full_like(other, math.exp(-2.0)), atol=1e-6, rtol=0
        )
        other.grad = None
        assert y.grad.isfinite().all()
    assert counts["seminorm"] <= counts[None]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reverse", [False, True])
def test_an_event_and_its_gradient(method, reverse):
    # y = y0 · e^(-t) falls to 1 at t = ln y0.
    y0 = torch.tensor([3.0], dtype=DOUBLE, requires_grad=True)
    t0 = torch.tensor(0.0, dtype=DOUBLE)
    sign = -1.0 if reverse else 1.0
    options = {"step_size": 0.01, "interp": "cubic"} if method in GRID else {}
    options |= STABLE.get(method, {})
    t, y = odeint_event(
        lambda t, y: -sign * y,
        y0,
        t0,
        event_fn=lambda t, y: y[0] - 1.0,
        reverse_time=reverse,
        method=method,
        options=options,
        rtol=1e-6,
        atol=1e-8,
    )
    tolerance = 1e-2 if method == "euler" else 1e-4
    assert t.item() == pytest.approx(sign * math.log(3.0), abs=tolerance)
    assert y[1].item() == pytest.approx(1.0, abs=1e-9)
    in_t, in_y = (torch.autograd.grad(x, y0, retain_graph=True)[0].item() for x in (t, y[1].sum()))
    assert in_t == pytest.approx(sign / 3.0, abs=tolerance)
    assert in_y == pytest.approx(0.0, abs=1e-9)


def test_of_many_event_numbers_the_first_counts(theirs):
    y0 = torch.tensor([1.0, -2.0], dtype=DOUBLE)
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE)

    def event(t, y):
        return torch.stack([y[0] + 1.0, y[1] - 1.0, t - 3.0])

    flow = lambda t, y: torch.stack([y[1] * 0 - 1.0, torch.ones_like(y[1])])  # noqa: E731
    found, y = odeint(flow, y0, t, event_fn=event, atol=1e-9)
    expected, other = theirs.odeint(flow, y0, t, event_fn=event, atol=1e-9)
    assert found.item() == pytest.approx(expected.item(), abs=1e-8) == pytest.approx(2.0)
    torch.testing.assert_close(y, other, atol=1e-8, rtol=0)


def test_dense_output_is_the_solution(y0):
    t = torch.linspace(0, 2, 9, dtype=DOUBLE)
    expected = odeint(Net(), y0, t, rtol=1e-8, atol=1e-8)
    state = odeint_dense(Net(), y0, t[0], t[-1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.stack([state(s) for s in t]), expected, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match=r"from 0\.0 to 2\.0"):
        state(2.5)
    with pytest.raises(ValueError, match="no dense output"):
        odeint_dense(Net(), y0, 0.0, 1.0, method="rk4")


def test_a_bfloat16_state_is_added_up_in_float32():
    seen = []

    def flow(t, y):
        seen.append((t.dtype, y.dtype))
        return torch.ones_like(y)

    y0 = torch.tensor([100.0], dtype=torch.bfloat16)
    t = torch.tensor([0.0, 1.0])
    found = odeint(flow, y0, t, method="euler", options={"step_size": 0.01})
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    # In bfloat16, 100 + 0.01 is 100, a hundred times.
    assert (found.dtype, found[-1].item()) == (torch.bfloat16, 101.0)


def test_callbacks_are_called_with_the_times_of_the_steps():
    log = []

    class Flow:
        def __call__(self, t, y):
            return -y

        def callback_step(self, t, y, h):
            log.append(("step", t.item(), h.item(), tuple(y.shape)))

    t = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    odeint(Flow(), torch.ones(2, dtype=DOUBLE), t, method="euler", options={"step_size": 0.25})
    assert log == [("step", s, 0.25, (2,)) for s in (1.0, 0.75, 0.5, 0.25)]
    flow = Flow()
    flow.callback_accept_step = lambda t, y, h: log.append("accept")
    flow.callback_reject_step = lambda t, y, h: log.append("reject")
    log.clear()
    odeint(flow, torch.ones(2, dtype=DOUBLE), t, options={"first_step": 1.0})
    assert log.count("accept") + log.count("reject") == sum(x[0] == "step" for x in log)
    assert "reject" in log
    with pytest.warns(UserWarning, match="never calls callback_accept_step"):
        odeint(flow, torch.ones(2, dtype=DOUBLE), t, method="rk4")


def test_one_time_is_the_start_and_costs_nothing():
    def flow(t, y):
        raise AssertionError

    y0 = torch.ones(2)
    assert torch.equal(odeint(flow, y0, torch.tensor([3.0])), y0[None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dopri6"}, "closest first: dopri5"),
        ({"method": "heun"}, "closest first: heun2"),
        ({"method": "implicit_euler"}, "not carried"),
        ({"method": "implicit_adams", "options": {"max_order": 13}}, "from 2 to 12"),
        ({"t": torch.tensor([0.0, 1.0, 0.5])}, "strictly increasing or decreasing"),
        ({"t": torch.tensor([0, 1])}, "floating point"),
        ({"method": "rk4", "options": {"interp": "quintic"}}, "linear"),
        (
            {"method": "rk4", "options": {"step_size": 1.0, "grid_constructor": print}},
            "exclude one another",
        ),
        (
            {"method": "rk4", "options": {"grid_constructor": lambda f, y, t: t + 1}},
            "must go from",
        ),
        ({"method": "rk4", "event_fn": lambda t, y: y.sum()}, "step_size"),
        ({"event_fn": lambda t, y: y.sum(), "t": torch.tensor([0.0])}, "two times"),
        ({"rtol": (1e-3, 1e-3)}, "2 numbers, but y0 has 1"),
    ],
)
def test_what_is_not_understood_is_refused(options, message):
    arguments = {"t": torch.tensor([0.0, 1.0]), **options}
    with pytest.raises(ValueError, match=message):
        odeint(lambda t, y: -y, torch.ones(2), **arguments)


def test_an_unknown_option_is_told():
    t = torch.tensor([0.0, 1.0])
    with pytest.warns(UserWarning, match="step_sise"):
        odeint(lambda t, y: -y, torch.ones(1), t, method="rk4", options={"step_sise": 0.1})


def test_too_many_steps_are_an_error_with_the_state():
    with pytest.raises(fs.AdaptiveError, match="max_num_steps=3") as caught:
        odeint(
            lambda t, y: -50 * y,
            torch.ones(1, dtype=DOUBLE),
            torch.tensor([0.0, 1.0]),
            options={"max_num_steps": 3},
        )
    assert 0 < caught.value.t < 1
    with pytest.raises(ValueError, match="adjoint_params"):
        odeint_adjoint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]))


def test_an_adaptive_method_says_what_is_not_finite():
    flow = lambda t, y: torch.where(t > 0.5, math.nan, 1.0) * y  # noqa: E731
    for solve in (
        lambda: odeint(flow, torch.ones(2), torch.tensor([0.0, 1.0])),
        lambda: odeint_dense(flow, torch.ones(2), 0.0, 1.0),
    ):
        with pytest.raises(fs.NotFiniteError, match=r"not finite at t=0\.5"):
            solve()
