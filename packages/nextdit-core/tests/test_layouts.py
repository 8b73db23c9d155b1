"""Checkpoints of others: recognised, read and written, against the libraries that own them."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextdit_core import NextDiT, NextDiTConfig, UserError
from nextdit_core.checkpoints import authors, diffusers
from nextdit_core.checkpoints.authors import Variant
from nextdit_core.checkpoints.checkpoint import open_checkpoint
from nextdit_core.checkpoints.mapping import convert
from nextdit_core.checkpoints.model_args import read_model_args, write_model_args
from nextdit_core.checkpoints.recognise import Layout, recognise
from nextdit_core.checkpoints.save import model_args_of

OnLatents = Callable[..., Tensor]
Lumina = Callable[..., Any]


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _case(model: Any, random: torch.Generator, rows: int = 3, columns: int = 4) -> dict[str, Any]:
    """Make latents, times and captions that fit a diffusers model."""
    sizes = model.config
    height, width = rows * sizes.patch_size, columns * sizes.patch_size
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    return {
        "x": torch.randn(2, sizes.in_channels, height, width, generator=random),
        "t": torch.tensor([0.2, 0.7]),
        "cap_feats": torch.randn(2, 5, sizes.cross_attention_dim, generator=random),
        "cap_mask": mask,
    }


def _velocity(model: Any, case: dict[str, Tensor]) -> Tensor:
    """Run a diffusers model as its pipeline does."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    with torch.no_grad():
        out = model(
            hidden_states=case["x"],
            timestep=case["t"],
            encoder_hidden_states=case["cap_feats"],
            encoder_mask=case["cap_mask"],
            image_rotary_emb=get_2d_rotary_pos_embed_lumina(model.head_dim, 384, 384),
            cross_attention_kwargs={},
            return_dict=False,
        )[0]
    return out[:, : model.config.in_channels]


@pytest.fixture
def backbone(random: torch.Generator) -> NextDiT:
    """A small text-to-image backbone in which no weight is zero."""
    config = NextDiTConfig(token_dim=16, width=48, layers=2, heads=4, kv_heads=2, text_dim=24)
    model = NextDiT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    return model


def _equal(one: NextDiT, other: NextDiT) -> bool:
    """Compare weights and sizes; how the feed-forward width was rounded is no size."""
    mine, theirs = one.state_dict(), other.state_dict()
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    return same and one.config.ffn_width == other.config.ffn_width


# The released sizes


def test_the_released_model_has_the_released_names_and_shapes(golden: Path) -> None:
    config = NextDiTConfig.named("2b-gqa", token_dim=16, text_dim=2048)
    with torch.device("meta"):
        ours = NextDiT(config).state_dict()
    for layout, name, count in ((authors, "official", 567), (diffusers, "diffusers", 639)):
        made = convert(ours, layout.writing(config, Variant()))
        expected = json.loads((golden / f"{name}_2b_keys.json").read_text())
        assert _shapes(made) == {name: tuple(shape) for name, shape in expected.items()}
        assert len(made) == count
    assert sum(tensor.numel() for tensor in made.values()) == 1_754_898_976
    official = convert(ours, authors.writing(config, Variant()))
    assert sum(tensor.numel() for tensor in official.values()) == 1_627_386_400
    assert authors.infer_config(_shapes(official)) == config


# diffusers


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 4, "patch_size": 1, "in_channels": 6},
        {"qk_norm": False},
        {"qk_norm": False, "norm_eps": 1e-6},
        {"learn_sigma": False, "patch_size": 4, "in_channels": 3},
        {"in_channels": 16, "ffn_dim_multiplier": 1.3, "multiple_of": 8},
    ],
    ids=str,
)
def test_diffusers_models_are_read_and_written(
    changes: dict[str, Any],
    lumina: Lumina,
    on_latents: OnLatents,
    random: torch.Generator,
    tmp_path: Path,
) -> None:
    from diffusers import LuminaNextDiT2DModel

    theirs = lumina(**changes)
    patch = theirs.config.patch_size
    theirs.save_pretrained(tmp_path / "theirs")
    case = _case(theirs, random)
    expected = _velocity(theirs, case)
    ours = NextDiT.from_pretrained(tmp_path / "theirs")
    assert (on_latents(ours, case, patch=patch) - expected).abs().max() <= 1e-5

    ours.save_pretrained(tmp_path / "ours", layout="diffusers", patch_size=patch)
    back, notes = LuminaNextDiT2DModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(notes.values()), notes
    assert (_velocity(back.eval(), case) - expected).abs().max() <= 1e-5
    assert _equal(NextDiT.from_pretrained(tmp_path / "ours"), ours)


