"""Features of a pretrained language model of the transformers library, which stays as it is."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from nextdit_core.conditioning import Conditioning
from nextdit_core.errors import UserError
from nextdit_core.folder import read_json
from nextdit_core.text_encoders.prompts import check_prompts

__all__ = ["TransformersTextEncoder"]

Precision = Literal["auto", "float32", "bfloat16", "float16"]

#: Names the models, separated by commas, whose own Python code may be run. An environment
#: variable and no option, so that a downloaded nextdit.json cannot ask for it.
TRUSTED = "NEXTDIT_TRUST_REMOTE_CODE"
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
SMALL = ("*.json", "*.txt", "*.model")
TOKENIZER = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "*.model"),
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
T5 = ("t5", "mt5", "umt5")

#: A call changes state in tokenizers and, where hidden states are asked for, in models; and the
#: first one loads the weights.
_LOCK = threading.Lock()


class TransformersTextEncoder(nn.Module):
    """Encode prompts by a frozen language model: Gemma, Qwen, Llama, InternLM or T5.

    As the Lumina-Next authors do it: text as it is, neither lower-cased nor cleaned; filled up
    on the right to a multiple of 8; at most 256 tokens; of decoders the hidden states before
    the last layer, which no norm has touched, of T5 its encoder's output. All prompts of a
    call, negative ones included, share one rule and are cut at `max_tokens` only.

    The weights are read from safetensors when the first prompt comes, and are no part of this
    module's state: it has no parameters, and a saved model keeps the name and the options.

    Args:
        model: A folder, or a name on the Hugging Face hub, such as "google/gemma-2b". Of a
            diffusers pipeline its text encoder and tokenizer are taken, also where the folder
            of that text encoder is named.
        subfolder: Where in it the language model is; its tokenizer is looked for beside
            "text_encoder..." in "tokenizer...". None means its root, or "text_encoder" of a
            diffusers pipeline.
        revision: Branch, tag or commit on the hub; a commit keeps meaning the same weights.
        max_tokens: Longer prompts are cut to this many tokens, special ones included.
        layer: Which hidden state, from 0 for the embeddings, or from -1 for the last, behind
            the final norm. None means -2, and for T5 -1. Lumina-T2X (LLaMA) is trained on -1.
        dtype: Of the weights and the features; "auto" is what the weights were saved as. In
            float16 Gemma overflows.

    Raises:
        UserError: transformers is missing, the folder holds no such model or only pickled
            weights, or an option does not fit.

    Source: Lumina-Next (arXiv 2406.18583); Alpha-VLLM/Lumina-T2X, `encode_prompt`. Unlike
    there, a prompt without any token is given one, so that no mask is empty.
    """

    device: torch.device

    def __init__(
        self,
        model: str,
        subfolder: str | None = None,
        revision: str | None = None,
        max_tokens: int = 256,
        layer: int | None = None,
        dtype: Precision = "auto",
    ) -> None:
        super().__init__()
        if max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}; expected at least 1")
        if dtype not in get_args(Precision):
            raise UserError(f"dtype is {dtype!r}; accepted: {', '.join(get_args(Precision))}")
        self.model, self.max_tokens, self.dtype = model, max_tokens, dtype
        given = {
            "model": model,
            "subfolder": subfolder,
            "revision": revision,
            "max_tokens": max_tokens,
            "layer": layer,
            "dtype": dtype,
        }
        self.device = torch.device("cpu")
        self._loaded: tuple[nn.Module, ...] = ()  # a tuple hides it from parameters and state

        library = _transformers()
        self._is_here = Path(model).expanduser().is_dir()
        self._revision = revision
        root = self._root(SMALL)
        if self._is_here:  # so that a saved model finds it from anywhere
            given["model"] = str(root)
        self.options = {name: value for name, value in given.items() if value is not None}
        if not self._is_here:  # its commit: the weights, read later, shall be of the same one
            self._revision = root.name
        if subfolder is None:
            subfolder = "text_encoder" if (root / "model_index.json").is_file() else ""
        self._subfolder, self._folder = subfolder, root / subfolder
        self._tokenizer_folder = root / subfolder.replace("text_encoder", "tokenizer")
        if subfolder == "" and not any(any(root.glob(kind)) for kind in TOKENIZER):
            beside = root.parent / root.name.replace("text_encoder", "tokenizer")
            self._tokenizer_folder = beside  # a pipeline's text encoder was named itself
        if not self._tokenizer_folder.is_dir():
            self._tokenizer_folder = self._folder
        settings = self._folder / "config.json"
        # Without a type transformers may guess one from the folder's name.
        if not settings.is_file() or "model_type" not in read_json(settings):
            raise UserError(
                f"{self._folder} holds no config.json with a model_type, so it is not a saved "
                f"transformers model; give the folder that save_pretrained wrote, or its subfolder"
            )
        if self._is_here:
            self._weights()
        self.config = self._read(library.AutoConfig.from_pretrained, self._folder)
        self._t5 = self.config.model_type in T5
        if self.config.is_encoder_decoder and not self._t5:
            raise UserError(
                f"{model} is of type {self.config.model_type!r}, an encoder with a decoder; "
                f"expected a language model that is a decoder only, or T5"
            )
        text = self.config.get_text_config()
        self.text_dim = int(text.hidden_size)
        states = int(text.num_hidden_layers) + 1
        self.layer = (-1 if self._t5 else -2) if layer is None else layer
        if not -states <= self.layer < states:
            raise UserError(
                f"layer is {self.layer}; {model} has {states} hidden states: expected "
                f"{-states} to {states - 1}"
            )
        self._tokenizer = self._read(
            library.AutoTokenizer.from_pretrained, self._tokenizer_folder, truncation_side="right"
        )
        # The first that there is stands for a prompt of no tokens, and fills up behind others.
        names = ("bos_token_id", "pad_token_id", "eos_token_id")
        ids = [getattr(self._tokenizer, name) for name in names]
        self._stand_in = next((int(one) for one in ids if one is not None), 0)

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Split prompts into tokens.

        Args:
            prompts: At least one.

        Returns:
            For each prompt 1 to `max_tokens` numbers, special tokens included.

        Raises:
            UserError: See `check_prompts`.
        """
        check_prompts(prompts)
        with _LOCK:
            encoded = self._tokenizer(
                list(prompts), padding=False, truncation=True, max_length=self.max_tokens
            )
        return [list(row) or [self._stand_in] for row in encoded["input_ids"]]

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts.

        Args:
            prompts: At least one; any text, the empty one included. Equal ones are computed
                once.

        Returns:
            Features `[batch, text_tokens, text_dim]` without gradient, `text_tokens` a multiple
            of 8, zero behind each prompt's length.

        Raises:
            UserError: See `check_prompts`; the weights cannot be read; or float16 overflowed.
        """
        check_prompts(prompts)
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        rows = self.token_ids(list(places))
        width = -(-max(map(len, rows)) // 8) * 8
        filled = torch.tensor([row + [self._stand_in] * (width - len(row)) for row in rows])
        counts = [len(row) for row in rows]
        mask = torch.arange(width) < torch.tensor(counts)[:, None]
        filled, mask = filled.to(self.device), mask.to(self.device)
        # Features belong to the model and its dtype, whatever the training around computes in.
        with _LOCK, torch.autocast(self.device.type, enabled=False):
            states = self._language_model()(
                input_ids=filled, attention_mask=mask.long(), output_hidden_states=True
            ).hidden_states
        text = states[self.layer].masked_fill(~mask[..., None], 0.0)
        if text.dtype == torch.float16 and not bool(text.isfinite().all()):
            raise UserError(f"{self.model} overflows in float16; use dtype='bfloat16'")
        order = [places[prompt] for prompt in prompts]
        if len(places) < len(prompts):
            text = text[torch.tensor(order).to(self.device)]
        known = tuple(counts[place] for place in order)
        return Conditioning(text, torch.tensor(known).to(self.device), host_lengths=known)

    def identity(self) -> str:
        """Give a SHA-256 of all that features depend on besides the prompt.

        That is the weights, the tokenizer and the model's settings by content, wherever they
        lie, and this encoder's options. Weights are read through, at about 1 GB/s, except on
        the hub's own shelf, where files are named after their SHA-256.
        """
        tokenizer = {file for kind in TOKENIZER for file in self._tokenizer_folder.glob(kind)}
        files = [self._folder / "config.json", *self._weights(), *sorted(tokenizer)]
        depends_on = {
            "files": [(path.name, _sha256(path)) for path in files],
            "options": (self.max_tokens, self.layer, self.dtype),
        }
        return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()

    def release(self) -> None:
        """Free the weights; the next call loads them again."""
        self._loaded = ()

    def extra_repr(self) -> str:
        """Name the model in `print(encoder)`."""
        return f"{self.model}, layer {self.layer}, {self.text_dim} wide, {self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow `Module.to` to another device; the dtype is an option of its own."""
        super()._apply(fn, recurse)
        self.device = fn(torch.empty(0, device=self.device)).device
        for model in self._loaded:
            model.to(self.device)
        return self

    def _language_model(self) -> nn.Module:
        if not self._loaded:
            self._loaded = (self._load().to(self.device),)
        return self._loaded[0]

    def _load(self) -> nn.Module:
        """Read the weights; a tensor that is missing would otherwise be drawn at random."""
        self._weights()
        library = _transformers()
        kind = library.AutoModelForTextEncoding if self._t5 else library.AutoModel
        model, found = self._read(
            kind.from_pretrained,
            self._folder,
            dtype=self.dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
        wrong = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
        if wrong:
            raise UserError(
                f"the weights in {self._folder} do not fit its config.json: {len(wrong)} tensors "
                f"are missing or misshapen, first {', '.join(wrong[:5])}; save the model again"
            )
        model.config.use_cache = False
        return model.eval().requires_grad_(False)

    def _root(self, patterns: Sequence[str]) -> Path:
        """Find the model's folder; of one on the hub, download the files of some patterns."""
        if self._is_here:
            return Path(self.model).expanduser().absolute()
        if self.model.startswith((".", "/", "~")) or self.model.count("/") > 1:
            raise UserError(f"there is no folder {self.model!r} here; give that of a saved model")
        from huggingface_hub import snapshot_download

        if self._trusted:
            patterns = [*patterns, "*.py"]
        try:
            found = snapshot_download(
                self.model, revision=self._revision, allow_patterns=list(patterns)
            )
        except Exception as error:  # of many kinds: network, rights, names
            raise UserError(
                f"{self.model!r} is no folder here, and the Hugging Face hub did not give it: "
                f"{_first_line(error)}"
            ) from error
        return Path(found)

    def _weights(self) -> list[Path]:
        """List the files of weights."""
        folder = self._folder
        if not self._is_here:
            self._root([(Path(self._subfolder) / file).as_posix() for file in WEIGHTS])
        files = sorted(folder.glob(WEIGHTS[0]))
        if files:
            return files
        pickles = sorted(path.name for kind in PICKLES for path in folder.glob(kind))
        if pickles:
            raise UserError(
                f"{folder} holds its weights as {pickles[0]}, a pickle, which could run any code "
                f"when read; save the model as safetensors, or take one that is"
            )
        raise UserError(f"{folder} holds no weights; expected model.safetensors")

    @property
    def _trusted(self) -> bool:
        return self.model in os.environ.get(TRUSTED, "").split(",")

    def _read(self, read: Callable[..., Any], folder: Path, **options: Any) -> Any:
        """Call a `from_pretrained`, and say what did not work in one line."""
        try:
            trusted = self._trusted
            return read(folder, trust_remote_code=trusted, local_files_only=not trusted, **options)
        except Exception as error:  # of many kinds: JSON, safetensors, a class that is missing
            if "trust_remote_code" in str(error):
                raise UserError(
                    f"{self.model} comes with Python code of its own, which is not run; where "
                    f"you have read and trust it, set {TRUSTED}={self.model}"
                ) from error
            raise UserError(f"cannot read {folder}: {_first_line(error)}") from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"text encoder 'transformers' needs the transformers library ({error}); install it "
            f'with: pip install "nextdit-core[text]"'
        ) from error
    return transformers


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _sha256(path: Path) -> str:
    """Hash a file; the hub's shelf has large ones under their hash already."""
    real = path.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64:
        return real.name
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
