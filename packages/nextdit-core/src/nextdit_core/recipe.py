"""A training recipe: TOML, checked key by key, with `key=value` overrides."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nextdit_core.config import SIZES
from nextdit_core.errors import UserError, unknown_name

__all__ = [
    "LoraRecipe",
    "ObjectiveRecipe",
    "OptimizerRecipe",
    "Recipe",
    "SamplingRecipe",
    "SizesRecipe",
]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SizesRecipe(_Section):
    """Sizes of the backbone.

    Args:
        size: Name of a set of sizes, from which keys that are left out are taken; with it,
            `multiple_of` is 256 unless it says otherwise.
        width: Hidden width.
        layers: Number of blocks.
        heads: Query heads.
        kv_heads: Key and value heads; as many as `heads` when left out.
        multiple_of: The feed-forward width is rounded up to a multiple of this.
        ffn_dim_multiplier: Extra factor on the feed-forward width.
        norm_eps: Epsilon of the norms.
        qk_norm: Norm of queries and keys.
        rope_base: Base of the rotary frequencies.
        time_experts: Feed-forward layers of which the timestep chooses some; 0 for none.
        space_experts: Feed-forward layers of which each token chooses some; 0 for none.
        experts_per_token: How many experts of a kind a token passes through.
    """

    size: (
        Literal[
            "tiny",
            "86m",
            "600m",
            "600m-moe-time",
            "600m-moe-space",
            "600m-moe-both",
            "2b",
            "2b-gqa",
            "3b",
            "5b",
            "7b",
        ]
        | None
    ) = None
    width: Count = 96
    layers: Count = 3
    heads: Count = 4
    kv_heads: Count | None = None
    multiple_of: Count = 32
    ffn_dim_multiplier: Positive | None = None
    norm_eps: Positive = 1e-5
    qk_norm: bool = True
    rope_base: Positive = 10000.0
    time_experts: Annotated[int, Field(ge=0)] = 0
    space_experts: Annotated[int, Field(ge=0)] = 0
    experts_per_token: Count = 2

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Take what a size says for the keys that are left out."""
        if not isinstance(values, Mapping) or values.get("size") not in SIZES:
            return values
        return {"multiple_of": 256, **SIZES[values["size"]], **values}

    def to_fields(self) -> dict[str, Any]:
        """Give the fields of a `NextDiTConfig`."""
        return self.model_dump(exclude={"size"})


