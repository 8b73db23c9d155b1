"""Time grids: published values, other people's schedulers, names, composition, inverses."""

import math
import pickle

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st

import flowsolvers as fs

SCHEDULES = [fs.uniform(), fs.shift(4.0), fs.shift(0.3), fs.sigmoid(), fs.cosine()]
SMOOTH = [
    *SCHEDULES,
    fs.logistic(),
    fs.logistic(9.0, 0.7),
    fs.karras(),
    fs.karras(3.0, 0.0),
    fs.polyexponential(),
    fs.polyexponential(0.02, 2.0),
    fs.linear_quadratic(),
    fs.linear_quadratic(0.1, 0.3),
    fs.beta(),
    fs.beta(0.9, 2.5),
    fs.from_times([0, 0.05, 0.3, 0.7, 1]),
    fs.shift(4.0) @ fs.logistic(),
]
EVERY = [*SMOOTH, fs.lumina_sigmoid(), fs.lumina_rational(4.0), fs.shift(4.0).inverse()]


# N=10, four decimals, from the formulas of the paper (sigmoid) and the released code (rational).
SIGMOID = [0, 0.0214, 0.0581, 0.1184, 0.2105, 0.3368, 0.4865, 0.8778, 0.9819, 0.9978, 1]
RATIONAL = [0, 0.027, 0.0588, 0.0968, 0.1429, 0.2, 0.2727, 0.3684, 0.5, 0.6923, 1]


@pytest.mark.parametrize(
    ("schedule", "expected"), [(fs.sigmoid(), SIGMOID), (fs.shift(4.0), RATIONAL)], ids=str
)
def test_grid_equals_published_values(schedule, expected):
    np.testing.assert_allclose(schedule.grid(10), expected, atol=5.1e-5)


def test_shift_is_sd3s_shift_in_noise_time():
    for u in np.linspace(0, 1, 11):
        noise = 1 - u  # SD3 (arXiv 2403.03206, eq. 23): s' = a·s / (1 + (a - 1)·s)
        assert 1 - fs.shift(3.0)(u) == pytest.approx(3 * noise / (1 + 2 * noise), abs=1e-15)


def test_sigmoid_is_the_papers_curve_up_to_an_affine_map():
    def paper(t: float) -> float:
        if t < 0.6:
            return 1 / (1 + math.exp(-6 * (t - 0.6)))
        return 1 - 1 / (1 + math.exp(20 * (t - 0.6)))

    assert (paper(0), paper(1)) == pytest.approx((0.0266, 0.99966), abs=5e-5)
    u = np.linspace(0, 1, 23)
    slope, offset = np.polyfit([paper(v) for v in u], [fs.sigmoid()(v) for v in u], 1)
    np.testing.assert_allclose(
        [slope * paper(v) + offset for v in u], list(map(fs.sigmoid(), u)), atol=1e-15
    )


@pytest.mark.parametrize("schedule", EVERY, ids=str)
@settings(deadline=None, max_examples=20)
@given(steps=st.integers(1, 150))
def test_grid_increases_from_exactly_0_to_exactly_1(schedule, steps):
    grid = schedule.grid(steps)
    assert len(grid) == steps + 1
    assert (grid[0], grid[-1]) == (0.0, 1.0)
    assert (schedule(0.0), schedule(1.0)) == (0.0, 1.0)
    assert (np.diff(grid) > 0).all()


@pytest.mark.parametrize("outer", EVERY, ids=str)
@pytest.mark.parametrize("inner", SCHEDULES, ids=str)
def test_composition_applies_the_right_one_first(outer, inner):
    both = outer @ inner
    assert str(both) == f"{outer}@{inner}"
    assert both(0.37) == outer(inner(0.37))
    assert fs.schedule(str(both)) == both
    assert pickle.loads(pickle.dumps(both)) == both


def test_composition_is_associative():
    a, b, c = fs.shift(4.0), fs.cosine(), fs.sigmoid()
    assert (a @ b) @ c == a @ (b @ c)
    with pytest.raises(TypeError):
        a @ (lambda u: u)


@settings(deadline=None)
@given(a=st.floats(0.05, 20), b=st.floats(0.05, 20), u=st.floats(0, 1))
def test_shifts_compose_by_multiplying(a, b, u):
    assert (fs.shift(a) @ fs.shift(b))(u) == pytest.approx(fs.shift(a * b)(u), abs=1e-12)


