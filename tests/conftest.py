"""What the tests across packages share: the command line in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def root() -> Path:
    """Name the folder of the checkout."""
    return ROOT


@pytest.fixture
def nextdit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `nextdit` in this process, to its exit code, in an empty working directory."""
    from nextdit_core.cli import main

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["nextdit", *arguments])
        with pytest.raises(SystemExit) as exited:
            main()
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, int(exited.value.code or 0), out, err)

    return run


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Write a small random Llama that reads letters, and name its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path / "letters"
    letters = {letter: place for place, letter in enumerate(["<s>", "?", *"adeforx "])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="?"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(letters), num_hidden_layers=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Running:
    """A `nextdit train` under way."""

    def __init__(self, arguments: Sequence[str], run: Path, log: Path) -> None:
        self.run = run
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nextdit_core", *arguments],
                env=_environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Read a .jsonl file of the run as far as it is written."""
        file = self.run / name
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    def wait_for_step(self, step: int) -> None:
        """Wait until the loss curve reaches a step."""
        deadline = time.monotonic() + 240
        while not any(row["step"] >= step for row in self.rows("metrics.jsonl")):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def interrupt(self) -> None:
        """Press Ctrl-C: a terminal sends it to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> int:
        """Wait for the end and give the exit code."""
        return self.process.wait(300)


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Start `nextdit train` and leave it running; what is left at the end is killed."""
    started: list[Running] = []

    def begin(recipe: Path, run: Path, *overrides: str) -> Running:
        log = tmp_path / f"log-{len(started)}.txt"
        arguments = ["train", str(recipe), f'out="{run}"', *overrides]
        started.append(Running(arguments, run, log))
        return started[-1]

    yield begin
    for running in started:
        if running.process.poll() is None:
            os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()
