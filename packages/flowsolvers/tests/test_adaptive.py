"""Adaptive solves: closed forms and scipy's solvers; counts, events, refusals."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch.utils._python_dispatch import TorchDispatchMode

import flowsolvers as fs
from flowsolvers.pairs import PAIRS

NAMED = ["bosh3", "dopri5", "tsit5", "dopri8"]
DOUBLE = torch.float64


def turning(t, x):
    """Rotation whose angle is t + t²/2."""
    return torch.stack([x[1], -x[0]]) * (1 + t)


def turned(t):
    angle = t + t**2 / 2
    return torch.tensor([math.sin(angle), math.cos(angle)], dtype=DOUBLE)


START = torch.tensor([0.0, 1.0], dtype=DOUBLE)


class Counted:
    def __init__(self, velocity):
        self.velocity, self.times = velocity, []

    def __call__(self, t, x):
        self.times.append(t)
        return self.velocity(t, x)


@pytest.mark.parametrize("pair", NAMED)
def test_error_falls_with_the_tolerance(mixture_flow, pair):
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        found = fs.solve_adaptive(
            mixture_flow.velocity, mixture_flow.noise, rtol=tolerance, atol=tolerance, pair=pair
        )
        errors.append((found.x - mixture_flow.data).square().mean().sqrt().item())
        assert errors[-1] < 20 * tolerance
    slope = np.polyfit(np.log10([1e-3, 1e-5, 1e-7, 1e-9]), np.log10(errors), 1)[0]
    assert 0.7 < slope < 1.3  # the error is proportional to the tolerance


@pytest.mark.parametrize("pair", PAIRS)
def test_evaluations_are_counted_exactly(pair):
    velocity = Counted(turning)
    found = fs.solve_adaptive(velocity, START, pair=pair, rtol=1e-4, atol=1e-4, end=2.0)
    stages = fs.embedded_pair(pair).stages
    attempts = found.accepted + found.rejected
    assert found.nfe == len(velocity.times) == 2 + attempts * (stages - 1)
    assert found.rows == found.nfe
    assert found.rejected > 0
    given = fs.solve_adaptive(turning, START, pair=pair, first_step=0.5, end=2.0)
    assert given.nfe == 1 + (given.accepted + given.rejected) * (stages - 1)


@pytest.mark.parametrize("pair", NAMED)
def test_dense_output_is_as_accurate_as_the_solve(pair):
    times = [0.0, 0.123, 0.5, 0.77, 1.4, 2.0]
    found = fs.solve_adaptive(
        turning, START, pair=pair, rtol=1e-8, atol=1e-8, end=2.0, at=times, dense=True
    )
    for time, state in zip(times, found.states, strict=True):
        torch.testing.assert_close(state, turned(time), atol=2e-6, rtol=0)
        torch.testing.assert_close(found.at(time), state, atol=1e-14, rtol=0)
    assert torch.equal(found.states[-1], found.x)
    assert torch.equal(found.states[0], START)


@pytest.mark.parametrize(
    ("pair", "order"), [("bosh3", 3), ("dopri5", 4), ("tsit5", 4), ("dopri8", 5)]
)
def test_dense_output_within_one_step_has_its_order(pair, order):
    def error(length):
        controller = fs.Controller(min_step=length)  # one step, whatever its error
        found = fs.solve_adaptive(
            turning,
            START,
            pair=pair,
            end=length,
            first_step=length,
            controller=controller,
            dense=True,
        )
        assert found.accepted == 1
        return max((found.at(p * length) - turned(p * length)).norm() for p in (0.2, 0.4, 0.7))

    slope = math.log2(error(0.125) / error(0.0625))
    assert slope == pytest.approx(order + 1, abs=0.25)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("pair", NAMED)
def test_reverse_returns_to_the_start(mixture_flow, pair, per_sample):
    def velocity(t, x):
        if not per_sample:
            return mixture_flow.velocity(t, x)
        rows = [mixture_flow.velocity(s, row[None]) for s, row in zip(t, x, strict=True)]
        return torch.cat(rows)

    options = {"pair": pair, "rtol": 1e-7, "atol": 1e-7, "per_sample": per_sample}
    noise = mixture_flow.noise[:4]
    data = fs.solve_adaptive(velocity, noise, **options).x
    torch.testing.assert_close(data, mixture_flow.data[:4], atol=2e-6, rtol=0)
    back = fs.solve_adaptive(velocity, data, start=1.0, end=0.0, **options)
    torch.testing.assert_close(back.x, noise, atol=2e-6, rtol=0)


def decay(t, x):
    """Each row at its own speed; t is one time, or one for each row."""
    speed = torch.tensor([0.1, 1.0, 4.0, 20.0, 0.0], dtype=x.dtype)[: len(x), None]
    return -speed * (1 + t.reshape(-1, 1)) * x


@pytest.mark.parametrize("pair", NAMED)
def test_each_sample_is_solved_as_it_would_be_alone(pair):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(5, 3, dtype=DOUBLE, generator=generator)
    rates = torch.tensor([0.1, 1.0, 4.0, 20.0, 0.0], dtype=DOUBLE)
    options = {"pair": pair, "at": [0.25, 1.0], "dense": True, "rtol": 1e-6, "atol": 1e-8}
    together = fs.solve_adaptive(decay, x0, per_sample=True, **options)
    evaluations = []
    for i, rate in enumerate(rates):
        alone = fs.solve_adaptive(lambda t, x, r=rate: -r * (1 + t) * x, x0[i], **options)
        torch.testing.assert_close(together.x[i], alone.x, atol=1e-12, rtol=1e-11)
        torch.testing.assert_close(together.states[:, i], alone.states, atol=1e-12, rtol=1e-11)
        torch.testing.assert_close(together.at(0.6)[i], alone.at(0.6), atol=1e-12, rtol=1e-11)
        assert (together.accepted[i], together.rejected[i]) == (alone.accepted, alone.rejected)
        evaluations.append(alone.nfe)
    assert together.nfe == max(evaluations) < sum(evaluations)
    exact = x0 * torch.exp(-rates * 1.5)[:, None]
    torch.testing.assert_close(together.x, exact, atol=1e-6, rtol=1e-5)


def test_samples_have_times_and_directions_of_their_own():
    start, end = torch.tensor([0.0, 2.0, 1.0]), torch.tensor([1.0, -1.0, 1.0])
    x0 = torch.tensor([[1.0], [9.0], [5.0]], dtype=DOUBLE)
    at = torch.tensor([[0.5, 1.0], [0.0, -0.5], [1.0, 1.0]])
    found = fs.solve_adaptive(
        lambda t, x: 2 * t[:, None] + 0 * x, x0, per_sample=True, start=start, end=end, at=at
    )
    expected = x0[:, 0] + (end.double() ** 2 - start.double() ** 2)
    torch.testing.assert_close(found.x[:, 0], expected)
    torch.testing.assert_close(
        found.states[..., 0].T, x0 + at.double() ** 2 - start.double()[:, None] ** 2
    )
    assert found.t.tolist() == end.tolist()
    assert found.accepted[2] == 0


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_tree_is_solved_as_its_parts_in_one_tensor(per_sample):
    flat = torch.randn(4, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    tree = {"a": flat[:, :2].reshape(4, 2, 1), "b": (flat[:, 2:],)}

    def velocity(t, x):
        joint = torch.cat([x["a"].flatten(1), x["b"][0]], 1)
        v = torch.sin(3 * joint) - joint.mean(1, keepdim=True)
        return {"a": v[:, :2].reshape(4, 2, 1), "b": (v[:, 2:],)}

    def whole(t, x):
        return torch.sin(3 * x) - x.mean(1, keepdim=True)

    options = {"per_sample": per_sample, "at": [0.5], "dense": True}
    ours = fs.solve_adaptive(velocity, tree, **options)
    one = fs.solve_adaptive(whole, flat, **options)
    assert ours.nfe == one.nfe
    for found, expected in [(ours.x, one.x), (ours.at(0.3), one.at(0.3))]:
        torch.testing.assert_close(found["a"], expected[:, :2].reshape(4, 2, 1))
        torch.testing.assert_close(found["b"][0], expected[:, 2:])
    torch.testing.assert_close(ours.states["b"][0], one.states[..., 2:])


@pytest.mark.parametrize("per_sample", [False, True])
def test_state_is_float32_and_time_float64_whatever_the_model(per_sample):
    seen = []

    def model(t, x):
        seen.append((t.dtype, x.dtype))
        return x.float().cos().to(x.dtype)

    x0 = torch.linspace(-1, 1, 8).view(4, 2)
    found = fs.solve_adaptive(model, x0.bfloat16(), per_sample=per_sample, rtol=1e-2, atol=1e-2)
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    assert found.x.dtype == torch.float32
    # Times this close together are one in float32, where a march would stand still.
    seen.clear()
    near = fs.solve_adaptive(model, x0, start=1.0, end=1.0 + 1e-9, per_sample=per_sample)
    torch.testing.assert_close(near.x, x0, atol=1e-8, rtol=0)
    assert torch.as_tensor(near.t).max() == 1.0 + 1e-9


def test_gradient_flows_through_the_solve():
    rate = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    x0 = torch.tensor([1.5, -0.3], dtype=DOUBLE, requires_grad=True)
    for per_sample in (False, True):
        found = fs.solve_adaptive(
            lambda t, x: rate * x, x0, per_sample=per_sample, rtol=1e-9, atol=1e-9, at=[0.5]
        )
        in_x, in_rate = torch.autograd.grad(found.x.sum(), (x0, rate), retain_graph=True)
        torch.testing.assert_close(in_x, rate.exp().expand(2).detach(), atol=1e-7, rtol=0)
        torch.testing.assert_close(in_rate, (x0.sum() * rate.exp()).detach(), atol=1e-7, rtol=0)
        (inside,) = torch.autograd.grad(found.states.sum(), x0)
        torch.testing.assert_close(inside, (rate / 2).exp().expand(2).detach(), atol=1e-7, rtol=0)


def falling(t, x):
    """Height and speed of a stone."""
    return torch.stack([x[..., 1], torch.full_like(x[..., 1], -9.81)], -1)


def test_event_is_located_to_1e_6():
    x0 = torch.tensor([10.0, 2.0], dtype=DOUBLE)
    exact = (2 + math.sqrt(4 + 2 * 9.81 * 10)) / 9.81
    found = fs.solve_adaptive(
        falling,
        x0,
        end=9.0,
        at=[0.5, 5.0],
        dense=True,
        events=[lambda t, x: x[0] + 50, lambda t, x: x[0]],
    )
    assert found.event == 1
    assert found.t == pytest.approx(exact, abs=1e-6)
    assert abs(found.x[0].item()) < 1e-6
    assert found.states[0, 1].item() == pytest.approx(2 - 9.81 * 0.5)
    assert found.states[1].isnan().all()
    with pytest.raises(ValueError, match="the solve went from"):
        found.at(5.0)

    # scipy finds the same event of a flow without a closed form.
    def swing(t, x):
        return torch.stack([x[1], -torch.sin(x[0])])

    answer = solve_ivp(
        lambda t, y: [y[1], -math.sin(y[0])],
        (0, 20),
        [1.0, 0.5],
        rtol=1e-12,
        atol=1e-12,
        events=lambda t, y: y[1],
    )
    for pair in NAMED:
        ours = fs.solve_adaptive(
            swing,
            torch.tensor([1.0, 0.5], dtype=DOUBLE),
            end=20.0,
            pair=pair,
            rtol=1e-9,
            atol=1e-9,
            events=[lambda t, x: x[1]],
        )
        assert ours.t == pytest.approx(answer.t_events[0][0], abs=1e-6)


def test_each_sample_stops_at_its_own_event():
    heights = torch.tensor([1.0, 10.0, 1000.0], dtype=DOUBLE)
    x0 = torch.stack([heights, torch.zeros(3, dtype=DOUBLE)], 1)
    found = fs.solve_adaptive(
        falling,
        x0,
        per_sample=True,
        end=3.0,
        at=[0.4, 2.0],
        dense=True,
        events=[lambda t, x: x[:, 0], lambda t, x: x[:, 1] + 50],
    )
    assert found.event.tolist() == [0, 0, -1]
    exact = (2 * heights[:2] / 9.81).sqrt()
    torch.testing.assert_close(found.t[:2], exact, atol=1e-6, rtol=0)
    assert found.t[2] == 3.0
    torch.testing.assert_close(found.x[:2, 0], torch.zeros(2, dtype=DOUBLE), atol=1e-6, rtol=0)
    assert found.x[2, 0].item() == pytest.approx(1000 - 9.81 * 4.5)
    assert found.states[0].isfinite().all()
    assert found.states[1].isnan().all(1).tolist() == [True, True, False]
    torch.testing.assert_close(found.at(found.t), found.x)


def test_of_two_events_in_one_step_the_first_counts():
    for events, first in (([0.3, 0.6], 0), ([0.6, 0.3], 1)):
        functions = [lambda t, x, e=e: t - e for e in events]
        found = fs.solve_adaptive(lambda t, x: 0 * x, START, first_step=1.0, events=functions)
        assert (found.event, found.accepted) == (first, 1)
        assert found.t == pytest.approx(0.3, abs=1e-12)
        each = fs.solve_adaptive(
            lambda t, x: 0 * x, START, first_step=1.0, events=functions, per_sample=True
        )
        assert each.event.tolist() == [first, first]
        torch.testing.assert_close(each.t, torch.full((2,), 0.3, dtype=DOUBLE))


def test_an_event_at_the_start_does_not_end_the_solve():
    # A ball that has just bounced: height 0, and it comes down after 2v/g.
    x0 = torch.tensor([0.0, 9.81], dtype=DOUBLE)
    found = fs.solve_adaptive(falling, x0, end=5.0, events=[lambda t, x: x[0]])
    assert found.t == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_named_jump_is_stepped_on_and_costs_less(per_sample, backwards):
    def velocity(t, x):
        t = t[:, None] if per_sample else t
        return torch.where(t < 0.5, -0.5 * x, x.square())

    counted = Counted(velocity)
    x0 = torch.tensor([[0.3], [0.6]], dtype=DOUBLE)
    options = {"per_sample": per_sample, "rtol": 1e-8, "atol": 1e-8}
    after = x0 * math.exp(-0.25)
    after = after / (1 - 0.5 * after)
    if backwards:
        options |= {"start": 1.0, "end": 0.0}
        x0, after = after, x0
    blind = fs.solve_adaptive(velocity, x0, **options)
    told = fs.solve_adaptive(counted, x0, jumps=[0.5], **options)
    torch.testing.assert_close(told.x, after, atol=1e-7, rtol=0)
    assert told.nfe == len(counted.times) < blind.nfe
    seen = torch.stack(counted.times).flatten().tolist()
    assert 0.5 not in seen
    assert math.nextafter(0.5, 0.0) in seen
    assert math.nextafter(0.5, 1.0) in seen


@pytest.mark.parametrize("per_sample", [False, True])
def test_what_is_not_finite_is_named_and_the_last_good_state_kept(per_sample):
    def velocity(t, x):
        t = t[:, None] if per_sample else t
        return torch.where(t > 0.25, math.nan, 1.0) + 0 * x

    x0 = torch.zeros(3, 2, dtype=DOUBLE)
    with pytest.raises(fs.AdaptiveError, match=r"not finite at t=0\.25") as caught:
        fs.solve_adaptive(velocity, x0, per_sample=per_sample)
    time = torch.as_tensor(caught.value.t).max().item()
    assert time == pytest.approx(0.25, abs=1e-9)
    torch.testing.assert_close(caught.value.x, torch.full_like(x0, time))
    assert caught.value.nfe > 0
    with pytest.raises(fs.AdaptiveError, match=r"not finite at t=0 "):
        fs.solve_adaptive(lambda t, x: x * math.inf, x0, per_sample=per_sample)


def test_only_the_samples_that_failed_are_named():
    def velocity(t, x):
        return x.square()  # reaches infinity at 1 / x0

    x0 = torch.tensor([[0.5], [2.0], [0.1]], dtype=DOUBLE)
    with pytest.raises(fs.AdaptiveError, match=r"for the samples \[1\]") as caught:
        fs.solve_adaptive(velocity, x0, per_sample=True)
    assert caught.value.t[1].item() == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_blow_up_says_what_to_do(per_sample):
    x0 = torch.tensor([[2.0]], dtype=DOUBLE)
    with pytest.raises(fs.AdaptiveError, match=r"too short for a float|not finite") as caught:
        fs.solve_adaptive(lambda t, x: x.square(), x0, per_sample=per_sample)
    assert torch.as_tensor(caught.value.t).item() == pytest.approx(0.5, abs=1e-5)
    with pytest.raises(fs.AdaptiveError, match=r"max_nfe=30 evaluations.*loosen") as caught:
        fs.solve_adaptive(lambda t, x: -100 * x, x0, max_nfe=30, per_sample=per_sample)
    assert caught.value.nfe <= 30
    assert torch.as_tensor(caught.value.t).item() > 0
    assert 0 < caught.value.x.item() < 2


def test_pid_rejects_less_than_the_classic_rule_where_stability_bounds_the_step():
    x0 = torch.tensor([1.0], dtype=DOUBLE)
    options = {"rtol": 1e-4, "atol": 1e-4, "pair": "bosh3"}
    classic = fs.solve_adaptive(lambda t, x: -300 * x, x0, **options)
    rule = fs.Controller(integral=0.3, proportional=0.4)
    smooth = fs.solve_adaptive(lambda t, x: -300 * x, x0, controller=rule, **options)
    assert smooth.rejected < classic.rejected
    each = fs.solve_adaptive(lambda t, x: -300 * x, x0, controller=rule, per_sample=True, **options)
    assert (each.accepted.item(), each.rejected.item()) == (smooth.accepted, smooth.rejected)


def test_longest_and_shortest_steps_are_kept_to():
    found = fs.solve_adaptive(
        lambda t, x: 0 * x, START, controller=fs.Controller(max_step=0.125), first_step=1.0
    )
    assert (found.accepted, found.rejected) == (8, 0)
    found = fs.solve_adaptive(
        turning, START, rtol=1e-12, atol=1e-12, controller=fs.Controller(min_step=0.25)
    )
    assert (found.accepted, found.rejected) == (4, 0)


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_shortest_step_is_no_excuse_for_what_is_not_finite(per_sample):
    controller = fs.Controller(min_step=0.05)
    with pytest.raises(fs.AdaptiveError, match="not finite") as caught:
        fs.solve_adaptive(
            lambda t, x: torch.where((t > 0.4).view(-1, 1), math.nan, x),
            torch.ones(2, 1),
            per_sample=per_sample,
            controller=controller,
        )
    t = torch.as_tensor(caught.value.t)
    assert bool(((t > 0.3) & (t <= 0.4)).all())
    torch.testing.assert_close(
        caught.value.x, t.float().exp().expand(2)[:, None], atol=1e-3, rtol=0
    )


def test_each_sample_may_have_a_first_step_of_its_own():
    flow, start = lambda t, x: x * torch.cos(9 * t)[:, None], torch.ones(2, 3).double()
    velocity = Counted(flow)
    first = torch.tensor([0.01, 0.3], dtype=DOUBLE)
    both = fs.solve_adaptive(velocity, start, first_step=first, per_sample=True)
    torch.testing.assert_close(velocity.times[1], 0.2 * first)  # dopri5's second stage
    for i, length in enumerate([0.01, 0.3]):
        alone = fs.solve_adaptive(flow, start[:1], first_step=length, per_sample=True)
        torch.testing.assert_close(both.x[i : i + 1], alone.x, atol=1e-12, rtol=0)
        assert both.accepted[i] == alone.accepted[0]
    with pytest.raises(ValueError, match=r"first_step has shape \(2,\)"):
        fs.solve_adaptive(lambda t, x: x, start, first_step=first)
    with pytest.raises(ValueError, match="first_step is a length"):
        fs.solve_adaptive(flow, start, first_step=-first, per_sample=True)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_norm_decides_which_errors_count(per_sample):
    """Of a calm part and one that is hard, only the norm's part is solved to the tolerance."""

    def flow(t, x):
        t = t.view(-1, 1)
        return {"calm": -x["calm"], "hard": 30 * torch.cos(30 * t) * torch.ones_like(x["hard"])}

    x0 = {"calm": torch.ones(2, 3).double(), "hard": torch.zeros(2, 3).double()}
    rms = lambda x: x.square().mean(1 if per_sample else None).sqrt()  # noqa: E731
    found = {
        part: fs.solve_adaptive(
            flow,
            x0,
            rtol=1e-6,
            atol=1e-6,
            per_sample=per_sample,
            norm=lambda x, part=part: rms(x[part]),
        )
        for part in x0
    }
    errors = {
        part: (one.x["hard"] - math.sin(30.0)).abs().max().item() for part, one in found.items()
    }
    assert errors["hard"] < 1e-5 < 1e-2 < errors["calm"]
    assert (found["calm"].x["calm"] - math.exp(-1.0)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="norm returned shape"):
        fs.solve_adaptive(flow, x0, per_sample=per_sample, norm=lambda x: x["calm"])