@settings(deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(0, 1), st.floats(1e-3, 50), st.floats(1e-3, 50))
def test_printed_names_are_read_back_exactly(sigma, mu, alpha, beta):
    for one in (fs.shift(sigma), fs.sigmoid(mu, alpha, beta)):
        assert fs.schedule(str(one)) == one


def test_names_are_brief():
    printed = [str(one) for one in (*SCHEDULES, fs.shift(4) @ fs.cosine())]
    assert printed == [
        "uniform",
        "shift:4",
        "shift:0.3",
        "sigmoid:0.6,6,20",
        "cosine",
        "shift:4@cosine",
    ]
    assert fs.schedule("sigmoid") == fs.sigmoid()
    assert fs.schedule("sigmoid:0.5") == fs.sigmoid(0.5)
    assert fs.schedule(" shift:4 @ cosine ") == fs.shift(4.0) @ fs.cosine()


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("shfit:4", "shift:SIGMA"),
        ("cosin", "cosine"),
        ("Sigmoid", "sigmoid:MU"),
        ("shift", "shift:SIGMA"),
        ("shift:", "shift:SIGMA"),
        ("shift:four", "shift:SIGMA"),
        ("shift:1,2", "shift:SIGMA"),
        ("shift:0", "shift:SIGMA"),
        ("shift:nan", "shift:SIGMA"),
        ("sigmoid:1,2,3,4", "sigmoid:MU"),
        ("sigmoid:0.6,-6,20", "sigmoid:MU"),
        ("logisitc", "logistic:K,M"),
        ("logistic:4,2", "logistic:K,M"),
        ("times:0,0.5,0.4,1", "times:0,T,...,1"),
        ("times:0.5", "times:0,T,...,1"),
        ("karas", "karras:RHO,SIGMA_MIN"),
        ("shfit:4^-1", "shift:SIGMA"),
        ("uniform:1", "uniform"),
        ("shift:4@unform", "uniform"),
    ],
)
def test_a_bad_name_lists_the_accepted_ones_closest_first(name, first):
    with pytest.raises(ValueError, match=rf"accepted(, closest first)?: {first}") as raised:
        fs.schedule(name)
    assert all(word in str(raised.value) for word in ("cosine", "uniform", "shift", "sigmoid"))


@pytest.mark.parametrize("name", ["", "@", "shift:4@", "@cosine"])
def test_an_empty_name_is_refused(name):
    with pytest.raises(ValueError, match="unknown schedule ''"):
        fs.schedule(name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.shift(0.0), "sigma"),
        (lambda: fs.shift(-1.0), "sigma"),
        (lambda: fs.shift(math.inf), "sigma"),
        (lambda: fs.sigmoid(mu=1.1), "mu"),
        (lambda: fs.sigmoid(mu=math.nan), "mu"),
        (lambda: fs.sigmoid(alpha=0.0), "alpha"),
        (lambda: fs.sigmoid(beta=math.nan), "beta"),
        (lambda: fs.sigmoid(1.0, 1e-20), "flat"),
        (lambda: fs.logistic(0.0), "k of logistic"),
        (lambda: fs.logistic(4.0, -0.1), "m of logistic"),
        (lambda: fs.lumina_rational(0.9), "at least 1"),
        (lambda: fs.lumina_sigmoid(mu=2.0), "mu of lumina-sigmoid"),
        (lambda: fs.karras(0.5), "rho"),
        (lambda: fs.karras(7.0, 1.0), "sigma_min"),
        (lambda: fs.polyexponential(0.0), "sigma_min"),
        (lambda: fs.polyexponential(0.1, math.nan), "rho"),
        (lambda: fs.linear_quadratic(0.6), "threshold"),
        (lambda: fs.linear_quadratic(0.1, 1.0), "linear"),
        (lambda: fs.beta(0.0), "a of beta"),
        (lambda: fs.beta(0.6, math.nan), "b of beta"),
        (lambda: fs.sd3_shift(0, 1024), "tokens"),
        (lambda: fs.sd3_shift(1024, 0), "trained"),
        (lambda: fs.flux_shift(0), "tokens"),
        (lambda: fs.flux_shift(64, kind="quadratic"), "exponential"),
        (lambda: fs.flux_shift(64, low=(64, 1.0), high=(64, 2.0)), "differ"),
        (lambda: fs.flux_shift(64, low=(256, 0.1), high=(512, 1.0), kind="linear"), "raise"),
        (lambda: fs.terminal(1.0), "sigma of terminal"),
        (lambda: fs.terminal(0.1)(0.5), "number of steps"),
        (lambda: fs.terminal(0.1).inverse()(0.5), "number of steps"),
        (lambda: fs.terminal(0.1).density(0.5), "number of steps"),
        (lambda: fs.from_times([0.0]), "from 0 to 1"),
        (lambda: fs.from_times([0.0, 0.9]), "from 0 to 1"),
        (lambda: fs.from_times([0.0, 0.5, 0.5, 1.0]), "strictly"),
        (lambda: fs.uniform().density(-0.1), r"\[0, 1\]"),
        (lambda: fs.uniform()(1.5), r"\[0, 1\]"),
        (lambda: fs.uniform()(math.nan), r"\[0, 1\]"),
        (lambda: fs.uniform().grid(0), "at least 1"),
        (lambda: fs.Schedule("half", lambda u: u / 2).grid(3), "rescale"),
        (lambda: fs.Schedule("nan", lambda u: math.nan).grid(3), "rescale"),
        (lambda: fs.Schedule("bump", lambda u: u + math.sin(2 * math.pi * u)).grid(8), "strictly"),
        (lambda: fs.shift(1e-40).grid(4), "strictly"),
    ],
)
def test_bad_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def paper_sigmoid(u: float) -> float:
    return 1 / (1 + math.exp(-(6 if u < 0.6 else 20) * (u - 0.6)))


