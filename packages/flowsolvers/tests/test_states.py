"""States that are trees of tensors: the same numbers as one tensor gives."""

from collections import namedtuple

import pytest
import torch

import flowsolvers as fs

Pair = namedtuple("Pair", "image sound")


def _field(t, x):
    return x.sin() + t


@pytest.mark.parametrize("solver", fs.solvers())
@pytest.mark.parametrize("form", ["list", "tuple", "dict", "named", "nested"])
def test_a_tree_gives_what_its_tensors_give_alone(solver, form):
    a = torch.randn(2, 3, dtype=torch.float64)
    b = torch.randn(4, dtype=torch.float64)
    make, take = {
        "list": (lambda a, b: [a, b], lambda tree: tree),
        "tuple": (lambda a, b: (a, b), lambda tree: tree),
        "dict": (lambda a, b: {"a": a, "b": b}, lambda tree: (tree["a"], tree["b"])),
        "named": (Pair, lambda tree: (tree.image, tree.sound)),
        "nested": (lambda a, b: {"x": [a, (b,)]}, lambda tree: (tree["x"][0], tree["x"][1][0])),
    }[form]

    def velocity(t, tree):
        assert type(tree) is type(make(a, b))
        return make(*(_field(t, leaf) for leaf in take(tree)))

    solution = fs.solve(velocity, make(a, b), nfe=7, solver=solver)
    for found, alone in zip(take(solution.x), (a, b), strict=True):
        expected = fs.solve(_field, alone, nfe=7, solver=solver).x
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    assert solution.nfe == 7


def test_each_tensor_reaches_the_model_in_its_own_dtype_and_is_kept_in_float32():
    x0 = [torch.ones(2, dtype=torch.bfloat16), torch.ones(3)]
    seen = []

    def velocity(t, x):
        seen.append([leaf.dtype for leaf in x])
        return [leaf * 0.1 for leaf in x]

    x = fs.solve(velocity, x0, nfe=4, solver="rk4").x
    assert seen == [[torch.bfloat16, torch.float32]] * 4
    assert [leaf.dtype for leaf in x] == [torch.float32] * 2
    torch.testing.assert_close(x[1], torch.full((3,), 0.1).exp(), rtol=1e-6, atol=0)
    assert x0[0].equal(torch.ones(2, dtype=torch.bfloat16))  # not written to


def test_a_tree_compiles_into_one_graph():
    plan = fs.plan("pec2", nfe=6)

    def sample(a, b):
        x = fs.solve(lambda t, x: {"a": x["b"] * t, "b": -x["a"]}, {"a": a, "b": b}, plan=plan).x
        return x["a"], x["b"]

    torch._dynamo.reset()
    a, b = torch.randn(2, 3)
    compiled = torch.compile(sample, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(a, b), sample(a, b), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x0", "velocity", "message"),
    [
        ([], lambda t, x: x, "no tensor"),
        ([torch.ones(1), 2.0], lambda t, x: x, "float"),
        ([torch.ones(1), torch.ones(1, dtype=torch.int64)], lambda t, x: x, "floating point"),
        ([torch.ones(1)] * 2, lambda t, x: x[0], r"shape \(1,\) for x of shape \[\(1,\), \(1,\)\]"),
        ([torch.ones(1)] * 2, lambda t, x: tuple(x), "for x of shape"),
        ([torch.ones(1), torch.ones(1, device="meta")], lambda t, x: x, "one device"),
    ],
)
def test_what_is_no_state_is_refused(x0, velocity, message):
    with pytest.raises(ValueError, match=message):
        fs.solve(velocity, x0, nfe=2)
