"""Guidance: others' formulas, what is evaluated when, the errors."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


def context(t, *, evaluation=0, stage=0, evaluations=10):
    return fs.Context(
        t,
        t_next=1.0,
        step=evaluation,
        steps=evaluations,
        stage=stage,
        evaluation=evaluation,
        evaluations=evaluations,
        is_last=evaluation + 1 == evaluations,
    )


def pair(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    c, u = torch.randn(2, *shape, dtype=dtype, generator=generator)
    return c, u


def guide(c, u, **options):
    return fs.guided(lambda t, x: c, lambda t, x: u, **options)


NOON = torch.tensor(0.5)


def test_apg_is_that_of_diffusers():
    theirs = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    c, u = pair(3, 4, 5, 5)
    for eta, cap in ((0.0, None), (0.3, 2.0), (1.0, 50.0)):
        v = guide(c, u, scale=3.5, rule=fs.APG(eta=eta, cap=cap))(NOON, c)
        # Their original formulation starts at c, as the paper's does, with its w - 1 as the scale.
        expected = theirs.normalized_guidance(
            c, u, 2.5, eta=eta, norm_threshold=cap or 0.0, use_original_formulation=True
        )
        torch.testing.assert_close(v, expected)
    torch.testing.assert_close(
        guide(c, u, scale=3.5, rule=fs.APG(eta=1.0))(NOON, c), guide(c, u, scale=3.5)(NOON, c)
    )


def test_apgs_momentum_is_that_of_diffusers_and_once_per_step():
    theirs = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    momentum = fs.Momentum(-0.6)
    rule = fs.APG(eta=0.2, cap=5.0, momentum=momentum)
    for _ in range(2):  # a second solve starts anew by itself
        buffer = theirs.MomentumBuffer(-0.6)
        for evaluation in range(4):
            c, u = torch.randn(2, 3, 16, dtype=torch.float64).unbind()
            seen = context(0.1, evaluation=evaluation)
            v = guide(c, u, scale=3.5, rule=rule)(NOON, c, context=seen)
            expected = theirs.normalized_guidance(
                c, u, 2.5, buffer, eta=0.2, norm_threshold=5.0, use_original_formulation=True
            )
            torch.testing.assert_close(v, expected)
            # A later stage sees the same past, and leaves none.
            again = context(0.1, evaluation=evaluation + 1, stage=1)
            torch.testing.assert_close(guide(c, u, scale=3.5, rule=rule)(NOON, c, context=again), v)


def test_momentum_starts_anew_even_where_a_solve_starts_outside_the_interval():
    c, u = pair(2, 5)
    v = guide(c, u, rule=fs.APG(momentum=fs.Momentum()), interval=(0.5, 1.0))
    solves = []
    for _ in range(2):
        seen = [context(t, evaluation=i) for i, t in enumerate((0.0, 0.4, 0.6, 0.8))]
        solves.append(torch.stack([v(NOON, c, context=one) for one in seen]))
    assert torch.equal(*solves)
    assert not torch.equal(solves[0][2], solves[0][3])


def test_the_optimised_scale_is_the_projection_on_u():
    c, u = pair(3, 4, 5)
    v = guide(c, u, scale=4.0, rule="cfg-zero*")(NOON, c)
    for one, c_i, u_i in zip(v, c, u, strict=True):
        z = torch.linalg.lstsq(u_i.flatten()[:, None], c_i.flatten()[:, None]).solution.item()
        torch.testing.assert_close(one, z * u_i + 4 * (c_i - z * u_i))


def test_renorm_has_the_norm_of_the_conditional_velocity():
    c, u = pair(3, 4, 5, 5)
    g = guide(c, u, scale=4.0)(NOON, c)
    v = guide(c, u, scale=4.0, rule="renorm")(NOON, c)
    # As in diffusers' Lumina2Pipeline.
    expected = g * (c.norm(dim=-1, keepdim=True) / g.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(v, expected)
    v = guide(c, u, scale=4.0, rule="renorm-clip")(NOON, c)
    torch.testing.assert_close(v.flatten(1).norm(dim=1), c.flatten(1).norm(dim=1))
    v = guide(c, u, scale=1.0, rule=fs.Renorm(dims=None, clip=True, factor=2.0))(NOON, c)
    torch.testing.assert_close(v, c)  # shorter than the limit: left alone


@pytest.mark.parametrize("rule", ["cfg", "cfg-zero*", "apg", "renorm", "renorm-clip"])
def test_every_rule_at_scale_1_is_the_conditional_velocity_and_takes_any_shape(rule):
    for shape in ((6,), (2, 6), (2, 4, 3, 3)):
        c, u = pair(*shape)
        torch.testing.assert_close(guide(c, u, scale=1.0, rule=rule)(NOON, c), c)
        half = guide(c.bfloat16(), u.bfloat16(), scale=4.0, rule=rule)(NOON, c)
        wide = guide(c.bfloat16().float(), u.bfloat16().float(), scale=4.0, rule=rule)(NOON, c)
        assert torch.equal(half, wide)
        zero = torch.zeros_like(c)
        assert guide(zero, zero, scale=4.0, rule=rule)(NOON, c).isfinite().all()


@pytest.mark.parametrize(
    ("channels", "chosen"),
    [
        (slice(0, 3), [0, 1, 2]),
        (slice(None, None, 2), [0, 2]),
        (1, [1]),
        (-1, [3]),
        ([3, 0], [0, 3]),
    ],
)
@pytest.mark.parametrize("dim", [1, -1])
def test_only_the_chosen_channels_are_guided(channels, chosen, dim):
    c, u = pair(2, 4, 5, 4)
    v = guide(c, u, scale=4.0, channels=channels, dim=dim)(NOON, c)
    expected = c.clone().movedim(dim, 0)
    expected[chosen] = (u + 4 * (c - u)).movedim(dim, 0)[chosen]
    torch.testing.assert_close(v, expected.movedim(0, dim))
    # Rules see the chosen channels alone.
    v = guide(c, u, scale=4.0, channels=channels, dim=dim, rule="cfg-zero*")(NOON, c)
    a, b = (part.movedim(dim, 1)[:, chosen] for part in (c, u))
    torch.testing.assert_close(
        v.movedim(dim, 1)[:, chosen], guide(a, b, scale=4.0, rule="cfg-zero*")(NOON, a)
    )


@pytest.mark.parametrize("t", [0.0, 0.1, 0.25, 0.5, 0.9, 0.95, 1.0])
def test_outside_the_interval_only_the_condition_is_evaluated(t):
    calls = []
    v = fs.guided(
        lambda t, x: calls.append("cond") or 2 * x,
        lambda t, x: calls.append("uncond") or x,
        scale=4.0,
        interval=(0.25, 0.9),
        zero_until=0.1,
    )
    x, inside = torch.ones(2, dtype=torch.float64), 0.25 <= t <= 0.9
    expected = 0.0 if t < 0.1 else 5.0 if inside else 2.0
    seen = context(t)
    got = v(torch.tensor(t, dtype=torch.float64), x, context=seen)
    assert got.tolist() == [expected] * 2
    assert calls == ([] if t < 0.1 else ["uncond", "cond"] if inside else ["cond"])
    assert v.rows(seen) == fs.model_rows(v, seen) == len(calls)
    # Without a context the answer is the same, at the full cost.
    assert v(torch.tensor(t, dtype=torch.float64), x).tolist() == [expected] * 2
    assert v.rows() == 2


def test_nothing_waits_for_the_device():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(func), "the host reads a tensor"
            return func(*args, **(kwargs or {}))

    t, x = torch.tensor(0.3), torch.randn(2, 4, 3)
    with Watch():
        for rule in ("cfg", "cfg-zero*", fs.APG(0.1, 2.0, fs.Momentum()), "renorm", "renorm-clip"):
            for seen in (None, context(0.3)):
                v = guide(
                    x.sin(),
                    x.cos(),
                    rule=rule,
                    scale=lambda t: 1 + 3 * t,
                    interval=(0.1, 0.9),
                    channels=[0, 1, 3],
                    zero_until=0.05,
                )
                v(t, x, context=seen)


@pytest.mark.parametrize("rule", ["cfg", "cfg-zero*", "apg", "renorm", "renorm-clip"])
@pytest.mark.parametrize("seen", [None, context(0.3), context(0.95)], ids=["none", "in", "out"])
def test_guidance_compiles_into_one_graph(rule, seen):
    def flow(t, x):
        v = fs.guided(
            lambda t, x: x.sin(),
            lambda t, x: x.cos(),
            rule=rule,
            scale=lambda t: 1 + t,
            interval=(0.1, 0.9),
            channels=slice(0, 3),
        )
        return v(t, x, context=seen)

    torch._dynamo.reset()
    t, x = torch.tensor(0.3), torch.randn(2, 4, 3)
    compiled = torch.compile(flow, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(t, x), flow(t, x), rtol=0, atol=0)


def test_one_call_on_a_doubled_batch_equals_two_calls():
    c, u = pair(2, 4, 3)
    calls = []

    def both(t, x):
        calls.append(len(x))
        return x * torch.cat([c, u])

    def cond(t, x):
        calls.append(len(x))
        return x * c

    x = torch.randn(2, 4, 3, dtype=torch.float64)
    options = {"scale": 4.0, "interval": (0.2, 0.6), "rule": "apg", "channels": slice(3)}
    two = fs.guided(cond, lambda t, x: x * u, **options)
    for t, rows in ((0.1, 1), (0.4, 2)):
        for alone, cost in ((None, 2), (cond, rows)):
            one, seen = fs.guided_batch(both, cond=alone, **options), context(t)
            expected = two(torch.tensor(t), x, context=seen)
            calls.clear()
            torch.testing.assert_close(one(torch.tensor(t), x, context=seen), expected)
            assert calls == [2 * cost]
            assert one.rows(seen) == cost
            torch.testing.assert_close(one(torch.tensor(t), x), expected)


def test_a_scale_may_follow_time_or_the_sample():
    c, u = pair(2, 3)
    v = guide(c, u, scale=lambda t: 1 + 3 * t)
    at_half = u + 2.5 * (c - u)
    torch.testing.assert_close(v(torch.tensor(0.5), c), at_half)
    torch.testing.assert_close(v(torch.tensor(0.5), c, context=context(0.5)), at_half)
    each = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    torch.testing.assert_close(guide(c, u, scale=each)(NOON, c), u + each * (c - u))


def test_several_conditions_add_their_differences():
    a, b = pair(2, 3)
    u = torch.randn(2, 3, dtype=torch.float64)
    v = fs.composed(lambda t, x: u, [(lambda t, x: a, 3.0), (lambda t, x: b, lambda t: -t)])
    for seen in (None, context(0.5)):
        v_half = v(torch.tensor(0.5, dtype=torch.float64), u, context=seen)
        torch.testing.assert_close(v_half, u + 3 * (a - u) - 0.5 * (b - u))
    assert fs.model_rows(v) == 3
    alone = fs.composed(lambda t, x: u, [(lambda t, x: a, 4.0)])
    torch.testing.assert_close(alone(NOON, u), guide(a, u, scale=4.0)(NOON, u))


def test_the_context_reaches_velocities_inside_guidance():
    seen = []

    @fs.contextual
    def velocity(t, x, *, context=None):
        seen.append(context)
        return x

    inner = fs.guided(velocity, lambda t, x: x, scale=2.0)
    outer = fs.guided(inner, velocity, scale=2.0)
    now = context(0.5)
    outer(NOON, torch.ones(1), context=now)
    outer(NOON, torch.ones(1))
    assert seen == [now, now, None, None]
    assert outer.rows(now) == 3


def test_guidance_in_an_interval_is_solved():
    v = fs.guided(lambda t, x: x, lambda t, x: -x, scale=2.0, interval=(0.0, 0.5))
    x = fs.solve(v, torch.ones(1, dtype=torch.float64), nfe=4000).x
    assert x.item() == pytest.approx(math.exp(3 * 0.5 + 0.5), rel=2e-3)  # 3x, then x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": (0.9, 0.1)}, "first < last"),
        ({"interval": (0.5, 0.5)}, "first < last"),
        ({"interval": (-0.1, 0.5)}, "0 <= first"),
        ({"interval": (0.0, 1.5)}, "<= 1"),
        ({"interval": (math.nan, 1.0)}, "first < last"),
        ({"rule": "cfg-zero"}, r"closest first: cfg-zero\*"),
        ({"rule": "renrom"}, "closest first: renorm"),
        ({"zero_until": 1.0}, "zero_until"),
        ({"zero_until": -0.1}, "zero_until"),
    ],
)
def test_bad_settings_are_refused_with_the_fix(options, message):
    with pytest.raises(ValueError, match=message):
        fs.guided(lambda t, x: x, lambda t, x: x, **options)
    with pytest.raises(ValueError, match=message):
        fs.guided_batch(lambda t, x: x, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.APG(eta=math.inf), "eta"),
        (lambda: fs.APG(cap=0.0), "cap"),
        (lambda: fs.Momentum(1.0), "beta"),
        (lambda: fs.Renorm(factor=0.0), "factor"),
        (lambda: fs.composed(lambda t, x: x, []), "at least one"),
        (lambda: fs.composed(lambda t, x: x, [(lambda t, x: x, math.nan)]), "finite"),
        (lambda: guide(*pair(2, 4), channels=slice(4, 6))(NOON, torch.ones(2, 4)), "at least one"),
        (lambda: guide(*pair(2, 4), channels=4)(NOON, torch.ones(2, 4)), "-4 to 3"),
        (lambda: guide(*pair(2, 4), channels=[0, -5])(NOON, torch.ones(2, 4)), "-4 to 3"),
        (lambda: guide(*pair(2, 4), channels=0, dim=2)(NOON, torch.ones(2, 4)), "dim=2"),
        (lambda: fs.guided_batch(lambda t, x: x[:1])(NOON, torch.ones(2, 4)), "1 rows for 4"),
        (lambda: fs.guided_batch(lambda t, x: x)(NOON, torch.tensor(1.0)), "no dimension"),
    ],
)
def test_bad_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