def test_a_solve_of_no_length_evaluates_nothing():
    for per_sample in (False, True):
        found = fs.solve_adaptive(
            turning, START, start=0.5, end=0.5, at=[0.5, 0.5], per_sample=per_sample
        )
        assert torch.equal(found.x, START)
        assert torch.equal(found.states, START.expand(2, 2))
    assert fs.solve_adaptive(turning, START, start=0.5, end=0.5).nfe == 0


@pytest.mark.parametrize(
    ("x0", "options", "message"),
    [
        (START.int(), {}, "floating point"),
        (START, {"rtol": -1.0}, "rtol and atol"),
        (START, {"rtol": 0.0, "atol": 0.0}, "not both 0"),
        (START, {"pair": "dorpi5"}, "closest first: dopri5"),
        (START, {"first_step": 0.0}, "first_step"),
        (START, {"max_nfe": 0}, "max_nfe"),
        (START, {"end": math.inf}, "finite numbers"),
        (START, {"end": torch.ones(2)}, "need per_sample=True"),
        (START, {"at": [0.5, 0.2]}, "in that order"),
        (START, {"at": [0.5, 1.2]}, "between 0.0 and 1.0"),
        (START, {"at": [0.5, 1.2], "per_sample": True}, "between start and end"),
        (START, {"jumps": [math.nan]}, "jumps"),
        (START[0], {"per_sample": True}, "batch"),
        ((START, START[:1]), {"per_sample": True}, "one first dimension"),
        (START, {"events": [lambda t, x: x]}, "one number"),
        (START, {"events": [lambda t, x: x.sum()], "per_sample": True}, "for each sample"),
    ],
)
def test_bad_settings_are_refused(x0, options, message):
    with pytest.raises(ValueError, match=message):
        fs.solve_adaptive(lambda t, x: x, x0, **options)


