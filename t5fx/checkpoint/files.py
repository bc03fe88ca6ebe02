"""Checkpoints on disk: safetensors files and one JSON file that describes them, no pickle.

A checkpoint is a folder. `t5fx_config.json` names the files with their sizes and SHA-256 digests,
the file of each tensor, the sites and the `LinearizeConfig`. Files have part of their digest in
their names, so that a new checkpoint never overwrites an old one's: replacing the JSON file, which
is atomic, is what replaces the checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t5fx.config import LinearizeConfig
from t5fx.errors import CheckpointError, T5Error

CONFIG_NAME = "t5fx_config.json"
VERSION = 1
#: Stands in the JSON for a callable `grid`, `prefix` or `suffix`.
CALLABLE = "<callable>"
#: What the JSON file has to have, and of which type.
_FIELDS = {
    **{"content": str, "model": str, "config": dict, "sites": dict, "files": dict},
    **{"tensors": dict, "tied": dict},
}


@dataclass
class Description:
    """What `t5fx_config.json` holds.

    content: "model" (every tensor) or "adapter" (new parameters only); model: class of the
    original; config: fields of `LinearizeConfig`; sites: key of each node -> its settings; files:
    name -> {"bytes", "sha256"}; tensors: name -> file; tied: name -> the name it is stored under.
    """

    content: str
    model: str
    config: dict[str, Any]
    sites: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=dict)


def write(
    folder: Path, tensors: Mapping[str, Tensor], description: Description, shard_bytes: int
) -> None:
    """Put a checkpoint into `folder` in the place of one that is there, or leave all as it was.

    Tensors that share all of their memory are stored once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored, description.tied = _untie(tensors)
    before = _files_of(folder)
    written: list[Path] = []
    try:
        shards = list(_shards(stored, shard_bytes))
        for number, shard in enumerate(shards, start=1):
            suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            path, digest = _write_shard(folder, description.content, suffix, shard, written)
            description.files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
            description.tensors |= dict.fromkeys(shard, path.name)
        text = json.dumps({"version": VERSION, **asdict(description)}, indent=2)
        with scratch_file(folder) as scratch:
            scratch.write_text(text + "\n", encoding="utf-8")
            sync(scratch)
            os.replace(scratch, folder / CONFIG_NAME)
    except BaseException:
        for path in written:
            if path.name not in before:
                path.unlink(missing_ok=True)
        raise
    sync(folder)
    for name in before - set(description.files):
        (folder / name).unlink(missing_ok=True)


def _write_shard(
    folder: Path, content: str, suffix: str, shard: dict[str, Tensor], written: list[Path]
) -> tuple[Path, str]:
    """The file that was written, and its digest."""
    from safetensors.torch import save_file

    with scratch_file(folder) as scratch:
        save_file({n: _alone(t) for n, t in shard.items()}, scratch, {"format": "pt"})
        sync(scratch)
        digest = _digest(scratch)
        path = folder / f"{content}-{digest[:12]}{suffix}.safetensors"
        written.append(path)
        os.replace(scratch, path)
    return path, digest


