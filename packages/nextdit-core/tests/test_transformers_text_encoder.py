from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from nextdit_core import NextDiT, NextDiTConfig, Pipeline, UserError, train
from nextdit_core.flow_model import FlowModel
from nextdit_core.text_encoders import FrozenTextEncoder, TextEncoder, load_text_encoder

transformers = pytest.importorskip("transformers")

KINDS = ["gemma", "gemma2", "qwen2", "qwen3", "llama", "internlm3", "t5"]
PROMPTS = [
    "a red fox in the snow",
    "",
    "A Red FOX",
    "孤舟蓑笠翁，独钓寒江雪 🎣",
    "👩‍👩‍👧 🇫🇷 ❤️",
    "Ein Leuchtturm im Sturm, маяк в бурю, منارة في العاصفة, 嵐の中の灯台",
    " ".join(["lighthouse"] * 1000),
]

Write = Callable[[str], Path]


@pytest.fixture
def load(language_model: Write) -> Callable[..., Any]:
    """Load the encoder of one type."""

    def encoder(kind: str, **options: Any) -> Any:
        return load_text_encoder("transformers", {"model": str(language_model(kind)), **options})

    return encoder


@pytest.fixture
def copy(language_model: Write, tmp_path: Path) -> Callable[[str], Path]:
    """Copy a model, to be damaged."""
    return lambda kind: shutil.copytree(language_model(kind), tmp_path / kind)