def test_other_refusals():
    with pytest.raises(ValueError, match=r"velocity returned shapes \[\(1,\)\]"):
        fs.solve_adaptive(lambda t, x: x[:1], START)
    with pytest.raises(ValueError, match="dense=True"):
        fs.solve_adaptive(turning, START).at(0.5)
    for change in (
        {"safety": 0.0},
        {"shrink": 1.0},
        {"grow": 1.0},
        {"min_step": 2.0, "max_step": 1},
    ):
        with pytest.raises(ValueError, match=r"must be|needs"):
            fs.Controller(**change)


class Reads(TorchDispatchMode):
    """Counts the values that the host reads from the device."""

    def __init__(self):
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Where there is a CUDA device, a read that is not of one element is a copy to the host.
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("at", [None, [0.1, 0.5, 0.9]])
def test_one_number_is_read_from_the_device_for_each_attempt(at):
    with Reads() as reads:
        found = fs.solve_adaptive(turning, START, rtol=1e-9, atol=1e-9, at=at)
    assert found.accepted > 10
    # The two more are those of the first step's length.
    assert reads.count == found.accepted + found.rejected + 2


def test_a_step_for_each_sample_reads_no_value_but_its_five_at_once():
    with Reads() as reads:
        found = fs.solve_adaptive(decay, START.view(2, 1), per_sample=True)
    assert found.accepted.max() > 3
    # `tolist` of the five is no read of one element; whether any sample has to move is.
    assert reads.count == 1


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_guidance_in_an_interval_is_stepped_on_at_its_edges(per_sample, backwards):
    times, calls = [], []

    def cond(t, x):
        times.append(t)
        return -x

    def uncond(t, x):
        calls.append(t)
        return -2 * x

    interval = None if per_sample else (0.25, 0.75)
    v = fs.guided(cond, uncond, scale=3.0, interval=interval or (0.0, 1.0))
    x0 = torch.ones(2, 1, dtype=DOUBLE)
    start, end = (1.0, 0.0) if backwards else (0.0, 1.0)
    found = fs.solve_adaptive(
        v, x0, rtol=1e-9, atol=1e-9, per_sample=per_sample, start=start, end=end
    )
    # Inside it is -2x + 3(-x + 2x) = x, outside -x.
    expected = math.exp(end - start) if per_sample else math.exp(0.5 - 0.5)
    torch.testing.assert_close(found.x, torch.full_like(x0, expected), atol=1e-7, rtol=0)
    assert found.rows == len(times) + len(calls)
    assert found.nfe == len(times)
    if not per_sample:
        assert len(calls) < 0.7 * len(times)  # half of the time is outside
        seen = [t.item() for t in times]
        assert math.nextafter(0.25, 0.0) in seen
        assert math.nextafter(0.75, 1.0) in seen
        assert all(0.25 <= t.item() <= 0.75 for t in calls)


