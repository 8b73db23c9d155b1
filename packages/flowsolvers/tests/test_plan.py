"""Plans: the budget is exact, the table is consistent, JSON is exact."""

import json
import math
import pickle

import pytest

import flowsolvers as fs

RUNGE_KUTTA = [name for name in fs.solvers() if isinstance(fs.method(name), fs.Tableau)]
SCHEDULES = [fs.uniform(), fs.shift(4.0), fs.sigmoid(), fs.cosine(), fs.shift(2.0) @ fs.cosine()]


@pytest.mark.parametrize("solver", RUNGE_KUTTA)
@pytest.mark.parametrize("nfe", range(1, 41))
def test_budget_is_met_exactly(solver, nfe):
    plan = fs.plan(solver, nfe=nfe)
    assert plan.nfe == nfe == sum(len(step.rows) for step in plan.steps)
    stages = fs.method(solver).stages
    whole = [stages] * (nfe // stages)
    assert [len(step.rows) for step in plan.steps] == [nfe % stages] * (nfe % stages > 0) + whole


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("solver", RUNGE_KUTTA)
@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 7, 24])
def test_weights_carry_each_point_to_its_time(solver, schedule, nfe):
    plan = fs.plan(solver, nfe=nfe, schedule=schedule)
    grid = schedule.grid(len(plan.steps))
    assert (plan.steps[0].t, *(step.t_next for step in plan.steps)) == grid
    for step in plan.steps:
        for row in step.rows:
            assert step.t + math.fsum(row.weights) == pytest.approx(row.t, abs=1e-14)
            assert step.t <= row.t <= step.t_next
        assert step.t + math.fsum(step.weights) == pytest.approx(step.t_next, abs=1e-14)


@pytest.mark.parametrize(
    ("nfe", "filler"), [(5, "euler"), (6, "midpoint"), (7, "kutta3")], ids=["1", "2", "3"]
)
def test_remainder_is_one_cheaper_step_at_the_start(nfe, filler):
    first, second = fs.plan("rk4", nfe=nfe).steps
    halves = fs.plan(filler, nfe=2 * (nfe - 4)).steps
    assert first == halves[0]
    assert second == fs.plan("rk4", nfe=8).steps[1]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("solver", fs.solvers())
def test_json_round_trip_is_exact(solver, schedule):
    plan = fs.plan(solver, nfe=11, schedule=schedule)
    again = fs.Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert str(again) == str(plan)
    assert fs.schedule(again.schedule) == schedule
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_auto_on_its_own_grid_is_the_default():
    auto = fs.schedule("auto:6")
    assert fs.plan(nfe=6) == fs.plan("auto", nfe=6, schedule=auto)


def test_plan_prints_one_line_for_each_evaluation_and_each_end():
    text = str(fs.plan("kutta3", nfe=4, schedule=fs.shift(4.0)))
    assert text == (
        "kutta3 on shift:4: 4 evaluations in 2 steps\n"
        "step  eval        t  point\n"
        "   1    v0   0.0000  x\n"
        "   1   end   0.2000  x + 0.2 v0\n"
        "   2    v1   0.2000  x\n"
        "   2    v2   0.6000  x + 0.4 v1\n"
        "   2    v3   1.0000  x - 0.8 v1 + 1.6 v2\n"
        "   2   end   1.0000  x + 0.1333 v1 + 0.5333 v2 + 0.1333 v3"
    )
    assert str(fs.plan(nfe=1)).startswith("auto on auto:1: 1 evaluation in 1 step\n")


@pytest.mark.parametrize("nfe", [0, -3, 2.0, "10", None])
def test_a_bad_budget_is_refused(nfe):
    with pytest.raises(ValueError, match="nfe must be an integer of at least 1"):
        fs.plan(nfe=nfe)


@pytest.mark.parametrize("schedule", ["shift:4", lambda u: u])
def test_a_schedule_that_is_not_one_is_refused(schedule):
    with pytest.raises(ValueError, match="schedule must be a Schedule"):
        fs.plan(nfe=4, schedule=schedule)


def _alone(step: fs.Step) -> fs.Plan:
    return fs.Plan("mine", "mine", (step,))


def _step(t: float, t_next: float) -> fs.Step:
    return fs.Step(t, t_next, (fs.Row(t, ()),), (t_next - t,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.Plan("mine", "mine", ()), "at least one step"),
        (lambda: fs.Plan("mine", "mine", (_step(0.0, 0.5), _step(0.6, 1.0))), "follow one another"),
        (lambda: fs.Plan("mine", "mine", (_step(0.0, 1.5),)), r"\[0, 1\]"),
        (lambda: _step(0.5, 0.5), "go somewhere"),
        (lambda: fs.Plan("mine", "mine", (_step(0.0, 0.5), _step(0.5, 0.2))), "one way"),
        (
            lambda: _alone(fs.Step(0.0, 1.0, (), (1.0,))),
            "combines 1 evaluations, but 0 come before",
        ),
        (lambda: _alone(fs.Step(0.0, 1.0, (fs.Row(0.0, (1.0,)),), (1.0,))), "but 0 come before"),
        (lambda: fs.Step(0.0, 1.0, (fs.Row(0.0, ()),), (math.nan,)), "not finite"),
        (lambda: fs.Step(0.0, 1.0, (fs.Row(math.inf, ()),), (1.0,)), "not finite"),
    ],
)
def test_a_table_that_is_no_path_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _without(key: str) -> str:
    data = json.loads(fs.plan(nfe=2).to_json())
    del data[key]
    return json.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        _without("steps"),
        _without("solver"),
        fs.plan(nfe=2).to_json().replace('"format": 3', '"format": 2'),
        fs.plan(nfe=2).to_json().replace('"t_next": 1.0', '"t_next": -1.0'),
        fs.plan(nfe=2).to_json().replace("0.5", "NaN"),
    ],
)
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match=r"not a plan .* give what Plan\.to_json wrote"):
        fs.Plan.from_json(text)
