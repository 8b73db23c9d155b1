"""Without a GPU, run the kernels in Triton's interpreter: decided before they are imported."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def compile_ahead() -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Compile kernels for GPUs that this machine need not have.

    A request names a `kernel` as "module:name", a `capability` such as 90, the `types` of its
    arguments as Triton spells them ("*bf16", "i32", "fp32"), its `constants`, and `options` such as
    num_warps. Pointers are taken as aligned to 16 bytes. The answer has `ptx`, `sass`, bytes of
    `shared` memory, `registers` of a thread and bytes of its `stack`.

    Runs in its own process: in this one the kernels may belong to Triton's interpreter.
    """

    def build(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        script = Path(__file__).parent / "tests" / "compile_ahead.py"
        done = subprocess.run(
            [sys.executable, str(script)],
            input=json.dumps(requests),
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return build
