"""A modality and a dataset that exist for these tests, installed as a stranger would."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rope3d
from nextdit_core import Conditioning, NextDiT, Recipe, Tokens, registry

MODULE = '''
"""Dots on a line, in samples of several lengths."""
import torch
from nextdit_core import Example, Modality, UserError


class Dots(Modality):
    axes = 1
    suffix = ".txt"
    token_dim = 2
    default_size = (6,)

    def __init__(self, scale: float = 1.0):
        self.scale = scale
        self.options = {"scale": scale}

    def size(self, latent):
        return (len(latent),)

    def positions(self, size):
        if len(size) != 1 or size[0] < 1:
            raise UserError(f"dots size {size} does not work")
        positions = torch.zeros(size[0], 3)
        positions[:, 0] = torch.arange(size[0])
        return positions

    def tokenize(self, latent):
        return latent * self.scale

    def detokenize(self, values, size):
        return values / self.scale

    def write(self, media, path, captions):
        rows = zip(captions, media, strict=True)
        path.write_text("".join(f"{caption}: {dots.tolist()}\\n" for caption, dots in rows))


class Lines:
    def __init__(self, count: int = 20):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)
        rows = torch.linspace(-1, 1, 4 + index % 3)
        up = index % 2 == 0
        return Example(torch.stack([rows, rows if up else -rows], -1), "up" if up else "down")
'''

ENTRY_POINTS = """
[nextdit.modalities]
dots = toy_dots:Dots
[nextdit.datasets]
lines = toy_dots:Lines
"""


@pytest.fixture
def install(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Path]]:
    """Put a distribution on the path: a module and its metadata."""

    def put(name: str, module: str, entry_points: str, source: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
        info = folder / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))
        monkeypatch.syspath_prepend(folder)
        registry.refresh()
        return folder

    yield put
    monkeypatch.undo()
    registry.refresh()


@pytest.fixture
def toy(install: Callable[..., Path]) -> Path:
    """Install the toy modality `dots` and dataset `lines`."""
    return install("toy-dots", "toy_dots", ENTRY_POINTS, MODULE)


@pytest.fixture
def recipe(toy: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Make small recipes for the toy modality."""

    def make(**changes: Any) -> Recipe:
        values: dict[str, Any] = {
            "out": str(tmp_path / "run"),
            "modality": "dots",
            "dataset": "lines",
            "model": {"width": 16, "layers": 1, "heads": 2},
            "text_encoder_options": {"text_dim": 16, "heads": 2},
            "optimizer": {"lr": 3e-3},
            "sampling": {"nfe": 4},
            "steps": 12,
            "batch_tokens": 24,
            "checkpoint_every": 4,
            "log_every": 2,
            "device": "cpu",
        }
        return Recipe.from_dict(values | changes)

    return make


#: Special tokens as the real tokenizers have them: beginning, end, padding.
SPECIAL = {
    "gemma": ("<bos>", "<eos>", "<pad>"),
    "gemma2": ("<bos>", "<eos>", "<pad>"),
    "llama": ("<s>", "</s>", None),
    "internlm3": ("<s>", "</s>", "</s>"),
    "qwen2": (None, "<|im_end|>", "<|endoftext|>"),
    "qwen3": (None, "<|im_end|>", "<|endoftext|>"),
    "t5": (None, "</s>", "<pad>"),
}


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write a small random language model of a type, with a tokenizer, and name its folder."""
    transformers = pytest.importorskip("transformers")
    made: dict[str, Path] = {}

    def write(kind: str) -> Path:
        if kind in made:
            return made[kind]
        if kind not in transformers.CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} has no {kind}")
        folder = tmp_path_factory.mktemp("models") / kind
        tokenizer = _tokenizer(transformers, *SPECIAL[kind])
        if kind == "t5":
            config = transformers.T5Config(
                **{"vocab_size": len(tokenizer), "d_model": 32, "d_kv": 8, "d_ff": 64},
                **{"num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
            )
        else:
            config = transformers.AutoConfig.for_model(
                kind,
                **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64},
                **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
                **{"head_dim": 8, "initializer_range": 0.2, "max_position_embeddings": 512},
                **{"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if kind == "t5":
                model = transformers.T5ForConditionalGeneration(config)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[kind] = folder
        return folder

    return write


def _tokenizer(transformers: Any, bos: str | None, eos: str | None, pad: str | None) -> Any:
    """Train a byte-level BPE on a few sentences; T5's ends a prompt, most begin it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = list(dict.fromkeys(one for one in (pad, eos, bos) if one is not None))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sentences = ["a red fox in the snow", "a lighthouse in a storm", "孤舟蓑笠翁", "独钓寒江雪"]
    tokenizer.train_from_iterator(sentences, trainer)
    frame = {"<bos>": "<bos> $A", "<s>": "<s> $A"}.get(bos or "", "$A")
    if pad == "<pad>" and bos is None:
        frame = "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[(one, tokenizer.token_to_id(one)) for one in special]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad
    )


