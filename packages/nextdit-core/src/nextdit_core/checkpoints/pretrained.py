"""`from_pretrained`, `save_pretrained` and `push_to_hub` of a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

if TYPE_CHECKING:
    from nextdit_core.backbone import NextDiT

__all__ = ["Pretrained"]


class Pretrained:
    """Gives a backbone its way to disk and back; what it imports, it imports when called."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        ema: bool = False,
        patch_size: int | None = None,
        heads: int | None = None,
        experts_by: Literal["time", "space"] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> NextDiT:
        """Load a backbone from disk or from the Hugging Face hub, in any layout.

        The layout is recognised by the names of the tensors: ours, that of Lumina-Next's authors
        (`consolidated*` files, of several model-parallel ranks too) or of their class-conditional
        Next-DiT, with experts or without, or diffusers' `LuminaNextDiT2DModel`. No pickle is
        executed. One tensor after the other is read, so that the memory in use is that of the
        weights.

        Args:
            path: What `save_pretrained` wrote, a saved model, a run (its newest checkpoint), a
                diffusers pipeline or its transformer, an authors' folder, a single weight file, or
                OWNER/NAME on the hub.
            dtype: What the weights become; as stored when None.
            device: Where they go.
            ema: Take the authors' averaged weights (`consolidated_ema.*`).
            patch_size: Side of a patch, where the checkpoint does not say it and it is not 2.
            heads: Query heads, where the checkpoint is class-conditional and of no released width.
            experts_by: By what the experts of a mixture are chosen, "time" or "space", where no
                tensor tells: up to a width of 1024, without a `model_args.pth`.
            revision: Branch, tag or commit on the hub.
            token: Access token of the hub; True takes the stored one.
            cache_dir: Where downloads are kept.
            local_files_only: Take what was downloaded before.
            force_download: Download again.

        Returns:
            The backbone in evaluation mode, its parameters trainable.

        Raises:
            UserError: There is no such checkpoint, it is damaged, of a newer format or another
                network (Lumina-2 is named), or tensors are missing, unexpected, misshapen or not
                finite.

        Convention: Tokens are (row in the patch, column in the patch, channel) on input and output,
            whatever the layout on disk; the half of the authors' output that their forward throws
            away and their pad token are left out.
        """
        from nextdit_core.checkpoints.hub import local_path
        from nextdit_core.checkpoints.load import load_backbone

        place = local_path(
            path,
            ema=ema,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return load_backbone(
            place,
            dtype=dtype,
            device=device,
            ema=ema,
            patch_size=patch_size,
            heads=heads,
            experts_by=experts_by,
        )

    def save_pretrained(
        self,
        path: str | Path,
        *,
        layout: Literal["nextdit", "diffusers", "authors"] = "nextdit",
        max_shard_size: int | str = "5GB",
        patch_size: int | None = None,
        sample_size: int | None = None,
    ) -> None:
        """Write a folder that `from_pretrained` reads.

        Args:
            path: Where it shall stand; it must not exist.
            layout: "nextdit" (config.json and model.safetensors), "diffusers" (what
                `LuminaNextDiT2DModel.from_pretrained` loads) or "authors"
                (consolidated.00-of-01.safetensors, with a model_args.pth where a constructor of
                theirs has these sizes; of a backbone with classes that of Next-DiT-ImageNet or,
                with experts, Next-DiT-MoE).
            max_shard_size: Most bytes of tensors in one file, such as "5GB"; there are several and
                an index where that is too little. The authors' layout is always one file.
            patch_size: Side of a patch, which decides the order of the numbers in a token in the
                layouts of others; the config's, or else 2, when None.
            sample_size: Side of the latents that it was trained on, from which diffusers' pipeline
                extrapolates; the config's, or else 128, when None. Our own layout keeps both.

        Raises:
            UserError: The place is taken or not writable, the disk is full, or the backbone has no
                form in the layout.
        """
        from nextdit_core.checkpoints.save import save_backbone

        model = cast("NextDiT", self)
        save_backbone(
            model.state_dict(),
            model.config,
            path,
            layout=layout,
            max_shard_size=max_shard_size,
            patch_size=patch_size,
            sample_size=sample_size,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload a Next-DiT backbone",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        **options: Any,
    ) -> str:
        """Upload to the Hugging Face hub what `save_pretrained` writes.

        Args:
            repo_id: OWNER/NAME; made where there is none.
            commit_message: Of the upload.
            private: Whether a repository that is made is private.
            token: Access token; the stored one when None.
            branch: Where to; the main one when None.
            create_pr: Open a pull request instead.
            options: Keyword arguments of `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            UserError: `huggingface_hub` is not installed (`pip install nextdit-core[hub]`).
        """
        from nextdit_core.checkpoints.hub import push_folder

        return push_folder(
            lambda folder: self.save_pretrained(folder, **options),
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
        )
