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
    said = ask("-res-usage", built.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert usage is not None, said
    return {
        "ptx": built.asm["ptx"],
        "sass": instructions(built.asm["cubin"]),
        "shared": built.metadata.shared,
        "registers": int(usage[1]),
        "stack": int(usage[2]),
    }


def instructions(cubin: bytes) -> str:
    """Disassemble, an instruction a line. Triton's own listing ends after 4096 instructions."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;", ask("-sass", cubin))
    assert [int(address, 16) for address, _ in lines] == [16 * i for i in range(len(lines))]
    return "\n".join(instruction for _, instruction in lines)


def ask(question: str, cubin: bytes) -> str:
    """Ask NVIDIA's cuobjdump, which comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, question, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print(json.dumps([build(request) for request in json.load(sys.stdin)]))
