"""Next-DiT: backbone, training and sampling for any modality that is tokens with positions."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextdit_core.autoencoder import Autoencoder, LatentSpec
    from nextdit_core.backbone import NextDiT
    from nextdit_core.conditioning import Conditioning
    from nextdit_core.config import NextDiTConfig
    from nextdit_core.context_drop import ContextDrop, Pooling
    from nextdit_core.dataset import Dataset, Example
    from nextdit_core.errors import UserError
    from nextdit_core.experts import Routing, watch_routing
    from nextdit_core.extrapolation import Extrapolation
    from nextdit_core.final_layer import FinalLayer
    from nextdit_core.guidance import Guidance
    from nextdit_core.modality import Modality, Size
    from nextdit_core.objective import FlowMatching
    from nextdit_core.pipeline import Pipeline
    from nextdit_core.prepared_conditioning import PreparedConditioning
    from nextdit_core.recipe import Recipe
    from nextdit_core.sde import SDE
    from nextdit_core.step import Step
    from nextdit_core.text_encoders import FrozenTextEncoder, TextEncoder
    from nextdit_core.tokens import Tokens
    from nextdit_core.training.run import train
    from nextdit_core.training.runtime import Engine, Runtime

__version__ = version("nextdit-core")

_HOMES = {
    "Autoencoder": "autoencoder",
    "LatentSpec": "autoencoder",
    "NextDiT": "backbone",
    "Conditioning": "conditioning",
    "NextDiTConfig": "config",
    "ContextDrop": "context_drop",
    "Pooling": "context_drop",
    "Dataset": "dataset",
    "Example": "dataset",
    "UserError": "errors",
    "Routing": "experts",
    "watch_routing": "experts",
    "Extrapolation": "extrapolation",
    "FinalLayer": "final_layer",
    "FlowMatching": "objective",
    "Guidance": "guidance",
    "Modality": "modality",
    "Size": "modality",
    "Pipeline": "pipeline",
    "PreparedConditioning": "prepared_conditioning",
    "Recipe": "recipe",
    "SDE": "sde",
    "Step": "step",
    "FrozenTextEncoder": "text_encoders",
    "TextEncoder": "text_encoders",
    "Tokens": "tokens",
    "Engine": "training.runtime",
    "Runtime": "training.runtime",
    "train": "training.run",
}

__all__ = [
    "SDE",
    "Autoencoder",
    "Conditioning",
    "ContextDrop",
    "Dataset",
    "Engine",
    "Example",
    "Extrapolation",
    "FinalLayer",
    "FlowMatching",
    "FrozenTextEncoder",
    "Guidance",
    "LatentSpec",
    "Modality",
    "NextDiT",
    "NextDiTConfig",
    "Pipeline",
    "Pooling",
    "PreparedConditioning",
    "Recipe",
    "Routing",
    "Runtime",
    "Size",
    "Step",
    "TextEncoder",
    "Tokens",
    "UserError",
    "__version__",
    "train",
    "watch_routing",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command line starts at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nextdit_core' has no attribute {name!r}")
    return getattr(import_module(f"nextdit_core.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return list(__all__)