@pytest.fixture(scope="session")
def golden() -> Path:
    """Find the reference tensors, beside the checkout or where NEXTDIT_GOLDEN says."""
    said = os.environ.get("NEXTDIT_GOLDEN")
    places = [Path(said)] if said else [p / "shared" / "golden" for p in Path(__file__).parents]
    for place in places:
        if (place / "tiny_official.safetensors").is_file():
            return place
    pytest.skip("no reference tensors: set NEXTDIT_GOLDEN to their folder")


#: Whether two tensors are within a bound of one another, under a name for the table.
Parity = Callable[..., None]


@pytest.fixture
def parity(record_property: Callable[[str, object], None]) -> Parity:
    """Hold two tensors within a bound of one another; benchmarks/core/parity.py lists them all."""

    def check(case: str, found: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
        error = (found - expected).abs().max().item()
        record_property("parity", (case, error, bound))
        assert error <= bound, case

    return check


@pytest.fixture
def random() -> torch.Generator:
    """Seed the random numbers of a test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def on_latents() -> Callable[..., Tensor]:
    """Run a backbone on latents `[batch, channels, height, width]`, as the peers' models run."""

    def run(model: NextDiT, case: dict[str, Tensor], *, patch: int = 2, **options: Any) -> Tensor:
        x = case["x"]
        batch, channels, height, width = x.shape
        rows, columns = height // patch, width // patch
        patches = x.unflatten(2, (rows, patch)).unflatten(4, (columns, patch))
        values = patches.permute(0, 2, 4, 3, 5, 1).reshape(-1, patch**2 * channels)
        positions = rope3d.grid(frames=1, height=rows, width=columns).repeat(batch, 1)
        tokens = Tokens(values, positions, (rows * columns,) * batch)
        condition = Conditioning(case["cap_feats"], case["cap_mask"].sum(1))
        with torch.no_grad():
            out = model(tokens, case["t"], condition, **options)
        out = out.view(batch, rows, columns, patch, patch, channels)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)

    return run


@pytest.fixture
def lumina(random: torch.Generator) -> Callable[..., Any]:
    """Make diffusers' models with random weights, none of them zero."""
    from diffusers import LuminaNextDiT2DModel

    def make(**changes: Any) -> Any:
        sizes = {
            "sample_size": 8,
            "hidden_size": 48,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 32,
            "cross_attention_dim": 24,
        }
        model = LuminaNextDiT2DModel(**(sizes | changes)).eval()
        tensors = model.state_dict()
        for name, tensor in tensors.items():
            if ".attn2.to_q" in name or ".attn2.norm_q" in name:
                tensor.copy_(tensors[name.replace("attn2", "attn1")])
            else:
                noise = torch.randn(tensor.shape, generator=random)
                flat = tensor.ndim < 2
                tensor.copy_(noise * 0.3 if flat else noise * tensor.shape[1] ** -0.5)
                if "norm" in name and flat and name.endswith("weight"):
                    tensor.add_(1.0)
        return model

    return make
