"""What to cite: every built-in solver and grid has a source, and the BibTeX can be read."""

import re
from pathlib import Path

import pytest

import flowsolvers as fs
from flowsolvers import citations


@pytest.mark.parametrize("solver", fs.solvers())
def test_every_solver_has_a_source(solver):
    text = fs.citation(fs.plan(solver, nfe=8))
    assert text.startswith("@")
    assert "year" in text


def test_the_grid_is_cited_besides_and_nothing_twice():
    text = fs.citation(fs.plan("pec2", nfe=8, schedule=fs.schedule("terminal:0.1@shift:4")))
    assert re.findall(r"^@\w+\{(\w+),", text, re.MULTILINE) == [
        "hairer1993",
        "zhao2023unipc",
        "hacohen2024ltx",
        "zhuo2024lumina",
        "esser2024sd3",
    ]


@pytest.mark.parametrize("key", list(citations._ENTRIES))
def test_each_entry_is_balanced_and_under_its_key(key):
    entry = citations._ENTRIES[key]
    assert re.match(rf"@(article|book|misc)\{{{key},\n", entry)
    assert entry.count("{") == entry.count("}")
    for field in ("author", "title", "year"):
        assert f"  {field} = {{" in entry


def test_keys_that_are_named_exist_and_all_are_used():
    named = {
        key
        for table in (citations._SOLVERS, citations._SCHEDULES)
        for keys in table.values()
        for key in keys
    }
    assert named == set(citations._ENTRIES)


def test_a_plan_of_ones_own_and_a_strangers_solver():
    plan = fs.plan("euler", nfe=2)
    mine = fs.Plan("mine", "of mine", plan.steps)
    assert fs.citation(mine) == ""


def test_the_documentation_lists_all_of_them():
    file = Path(__file__).parents[3] / "docs" / "solvers.bib"
    if not file.exists():
        pytest.skip("the documentation lies in the repository, not in the source distribution")
    assert file.read_text(encoding="utf-8") == "\n\n".join(citations._ENTRIES.values()) + "\n"
