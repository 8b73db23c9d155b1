"""Folders that are either complete or refused.

A folder is written under a temporary name beside its place, gets its completeness marker
last, and is then renamed. Reading starts with the marker.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nextdit_core.errors import UserError

__all__ = [
    "MARKER",
    "cannot_write",
    "check_complete",
    "check_free",
    "new_file",
    "new_folder",
    "read_json",
    "read_object",
    "write_json",
    "write_text",
]

#: File that lists every other file of a folder with its size, written last.
MARKER = "complete.json"


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one step.

    Args:
        path: The file.
        text: What it shall hold.

    Raises:
        UserError: The place is not writable, or the disk is full.
    """
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a JSON value in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: It cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def check_free(path: Path) -> None:
    """Refuse a place where something stands.

    Raises:
        UserError: The place is taken.
    """
    if path.exists():
        raise UserError(f"{path} exists already; choose another place or remove it")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: It cannot be read, is not JSON, or holds something else.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object; it was changed or is damaged")
    return values


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Write a folder that appears whole or not at all.

    Args:
        path: Where it shall stand; must not exist.

    Yields:
        An empty folder to write into.

    Raises:
        UserError: The place is taken, not writable, or the disk is full. What was there
            before is untouched.
    """
    check_free(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        sizes = {file.relative_to(partial).as_posix(): file.stat().st_size for file in files}
        for file in files:
            _to_disk(file)
        write_json(partial / MARKER, {"files": sizes})
        _to_disk(partial / MARKER)
        partial.rename(path)
        _to_disk(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file that appears whole or not at all; one that was there is replaced.

    Args:
        path: Where it shall stand. Missing folders are made.

    Yields:
        A path of the same suffix to write to.

    Raises:
        UserError: The place is not writable, or the disk is full.
    """
    # Threads, and machines that share a disk, may have one process number.
    own = f"{os.getpid()}-{secrets.token_hex(4)}"
    partial = path.with_name(f".{path.stem}.partial-{own}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # it was renamed, or there was never a place for it
            partial.unlink()


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(path: Path, error: OSError) -> UserError:
    """Say why something could not be written, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"no space left to write {path}; what was saved before is intact: free some space "
            f"and run the same command again"
        )
    return UserError(f"cannot write {path}: {error.strerror or error}; choose another folder")


def check_complete(path: Path) -> None:
    """Refuse a folder that was not written to its end, or lost something since.

    Args:
        path: The folder.

    Raises:
        UserError: The folder or its marker is missing, or a file is missing or was cut.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give the path of a saved model or of a run")
    marker = path / MARKER
    if not marker.is_file():
        raise UserError(
            f"{path} is incomplete: it has no {MARKER}, which is written last; use another "
            f"checkpoint or copy the folder again"
        )
    sizes = read_object(marker).get("files")
    if not isinstance(sizes, dict):
        raise UserError(f"{marker} lists no files; it was changed or is damaged")
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{path} is truncated: {name} is missing; copy the folder again")
        if file.stat().st_size != size:
            raise UserError(
                f"{path} is truncated: {name} has {file.stat().st_size} bytes and was written "
                f"with {size}; copy the folder again or use another checkpoint"
            )
