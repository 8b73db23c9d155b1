"""Tableaus: coefficients, order conditions, refusal of what is not a method."""

import math

import numpy as np
import pytest
from scipy.integrate import RK23

import flowsolvers as fs
from flowsolvers import tableaus

RUNGE_KUTTA = [name for name in fs.solvers() if isinstance(fs.method(name), fs.Tableau)]


@pytest.mark.parametrize("name", RUNGE_KUTTA)
def test_tableau_meets_butchers_conditions_of_its_order(name):
    method = fs.method(name)
    s = method.stages
    a = np.array([[*row, *[0.0] * (s - len(row))] for row in method.a])
    b, c = np.array(method.b), np.array(method.c)
    conditions = [  # Butcher (2016), table 315(I): order, left side, right side
        (1, b.sum(), 1),
        (2, b @ c, 1 / 2),
        (3, b @ c**2, 1 / 3),
        (3, b @ a @ c, 1 / 6),
        (4, b @ c**3, 1 / 4),
        (4, (b * c) @ a @ c, 1 / 8),
        (4, b @ a @ c**2, 1 / 12),
        (4, b @ a @ a @ c, 1 / 24),
    ]
    for order, left, right in conditions:
        if order <= method.order:
            assert left == pytest.approx(right, abs=1e-14)
    if method.order < 4:
        above = [left - right for order, left, right in conditions if order == method.order + 1]
        assert max(map(abs, above)) > 1e-3, "the order is higher than declared"


def test_ralston3_is_scipys_bogacki_shampine():
    method = fs.method("ralston3")
    np.testing.assert_allclose(method.b, RK23.B, rtol=1e-15)
    np.testing.assert_allclose(method.c, RK23.C, rtol=1e-15)
    np.testing.assert_allclose([*method.a[1], 0.0], RK23.A[1][:2], rtol=1e-15)
    np.testing.assert_allclose(method.a[2], RK23.A[2][:2], rtol=1e-15)


def test_ralston_has_the_least_error_bound_of_order_2():
    # Ralston (1962): over the one-parameter family the bound is least at c = 2/3.
    def bound(c: float) -> float:
        b1 = 1 / (2 * c)
        return abs(b1 * c**2 / 2 - 1 / 6) + 1 / 6

    c = fs.method("ralston").c[1]
    assert c == 2 / 3
    assert all(bound(c) < bound(other) for other in (0.5, 0.6, 0.75, 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": (0.5, 0.6)}, "b sums to"),
        ({"a": ((), (0.4,))}, "row 1 of a sums to"),
        ({"c": (0.1, 0.5)}, "row 0 of a sums to"),
        ({"c": (0.0,)}, "2 stages"),
        ({"a": ((), (0.25, 0.25))}, "rows of a"),
        ({"order": 0}, "at least 1"),
        ({"b": (), "c": (), "a": ()}, "at least 1"),
        ({"b": (math.nan, 1.0)}, "b sums to"),
    ],
)
def test_what_is_not_a_method_is_refused(change, message):
    parts = {"order": 2, "c": (0.0, 0.5), "a": ((), (0.5,)), "b": (0.0, 1.0)}
    with pytest.raises(ValueError, match=message):
        fs.Tableau(**{**parts, **change})


def test_every_built_in_tableau_is_registered_under_its_own_name():
    built_in = {
        name.lower(): getattr(tableaus, name) for name in tableaus.__all__ if name.isupper()
    }
    for name, method in built_in.items():
        assert fs.method(name) is method
