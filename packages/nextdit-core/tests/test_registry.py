from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nextdit_core import UserError, registry
from nextdit_core.modality import load_modality
from nextdit_core.testing import check_modality


def test_a_stranger_is_found_and_passes_the_conformance_checks(toy: Path) -> None:
    part = registry.parts("nextdit.modalities")["dots"]
    assert part.origin == "toy-dots 1.2"
    modality = load_modality("dots", {"scale": 2.0})
    media = [example.media for example in registry.load("nextdit.datasets", "lines")(count=3)]
    check_modality(modality, media)


def test_listing_imports_nothing(install: Callable[..., Path]) -> None:
    entry = "[nextdit.modalities]\nbroken = toy_broken:Thing\n"
    install("toy-broken", "toy_broken", entry, "raise RuntimeError('no such luck')")
    assert "broken" in registry.parts("nextdit.modalities")
    assert "toy_broken" not in sys.modules
    with pytest.raises(
        UserError, match=r"'broken' of toy-broken 1.2 failed to load .*RuntimeError: no such luck"
    ):
        registry.load("nextdit.modalities", "broken")


def test_two_claims_on_one_name_name_both(install: Callable[..., Path]) -> None:
    entry = "[nextdit.modalities]\ntwice = toy_{0}:Thing\n"
    install("toy-a", "toy_a", entry.format("a"), "Thing = object")
    install("toy-b", "toy_b", entry.format("b"), "Thing = object")
    with pytest.raises(UserError, match=r"two distributions claim .*'twice': toy-\w 1.2 and toy-"):
        registry.parts("nextdit.modalities")


def test_an_unknown_name_lists_the_closest_first(toy: Path) -> None:
    with pytest.raises(UserError, match=r"unknown modality 'dotz'; accepted: dots"):
        registry.load("nextdit.modalities", "dotz")


def test_a_known_part_that_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", lambda group: {})
    with pytest.raises(UserError, match="pip install nextdit-ray"):
        registry.load("nextdit.engines", "ray")


def test_an_unknown_option_lists_the_accepted(toy: Path) -> None:
    with pytest.raises(UserError, match=r"modality 'dots' has no option 'scall'; accepted: scale"):
        load_modality("dots", {"scall": 1.0})


def test_a_class_that_is_no_modality_is_refused(install: Callable[..., Path]) -> None:
    entry = "[nextdit.modalities]\nhalf = toy_half:Half\n"
    install("toy-half", "toy_half", entry, "class Half:\n    axes = 1\n")
    with pytest.raises(UserError, match=r"lacks token_dim, .*must satisfy nextdit_core.Modality"):
        load_modality("half")


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("axes", 5, "axes is 5"),
        ("tokenize", lambda latent: latent[1:], "tokens have shape"),
        ("detokenize", lambda values, size: values * 1.1, "differs by"),
        ("positions", lambda size: __import__("torch").zeros(size[0], 2), "positions have shape"),
        ("options", {"scale": 3.0}, None),
        ("default_size", (4, 4), "dots size"),
    ],
)
def test_the_conformance_checks_can_fail(
    toy: Path, attribute: str, value: object, message: str | None
) -> None:
    modality = load_modality("dots")
    media = [example.media for example in registry.load("nextdit.datasets", "lines")(count=3)]
    setattr(modality, attribute, value)
    if message is None:
        check_modality(modality, media)
        return
    with pytest.raises((AssertionError, UserError), match=message):
        check_modality(modality, media)
