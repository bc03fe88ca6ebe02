"""Checkpoints on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from t5fx.checkpoint.card import CARD, is_generated
from t5fx.checkpoint.description import CONFIG_NAME, LIBRARY_CONFIG, described
from t5fx.checkpoint.save import index_of
from t5fx.errors import CheckpointError

#: A repository's name, as `from_pretrained` takes it.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: What the weights of a checkpoint that a library wrote are called.
_WEIGHTS = ("*.safetensors", "*.safetensors.index*.json")
#: The files that `t5fx.save_pretrained` may have uploaded before.
_OURS = [
    pattern
    for kind in ("model", "adapter")
    for pattern in (index_of(kind), f"{kind}-{'[0-9a-f]' * 12}*.safetensors")
]


def is_repository(name: object) -> bool:
    """Whether a name has the form "user/name"."""
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None


def local_folder(
    name: str | os.PathLike[str],
    subfolder: str,
    *,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    """The folder of a checkpoint: the one of this name, or where the hub's files are kept here.

    A name of the form "user/name" is a repository's, where no folder has it. Files that are not in
    the hub's cache yet are downloaded: the description, then the weights that it names.

    Raises `CheckpointError` where the hub has no such repository or cannot be reached.
    """
    path = Path(name)
    if not is_repository(name) or path.is_dir():
        return path / subfolder
    from huggingface_hub import snapshot_download

    def fetch(patterns: Iterable[str], revision: str | None) -> Path:
        about = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
        found = snapshot_download(
            str(name),
            revision=revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            token=token,
            local_files_only=local_files_only,
            allow_patterns=about,
        )
        return Path(found)

    try:
        root = fetch((CONFIG_NAME, LIBRARY_CONFIG), revision)
        # The rest is of the same commit, whatever is pushed meanwhile.
        if (root / subfolder / CONFIG_NAME).exists():
            files: Iterable[str] = described(root / subfolder)[0].files
        else:
            files = _WEIGHTS
        return fetch(files, root.name) / subfolder
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" at the revision '{revision}'"
        raise CheckpointError(
            f"'{name}': expected a folder on this machine, or a repository on the Hugging Face Hub "
            f"(or in its cache here){at}, got neither: {str(error).strip()}"
        ) from error


def push(
    folder: Path,
    files: Iterable[str],
    repo_id: str,
    *,
    token: str | bool | None,
    private: bool | None,
) -> str:
    """Upload a checkpoint to a repository, which is made where there is none; returns its address.

    Weights of an earlier checkpoint are removed there, in the same commit. A card that somebody
    wrote is kept.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    made = api.create_repo(repo_id, private=private, exist_ok=True)
    given = list(files)
    if api.file_exists(made.repo_id, CARD):
        there = Path(api.hf_hub_download(made.repo_id, CARD))
        if not is_generated(there.read_text(encoding="utf-8")):
            given.remove(CARD)
    api.upload_folder(
        repo_id=made.repo_id,
        folder_path=folder,
        commit_message="A checkpoint of t5fx",
        allow_patterns=given,
        delete_patterns=_OURS,
    )
    return str(made)
