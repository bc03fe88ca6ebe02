"""Writing checkpoints: a folder changes from one whole checkpoint to the next.

`t5fx_config.json` names the files with their sizes and SHA-256 digests, the sites and the
`LinearizeConfig`; `model.safetensors.index.json` (`adapter...`) is the index that Hugging Face's
libraries read. Files of weights have part of their digest in their names, so that a new checkpoint
never overwrites an old one's: replacing the JSON file is what replaces the checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from t5fx.atomic import SCRATCH, replacing, scratch_beside, sync
from t5fx.checkpoint.card import CARD
from t5fx.checkpoint.description import CONFIG_NAME, Description
from t5fx.checkpoint.files import digest_of
from t5fx.errors import CheckpointError

#: The names of files of weights that `write` makes, and of what a killed one leaves.
_OURS = re.compile(r"(model|adapter)-[0-9a-f]{12}(-\d{5}-of-\d{5})?\.safetensors")
_LEFT = re.compile(
    rf"\.({re.escape(CONFIG_NAME)}|{re.escape(CARD)}|(model|adapter).*\.safetensors(\.index\.json)?)"
    rf"\.[^.]+{re.escape(SCRATCH)}"
)


def index_of(content: str) -> str:
    """The name of the index for a checkpoint of this content."""
    return f"{content}.safetensors.index.json"


def write(
    folder: Path, tensors: Mapping[str, Tensor], description: Description, max_shard_size: int | str
) -> None:
    """Put a checkpoint into `folder` in the place of one that is there, or leave all as it was.

    Tensors that share all of their memory are stored once. What earlier saves left, also killed
    ones, is removed.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder.mkdir(parents=True, exist_ok=True)
    stored, description.tied = _untie(tensors)
    content = description.content
    split = split_torch_state_dict_into_shards(
        stored, filename_pattern=f"{content}{{suffix}}.safetensors", max_shard_size=max_shard_size
    )
    index = folder / index_of(content)
    with _alone_in(folder):
        _refuse_foreign(index)
        before = {path.name for path in folder.iterdir()}
        index_before = index.read_bytes() if index.exists() else None
        weight_map: dict[str, str] = {}
        try:
            for name, keys in split.filename_to_tensors.items():
                shard = {key: stored[key] for key in keys}
                suffix = name.removeprefix(content)
                path, digest = _write_shard(folder, content, suffix, shard)
                description.files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
                weight_map |= dict.fromkeys(shard, path.name)
            _write_json(index, {"metadata": split.metadata, "weight_map": weight_map})
            _write_json(folder / CONFIG_NAME, description.to_dict())
        except BaseException:
            for name in set(description.files) - before:
                (folder / name).unlink(missing_ok=True)
            if index_before is None:
                index.unlink(missing_ok=True)
            elif index.read_bytes() != index_before:
                index.write_bytes(index_before)
            raise
        _tidy(folder, {*description.files, index.name})


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One save at a time in a folder: a process that is killed holds no other one up."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems of networks have none either
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _refuse_foreign(index: Path) -> None:
    """Raise where an index is one that another library wrote for other weights."""
    if index.exists() and not _is_ours(index):
        raise CheckpointError(
            f"'{index.parent}': expected a folder for a checkpoint of t5fx, got one with "
            f"{index.name} of other weights in it: give a folder of its own"
        )


def _is_ours(index: Path) -> bool:
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return all(_OURS.fullmatch(name) for name in named)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _tidy(folder: Path, kept: set[str]) -> None:
    """Remove what earlier saves wrote and the new checkpoint does not name."""
    indices = {index_of(content) for content in ("model", "adapter")}
    for path in list(folder.iterdir()):
        ours = bool(_OURS.fullmatch(path.name) or _LEFT.fullmatch(path.name))
        if path.name not in kept and (ours or (path.name in indices and _is_ours(path))):
            path.unlink(missing_ok=True)


def _write_shard(
    folder: Path, content: str, suffix: str, shard: dict[str, Tensor]
) -> tuple[Path, str]:
    """The file that was written, and its digest, part of which is in its name."""
    from safetensors.torch import save_file

    with scratch_beside(folder / f"{content}{suffix}") as scratch:
        save_file({n: _alone(t) for n, t in shard.items()}, scratch, {"format": "pt"})
        sync(scratch)
        digest = digest_of(scratch)
        path = folder / f"{content}-{digest[:12]}{suffix}"
        os.replace(scratch, path)
    return path, digest


def _write_json(path: Path, data: dict[str, Any]) -> None:
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _alone(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor with memory of its own, which is what safetensors stores."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _untie(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, and for each other name the one whose memory it is."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in tensors.items():
        where = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and where in first:
            tied[name] = first[where]
        else:
            first.setdefault(where, name)
            stored[name] = tensor
    return stored, tied
