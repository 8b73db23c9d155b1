from __future__ import annotations

import pytest
import torch

from nextdit_core import UserError
from nextdit_core.text_encoders import load_text_encoder
from nextdit_core.text_encoders.bytes import ByteTextEncoder

PROMPTS = ["a handwritten seven", "", "孤舟蓑笠翁 🎣", "x" * 500]


def test_every_prompt_has_finite_features() -> None:
    encoder = ByteTextEncoder(text_dim=32, max_bytes=64)
    condition = encoder(PROMPTS)
    assert torch.isfinite(condition.text).all()
    assert condition.lengths.tolist() == [21, 2, 22, 66]


def test_features_do_not_depend_on_the_other_prompts() -> None:
    encoder = ByteTextEncoder(text_dim=32)
    together = encoder(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = encoder([prompt])
        length = int(alone.lengths)
        difference = together.text[row, :length] - alone.text[0, :length]
        assert difference.abs().max() <= 1e-5


def test_options_rebuild_the_encoder() -> None:
    encoder = ByteTextEncoder(text_dim=32, layers=2, heads=2, max_bytes=16)
    again = load_text_encoder("bytes", encoder.options)
    again.load_state_dict(encoder.state_dict())


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="text_dim 30 is not a multiple of heads 4"):
        load_text_encoder("bytes", {"text_dim": 30})