def test_nothing_is_evaluated_while_guidance_is_zero():
    calls = []

    def cond(t, x):
        calls.append(t.item())
        return -x

    v = fs.guided(cond, lambda t, x: -2 * x, scale=3.0, zero_until=0.3)
    found = fs.solve_adaptive(v, torch.ones(2, 1, dtype=DOUBLE), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.x, torch.full_like(found.x, math.exp(0.7)))
    assert min(calls) >= 0.3
    assert found.rows == 2 * len(calls) < 2 * found.nfe


@pytest.mark.parametrize("end", [2.0, -2.0])
def test_a_contextual_velocity_is_told_what_is_known(end):
    told = []

    @fs.contextual
    def velocity(t, x, *, context=None):
        told.append((t.item(), context))
        return plain(t, x)

    def plain(t, x):
        return turning(t**4, x)

    options = {"rtol": 1e-4, "atol": 1e-4, "end": end, "jumps": [end / 2]}
    found = fs.solve_adaptive(velocity, START, **options)
    assert torch.equal(found.x, fs.solve_adaptive(plain, START, **options).x)
    assert found.rejected > 0
    contexts = [context for _, context in told]
    assert [t for t, _ in told] == [context.t for context in contexts]
    assert [context.evaluation for context in contexts] == list(range(found.nfe))
    unknown = {(c.steps, c.evaluations, c.is_last, c.evaluations_left) for c in contexts}
    assert unknown == {(None, None, None, None)}
    # Before an attempt: the slope at the start, the guess, and the other side of the jump.
    before = [c for c in contexts if c.t_next is None]
    assert [(c.step > 0, c.stage) for c in before] == [(False, 0), (False, 0), (True, 0)]
    assert before[2].t_start == end / 2
    attempts = {(c.step, c.t_next) for c in contexts if c.t_next is not None}
    assert len(attempts) == found.accepted + found.rejected
    assert {step for step, _ in attempts} == set(range(found.accepted))
    low, high = min(0.0, end), max(0.0, end)
    for step, t_next in attempts:
        mine = [c for c in contexts if (c.step, c.t_next) == (step, t_next)]
        assert [c.stage for c in mine] == list(range(1, 7))
        assert all(min(c.t_start, t_next) <= c.t <= max(c.t_start, t_next) for c in mine)
        assert low <= t_next <= high


