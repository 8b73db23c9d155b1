"""Memory for time: forget a block's activations, and compute them again in the backward pass."""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from nextdit_core.backbone import NextDiT

__all__ = ["checkpoint_blocks"]


def checkpoint_blocks(backbone: NextDiT) -> None:
    """Keep only the input of each block; a second time changes nothing.

    Names of parameters stay as they are. In sampling, without gradients, nothing is different.

    Args:
        backbone: Its blocks are changed in place.
    """
    for block in backbone.blocks:
        own = vars(block)
        if "forward" not in own:
            own["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
