"""Damaged and evil files: each is refused with one line or loads, and none runs code.

NEXTDIT_FUZZ gives another number of damaged files per layout, NEXTDIT_FUZZ_SEED another seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nextdit_core import NextDiT, NextDiTConfig, Pipeline, Recipe, UserError, train
from nextdit_core.checkpoints.model_args import read_model_args

COUNT = int(os.environ.get("NEXTDIT_FUZZ", "120"))
SEED = int(os.environ.get("NEXTDIT_FUZZ_SEED", "0"))
LAYOUTS = ("nextdit", "sharded", "experts", "diffusers", "authors", "pth", "old pth")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write one small backbone in every layout and kind of file."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sound")
    config = NextDiTConfig(
        token_dim=4, width=16, layers=1, heads=2, text_dim=8, multiple_of=8, kv_heads=1
    )
    model = NextDiT(config)
    model.save_pretrained(folder / "nextdit")
    model.save_pretrained(folder / "sharded", max_shard_size="8KB")
    mixture = dataclasses.replace(config, time_experts=2, space_experts=3)
    NextDiT(mixture).save_pretrained(folder / "experts")
    model.save_pretrained(folder / "diffusers", layout="diffusers")
    model.save_pretrained(folder / "authors", layout="authors")
    weights = load_file(folder / "authors" / "consolidated.00-of-01.safetensors")
    for name in ("pth", "old pth"):
        (folder / name).mkdir()
        file = folder / name / "consolidated.00-of-01.pth"
        torch.save(weights, file, _use_new_zipfile_serialization=name == "pth")
    args = argparse.Namespace(model="NextDiT_2B_GQA_patch2", qk_norm=True, lr=1e-4, vae=None)
    for name in ("authors", "pth", "old pth"):
        file = folder / name / "model_args.pth"
        torch.save(args, file, _use_new_zipfile_serialization=name != "old pth")
    for place in folder.iterdir():
        (place / "complete.json").unlink(missing_ok=True)  # it would notice most of what follows
        assert isinstance(NextDiT.from_pretrained(place), NextDiT)
    return {name: folder / name for name in LAYOUTS}


def _flip_bits(data: bytearray, draw: random.Random) -> None:
    end = draw.choice([len(data), min(len(data), 4096), min(len(data), 64)])
    for _ in range(draw.choice([1, 1, 2, 8, 64])):
        data[draw.randrange(end)] ^= 1 << draw.randrange(8)


def _cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.choice([draw.randrange(len(data)), draw.randrange(min(len(data), 64))]) :]


def _cut_out(data: bytearray, draw: random.Random) -> None:
    begin = draw.randrange(len(data))
    del data[begin : begin + draw.randrange(1, 200)]


def _put_in(data: bytearray, draw: random.Random) -> None:
    begin = draw.randrange(len(data))
    data[begin:begin] = draw.randbytes(draw.randrange(1, 200))


def _overwrite(data: bytearray, draw: random.Random) -> None:
    begin = draw.randrange(len(data))
    data[begin : begin + 16] = draw.choice([b"\0" * 16, b"\xff" * 16, draw.randbytes(16)])


def _other_number(data: bytearray, draw: random.Random) -> None:
    """Change a number in a text or header: shapes, offsets, sizes."""
    digits = [i for i in range(8, min(len(data), 8192)) if chr(data[i]).isdigit()]
    if digits:
        place = draw.choice(digits)
        data[place : place + 1] = draw.choice([b"0", b"7", b"-1", b"99999999999", b"1e9", b"null"])


def _other_dtype(data: bytearray, draw: random.Random) -> None:
    places = [i for i in range(len(data) - 3) if data[i : i + 3] == b"F32"]
    if places:
        place = draw.choice(places)
        data[place : place + 3] = draw.choice([b"I32", b"F16", b"F64", b"U32", b"X99", b"F8 "])


DAMAGES = [_flip_bits, _cut, _cut_out, _put_in, _overwrite, _other_number, _other_dtype]


def _same_length_header(data: bytearray, length: int) -> None:
    """Keep a safetensors header readable where only its text changed."""
    data[:8] = struct.pack("<Q", length)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_files_are_refused_or_load(
    layout: str, sound: dict[str, Path], tmp_path: Path
) -> None:
    draw = random.Random(f"{layout} {SEED}")
    said: list[str] = []
    loaded = 0
    for number in range(COUNT):
        place = tmp_path / str(number)
        shutil.copytree(sound[layout], place)
        files = [file for file in sorted(place.iterdir()) if file.name != "README.md"]
        file = draw.choice(files)
        data = bytearray(file.read_bytes())
        damage = draw.choice(DAMAGES)
        before = len(data)
        damage(data, draw)
        if file.suffix == ".safetensors" and damage in (_other_number, _other_dtype):
            (header,) = struct.unpack("<Q", data[:8])
            _same_length_header(data, header + len(data) - before)
        file.write_bytes(data)
        try:
            model = NextDiT.from_pretrained(place)
        except UserError as error:
            said.append(str(error))
        except BaseException as error:
            raise AssertionError(f"{damage.__name__} of {file.name}, number {number}") from error
        else:
            loaded += 1
            assert all(p.isfinite().all() for p in model.parameters())
        shutil.rmtree(place)
    print(f"\n{layout}: {COUNT} damaged, {len(said)} refused, {loaded} loaded, none crashed")
    assert all("\n" not in line for line in said)
    assert len(said) + loaded == COUNT
    assert len(said) > COUNT // 4


def test_damaged_saved_models_are_refused_or_load(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    checkpoint = train(recipe(steps=1))
    shutil.rmtree(checkpoint / "training")
    (checkpoint / "complete.json").write_text(json.dumps({"files": {}}))
    draw = random.Random(f"saved model {SEED}")
    loaded = 0
    said: list[str] = []
    for number in range(COUNT):
        place = tmp_path / str(number)
        shutil.copytree(checkpoint, place)
        files = ["nextdit.json", "complete.json", "backbone/config.json"]
        file = place / draw.choice([*files, "text_encoder/model.safetensors"])
        data = bytearray(file.read_bytes())
        if file.suffix == ".json" and draw.random() < 0.5:
            data[:] = _other_json(json.loads(data), draw)
        else:
            draw.choice(DAMAGES)(data, draw)
        file.write_bytes(data)
        try:
            Pipeline.from_pretrained(place, device="cpu")
        except UserError as error:
            said.append(str(error))
        except BaseException as error:
            raise AssertionError(f"{file.name}, number {number}: {bytes(data)!r}") from error
        else:
            loaded += 1
        shutil.rmtree(place)
    print(f"\nsaved model: {COUNT} damaged, {len(said)} refused, {loaded} loaded, none crashed")
    assert len(said) + loaded == COUNT
    assert len(said) > COUNT // 4


def _other_json(value: Any, draw: random.Random) -> bytes:
    """Put another kind of value in a place of a JSON document, or take one away."""
    inner = value
    while isinstance(inner, dict) and inner and draw.random() < 0.8:
        key = draw.choice(list(inner))
        if isinstance(inner[key], dict) and draw.random() < 0.5:
            inner = inner[key]
        elif draw.random() < 0.3:
            del inner[key]
        else:
            inner[key] = draw.choice([None, 7, -1, 1.5, True, "x", [], ["x"], {}, {"x": 1}])
            return json.dumps(value).encode()
    if inner is value and draw.random() < 0.3:
        return json.dumps(draw.choice([None, 7, "x", [], [1], {}])).encode()
    return json.dumps(value).encode()


class _Payload:
    """Pickles to a call of something with one argument."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call = call
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def _by_hand(sentinel: Path) -> dict[str, bytes]:
    """Write pickles that no pickler writes, as an attacker does."""
    touch = f"touch {sentinel}".encode()
    argument = b"X" + struct.pack("<I", len(touch)) + touch
    return {
        "GLOBAL": b"cos\nsystem\n(" + argument + b"tR.",
        "INST": b"(" + argument + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + argument + b"o.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + argument + b"\x85R.",
        "dotted": b"\x80\x04\x8c\x08argparse\x8c\x0a_os.system\x93" + argument + b"\x85R.",
        "builtins": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x05" + b"1 + 1" + b"\x85R.",
        "copyreg": b"ccopyreg\n_reconstructor\n(cos\nsystem\n" + argument + b"NtR.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pos.system\n.",
        "get attribute": b"cbuiltins\ngetattr\n(cargparse\nNamespace\nX\x08\0\0\0__init__tR.",
        "far memo": b"\x80\x02]r\xff\xff\xff\x7f.",
        "behind": b"\x80\x02cargparse\nNamespace\n)\x81}b0cos\nsystem\n" + argument + b"\x85R.",
    }