def test_with_a_step_for_each_sample_there_is_no_context():
    told = []

    @fs.contextual
    def velocity(t, x, *, context=None):
        told.append(context)
        return -x

    fs.solve_adaptive(velocity, torch.ones(2, 1), per_sample=True)
    assert set(told) == {None}


def test_a_momentum_is_refused():
    v = fs.guided(lambda t, x: -x, lambda t, x: x, scale=2.0, rule=fs.APG(momentum=fs.Momentum()))
    with pytest.raises(ValueError, match="leave it out of an adaptive solve"):
        fs.solve_adaptive(v, torch.ones(2, 3))


@pytest.mark.parametrize("per_sample", [False, True])
def test_who_catches_what_is_not_finite_of_solve_catches_it_here(per_sample):
    def velocity(t, x):
        return torch.where(t.view(-1, 1) > 0.25, math.nan, 1.0) + 0 * x

    x0 = torch.zeros(2, 1, dtype=DOUBLE)
    for start in (x0, math.nan * x0):
        with pytest.raises(fs.NotFiniteError) as caught:
            fs.solve_adaptive(velocity, start, per_sample=per_sample)
        assert isinstance(caught.value, fs.AdaptiveError)
        assert (caught.value.step, caught.value.evaluation) == (None, None)
    with pytest.raises(fs.NotFiniteError, match="NaN or infinite"):
        fs.solve(lambda t, x: velocity(t, x), x0, nfe=8, solver="euler")
    steep = lambda t, x: torch.where(t.view(-1, 1) < 0.5, 0.0, 1e30) + 0 * x  # noqa: E731
    for options in ({"max_nfe": 5}, {}):
        with pytest.raises(fs.AdaptiveError) as other:
            fs.solve_adaptive(steep, x0, per_sample=per_sample, **options)
        assert not isinstance(other.value, fs.NotFiniteError)
