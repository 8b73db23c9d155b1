"""Checkpoints on the Hugging Face hub, through `huggingface_hub` (the extra `hub`)."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nextdit_core.errors import UserError
from nextdit_core.folder import read_object
from nextdit_core.model_folder import CARD

__all__ = ["PIPELINE_CLASSES", "local_path", "push_folder"]

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
#: Classes of diffusers' pipelines of Lumina-Next; the second is that of the released weights.
PIPELINE_CLASSES = ("LuminaPipeline", "LuminaText2ImgPipeline")
#: What is read of one.
PIPELINE = [
    "model_index.json",
    *("transformer/config.json", "transformer/*.safetensors*"),
    *("vae/config.json", "vae/diffusion_pytorch_model*.safetensors*"),
    *("text_encoder/*.json", "text_encoder/model*.safetensors"),
    *("tokenizer/*", "scheduler/*"),
]
#: What a backbone needs of a repository, in any layout: no text encoder, no autoencoder.
PATTERNS = [
    "*.json",
    "README.md",
    "model_args.pth",
    "model*.safetensors",
    "diffusion_pytorch_model*.safetensors",
    "backbone/*",
    "transformer/*",
]


def local_path(
    path: str | Path,
    *,
    ema: bool = False,
    pipeline: bool = False,
    alone: bool = True,
    patterns: Sequence[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Give a path on disk, downloading a repository of the hub where no such path exists.

    Args:
        path: A path, or OWNER/NAME.
        ema: Take the authors' averaged weights instead of the raw ones.
        pipeline: Take all files of a saved model, of a diffusers pipeline of Lumina-Next those
            that are read, of another pipeline its index, and of anything else what a backbone
            needs.
        alone: Whether a backbone alone will do for a pipeline.
        patterns: Take these files and no others.
        revision: Branch, tag or commit.
        token: Access token; True takes the stored one.
        cache_dir: Where downloads are kept; huggingface_hub's own place when None.
        local_files_only: Take what was downloaded before.
        force_download: Download again.

    Returns:
        The path.

    Raises:
        UserError: There is no such path, and it is no repository, or `huggingface_hub` is not
            installed, or the download failed.
    """
    place = Path(path).expanduser()
    if place.exists() or not REPOSITORY.fullmatch(str(path)):
        return place
    hub = _hub(f"there is no folder {path}, and to download it from the Hugging Face hub")
    consolidated = "consolidated_ema.*" if ema else "consolidated.*"

    def download(patterns: Sequence[str] | None) -> Path:
        found = hub.snapshot_download(
            str(path),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            allow_patterns=None if patterns is None else list(patterns),
        )
        return Path(found)

    try:
        if patterns is not None:
            return download(patterns)
        if pipeline:
            first = download([CARD, "model_index.json"])
            if (first / CARD).is_file():
                return download(None)
            index = first / "model_index.json"
            if index.is_file():
                known = read_object(index).get("_class_name") in PIPELINE_CLASSES
                return download(PIPELINE) if known else first
            if not alone:
                raise UserError(
                    f"{path} on the Hugging Face hub is no saved nextdit model and no diffusers "
                    f"pipeline; of a backbone alone, such as the authors' Lumina-Next, say where "
                    f"its other parts are: text_encoder=, autoencoder="
                )
        return download([*PATTERNS, consolidated])
    except UserError:
        raise
    except Exception as error:  # the network, the disk, the licence of a repository ...
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"there is no folder {path} here, and no such model came from the Hugging Face hub: "
            f"{said}"
        ) from error


def push_folder(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """Write a folder, upload it, and remove it here.

    Args:
        save: Writes it.
        repo_id: OWNER/NAME; made where there is none.
        commit_message: Of the upload.
        private: Whether a repository that is made is private; the account's default when None.
        token: Access token; the stored one when None.
        branch: Where to; the main one when None.
        create_pr: Open a pull request instead.

    Returns:
        The address of the commit.

    Raises:
        UserError: `huggingface_hub` is not installed.
    """
    hub = _hub("to upload")
    api = hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / repo_id.rpartition("/")[2]
        save(folder)
        return api.upload_folder(
            repo_id=repo_id,
            repo_type="model",
            folder_path=folder,
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
        )


def _hub(why: str) -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise UserError(
            f"{why}, huggingface_hub is needed: pip install 'nextdit-core[hub]'"
        ) from error
    return huggingface_hub