@torch.no_grad()
def _expected(folder: Path, kind: str, prompt: str, limit: int = 256) -> torch.Tensor:
    """Compute one prompt without padding; a hook takes what leaves the last layer but one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=limit).input_ids
    ids = ids.long() if ids.shape[1] else torch.tensor([[tokenizer.pad_token_id]])
    if kind == "t5":
        model = transformers.T5EncoderModel.from_pretrained(folder).eval()
        return model(input_ids=ids).last_hidden_state[0]
    model = transformers.AutoModel.from_pretrained(folder).eval()
    seen: list[Any] = []
    model.layers[-2].register_forward_hook(lambda *call: seen.append(call[2]))
    model(input_ids=ids)
    (out,) = seen
    return (out if isinstance(out, torch.Tensor) else out[0])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_model_prompt_by_prompt(
    load: Any, language_model: Write, kind: str
) -> None:
    encoder = load(kind)
    assert isinstance(encoder, TextEncoder)
    assert isinstance(encoder, FrozenTextEncoder)
    condition = encoder(PROMPTS)
    assert condition.text.shape == (len(PROMPTS), 256, encoder.text_dim)
    for row, prompt in enumerate(PROMPTS):
        expected = _expected(language_model(kind), kind, prompt)
        assert int(condition.lengths[row]) == len(expected) >= 1
        difference = condition.text[row, : len(expected)] - expected
        assert difference.abs().max() <= 1e-5 * expected.abs().max().clamp(min=1), prompt
        assert not condition.text[row, len(expected) :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_the_same_features_alone(load: Any, kind: str) -> None:
    encoder = load(kind)
    together = encoder(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = encoder([prompt])
        length = int(alone.lengths)
        assert alone.text.shape[1] == -(-length // 8) * 8
        assert int(together.lengths[row]) == length
        difference = together.text[row, :length] - alone.text[0, :length]
        assert difference.abs().max() <= 1e-5 * alone.text.abs().max().clamp(min=1)
    assert torch.equal(encoder(PROMPTS).text, together.text)
    assert torch.equal(load(kind)(PROMPTS).text, together.text)


def test_features_are_those_of_the_lumina_pipeline(golden: Path) -> None:
    """diffusers lower-cases and, by its tokenizer, pads on the left; the authors on the right."""
    diffusers = pytest.importorskip("diffusers")
    folder = golden / "tiny_pipeline"
    pipeline = diffusers.LuminaPipeline.from_pretrained(folder)
    encoder = load_text_encoder("transformers", {"model": str(folder)})
    prompts = ["a red fox", "", "孤舟蓑笠翁 🎣", "a lighthouse in a storm", "x " * 400]
    condition = encoder(prompts)
    for side, tolerance in (("right", 0.0), ("left", 1e-6)):
        pipeline.tokenizer.padding_side = side
        with torch.no_grad():
            text, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        for row in range(len(prompts)):
            expected = text[row, mask[row].bool()]
            assert int(condition.lengths[row]) == len(expected)
            difference = condition.text[row, : len(expected)] - expected
            assert difference.abs().max() <= tolerance * expected.abs().max()


def test_a_long_negative_prompt_is_kept_whole(load: Any) -> None:
    """diffusers cuts it to the padded length of the positive one."""
    encoder = load("gemma")
    positive, negative = "cat", "blurred, grey, watermarked, low contrast, cropped " * 3
    condition = encoder([positive, negative])
    alone = encoder([negative])
    assert int(condition.lengths[1]) == int(alone.lengths) > 40 > int(condition.lengths[0])
    assert (condition.text[1] - alone.text[0]).abs().max() <= 1e-5 * alone.text.abs().max()


def test_case_and_spaces_reach_the_model(load: Any) -> None:
    encoder = load("gemma")
    ids = encoder.token_ids(["A Red FOX", "a red fox", "a red  fox ", "孤舟"])
    assert len(set(map(tuple, ids))) == 4
    assert encoder._tokenizer.decode(ids[3], skip_special_tokens=True) == "孤舟"


def test_equal_prompts_are_computed_once_and_in_order(load: Any) -> None:
    encoder = load("qwen2")
    shapes: list[torch.Size] = []
    encoder(["a"])
    encoder._loaded[0].register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    condition = encoder(["b", "", "b", "a red fox", "", ""])
    assert condition.host_lengths == tuple(condition.lengths.tolist())
    assert [shape[0] for shape in shapes] == [3]
    single = {prompt: encoder([prompt]) for prompt in ("b", "", "a red fox")}
    for row, prompt in enumerate(["b", "", "b", "a red fox", "", ""]):
        length = int(single[prompt].lengths)
        assert int(condition.lengths[row]) == length
        difference = condition.text[row, :length] - single[prompt].text[0, :length]
        assert difference.abs().max() <= 1e-5 * condition.text.abs().max()


@pytest.mark.parametrize("kind", ["gemma", "qwen2", "t5"])
def test_a_shorter_limit_cuts_as_the_tokenizer_does(
    load: Any, language_model: Write, kind: str
) -> None:
    encoder = load(kind, max_tokens=5)
    condition = encoder(["a red fox in the snow, a lighthouse in a storm", ""])
    expected = _expected(language_model(kind), kind, "a red fox in the snow, a lighthouse", 5)
    assert condition.lengths.tolist() == [5, 1]
    assert condition.text.shape[1] == 8
    difference = condition.text[0, :5] - expected
    assert difference.abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("layer", [0, 1, -1, 3, -4])
def test_another_hidden_state_can_be_asked_for(
    load: Any, language_model: Write, layer: int
) -> None:
    condition = load("llama", layer=layer)(["a red fox"])
    folder = language_model("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        ids = tokenizer("a red fox", return_tensors="pt").input_ids
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]
    assert (condition.text[0, : len(expected)] - expected).abs().max() <= 1e-5


def test_the_model_is_frozen_and_no_part_of_the_state(load: Any) -> None:
    encoder = load("t5")
    model = FlowModel(NextDiT(NextDiTConfig(token_dim=2, width=16, heads=2, text_dim=32)), encoder)
    model.train()
    with torch.enable_grad():
        first = encoder(["a red fox"])
        second = encoder(["a red fox"])
    assert not first.text.requires_grad
    assert torch.equal(first.text, second.text)  # no dropout
    (language,) = encoder._loaded
    assert not language.training
    assert not any(parameter.requires_grad for parameter in language.parameters())
    assert all(name.startswith("backbone.") for name in model.state_dict())
    assert all(name.startswith("backbone.") for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float32", torch.float32)],
)
def test_the_dtype_is_the_option_s_whatever_is_around(
    load: Any, dtype: str, expected: torch.dtype
) -> None:
    encoder = load("gemma", dtype=dtype)
    plain = encoder(["a red fox"]).text
    assert plain.dtype == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(["a red fox"]).text, plain)
    assert torch.equal(encoder.to(torch.float64)(["a red fox"]).text, plain)


def test_bfloat16_is_near_float32(load: Any) -> None:
    exact = load("gemma")(PROMPTS)
    rounded = load("gemma", dtype="bfloat16")(PROMPTS)
    assert torch.equal(exact.lengths, rounded.lengths)
    error = (rounded.text.float() - exact.text).norm() / exact.text.norm()
    assert 1e-4 < error < 3e-2


def test_an_overflow_of_float16_is_named(copy: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy("gemma")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor * 3e4 if "down_proj" in name else tensor for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    options = {"model": str(folder)}
    wide = load_text_encoder("transformers", options)(["a red fox"])
    assert wide.text.isfinite().all()
    assert wide.text.abs().max() > torch.finfo(torch.float16).max
    narrow = load_text_encoder("transformers", options | {"dtype": "float16"})
    with pytest.raises(UserError, match=r"overflows in float16; use dtype='bfloat16'"):
        narrow(["a red fox"])


def test_it_follows_to_another_device(load: Any) -> None:
    """The meta device stands for one: what is put there can be told from what is not."""
    encoder = load("gemma")
    encoder(["a"])
    encoder.to("meta")
    assert encoder.device.type == "meta"
    assert {one.device.type for one in encoder._loaded[0].parameters()} == {"meta"}
    encoder.release()
    encoder.to_empty(device="cpu")
    assert encoder(["a"]).text.device.type == "cpu"


def test_threads_share_one_encoder(load: Any) -> None:
    encoder = load("gemma")
    asked = [[prompt] * (1 + row % 3) for row, prompt in enumerate(PROMPTS * 4)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(encoder, asked))
    for prompts, condition in zip(asked, found, strict=True):
        assert torch.equal(condition.text, encoder(prompts).text)


def test_a_model_in_shards_gives_the_same(load: Any, copy: Any) -> None:
    folder = copy("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    sharded = load_text_encoder("transformers", {"model": str(folder)})
    assert torch.equal(sharded(PROMPTS).text, load("llama")(PROMPTS).text)


def test_a_hub_name_is_found_on_the_hub_s_shelf(
    load: Any, language_model: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download of one commit as the hub's library leaves it, and no network."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    shelf = tmp_path / "models--somebody--tiny-gemma"
    shutil.copytree(language_model("gemma"), shelf / "snapshots" / commit)
    (shelf / "refs").mkdir()
    (shelf / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    encoder = load_text_encoder("transformers", {"model": "somebody/tiny-gemma"})
    here = load("gemma")
    assert torch.equal(encoder(PROMPTS).text, here(PROMPTS).text)
    assert encoder.identity() == here.identity()
    with pytest.raises(UserError, match="'somebody/else' is no folder here, and the Hugging Face"):
        load_text_encoder("transformers", {"model": "somebody/else"})


def test_the_identity_is_that_of_content_and_options(load: Any, copy: Any) -> None:
    from safetensors.torch import load_file, save_file

    same, folder = load("gemma").identity(), copy("gemma")

    def identity(**options: Any) -> str:
        return load_text_encoder("transformers", {"model": str(folder), **options}).identity()

    assert identity() == same
    (folder / "README.md").write_text("a model card")
    assert identity(layer=-2, revision="main") == same
    seen = {same, identity(layer=-1), identity(max_tokens=77), identity(dtype="bfloat16")}
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    seen.add(identity())
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    seen.add(identity())
    assert len(seen) == 6


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"evil": _Evil(folder / "executed")}, folder / "pytorch_model.bin")


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def _own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    marker = str(folder / "executed")
    (folder / "mine.py").write_text(f"open({marker!r}, 'w')\nclass Mine: ...\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"there is no folder '/.*gemma' here"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json with a"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot read .*config.json: "),
        (lambda folder: (folder / "config.json").write_text("{}"), "no config.json with a model"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot read .*gemma: "),
        (_without_weights, "holds no weights; expected model.safetensors"),
        (_pickled, r"holds its weights as pytorch_model.bin, a pickle, which could run any code"),
        (_own_code, r"code of its own, which is not run; .* NEXTDIT_TRUST_REMOTE_CODE=/.*gemma"),
    ],
    ids=["no folder", "no config", "config", "empty", "tokenizer", "weights", "pickle", "code"],
)
def test_a_folder_that_is_no_such_model_is_refused_at_once(
    copy: Any, damage: Callable[[Path], object], message: str
) -> None:
    folder = copy("gemma")
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_text_encoder("transformers", {"model": str(folder)})
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("trusted", ["", "another/model", "/"])
def test_a_saved_model_cannot_ask_for_its_own_code(
    copy: Any, trusted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy("gemma")
    _own_code(folder)
    monkeypatch.setenv("NEXTDIT_TRUST_REMOTE_CODE", trusted)
    with pytest.raises(UserError, match="has no option 'trust_remote_code'"):
        load_text_encoder("transformers", {"model": str(folder), "trust_remote_code": True})
    with pytest.raises(UserError, match="code of its own, which is not run"):
        load_text_encoder("transformers", {"model": str(folder)})
    assert not (folder / "executed").exists()


def test_code_that_the_user_names_as_trusted_is_run(
    load: Any, copy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = copy("gemma")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "mine.MyConfig", "AutoModel": "mine.MyModel"}
    config |= {"model_type": "mine", "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(
        "from transformers import GemmaConfig, GemmaModel\n"
        "class MyConfig(GemmaConfig):\n    model_type = 'mine'\n"
        "class MyModel(GemmaModel):\n    config_class = MyConfig\n"
    )
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setenv("NEXTDIT_TRUST_REMOTE_CODE", f"another/model,{folder}")
    encoder = load_text_encoder("transformers", {"model": str(folder)})
    assert torch.equal(encoder(PROMPTS).text, load("gemma")(PROMPTS).text)
    assert type(encoder._loaded[0]).__name__ == "MyModel"


def _truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _without_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _misshapen(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"intermediate_size": 64', '"intermediate_size": 48')
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncated, "cannot read .*gemma: "),
        (_without_a_tensor, r"do not fit its config.json: 1 tensors.*layers.1.mlp.up_proj.weight"),
        (_misshapen, r"cannot read .*gemma: |do not fit its config.json: 9 tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_any_feature(
    copy: Any, damage: Callable[[Path], None], message: str
) -> None:
    folder = copy("gemma")
    damage(folder)
    encoder = load_text_encoder("transformers", {"model": str(folder)})
    with pytest.raises(UserError, match=message):
        encoder(["a red fox"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype is 'float8'; accepted: auto, float32, bfloat16, float16"),
        ({"layer": 4}, r"layer is 4; .* has 4 hidden states: expected -4 to 3"),
        ({"layer": -5}, r"layer is -5"),
        ({"max_tokens": 0}, "max_tokens is 0; expected at least 1"),
        ({"max_token": 77}, r"has no option 'max_token'; accepted: max_tokens"),
        ({"subfolder": "text_encoder"}, r"text_encoder holds no config.json"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    load: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load("gemma", **options)


@pytest.mark.parametrize(
    ("kind", "sizes", "width", "billions"),
    [
        ("t5", (32128, 1024, 2816, 24, 16, 16, 64), 1024, 0.34),
        ("qwen3", (151936, 1024, 3072, 28, 16, 8, 128), 1024, 0.60),
        ("gemma", (256000, 2048, 16384, 18, 8, 1, 256), 2048, 2.51),
        ("gemma2", (256000, 2304, 9216, 26, 8, 4, 256), 2304, 2.61),
        ("llama", (32000, 4096, 11008, 32, 32, 32, 128), 4096, 6.61),
    ],
)
def test_the_sizes_in_the_guide(
    kind: str, sizes: tuple[int, ...], width: int, billions: float
) -> None:
    vocabulary, hidden, feed_forward, layers, heads, kv_heads, head_dim = sizes
    if kind == "t5":
        config = transformers.T5Config(
            **{"vocab_size": vocabulary, "d_model": hidden, "d_ff": feed_forward},
            **{"num_layers": layers, "num_heads": heads, "d_kv": head_dim},
            feed_forward_proj="gated-gelu",
        )
    else:
        config = transformers.AutoConfig.for_model(
            kind,
            **{"vocab_size": vocabulary, "num_attention_heads": heads},
            **{"hidden_size": hidden, "intermediate_size": feed_forward, "head_dim": head_dim},
            **{"num_hidden_layers": layers, "num_key_value_heads": kv_heads},
        )
    with torch.device("meta"):
        if kind == "t5":
            model = transformers.T5EncoderModel(config)
        else:
            model = transformers.AutoModel.from_config(config)
    assert config.hidden_size == width
    assert round(sum(one.numel() for one in model.parameters()) / 1e9, 2) == billions


def test_an_encoder_with_a_decoder_is_refused(copy: Any) -> None:
    folder = copy("gemma")
    transformers.BartConfig(d_model=16).save_pretrained(folder)
    with pytest.raises(UserError, match=r"type 'bart', an encoder with a decoder; expected"):
        load_text_encoder("transformers", {"model": str(folder)})


def test_the_missing_extra_is_named(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r'needs the transformers library .*"nextdit-core\[text\]"'):
        load("gemma")


def test_options_rebuild_the_encoder(load: Any) -> None:
    encoder = load("qwen3", max_tokens=9, layer=1, dtype="bfloat16")
    again = load_text_encoder("transformers", json.loads(json.dumps(encoder.options)))
    assert torch.equal(encoder(PROMPTS).text, again(PROMPTS).text)


def test_a_relative_folder_is_found_from_anywhere(
    load: Any, language_model: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = language_model("gemma")
    monkeypatch.chdir(folder.parent)
    encoder = load_text_encoder("transformers", {"model": folder.name})
    monkeypatch.chdir(tmp_path)
    again = load_text_encoder("transformers", encoder.options)
    assert torch.equal(encoder(PROMPTS).text, again(PROMPTS).text)


def test_a_model_is_trained_saved_and_sampled_without_the_language_model_s_weights(
    recipe: Any, language_model: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"model": str(language_model("gemma")), "max_tokens": 16}
    run = recipe(text_encoder="transformers", text_encoder_options=options, steps=8)
    checkpoint = train(run)
    assert not (checkpoint / "text_encoder").exists()
    card = json.loads((checkpoint / "nextdit.json").read_text())
    assert card["text_encoder"] == {"name": "transformers", "options": options | {"dtype": "auto"}}
    longer = recipe(text_encoder="transformers", text_encoder_options=options)
    pipe = Pipeline.from_pretrained(train(longer), device="cpu", dtype=torch.bfloat16)
    (sample,) = pipe("up", negative_prompt="down, " * 20)
    assert sample.isfinite().all()
    assert not torch.equal(sample, pipe("up")[0])