def test_sharded_diffusers_models_are_read_and_written(
    lumina: Lumina, on_latents: OnLatents, random: torch.Generator, tmp_path: Path
) -> None:
    from diffusers import LuminaNextDiT2DModel

    theirs = lumina()
    case = _case(theirs, random)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = NextDiT.from_pretrained(tmp_path / "theirs")
    assert (on_latents(ours, case) - _velocity(theirs, case)).abs().max() <= 1e-5
    ours.save_pretrained(tmp_path / "ours", layout="diffusers", max_shard_size="100KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    back = LuminaNextDiT2DModel.from_pretrained(tmp_path / "ours").eval()
    assert (_velocity(back, case) - _velocity(theirs, case)).abs().max() <= 1e-5


@pytest.mark.parametrize("part", ["", "transformer", "transformer/diffusion_pytorch_model"])
def test_a_saved_pipeline_holds_the_authors_weights(golden: Path, part: str) -> None:
    place = golden / "tiny_pipeline" / part
    path = place.with_suffix(".safetensors") if part.endswith("model") else place
    assert open_checkpoint(path).layout is Layout.DIFFUSERS
    official = NextDiT.from_pretrained(golden / "tiny_official.safetensors")
    assert _equal(NextDiT.from_pretrained(path), official)


def test_a_diffusers_model_without_its_config_is_read_by_its_shapes(
    lumina: Lumina, on_latents: OnLatents, random: torch.Generator, tmp_path: Path
) -> None:
    theirs = lumina()
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").unlink()
    case = _case(theirs, random)
    ours = NextDiT.from_pretrained(tmp_path / "theirs")
    assert (on_latents(ours, case) - _velocity(theirs, case)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["layers.1.attn2.to_q.weight", "layers.0.attn2.norm_q.bias"])
def test_twins_that_drifted_apart_are_refused(lumina: Lumina, name: str, tmp_path: Path) -> None:
    theirs = lumina()
    theirs.state_dict()[name][:1] += 0.25
    theirs.save_pretrained(tmp_path / "theirs")
    other = re.escape(name.replace("attn2", "attn1"))
    with pytest.raises(UserError, match=rf"{other} and {re.escape(name)} differ by up to 0\.25"):
        NextDiT.from_pretrained(tmp_path / "theirs")


def test_another_epsilon_in_the_norms_than_in_the_qk_norm_is_refused(
    lumina: Lumina, tmp_path: Path
) -> None:
    lumina(norm_eps=1e-6).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="their QK-norm always has 1e-05"):
        NextDiT.from_pretrained(tmp_path / "theirs")


# The authors


def test_the_authors_weights_are_read_and_written(
    golden: Path, on_latents: OnLatents, tmp_path: Path
) -> None:
    ours = NextDiT.from_pretrained(golden / "tiny_official.safetensors")
    ours.save_pretrained(tmp_path / "out", layout="authors")
    written = load_file(tmp_path / "out" / "consolidated.00-of-01.safetensors")
    official = load_file(golden / "tiny_official.safetensors")
    assert written.keys() == official.keys()
    for name, tensor in official.items():
        if name == "pad_token":
            assert not written[name].any()
        elif name.startswith("final_layer.linear."):
            both = written[name].unflatten(0, (4, 8)), tensor.unflatten(0, (4, 8))
            assert torch.equal(both[0][:, :4], both[1][:, :4])
            assert not both[0][:, 4:].any()
        else:
            assert torch.equal(written[name], tensor), name
    again = NextDiT.from_pretrained(tmp_path / "out")
    case = load_file(golden / "fwd_masked_12x20.safetensors")
    assert (on_latents(again, case) - case["out_official"]).abs().max() <= 1e-5


@pytest.mark.parametrize("ending", ["safetensors", "pth", "old pth"])
def test_an_authors_folder_holds_raw_and_averaged_weights(
    ending: str, backbone: NextDiT, tmp_path: Path
) -> None:
    backbone.save_pretrained(tmp_path / "out", layout="authors")
    raw = load_file(tmp_path / "out" / "consolidated.00-of-01.safetensors")
    average = {name: tensor * 0.5 for name, tensor in raw.items()}
    folder = tmp_path / "theirs"
    folder.mkdir()
    for stem, tensors in (("consolidated", raw), ("consolidated_ema", average)):
        file = folder / f"{stem}.00-of-01.{ending.split()[-1]}"
        if ending == "safetensors":
            save_file(tensors, file)
        else:
            torch.save(tensors, file, _use_new_zipfile_serialization=ending == "pth")
    assert _equal(NextDiT.from_pretrained(folder), backbone)
    averaged = NextDiT.from_pretrained(folder, ema=True)
    assert torch.equal(averaged.x_embedder.bias, backbone.x_embedder.bias * 0.5)
    with pytest.raises(UserError, match="no file of averaged weights"):
        NextDiT.from_pretrained(tmp_path / "out", ema=True)


