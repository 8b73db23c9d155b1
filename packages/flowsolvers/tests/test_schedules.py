"""Time grids: published values, exact ends, names, composition."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flowsolvers as fs

SCHEDULES = [fs.uniform(), fs.shift(4.0), fs.shift(0.3), fs.sigmoid(), fs.cosine()]


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


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@settings(deadline=None)
@given(steps=st.integers(1, 300))
def test_grid_increases_from_exactly_0_to_exactly_1(schedule, steps):
    grid = schedule.grid(steps)
    assert len(grid) == steps + 1
    assert (grid[0], grid[-1]) == (0.0, 1.0)
    assert (schedule(0.0), schedule(1.0)) == (0.0, 1.0)
    assert (np.diff(grid) > 0).all()


@pytest.mark.parametrize("outer", SCHEDULES, ids=str)
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
