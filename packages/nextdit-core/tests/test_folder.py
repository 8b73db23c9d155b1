from __future__ import annotations

from pathlib import Path

import pytest

from nextdit_core import UserError
from nextdit_core.folder import MARKER, check_complete, new_file, new_folder


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    place = tmp_path / "model"
    with new_folder(place) as folder:
        (folder / "weights").write_bytes(b"1234")
        assert not place.exists()
    check_complete(place)
    assert sorted(file.name for file in place.iterdir()) == [MARKER, "weights"]
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_folder_does_not_appear(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "model") as folder:
        (folder / "weights").write_bytes(b"1234")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    before = tmp_path / "step_1"
    with new_folder(before) as folder:
        (folder / "weights").write_bytes(b"1")
    with (
        pytest.raises(UserError, match=r"no space left .* saved before is intact"),
        new_folder(tmp_path / "step_2"),
    ):
        raise OSError(28, "No space left on device")
    check_complete(before)
    assert [file.name for file in tmp_path.iterdir()] == ["step_1"]


def test_a_place_that_is_taken_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path):
        pass


@pytest.mark.parametrize("damage", ["marker", "missing", "cut", "not there"])
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: str) -> None:
    place = tmp_path / "model"
    with new_folder(place) as folder:
        (folder / "weights").write_bytes(b"1234")
    if damage == "marker":
        (place / MARKER).unlink()
    elif damage == "missing":
        (place / "weights").unlink()
    elif damage == "cut":
        (place / "weights").write_bytes(b"12")
    else:
        place = tmp_path / "other"
    message = {
        "marker": "incomplete",
        "missing": "truncated: weights is missing",
        "cut": "truncated: weights has 2 bytes",
        "not there": "is not a folder",
    }[damage]
    with pytest.raises(UserError, match=message):
        check_complete(place)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    place = tmp_path / "sheet.png"
    place.write_text("old")
    with pytest.raises(RuntimeError), new_file(place) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert place.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
    with new_file(place) as partial:
        assert partial.suffix == ".png"
        partial.write_text("new")
    assert place.read_text() == "new"
