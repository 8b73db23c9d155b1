from __future__ import annotations

from typing import Any

import pytest
import torch

from nextdit_core import UserError
from nextdit_core.text_encoders import load_text_encoder
from nextdit_core.text_encoders.bytes import END, FILL, START, ByteTextEncoder

PROMPTS = ["a handwritten seven", "", "孤舟蓑笠翁 🎣", "x" * 500]


def test_every_prompt_has_finite_features() -> None:
    encoder = ByteTextEncoder(text_dim=32, max_bytes=64)
    condition = encoder(PROMPTS)
    assert torch.isfinite(condition.text).all()
    assert condition.lengths.tolist() == [21, 2, 22, 66]
    assert condition.host_lengths == (21, 2, 22, 66)


def test_features_do_not_depend_on_the_other_prompts() -> None:
    encoder = ByteTextEncoder(text_dim=32)
    together = encoder(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = encoder([prompt])
        length = int(alone.lengths)
        difference = together.text[row, :length] - alone.text[0, :length]
        assert difference.abs().max() <= 1e-5


def test_the_size_in_the_guide() -> None:
    assert sum(one.numel() for one in ByteTextEncoder().parameters()) == 83_200


def test_options_rebuild_the_encoder() -> None:
    encoder = ByteTextEncoder(text_dim=32, layers=2, heads=2, max_bytes=16)
    again = load_text_encoder("bytes", encoder.options)
    again.load_state_dict(encoder.state_dict())


@pytest.mark.parametrize("prompt", ["", "é", "孤舟蓑笠翁 🎣", "👩‍👩‍👧 🇫🇷 ❤️", "a\x00b\n"])
def test_symbols_are_the_bytes_of_the_prompt(prompt: str) -> None:
    symbols, lengths = ByteTextEncoder().symbols([prompt, "x" * 50])
    row = symbols[0].tolist()
    framed, filled = row[: lengths[0]], row[lengths[0] :]
    assert framed == [START, *prompt.encode(), END]
    assert set(filled) == {FILL}


@pytest.mark.parametrize("limit", range(1, 12))
def test_a_long_prompt_is_cut_between_characters(limit: int) -> None:
    symbols, lengths = ByteTextEncoder(max_bytes=limit).symbols(["aé孤🎣" * 9])
    kept = bytes(symbols[0, 1 : lengths[0] - 1].tolist())
    text = kept.decode("utf-8")  # raises where a character was torn apart
    assert ("aé孤🎣" * 9).startswith(text)
    following = ("aé孤🎣" * 9)[len(text)]
    assert len(kept) <= limit < len(kept + following.encode())


def test_a_prompt_of_a_thousand_words_is_read_up_to_the_limit() -> None:
    encoder = ByteTextEncoder(text_dim=32)
    words = " ".join(["lighthouse"] * 1000)
    condition = encoder([words, words[:256]])
    assert condition.lengths.tolist() == [258, 258]
    assert torch.equal(condition.text[0], condition.text[1])


@pytest.mark.parametrize("training", [True, False])
def test_features_are_those_of_torch_layer_by_layer(training: bool) -> None:
    """In evaluation without gradients torch takes another way through its encoder."""
    encoder = ByteTextEncoder(text_dim=32, layers=2).train(training)
    with torch.set_grad_enabled(training):
        condition = encoder(PROMPTS)
    symbols, lengths = encoder.symbols(PROMPTS)
    for row, length in enumerate(lengths.tolist()):
        hidden = encoder.bytes(symbols[row, :length]) + encoder.places.weight[:length]
        for layer in encoder.layers.layers:
            heads = layer.self_attn
            normed = layer.norm1(hidden)
            q, k, v = (normed @ heads.in_proj_weight.T + heads.in_proj_bias).chunk(3, -1)
            q, k, v = (part.view(length, 4, 8).transpose(0, 1) for part in (q, k, v))
            mixed = ((q @ k.transpose(1, 2)) / 8**0.5).softmax(-1) @ v
            hidden = hidden + heads.out_proj(mixed.transpose(0, 1).reshape(length, 32))
            middle = torch.nn.functional.gelu(layer.linear1(layer.norm2(hidden)))
            hidden = hidden + layer.linear2(middle)
        expected = encoder.norm(hidden)
        assert (condition.text[row, :length] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("seven", r"is the text 'seven'; expected a list of texts: \['seven'\]"),
        ([], "no prompt given; expected at least one"),
        (["a", None], "prompt 1 is None; expected text"),
        (["a \ud83d"], "prompt 0 holds half of a surrogate pair at character 2"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(prompts: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ByteTextEncoder()(prompts)


@pytest.mark.parametrize("option", ["text_dim", "layers", "heads", "max_bytes"])
def test_sizes_below_one_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"{option} is 0; expected at least 1"):
        load_text_encoder("bytes", {option: 0})


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="text_dim 30 is not a multiple of heads 4"):
        load_text_encoder("bytes", {"text_dim": 30})
