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


@pytest.fixture(scope="session")
def golden() -> Path:
    """Find the reference tensors, beside the checkout or where NEXTDIT_GOLDEN says."""
    said = os.environ.get("NEXTDIT_GOLDEN")
    places = [Path(said)] if said else [p / "shared" / "golden" for p in Path(__file__).parents]
    for place in places:
        if (place / "tiny_official.safetensors").is_file():
            return place
    pytest.skip("no reference tensors: set NEXTDIT_GOLDEN to their folder")


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


@pytest.fixture(scope="session")
def lumina_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make diffusers' pipeline of Lumina-Next, small and random, of its true classes.

    Trained, as its sizes say, at 64 x 64 pixels.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        LuminaNextDiT2DModel,
        LuminaPipeline,
    )
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import GemmaConfig, GemmaModel, PreTrainedTokenizerFast

    letters = ["<pad>", "<eos>", "<bos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz ,"]
    tokenizer = Tokenizer(models.WordLevel({one: i for i, one in enumerate(letters)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gemma = GemmaModel(
            GemmaConfig(
                **{"vocab_size": len(letters), "hidden_size": 32, "intermediate_size": 64},
                **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1},
                **{"head_dim": 8, "initializer_range": 0.2, "max_position_embeddings": 512},
                **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
            )
        )
        transformer = LuminaNextDiT2DModel(
            **{"sample_size": 8, "hidden_size": 48, "num_layers": 2, "num_attention_heads": 4},
            **{"num_kv_heads": 2, "multiple_of": 32, "cross_attention_dim": 32},
        )
        for name, tensor in transformer.state_dict().items():
            if ".attn2.to_q" in name or ".attn2.norm_q" in name:
                tensor.copy_(transformer.state_dict()[name.replace("attn2", "attn1")])
            elif tensor.ndim > 1:
                tensor.normal_(std=tensor.shape[1] ** -0.5)
            else:
                tensor.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.3)
        vae = AutoencoderKL(
            **{"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4},
            **{"down_block_types": ("DownEncoderBlock2D",) * 4, "layers_per_block": 1},
            **{"up_block_types": ("UpDecoderBlock2D",) * 4, "scaling_factor": 0.7},
        )
        vae.decoder.conv_out.weight.detach().mul_(6.0)  # so that pictures have contrast
    pipe = LuminaPipeline(
        transformer=transformer.eval(),
        vae=vae.eval(),
        text_encoder=gemma.eval(),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            **{"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"},
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def lumina_folder(lumina_pipeline: Any, tmp_path: Path) -> Path:
    """Save that pipeline, for a test to use or to break."""
    folder = tmp_path / "lumina"
    lumina_pipeline.save_pretrained(folder)
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
