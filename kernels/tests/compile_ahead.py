"""Compile kernels to machine code: requests as JSON on stdin, code as JSON on stdout.

See the fixture of the same name in conftest.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def build(request: dict[str, Any]) -> dict[str, Any]:
    module, name = request["kernel"].split(":")
    kernel = getattr(import_module(module), name)
    constants = {name: request["constants"][name] for name in request["constants"]}
    types = {n: "constexpr" if n in constants else request["types"][n] for n in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if types[name].startswith("*")
    }
    built = triton.compile(
        ASTSource(kernel, types, constants, aligned),
        target=GPUTarget("cuda", request["capability"], 32),
        options=request.get("options"),
    )
    registers, stack = usage(built.asm["cubin"])
    return {
        "ptx": built.asm["ptx"],
        "sass": built.asm["sass"],
        "shared": built.metadata.shared,
        "registers": registers,
        "stack": stack,
    }


def usage(cubin: bytes) -> tuple[int, int]:
    """Ask the disassembler for a thread's registers and bytes of stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    print(json.dumps([build(request) for request in json.load(sys.stdin)]))
