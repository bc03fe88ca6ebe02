"""A training that was interrupted goes on from a file."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from t5fx.checkpoint.files import scratch_file, sync
from t5fx.errors import TrainingError


def save_state(path: Path, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings, lists and dicts; whole, or what was there before stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch_file(path.parent) as scratch:
        with scratch.open("wb") as file:  # torch.save itself refuses names that begin with a dot
            torch.save({"settings": dict(settings), **state}, file)
        sync(scratch)
        os.replace(scratch, path)


def load_state(
    path: Path, settings: Mapping[str, Any], device: torch.device
) -> dict[str, Any] | None:
    """What `save_state` wrote, or None where there is no file.

    Raises:
        TrainingError: the file is damaged, or of a training with other settings.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        found = state.pop("settings")
    except (RuntimeError, EOFError, OSError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"checkpoint: expected the state of a training in {path}, got what cannot be read "
            f"({type(error).__name__}): delete it to start anew"
        ) from error
    for name, value in settings.items():
        if found.get(name) != value:
            raise TrainingError(
                f"checkpoint: expected a training with {name}={value!r} in {path}, got one with "
                f"{found.get(name)!r}: give the same, or delete the file to start anew"
            )
    return state
