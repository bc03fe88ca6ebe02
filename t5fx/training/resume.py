"""A training that was interrupted goes on from a file, or from a folder."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from t5fx.atomic import replacing, sync
from t5fx.errors import TrainingError
from t5fx.training.processes import barrier, is_first


def save_state(path: Path, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings, lists and dicts; whole, or what was there before stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # torch.save itself refuses names that begin with a dot.
    with replacing(path) as scratch, scratch.open("wb") as file:
        torch.save({"settings": dict(settings), **state}, file)


def load_state(
    path: Path, settings: Mapping[str, Any], device: torch.device
) -> dict[str, Any] | None:
    """What `save_state` wrote, or None where there is no file.

    Raises:
        TrainingError: the file is damaged, or of a training with other settings.
    """
    if not path.exists():
        return None
    with readable(path):
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        found = state.pop("settings")
    check_settings(path, found, settings)
    return state


def save_folder(folder: Path, step: int, write: Callable[[Path], None]) -> None:
    """Let every process write the state after a step; the newest whole one stays in `folder`.

    It is written under a name of its own and gets its right name when it is on the disk; older
    ones are removed only then. Every process calls it, and sees the same file system.
    """
    scratch = folder / ".writing"
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
    barrier()
    write(scratch)
    barrier()
    if is_first():
        for path in (*scratch.iterdir(), scratch):
            sync(path)
        path = folder / f"step-{step:09d}"
        os.replace(scratch, path)
        sync(folder)
        for older in set(_saved(folder)) - {path}:
            shutil.rmtree(older)
    barrier()


def newest(folder: Path) -> Path | None:
    """What `save_folder` wrote last, or None where there is nothing."""
    return max(_saved(folder), default=None)


def _saved(folder: Path) -> list[Path]:
    return list(folder.glob("step-*"))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What reading a damaged checkpoint raises is a `TrainingError` that says so."""
    try:
        yield
    except (
        *(RuntimeError, EOFError, OSError, KeyError, TypeError, ValueError, AttributeError),
        pickle.UnpicklingError,
    ) as error:
        raise TrainingError(
            f"checkpoint: expected the state of a training in {path}, got what cannot be read "
            f"({type(error).__name__}: {error}): delete it to start anew"
        ) from error


def check_settings(
    path: str | Path | None, found: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Raise `TrainingError` where a checkpoint is of a training with other settings."""
    for name, value in settings.items():
        if found.get(name) != value:
            raise TrainingError(
                f"checkpoint: expected a training with {name}={value!r} in {path}, got one with "
                f"{found.get(name)!r}: give the same, or delete the checkpoint to start anew"
            )