def _pickled(sentinel: Path) -> dict[str, bytes]:
    command = f"touch {sentinel}"
    code = f"open({str(sentinel)!r}, 'w').close()"
    payloads = {
        "system": _Payload(os.system, command),
        "popen": _Payload(os.popen, command),
        "eval": _Payload(eval, code),
        "exec": _Payload(exec, code),
        "open": _Payload(open, str(sentinel), "w"),
        "import": _Payload(__import__, "antigravity"),
        "torch": _Payload(torch.load, str(sentinel)),
        "path": sentinel,
    }
    found = {}
    for name, payload in payloads.items():
        places = {
            "alone": payload,
            "in a namespace": argparse.Namespace(model="NextDiT_2B_patch2", lr=payload),
            "in a list": argparse.Namespace(lr=[{"a": (payload,)}]),
            "among weights": {"layers.0.attention.wq.weight": payload},
        }
        for where, value in places.items():
            for protocol in (0, 2, 5):
                made = pickle.dumps(value, protocol)
                found[f"{name} {where}, protocol {protocol}"] = made
    return found


def _forms(data: bytes) -> dict[str, bytes]:
    """Wrap a pickle as torch.save does, now and before 1.6, and not at all."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("archive/data.pkl", data)
        out.writestr("archive/version", "3\n")
    head = b"".join(
        pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    return {"zip": archive.getvalue(), "old": head + data + pickle.dumps([], 2), "bare": data}


def test_evil_pickles_are_refused_and_not_run(sound: dict[str, Path], tmp_path: Path) -> None:
    sentinel = tmp_path / "it-ran"
    tried = 0
    for pickled in (_by_hand(sentinel), _pickled(sentinel)):
        for name, data in pickled.items():
            for form, content in _forms(data).items():
                for file in ("model_args.pth", "consolidated.00-of-01.pth"):
                    place = tmp_path / "place"
                    shutil.copytree(sound["pth"], place)
                    (place / file).write_bytes(content)
                    with pytest.raises(UserError) as caught:
                        NextDiT.from_pretrained(place)
                    assert file in str(caught.value), (name, form)
                    assert not sentinel.exists(), (name, form, file)
                    shutil.rmtree(place)
                    tried += 1
    print(f"\n{tried} evil pickles, all refused, none ran")
    assert tried > 500


def test_the_payloads_would_run_elsewhere(tmp_path: Path) -> None:
    """Without this, the test above could pass because its pickles do nothing."""
    sentinel = tmp_path / "it-ran"
    for name, data in (_by_hand(sentinel) | _pickled(sentinel)).items():
        if name.split()[0] in ("GLOBAL", "INST", "OBJ", "STACK_GLOBAL", "system", "eval", "exec"):
            pickle.loads(data)
            assert sentinel.exists(), name
            sentinel.unlink()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_plain_arguments_are_read(protocol: int, form: str, tmp_path: Path) -> None:
    values = {
        "model": "NextDiT_2B_GQA_patch2",
        "qk_norm": True,
        "lr": 1e-4,
        "seed": 2**70,
        "vae": None,
        "sizes": [1, (2, 3), {"a": {"b", "c"}}],
        "path": "/mnt/数据",
        "bytes": b"\x00\xff",
    }
    if protocol < 4:
        del values["bytes"], values["sizes"]  # older protocols make these by calls
    data = pickle.dumps(argparse.Namespace(**values), protocol)
    if protocol < 2:
        with pytest.raises(UserError, match=r"copyreg|copy_reg"):
            (tmp_path / "model_args.pth").write_bytes(_forms(data)[form])
            read_model_args(tmp_path / "model_args.pth")
        return
    (tmp_path / "model_args.pth").write_bytes(_forms(data)[form])
    assert read_model_args(tmp_path / "model_args.pth") == values


def test_values_shared_without_end_are_refused(tmp_path: Path) -> None:
    bomb: list[Any] = []
    for _ in range(40):
        bomb = [bomb, bomb, bomb]
    torch.save(argparse.Namespace(lr=bomb), tmp_path / "model_args.pth")
    with pytest.raises(UserError, match="holds too many values"):
        read_model_args(tmp_path / "model_args.pth")


def test_a_json_file_that_is_nested_without_end_is_refused(
    sound: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(sound["nextdit"], tmp_path / "place")
    (tmp_path / "place" / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(UserError, match="cannot read"):
        NextDiT.from_pretrained(tmp_path / "place")
    (tmp_path / "place" / "config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="is not a JSON object"):
        NextDiT.from_pretrained(tmp_path / "place")
