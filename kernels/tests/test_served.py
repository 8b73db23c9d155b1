"""Plans of launches: made once for each layout of their tensors."""

import pytest
import torch

from nextdit_kernels import served

X = torch.zeros(4, 6)


@pytest.fixture
def planned():
    """A remembered plan, and the arguments with which it was made."""
    made = []

    @served.remembered
    def plan(*arguments):
        made.append(arguments)
        return len(made)

    return plan, made


def test_a_layout_is_planned_once(planned) -> None:
    plan, made = planned
    assert plan(X, None, True) == plan(torch.ones(4, 6), None, True) == 1
    assert len(made) == 1


@pytest.mark.parametrize(
    "other",
    [
        (X.double(), None, True),
        (X[:3], None, True),
        (X.view(6, 4).t(), None, True),
        (X.to("meta"), None, True),
        (X, X, True),
        (X, None, False),
    ],
    ids=["dtype", "shape", "strides", "device", "another-tensor", "a-word"],
)
def test_whatever_a_plan_depends_on_is_planned_anew(planned, other) -> None:
    plan, _ = planned
    assert plan(X, None, True) == 1
    assert plan(*other) == 2
    assert plan(X, None, True) == 1


def test_lists_are_as_good_as_tuples(planned) -> None:
    plan, _ = planned
    assert plan(X, [3, 1]) == plan(X, (3, 1)) == 1
    assert plan(X, [1, 3]) == 2


def test_errors_are_not_remembered() -> None:
    calls = []

    @served.remembered
    def plan(x):
        calls.append(x)
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            plan(X)
    assert len(calls) == 2


def test_memory_is_bounded(planned, monkeypatch) -> None:
    plan, made = planned
    monkeypatch.setattr(served, "_PLANS", 3)
    for _ in range(2):
        for tokens in (1, 2, 3, 4):
            plan(torch.zeros(tokens))
    assert len(made) == 8  # three are kept at most, so each of four is made again
