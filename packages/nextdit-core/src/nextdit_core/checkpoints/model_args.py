"""The arguments that the authors pickle beside their weights, read without running a pickle.

`model_args.pth` is `torch.save(argparse.Namespace(...))`. Its opcodes are checked one by one
against the few that build a namespace of plain values; what it would import is looked at, not
imported.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

from nextdit_core.errors import UserError

__all__ = ["read_model_args", "write_model_args"]

#: A real one has about a thousand bytes.
LARGEST = 1 << 20
#: Opcodes of plain values and containers, and the three that make the namespace.
# fmt: off
HARMLESS = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT",
    "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES",
    "EMPTY_LIST", "APPEND", "APPENDS", "LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "PUT",
    "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL",
})
# fmt: on
MAKING = frozenset({"REDUCE", "NEWOBJ", "BUILD"})
NAMESPACE = ("argparse", "Namespace")


class _Namespace:
    """Stands in for argparse.Namespace: holds what BUILD puts into it, and does nothing."""


class _Plain(pickle.Unpickler):
    """An unpickler for which there is one class in the world."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) != NAMESPACE:
            raise _would_run(f"{module_name}.{global_name}")
        return _Namespace

    def persistent_load(self, pid: Any) -> Any:
        raise _would_run("a persistent id")


def _would_run(what: str) -> UserError:
    return UserError(f"it would import or call {what}")


def read_model_args(path: Path) -> dict[str, Any]:
    """Read `model_args.pth`.

    Args:
        path: As `torch.save` of any version writes it, or a bare pickle.

    Returns:
        The arguments by name; numbers, text, booleans, None, and lists, tuples and dictionaries
        of them.

    Raises:
        UserError: It is damaged, or holds anything besides a namespace of plain values. Nothing
            was executed.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"it has more than {LARGEST} bytes")
        return _namespace(_pickle_of(path.read_bytes()))
    except Exception as error:  # a damaged pickle raises whatever its first bad byte leads to
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"refused {path}: {said}; expected an argparse.Namespace of plain values. The sizes "
            f"are also in the weights: remove this file to load without it"
        ) from error


def _pickle_of(data: bytes) -> bytes:
    """Find the pickle of the saved object in what `torch.save` wrote."""
    stream = io.BytesIO(data)
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            entries = [e for e in archive.infolist() if e.filename.endswith("data.pkl")]
            if len(entries) != 1 or entries[0].file_size > LARGEST:
                raise UserError("it is an archive without one data.pkl")
            return archive.read(entries[0])
    # Before PyTorch 1.6: pickles of a magic number, a protocol and the machine come first.
    rest = data
    for _ in range(3):
        end = _end_of_pickle(rest)
        if end == len(rest):
            return rest
        first, rest = rest[:end], rest[end:]
        if b"Namespace" in first:
            return first
    return rest[: _end_of_pickle(rest)]


def _end_of_pickle(data: bytes) -> int:
    stream = io.BytesIO(data)
    for _ in pickletools.genops(stream):
        pass
    return stream.tell()


def _namespace(data: bytes) -> dict[str, Any]:
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in HARMLESS | MAKING:
            raise UserError(f"it uses the opcode {opcode.name}")
        if opcode.name == "GLOBAL" and tuple(str(argument).split(" ", 1)) != NAMESPACE:
            raise _would_run(str(argument).replace(" ", "."))
        if opcode.name.endswith("PUT") and int(argument or 0) > len(data):
            raise UserError("it numbers its memory beyond its length")
    made = _Plain(io.BytesIO(data)).load()
    if type(made) is not _Namespace:
        raise UserError(f"it holds a {type(made).__name__}")
    values = vars(made)
    _check_plain(values)
    return values


def _check_plain(values: dict[str, Any]) -> None:
    """Look at every value once per place; shared lists can stand for more places than fit."""
    left: list[Any] = [values]
    for _ in range(LARGEST // 8):
        if not left:
            return
        value = left.pop()
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif type(value) in (list, tuple, set):
            left += value
        elif not (value is None or type(value) in (bool, int, float, str, bytes)):
            raise UserError(f"one of its values is a {type(value).__name__}")
    raise UserError("it holds too many values")


def write_model_args(path: Path, values: dict[str, Any]) -> None:
    """Write `model_args.pth` as the authors' scripts read it.

    Args:
        path: The file.
        values: Arguments by name, plain values.
    """
    import argparse

    import torch

    torch.save(argparse.Namespace(**values), path)