@pytest.mark.parametrize(("size", "said"), [("2b-gqa", "NextDiT_2B_GQA_patch2"), ("3b", None)])
def test_the_authors_scripts_are_told_their_constructor(
    size: str, said: str | None, tmp_path: Path
) -> None:
    args = model_args_of(NextDiTConfig.named(size, token_dim=16, text_dim=2048))
    assert (args and args["model"]) == said
    if args is not None:
        write_model_args(tmp_path / "model_args.pth", args)
        theirs = torch.load(tmp_path / "model_args.pth", weights_only=False)
        assert isinstance(theirs, argparse.Namespace)
        assert (theirs.model, theirs.qk_norm) == (said, True)
        assert read_model_args(tmp_path / "model_args.pth") == args


def _cut(tensors: dict[str, Tensor], ranks: int) -> list[dict[str, Tensor]]:
    """Cut as fairscale's layers do: column-parallel by rows, row-parallel by columns."""
    by_rows = ("wq.", "wk.", "wv.", "wk_y.", "wv_y.", "w1.", "w3.", "adaLN_modulation.1.")
    by_rows += ("x_embedder.", "cap_embedder.1.", "t_embedder.mlp.0.", "final_layer.linear.")
    by_columns = (".wo.weight", ".w2.weight", "t_embedder.mlp.2.weight")
    shards: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        axis = 0 if any(part in name for part in (*by_rows, "attention.gate")) else None
        axis = 1 if name.endswith(by_columns) else axis
        parts = [tensor] * ranks if axis is None else tensor.chunk(ranks, axis)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.contiguous().clone()
    return shards


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_model_parallel_shards_are_merged(ending: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = NextDiTConfig(
        token_dim=16, width=48, layers=2, heads=4, kv_heads=2, text_dim=24, qk_norm=False
    )
    whole = NextDiT(config)
    whole.save_pretrained(tmp_path / "out", layout="authors")
    tensors = load_file(tmp_path / "out" / "consolidated.00-of-01.safetensors")
    (tmp_path / "cut").mkdir()
    for rank, shard in enumerate(_cut(tensors, 2)):
        file = tmp_path / "cut" / f"consolidated.{rank:02d}-of-02.{ending}"
        save_file(shard, file) if ending == "safetensors" else torch.save(shard, file)
    assert _equal(NextDiT.from_pretrained(tmp_path / "cut"), whole)
    assert _equal(NextDiT.from_pretrained(tmp_path / "cut" / file.name), whole)
    file.unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 2 model-parallel shards: consolidated\.01"):
        NextDiT.from_pretrained(tmp_path / "cut")


def test_shards_with_a_norm_of_their_own_heads_are_refused(
    backbone: NextDiT, tmp_path: Path
) -> None:
    backbone.save_pretrained(tmp_path / "out", layout="authors")
    tensors = load_file(tmp_path / "out" / "consolidated.00-of-01.safetensors")
    (tmp_path / "cut").mkdir()
    for rank, shard in enumerate(_cut(tensors, 2)):
        save_file(shard, tmp_path / "cut" / f"consolidated.{rank:02d}-of-02.safetensors")
    with pytest.raises(UserError, match="Each rank normalised over its own heads"):
        NextDiT.from_pretrained(tmp_path / "cut")


def test_a_backbone_that_theirs_cannot_be_is_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({}, "it has no text"),
        ({"text_dim": 8, "axes": 1}, "positions have 1 axes"),
        ({"text_dim": 8, "token_dim": 6}, "no 2x2 patches"),
        ({"text_dim": 8, "rope_base": 100.0}, "rope_base is 100.0"),
    ):
        model = NextDiT(NextDiTConfig(**{"token_dim": 4, "width": 32, "layers": 1} | changes))
        for layout in ("authors", "diffusers"):
            with pytest.raises(UserError, match=message):
                model.save_pretrained(tmp_path / "out", layout=layout)
    with pytest.raises(UserError, match="unknown layout 'comfy'; accepted: authors"):
        model.save_pretrained(tmp_path / "out", layout="comfy")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


# Recognition


