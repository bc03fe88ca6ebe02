"""Reading checkpoints: safetensors files and one JSON file that describes them, no pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t5fx.checkpoint.description import CONFIG_NAME, described, site_of
from t5fx.config import LinearizeConfig
from t5fx.errors import CheckpointError


class Checkpoint:
    """A checkpoint that was found whole: every file as it was written, every tensor in place.

    library: whether it was saved by the model's library and not by t5fx; shapes: of each tensor.

    Raises `CheckpointError` that names what is missing, damaged or unknown.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description, self.where = described(folder)
        self.library = self.where.name != CONFIG_NAME
        self._check_files()
        #: The file of each tensor, and its name in there.
        self._stored: dict[str, tuple[str, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self.description.files:
            for name, shape in self._read_shapes(file).items():
                self._stored[name], self.shapes[name] = (file, name), shape
        for name, source in self.description.tied.items():
            if source not in self.shapes:
                raise CheckpointError(
                    f"'{self.where}' ties '{name}' to '{source}', which is not there"
                )
            self._stored[name], self.shapes[name] = self._stored[source], self.shapes[source]

    @property
    def digest(self) -> str:
        """Tells checkpoints of different content apart."""
        files = sorted(
            about.get("sha256") or digest_of(self.folder / name)
            for name, about in self.description.files.items()
        )
        return hashlib.sha256(json.dumps([files, self.description.sites]).encode()).hexdigest()

    def site(self, name: str) -> str | None:
        """The key of the node that a tensor belongs to; None for one of the original."""
        return site_of(name, self.description.sites)

    def config(self) -> LinearizeConfig:
        """The saved options."""
        return self.description.linearize_config(self.where)

    def rename(self, names: Mapping[str, str]) -> None:
        """From now on tensors have other names: those here by the ones in the files."""
        for of in (self.shapes, self._stored):
            renamed = {names.get(name, name): value for name, value in of.items()}
            of.clear()
            of.update(renamed)  # type: ignore[arg-type]

    def _check_files(self) -> None:
        for name, about in self.description.files.items():
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"'{path}': expected this file of the checkpoint, got none")
            if self.library:
                continue
            if not isinstance(about, dict) or not {"bytes", "sha256"} <= set(about):
                raise CheckpointError(
                    f"'{self.where}': expected bytes and sha256 of {name!r}, got {about!r}"
                )
            size = path.stat().st_size
            if size != about["bytes"]:
                raise CheckpointError(
                    f"'{path}': expected {about['bytes']} bytes, got {size}: the file was cut "
                    f"short or changed; copy it again"
                )
            if digest_of(path) != about["sha256"]:
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
        for file in self.description.files:
            names = [n for n, (home, _) in self._stored.items() if home == file and wanted(n)]
            if names:
                with self._open(file) as tensors:
                    for name in names:
                        yield name, tensors.get_tensor(self._stored[name][1])


def digest_of(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
