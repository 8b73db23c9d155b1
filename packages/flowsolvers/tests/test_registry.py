"""Registry: strangers come through the same door, and clashes are named."""

from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

import flowsolvers as fs
from flowsolvers import registry
from flowsolvers.tableaus import HEUN


@pytest.fixture
def install(monkeypatch):
    """Pretend that distributions with these (distribution, name, value) are installed."""

    def pretend(*parts):
        reads = []

        def entry_points(*, group):
            reads.append(group)
            entries = []
            for dist, name, value in parts:
                entry = EntryPoint(name, value, group)
                vars(entry)["dist"] = dist and SimpleNamespace(name=dist, version="1.2")
                entries.append(entry)
            return entries

        monkeypatch.setattr(registry, "entry_points", entry_points)
        registry._entries.cache_clear()
        return reads

    yield pretend
    registry._entries.cache_clear()


def test_a_strangers_solver_is_found_by_name(install):
    install(("stranger", "mine", "flowsolvers.tableaus:HEUN"))
    assert fs.solvers() == ("mine",)
    assert fs.method("mine") is HEUN
    assert fs.plan("mine", nfe=4).solver == "mine"


def test_a_method_of_many_stages_meets_every_budget(install, monkeypatch):
    stages = 7
    wide = fs.Tableau(
        order=1,
        c=tuple(i / stages for i in range(stages)),
        a=tuple((1 / stages,) * i for i in range(stages)),
        b=(1 / stages,) * stages,
    )
    monkeypatch.setattr("flowsolvers.tableaus.WIDE", wide, raising=False)
    install(("stranger", "wide", "flowsolvers.tableaus:WIDE"))
    assert [fs.plan("wide", nfe=nfe).nfe for nfe in range(1, 30)] == list(range(1, 30))
    assert [len(step.rows) for step in fs.plan("wide", nfe=13).steps] == [4, 2, 7]


def test_listing_imports_nothing_and_reads_metadata_once(install):
    reads = install(("stranger", "mine", "no_such_module:X"))
    assert fs.solvers() == fs.solvers() == ("mine",)
    assert reads == ["flowsolvers.solvers"]


def test_two_distributions_claiming_one_name_are_both_named(install):
    install(("one", "mine", "flowsolvers.tableaus:HEUN"), ("two", "mine", "math:pi"))
    for ask in (fs.solvers, lambda: fs.method("mine"), lambda: fs.plan("mine", nfe=2)):
        with pytest.raises(ValueError, match=r"'mine': one 1\.2 and two 1\.2; uninstall"):
            ask()


def test_a_failed_load_names_distribution_version_and_cause(install):
    install(("stranger", "mine", "no_such_module:X"), (None, "other", "no_such_module:X"))
    with pytest.raises(ValueError, match=r"stranger 1\.2 failed .* No module named 'no_such_mod"):
        fs.method("mine")
    with pytest.raises(ValueError, match="of an unnamed distribution failed"):
        fs.method("other")


def test_what_is_not_a_tableau_is_refused(install):
    install(("stranger", "mine", "math:pi"))
    with pytest.raises(ValueError, match=r"stranger 1\.2 is a float; .* flowsolvers\.Tableau"):
        fs.method("mine")


@pytest.mark.parametrize(
    ("name", "first"), [("midpiont", "midpoint"), ("RK4", "rk4"), ("heun2", "heun"), ("ssp", "ssp")]
)
def test_an_unknown_name_lists_the_accepted_ones_closest_first(name, first):
    with pytest.raises(ValueError, match=rf"unknown solver '{name}'.* first: {first}") as raised:
        fs.plan(name, nfe=4)
    assert all(accepted in str(raised.value) for accepted in fs.solvers())
