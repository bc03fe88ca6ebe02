"""Small facts that are kept from one process to the next, a file of JSON each."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

from t5fx.atomic import replacing

log = logging.getLogger(__name__)


def folder() -> Path:
    """Where they are kept: $T5FX_CACHE_DIR, or t5fx in the user's folder for caches."""
    given = os.environ.get("T5FX_CACHE_DIR")
    if given:
        return Path(given)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "t5fx"


def file_of(kind: str, key: str) -> Path:
    """The file of one fact: of a kind, by all that it depends on."""
    return folder() / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def load(kind: str, key: str) -> dict[str, Any] | None:
    """A fact, or None where it is not there, cannot be read, or is another key's."""
    path = file_of(kind, key)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return data if data["key"] == key else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read, so that it is replaced: %s", path, error)
        return None


def save(kind: str, key: str, fact: dict[str, Any], what: str) -> None:
    """Keep a fact, all of it or nothing. A folder that cannot be written costs a warning.

    what: the facts' name in that warning.
    """
    path = file_of(kind, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            scratch.write_text(json.dumps({"key": key, **fact}), encoding="utf-8")
    except OSError as error:
        warnings.warn(
            f"{what} are kept for this process only: {error}; set T5FX_CACHE_DIR", stacklevel=3
        )