def _alone(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor with memory of its own, which is what safetensors stores."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _shards(tensors: dict[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    """Tensors in their order, at most `most` bytes together, or one alone."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > most:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


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


@contextlib.contextmanager
def scratch_file(folder: Path) -> Iterator[Path]:
    """The path of an empty file in the folder, with the permissions of any new one; removed."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=".t5fx-")
    os.close(handle)
    path = Path(name)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    with contextlib.suppress(OSError):  # a folder cannot be opened everywhere
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files_of(folder: Path) -> set[str]:
    """Weight files of the checkpoint that is in the folder now."""
    try:
        files = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["files"]
        return {name for name in files if Path(name).name == name}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


class Checkpoint:
    """A checkpoint that was found whole: every file as it was written, every tensor in place.

    Raises `CheckpointError` that names what is missing, damaged or unknown.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description = _described(folder)
        self._check_files()
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self.description.files:
            self.shapes |= self._read_shapes(file)
        stored = self.description.tensors
        if set(stored) != set(self.shapes):
            raise CheckpointError(
                f"'{folder}': expected the tensors that {CONFIG_NAME} lists, "
                f"{differences(stored, self.shapes)}"
            )
        for name, source in self.description.tied.items():
            if source not in self.shapes:
                raise CheckpointError(
                    f"'{folder}': {CONFIG_NAME} ties '{name}' to '{source}', which is not there"
                )
            self.shapes[name] = self.shapes[source]

    @property
    def digest(self) -> str:
        """Tells checkpoints of different content apart."""
        files = sorted(about["sha256"] for about in self.description.files.values())
        return hashlib.sha256(json.dumps([files, self.description.sites]).encode()).hexdigest()

    def site(self, name: str) -> str | None:
        """The key of the node that a tensor belongs to; None for one of the original."""
        return site_of(name, self.description.sites)

    def config(self) -> LinearizeConfig:
        """The saved options."""
        data = self.description.config
        overrides = data.get("overrides") or {}
        names = {n for d in (data, *overrides.values()) for n, v in d.items() if v == CALLABLE}
        if names:
            raise CheckpointError(
                f"'{self.folder}': {', '.join(sorted(names))} of its LinearizeConfig was a "
                f"callable, which a checkpoint cannot hold: load it with "
                f"t5fx.from_pretrained(..., config=LinearizeConfig(...))"
            )
        try:
            return LinearizeConfig.from_dict(data)
        except (T5Error, TypeError, AttributeError) as error:
            raise CheckpointError(f"'{self.folder / CONFIG_NAME}': {error}") from error

    def _check_files(self) -> None:
        for name, about in self.description.files.items():
            path = self.folder / name
            if Path(name).name != name:
                raise CheckpointError(
                    f"'{self.folder / CONFIG_NAME}': expected names of files in the same folder, "
                    f"got {name!r}"
                )
            if not path.is_file():
                raise CheckpointError(f"'{path}': expected this file of the checkpoint, got none")
            if not isinstance(about, dict) or not {"bytes", "sha256"} <= set(about):
                raise CheckpointError(
                    f"'{self.folder / CONFIG_NAME}': expected bytes and sha256 of {name!r}, got "
                    f"{about!r}"
                )
            size = path.stat().st_size
            if size != about["bytes"]:
                raise CheckpointError(
                    f"'{path}': expected {about['bytes']} bytes, got {size}: the file was cut "
                    f"short or changed; copy it again"
                )
            if _digest(path) != about["sha256"]:
                raise CheckpointError(
                    f"'{path}': expected the SHA-256 digest {about['sha256']}, got another: the "
                    f"file is damaged; copy it again"
                )

    def _read_shapes(self, file: str) -> dict[str, tuple[int, ...]]:
        with self._open(file) as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / file, framework="pt", device="cpu") as tensors:
                yield tensors
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"'{self.folder / file}': expected a safetensors file, got {error}"
            ) from error

    def tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        """Every name that is wanted with its values, one file after another."""
        names: dict[str, list[str]] = {name: [name] for name in self.description.tensors}
        for name, source in self.description.tied.items():
            names[source].append(name)
        for file in self.description.files:
            with self._open(file) as tensors:
                for source in tensors.keys():  # noqa: SIM118
                    if any(map(wanted, names[source])):
                        value = tensors.get_tensor(source)
                        yield from ((name, value) for name in names[source] if wanted(name))


def _described(folder: Path) -> Description:
    path = folder / CONFIG_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"'{folder}': expected a folder that t5fx.save_pretrained wrote, with {CONFIG_NAME} "
            f"in it, got none"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}': expected JSON, got {error}") from error
    version = data.pop("version", None) if isinstance(data, dict) else None
    if version != VERSION:
        raise CheckpointError(
            f"'{path}': expected a checkpoint of version {VERSION}, got {version!r}; a later "
            f"version needs a later t5fx"
        )
    for name, kind in _FIELDS.items():
        if not isinstance(data.get(name), kind):
            raise CheckpointError(
                f"'{path}': expected {name!r} to be a {kind.__name__}, got {data.get(name)!r}"
            )
    unknown = sorted(set(data) - set(_FIELDS) - {"made_with"})
    if unknown or data["content"] not in ("model", "adapter"):
        wrong = f"unknown fields {unknown}" if unknown else f"content {data['content']!r}"
        raise CheckpointError(f"'{path}': expected what t5fx.save_pretrained writes, got {wrong}")
    return Description(**data)


def site_of(name: str, sites: Container[str]) -> str | None:
    """The key of the site that a tensor belongs to: the part of its name that is one."""
    parts = name.split(".")
    keys = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((key for key in keys if key in sites), None)


def differences(expected: Any, got: Any) -> str:
    """`missing: 'a', 'b'; unexpected: 'c'`, a few of each."""
    parts = []
    for word, names in (
        ("missing", set(expected) - set(got)),
        ("unexpected", set(got) - set(expected)),
    ):
        if names:
            shown = ", ".join(map(repr, sorted(names)[:5]))
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            parts.append(f"{word}: {shown}{more}")
    return "; ".join(parts)


def check_shape(name: str, expected: torch.Size, got: tuple[int, ...], where: Path) -> None:
    """Raise `CheckpointError` unless a stored tensor has the shape that the model wants."""
    if tuple(expected) != got:
        raise CheckpointError(
            f"'{where}': expected '{name}' of shape {list(expected)}, as in the model, got "
            f"{list(got)}"
        )