def test_luminas_curves_are_as_printed_between_ends_that_are_set():
    u = np.arange(1, 20) / 20
    expected = [0.0, *map(paper_sigmoid, u), 1.0]
    np.testing.assert_allclose(fs.lumina_sigmoid().grid(20), expected, rtol=1e-14)
    expected = [0.0, *(u / (4 - u + 4 * u)), 1.0]
    np.testing.assert_allclose(fs.lumina_rational(4.0).grid(20), expected, rtol=1e-14)
    assert fs.lumina_rational(4.0)(1 - 1e-12) == pytest.approx(1 / 7)
    for schedule in (fs.lumina_sigmoid(), fs.lumina_rational(4.0)):
        assert schedule.inverse()(schedule(0.3)) == pytest.approx(0.3, abs=1e-14)
        assert schedule.inverse()(0.9999) == 1.0
    assert fs.lumina_sigmoid().inverse()(0.01) == 0.0


def test_logistic_is_the_normalised_logistic_function():
    u = np.linspace(0, 1, 21)
    for k, m in ((4.0, 0.5), (6.0, 0.3), (0.1, 0.9)):
        low, middle, high = (scipy.special.expit(k * (v - m)) for v in (0.0, u, 1.0))
        expected = (middle - low) / (high - low)
        np.testing.assert_allclose([fs.logistic(k, m)(v) for v in u], expected, atol=1e-13)


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.05, 0.3), (1, 1), (2, 5), (1, 0.4), (80, 3)])
def test_beta_is_scipys_quantile(a, b):
    u = np.linspace(0.001, 0.999, 99)
    ours, theirs = fs.beta(a, b), scipy.stats.beta(a, b)
    np.testing.assert_allclose([ours(v) for v in u], theirs.ppf(u), rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose([ours.inverse()(v) for v in u], theirs.cdf(u), rtol=1e-11)
    np.testing.assert_allclose([ours.density(v) for v in u], 1 / theirs.pdf(theirs.ppf(u)), 1e-9)


TIMES = [
    [0, 1],
    [0, 0.3, 1],
    [0, 0.01, 0.02, 0.7, 0.71, 1],
    [0, 0.4, 0.5, 0.9, 0.95, 0.99, 1],
]


@pytest.mark.parametrize("times", TIMES, ids=len)
def test_given_times_are_met_exactly_with_scipys_monotone_cubic_between(times):
    ours = fs.from_times(times)
    knots, u = np.linspace(0, 1, len(times)), np.linspace(0, 1, 301)
    theirs = scipy.interpolate.PchipInterpolator(knots, times)
    assert ours.grid(len(times) - 1) == tuple(times)
    np.testing.assert_allclose([ours(v) for v in u], theirs(u), atol=1e-13)
    np.testing.assert_allclose([ours.density(v) for v in u], theirs(u, 1), atol=1e-11)


@pytest.mark.parametrize("schedule", SMOOTH, ids=str)
def test_inverse_undoes_and_density_is_the_slope(schedule):
    back = schedule.inverse()
    assert back.inverse() == schedule
    assert fs.schedule(str(back)) == back
    assert (back(0.0), back(1.0)) == (0.0, 1.0)
    u = np.linspace(0.02, 0.98, 25)
    np.testing.assert_allclose([back(schedule(v)) for v in u], u, atol=2e-9)
    slope = scipy.differentiate.derivative(np.vectorize(schedule), u, initial_step=0.01).df
    np.testing.assert_allclose([schedule.density(v) for v in u], slope, rtol=2e-4, atol=1e-6)
    t = np.array([schedule(v) for v in u])
    np.testing.assert_allclose([back.density(v) for v in t], 1 / slope, rtol=2e-4)


def test_a_schedule_of_ones_own_is_inverted_by_bisection():
    own = fs.Schedule("my@square", lambda u: u * u)
    assert own.inverse()(0.49) == pytest.approx(0.7, abs=1e-15)
    assert own.inverse()(1e-30) == pytest.approx(1e-15)
    assert own.density(0.3) == pytest.approx(0.6)
    assert (own.density(0.0), own.density(1.0)) == pytest.approx((0.0, 2.0), abs=2e-5)
    assert (str(own.inverse()), own.inverse().inverse()) == ("my@square^-1", own)
    assert (own @ fs.shift(2.0)).inverse()((own @ fs.shift(2.0))(0.3)) == pytest.approx(0.3)


def theirs(sigmas, mu=None, **config):
    """Times of diffusers' flow-matching Euler scheduler, for given noise levels."""
    diffusers = pytest.importorskip("diffusers", reason="the peer is diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=list(sigmas), mu=mu)
    return 1 - scheduler.sigmas.double().numpy()


def even(steps):
    return np.linspace(1, 1 / steps, steps)


@pytest.mark.parametrize("steps", [1, 4, 11, 30])
def test_shifts_are_those_of_diffusers(steps):
    def check(schedule, expected):
        np.testing.assert_allclose(schedule.grid(steps), expected, atol=2e-7)  # they use float32

    check(fs.shift(3.0), theirs(even(steps), shift=3.0))
    check(fs.sd3_shift(4096, 1024), theirs(even(steps), shift=2.0))
    for tokens in (256, 1000, 4096, 9000):
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        dynamic = {"use_dynamic_shifting": True, "mu": mu}
        check(fs.flux_shift(tokens), theirs(even(steps), **dynamic))
        expected = theirs(even(steps), time_shift_type="linear", **dynamic)
        check(fs.flux_shift(tokens, kind="linear"), expected)
    if steps > 1:  # theirs divides by 0 at one step
        check(
            fs.terminal(0.1) @ fs.flux_shift(2048, low=(1024, 0.95), high=(4096, 2.05)),
            theirs(
                even(steps),
                0.95 + (2.05 - 0.95) * (2048 - 1024) / (4096 - 1024),
                use_dynamic_shifting=True,
                shift_terminal=0.1,
            ),
        )
        check(fs.terminal(0.2), theirs(even(steps), shift_terminal=0.2))
    assert fs.terminal(0.1).grid(1) == (0.0, 1.0)


@pytest.mark.parametrize("steps", [2, 5, 24])
def test_curves_in_the_noise_level_are_those_of_diffusers(steps):
    levels = np.linspace(1, 0.001, steps + 1)

    def rescaled(**config):
        t = theirs(levels, **config)[:-1]  # without the 0 that they append
        return t / t[-1]

    karras, exponential = rescaled(use_karras_sigmas=True), rescaled(use_exponential_sigmas=True)
    np.testing.assert_allclose(fs.karras().grid(steps), karras, atol=2e-7)
    np.testing.assert_allclose(fs.polyexponential().grid(steps), exponential, atol=2e-7)
    np.testing.assert_allclose(fs.beta().grid(steps), rescaled(use_beta_sigmas=True), atol=2e-7)


@pytest.mark.parametrize("steps", [2, 10, 64])
def test_linear_quadratic_is_mochis(steps):
    mochi = pytest.importorskip("diffusers.pipelines.mochi.pipeline_mochi")
    levels = mochi.linear_quadratic_schedule(steps, 0.025)
    np.testing.assert_allclose(fs.linear_quadratic().grid(steps)[:-1], 1 - np.array(levels), 1e-13)


def test_a_terminal_composes_and_serves_a_solver():
    schedule = fs.schedule("terminal:0.1@shift:4@cosine")
    assert schedule == fs.terminal(0.1) @ fs.shift(4.0) @ fs.cosine()
    for steps in (2, 7):
        assert schedule.grid(steps)[-2] == pytest.approx(0.9)
    plan = fs.plan("midpoint", nfe=10, schedule=schedule)
    assert plan.steps[-1].t == pytest.approx(0.9)