def test_lumina_2_is_named_and_not_mistaken(golden: Path, lumina: Lumina, tmp_path: Path) -> None:
    from diffusers import Lumina2Transformer2DModel

    second = Lumina2Transformer2DModel(
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        axes_dim_rope=(8, 8, 8),
        cap_feat_dim=32,
    )
    second.save_pretrained(tmp_path / "second")
    with pytest.raises(UserError, match=r"is Lumina-2 \(Lumina-Image-2\.0\) in diffusers' layout"):
        NextDiT.from_pretrained(tmp_path / "second")
    first = _shapes(lumina().state_dict())
    assert recognise(first) is Layout.DIFFUSERS
    assert recognise(_shapes(load_file(golden / "tiny_official.safetensors"))) is Layout.AUTHORS
    # A key that both have, and that others take for Lumina-2's, decides nothing.
    assert recognise({"cap_embedder.1.weight": (4, 4)}) is Layout.UNKNOWN


#: Keys of networks that are no Next-DiT, as their code names them.
FOREIGN = {
    Layout.LUMINA_2: {
        "x_embedder.weight": (48, 64),
        "cap_embedder.1.weight": (48, 32),
        "noise_refiner.0.attention.qkv.weight": (96, 48),
        "layers.0.attention.qkv.weight": (96, 48),
        "layers.0.attention.out.weight": (48, 48),
    },
    Layout.STALE: {
        "patch_embedder.weight": (48, 16),
        "layers.0.attn1.to_q.weight": (48, 48),
        "layers.0.attn_norm1.weight": (48,),
        "layers.0.adaLN_modulation.1.weight": (192, 48),
    },
    Layout.FLAG_DIT: {
        "x_embedder.weight": (48, 16),
        "y_embedder.embedding_table.weight": (1001, 48),
        "layers.0.attention.wq.weight": (48, 48),
        "layers.0.attention_norm.weight": (48,),
        "layers.0.adaLN_modulation.1.weight": (288, 48),
    },
    Layout.FLAG_DIT_1D: {
        "proj_in.weight": (48, 20),
        "blocks.0.attention.wq.weight": (48, 48),
        "final_layer.linear.weight": (20, 48),
    },
}


@pytest.mark.parametrize("layout", FOREIGN)
def test_relatives_are_refused_by_name(layout: Layout, tmp_path: Path) -> None:
    save_file({n: torch.zeros(s) for n, s in FOREIGN[layout].items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=re.escape(f"is {layout.value}: ")):
        NextDiT.from_pretrained(tmp_path / "x.safetensors")


def test_what_is_unknown_is_shown(tmp_path: Path) -> None:
    tensors = {f"model.{i}.weight": torch.zeros(1) for i in range(9)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"known here; its first tensors: model\.0\.weight, .*4"):
        NextDiT.from_pretrained(tmp_path / "x.safetensors")


@pytest.mark.parametrize("layout", ["authors", "diffusers", "nextdit"])
def test_tensors_that_do_not_fit_are_listed(layout: Any, backbone: NextDiT, tmp_path: Path) -> None:
    backbone.save_pretrained(tmp_path / "out", layout=layout)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    ffn = [name for name in tensors if "ffn_norm" in name or "attention_norm1" in name]
    for name in ffn[:6]:
        del tensors[name]
    tensors["layers.0.surplus"] = torch.zeros(1)
    gate = next(name for name in tensors if name.endswith(("norm2.weight", "wo.weight")))
    tensors[gate] = torch.zeros(7)
    save_file(tensors, file)
    (tmp_path / "out" / "complete.json").unlink()
    with pytest.raises(UserError) as caught:
        NextDiT.from_pretrained(tmp_path / "out")
    said = str(caught.value)
    title = {"authors": "the authors'", "diffusers": "diffusers'", "nextdit": "nextdit-core"}
    assert f"looks like {'a Next-DiT' if layout == 'nextdit' else 'Lumina-Next'}" in said
    assert title[layout] in said
    missing = len(ffn[:6])
    more = f"{', '.join(ffn[:5])} and {missing - 5} more" if missing > 5 else ", ".join(ffn)
    assert f"{missing} missing: {more}" in said
    assert "1 unexpected: layers.0.surplus" in said
    assert f"1 of another shape: {gate} [7] (expected [" in said


def test_a_place_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file or folder"):
        NextDiT.from_pretrained(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no checkpoint that is known.*there: none"):
        NextDiT.from_pretrained(tmp_path)
    (tmp_path / "x.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match="is not a weight file"):
        NextDiT.from_pretrained(tmp_path / "x.ckpt")
    save_file({"a": torch.zeros(1, dtype=torch.int8)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="holds a as I8; weights are float32"):
        NextDiT.from_pretrained(tmp_path / "x.safetensors")