class LoraRecipe(_Section):
    """Adapters that are trained in place of the given weights.

    Args:
        rank: Of each adapter.
        alpha: What an adapter adds is multiplied by alpha / rank; as `rank` when left out.
        targets: Names of the linear layers in every block: wq, wk, wv, wo, wk_y, wv_y of the
            attention, w1, w2, w3 of the feed-forward network.
    """

    rank: Count = 16
    alpha: Count | None = None
    targets: Annotated[list[str], Field(min_length=1)] = ["wq", "wk", "wv", "wo"]

    @property
    def scale(self) -> float:
        """The factor of what an adapter adds."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class OptimizerRecipe(_Section):
    """AdamW and its learning-rate schedule.

    Args:
        lr: Peak learning rate.
        schedule: "constant", or "cosine" down to zero at the last step.
        warmup_steps: Steps over which the rate rises linearly from zero.
        weight_decay: Decoupled weight decay.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        grad_clip: Largest norm of the whole gradient.
    """

    lr: Positive = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NotNegative = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    grad_clip: Positive = 2.0


class ObjectiveRecipe(_Section):
    """What the backbone learns to predict, and along which path.

    Args:
        path: "linear" (α = t, σ = 1 - t), "gvp" (sin and cos of πt/2) or "vp" (variance-preserving
            diffusion).
        prediction: "velocity", "noise", "score" or "data".
        weighting: Of the squared error: "none", that of the prediction, a score counting as the
            noise -σ·score; "velocity", that of the velocity that it becomes; "likelihood", with
            which the loss bounds the likelihood.
    """

    path: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Literal["velocity", "noise", "score", "data"] = "velocity"
    weighting: Literal["none", "velocity", "likelihood"] = "none"


class SamplingRecipe(_Section):
    """How the trained model is sampled unless a request says otherwise.

    Args:
        nfe: Velocity evaluations for one sample.
        solver: A flowsolvers solver name; "auto" chooses by the budget.
        schedule: A flowsolvers time grid, such as "uniform" or "shift:4"; "auto" is the solver's
            own.
        guidance: Classifier-free guidance scale; 1 is no guidance.
    """

    nfe: Count = 16
    solver: str = "auto"
    schedule: str = "auto"
    guidance: NotNegative = 3.0


class Recipe(_Section):
    """Everything that defines a training run.

    Args:
        out: Run folder.
        modality: Name of an installed modality.
        modality_options: Its options.
        dataset: Name of an installed dataset.
        dataset_options: Its options.
        text_encoder: Name of an installed text encoder.
        text_encoder_options: Its options.
        text_cache: Folder that keeps the features of a frozen text encoder, so that each caption
            is encoded once; may be shared by runs.
        init_from: Weights to start from: a saved model, a run, a backbone of any layout, or
            OWNER/NAME on the Hugging Face hub. Sizes are then the weights'; a resumed run does not
            look there.
        lora: Train adapters, and leave the weights of `init_from` as they are.
        model: Sizes of the backbone.
        optimizer: AdamW and its schedule.
        objective: What is predicted, along which path, and how errors weigh.
        sampling: Defaults for sampling the result.
        steps: Optimiser steps in all.
        batch_tokens: Tokens in one global batch, over all workers.
        micro_batch_tokens: Most tokens that a worker sends through the model at once; it adds up
            the gradients of its share of a batch. None sends all.
        checkpoint_activations: Keep only each block's input and compute the rest again in the
            backward pass: less memory, about a third more time.
        seed: Seed of the initial weights, the batch plan and the noise.
        time_distribution: How training times are spread over [0, 1].
        time_shift: How training times move towards noise in larger samples: "none", "flux",
            "sd3:TOKENS", or a time grid such as "shift:3" for all.
        caption_dropout: Share of samples that see the empty caption.
        ema_decay: Decay of the weight average; it starts lower and rises to this.
        precision: "float32", or "bfloat16" autocast.
        log_every: Steps between two reports.
        tensorboard: Also write the numbers of `metrics.jsonl` to an event log, in the folder
            `tensorboard` of the run.
        peak_tflops: What one device can do, in 10¹² operations a second, for the utilisation (MFU);
            looked up for known GPUs in bfloat16 when left out.
        checkpoint_every: Steps between two checkpoints.
        keep_checkpoints: How many of the newest checkpoints stay on disk.
        engine: Name of an installed engine.
        workers: Worker processes.
        address: Cluster to connect to, for engines that have one.
        device: "auto", "cpu" or "cuda".
        max_failures: Worker failures that are survived by resuming.
    """

    out: Annotated[str, Field(min_length=1)]
    modality: str
    dataset: str
    text_encoder: str = "bytes"
    modality_options: dict[str, Any] = {}
    dataset_options: dict[str, Any] = {}
    text_encoder_options: dict[str, Any] = {}
    text_cache: Annotated[str, Field(min_length=1)] | None = None
    init_from: Annotated[str, Field(min_length=1)] | None = None
    lora: LoraRecipe | None = None
    model: SizesRecipe = SizesRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    objective: ObjectiveRecipe = ObjectiveRecipe()
    sampling: SamplingRecipe = SamplingRecipe()
    steps: Count = 1000
    batch_tokens: Count = 1024
    micro_batch_tokens: Count | None = None
    checkpoint_activations: bool = False
    seed: int = 0
    time_distribution: Literal["uniform", "lognorm"] = "uniform"
    time_shift: str = "none"
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    precision: Literal["float32", "bfloat16"] = "float32"
    log_every: Count = 10
    tensorboard: bool = False
    peak_tflops: Positive | None = None
    checkpoint_every: Count = 100
    keep_checkpoints: Count = 2
    engine: str = "local"
    workers: Count = 1
    address: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_failures: Annotated[int, Field(ge=0)] = 3

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Check a nested dictionary.

        Args:
            values: As a TOML file would hold them.

        Returns:
            The recipe.

        Raises:
            UserError: A key is unknown or missing, or a value is not acceptable.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _explain(error) from error

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a TOML file and apply overrides.

        Args:
            path: The file.
            overrides: Each `key=value`, with dots into sections: `model.width=128`. The value
                is read as TOML; what is not TOML is text.

        Returns:
            The recipe.

        Raises:
            UserError: The file cannot be read, or a key or value is not acceptable.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read recipe {path}: {error}") from error
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"recipe {path} is not valid TOML: {error}") from error
        for override in overrides:
            _override(values, override)
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Give the recipe as TOML-able values; unset keys are left out.

        With `init_from`, so are the sizes that the recipe does not set, which are the weights'.
        """
        values = self.model_dump(exclude_none=True)
        if self.init_from is not None:
            values["model"] = self.model.model_dump(exclude_none=True, exclude_unset=True)
        return values


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{text!r} is not an override; expected key=value, such as steps=2000")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"override {text!r}: {section} is a value, not a section")
    values[last] = parsed


def _section(annotation: Any) -> Any:
    """Find the section in the annotation of a key, which may be optional."""
    kinds = [annotation, *get_args(annotation)]
    return next(kind for kind in kinds if hasattr(kind, "model_fields"))


def _explain(error: ValidationError) -> UserError:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        fields: Mapping[str, Any] = Recipe.model_fields
        for part in place[:-1]:
            fields = _section(fields[part].annotation).model_fields
        prefix = "".join(f"{part}." for part in place[:-1])
        return unknown_name("recipe key", key, [prefix + name for name in fields])
    if first["type"] == "missing":
        return UserError(f"the recipe lacks {key!r}; add {key} = ... to it")
    message = first["msg"][0].lower() + first["msg"][1:]
    return UserError(f"recipe key {key!r} is {first['input']!r}; {message}")
