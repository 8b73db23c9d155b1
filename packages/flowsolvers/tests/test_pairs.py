"""Embedded pairs: order conditions of every rooted tree, other projects' coefficients."""

from dataclasses import replace
from functools import cache
from itertools import combinations_with_replacement
from math import prod

import numpy as np
import pytest
from scipy.integrate import RK23, RK45

import flowsolvers as fs
from flowsolvers.pairs import BOSH3, DOPRI5, PAIRS

#: Order of the dense output.
DENSE = {"adaptive_heun": 2, "fehlberg2": 2, "bosh3": 3, "dopri5": 4, "tsit5": 4, "dopri8": 5}


@cache
def trees(order):
    """Every rooted tree of an order, as the sorted tuple of the trees at its root."""
    return tuple(forests(order - 1, order - 1))


def forests(vertices, largest):
    """Every multiset of trees with so many vertices in all, none above the largest order."""
    if vertices == 0:
        yield ()
    for order in range(min(vertices, largest), 0, -1):
        for count in range(1, vertices // order + 1):
            for chosen in combinations_with_replacement(trees(order), count):
                for rest in forests(vertices - order * count, order - 1):
                    yield (*chosen, *rest)


def size(tree):
    return 1 + sum(map(size, tree))


def density(tree):
    return size(tree) * prod(map(density, tree))


def stage_weights(a, tree):
    return prod((a @ stage_weights(a, branch) for branch in tree), start=np.ones(len(a)))


def defect(pair, weights, order, end=1.0):
    """How far from Butcher's conditions of an order weights are that lead to the fraction end."""
    a = np.array([[*row, *[0.0] * (pair.stages - len(row))] for row in pair.a])
    return max(
        abs(weights @ stage_weights(a, tree) - end**order / density(tree)) for tree in trees(order)
    )


def test_there_are_as_many_trees_as_cayley_counted():
    assert [len(trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


@pytest.mark.parametrize("name", PAIRS)
def test_pair_meets_the_conditions_of_both_its_orders_and_of_none_above(name):
    pair = fs.embedded_pair(name)
    b, companion = np.array(pair.b), np.array(pair.b) - np.array(pair.error)
    assert max(defect(pair, b, order) for order in range(1, pair.order + 1)) < 1e-13
    assert defect(pair, b, pair.order + 1) > 1e-6
    assert max(defect(pair, companion, order) for order in range(1, pair.order)) < 1e-13
    assert defect(pair, companion, pair.order) > 1e-6


@pytest.mark.parametrize("name", PAIRS)
def test_dense_output_meets_the_conditions_of_its_order_everywhere(name):
    pair = fs.embedded_pair(name)
    rows = np.array(pair.dense)
    powers = np.arange(1, rows.shape[1] + 1)
    for end in (0.1, 0.4, 0.5, 0.85):
        weights = rows @ end**powers
        for order in range(1, DENSE[name] + 1):
            assert defect(pair, weights, order, end) < 1e-12
    # It leaves and arrives with the velocity's slope, so that it is smooth from step to step.
    last = np.zeros(pair.stages)
    last[-1] = 1.0
    np.testing.assert_allclose(rows @ powers, last, atol=1e-9)


@pytest.mark.parametrize(("name", "theirs"), [("bosh3", RK23), ("dopri5", RK45)])
def test_pair_is_scipys(name, theirs):
    pair = fs.embedded_pair(name)
    stages = pair.stages - 1
    np.testing.assert_allclose(pair.c[:-1], theirs.C, rtol=1e-15)
    np.testing.assert_allclose(pair.b[:-1], theirs.B, rtol=1e-15)
    for row, other in zip(pair.a[:-1], theirs.A, strict=True):
        np.testing.assert_allclose([*row, *[0.0] * (stages - len(row))][: len(other)], other)
    np.testing.assert_allclose(pair.dense, theirs.P, atol=1e-14)


@pytest.mark.parametrize("name", ["bosh3", "dopri5", "dopri8", "fehlberg2"])
def test_pair_is_torchdiffeqs(name):
    solvers = pytest.importorskip("torchdiffeq._impl.odeint").SOLVERS
    pair, theirs = fs.embedded_pair(name), solvers[name].tableau
    stages = len(theirs.c_sol)  # without the appended one, where they have none
    np.testing.assert_allclose(pair.b[:stages], theirs.c_sol, rtol=1e-14)
    np.testing.assert_allclose(pair.error[:stages], theirs.c_error, rtol=1e-14, atol=1e-17)
    np.testing.assert_allclose(pair.c[1:stages], theirs.alpha, rtol=1e-14)
    for row, other in zip(pair.a[1:], theirs.beta, strict=False):
        np.testing.assert_allclose(row, other[: len(row)], rtol=1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": 1}, "order of at least 2"),
        ({"c": BOSH3.c[:-1]}, "as many values of c"),
        ({"a": BOSH3.a[:-1]}, "rows of a"),
        ({"c": (0.0, 0.4, 0.75, 1.0)}, "row 1 of a sums to"),
        ({"b": (*BOSH3.b[:-1], 0.1)}, "b sums to"),
        ({"error": (0.1, 0.0, 0.0, 0.0)}, "error sums to"),
        ({"b": BOSH3.b[::-1]}, "next step's first"),
        ({"dense": (BOSH3.dense[1], *BOSH3.dense[1:])}, "row 0 of dense"),
    ],
)
def test_what_is_not_a_pair_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(BOSH3, **change)


def test_unknown_name_lists_the_closest_first():
    with pytest.raises(ValueError, match=r"'dopri'; accepted, closest first: dopri5, dopri8"):
        fs.embedded_pair("dopri")
    assert fs.embedded_pair(DOPRI5) is DOPRI5
