"""What a checkpoint says of itself.

It does so in `t5fx_config.json`, which `t5fx.save_pretrained` writes, or in an entry of the
`config.json` that a linearized model of transformers or diffusers writes when its own
`save_pretrained` is called.
"""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from t5fx.config import LinearizeConfig
from t5fx.errors import CheckpointError, T5Error

CONFIG_NAME = "t5fx_config.json"
#: The file in which transformers and diffusers save a model's configuration, and our entry in it.
#: Both libraries pass over entries that begin with an underscore when they make a model.
LIBRARY_CONFIG, ENTRY = "config.json", "_t5fx"
VERSION = 2
#: Stands in the JSON for a callable `grid`, `prefix` or `suffix`.
CALLABLE = "<callable>"
#: What a description has to have, and of which type.
_FIELDS = {
    **{"content": str, "model": str, "config": dict, "sites": dict, "files": dict, "tied": dict},
    "made_with": dict,
}


@dataclass
class Description:
    """What a checkpoint holds.

    content: "model" (every tensor) or "adapter" (new parameters only); model: class of the
    original; config: fields of `LinearizeConfig`; sites: key of each node -> its settings; files:
    name -> {"bytes", "sha256"}, or {} for a file of another library; tied: name of a tensor -> the
    name that it is stored under; made_with: versions of packages.
    """

    content: str
    model: str
    config: dict[str, Any]
    sites: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"version": VERSION, **asdict(self)}

    def linearize_config(self, where: Path) -> LinearizeConfig:
        """The saved options. Raises `CheckpointError` where a callable was among them."""
        data = self.config
        overrides = data.get("overrides") or {}
        names = {n for d in (data, *overrides.values()) for n, v in d.items() if v == CALLABLE}
        if names:
            raise CheckpointError(
                f"'{where}': {', '.join(sorted(names))} of its LinearizeConfig was a callable, "
                f"which a checkpoint cannot hold: load it with "
                f"t5fx.from_pretrained(..., config=LinearizeConfig(...))"
            )
        try:
            return LinearizeConfig.from_dict(data)
        except (T5Error, TypeError, AttributeError) as error:
            raise CheckpointError(f"'{where}': {error}") from error


def described(folder: Path) -> tuple[Description, Path]:
    """What the checkpoint in a folder says of itself, and the file that says it.

    Raises `CheckpointError` where there is none, two, or one that cannot be understood.
    """
    own, library = folder / CONFIG_NAME, folder / LIBRARY_CONFIG
    entry = _entry(library)
    if not own.exists() and entry is not None:
        found = _parsed(entry, library)
        found.files = {name: {} for name in _weights(folder)}
        return found, library
    try:
        found = _parsed(json.loads(own.read_text(encoding="utf-8")), own)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"'{folder}': expected a folder that t5fx.save_pretrained wrote, with {CONFIG_NAME} "
            f"in it, or a linearized model's own save_pretrained, with '{ENTRY}' in "
            f"{LIBRARY_CONFIG}, got none of them"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{own}': expected JSON, got {error}") from error
    more = sorted({path.name for path in folder.glob("*.safetensors")} - set(found.files))
    if entry is not None and more:
        raise CheckpointError(
            f"'{folder}': expected one checkpoint, got that of {CONFIG_NAME} and that of "
            f"{LIBRARY_CONFIG} ({', '.join(more)}): delete the older one of the two"
        )
    return found, own


def _entry(path: Path) -> Any:
    """Our entry in a library's file of configuration, or None."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # this file is another library's, which says what is wrong with it
    return data.get(ENTRY) if isinstance(data, dict) else None


def _weights(folder: Path) -> list[str]:
    """The safetensors files that a library has put into a folder: those of its index, or one.

    An index whose files are gone was left by an earlier save.
    """
    found: list[list[str]] = []
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = sorted({name for name in named if Path(name).name == name})
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"'{index}': expected an index of safetensors files, got {error!r}"
            ) from error
        if any((folder / name).exists() for name in files):
            found.append(files)
    indexed = {name for files in found for name in files}
    found += [[p.name] for p in sorted(folder.glob("*.safetensors")) if p.name not in indexed]
    if len(found) != 1:
        raise CheckpointError(
            f"'{folder}': expected the weights of one model, in one safetensors file or in those "
            f"of one index, got {'; '.join(', '.join(files) for files in found) or 'none'}"
        )
    return found[0]


def _parsed(data: Any, path: Path) -> Description:
    data = dict(data) if isinstance(data, dict) else {}
    version = data.pop("version", None)
    if version != VERSION:
        raise CheckpointError(
            f"'{path}': expected a checkpoint of version {VERSION}, got {version!r}: load it with "
            f"the version of t5fx that saved it"
        )
    for name, kind in _FIELDS.items():
        if not isinstance(data.get(name), kind):
            raise CheckpointError(
                f"'{path}': expected {name!r} to be a {kind.__name__}, got {data.get(name)!r}"
            )
    unknown = sorted(set(data) - set(_FIELDS))
    if unknown or data["content"] not in ("model", "adapter"):
        wrong = f"unknown fields {unknown}" if unknown else f"content {data['content']!r}"
        raise CheckpointError(f"'{path}': expected what t5fx.save_pretrained writes, got {wrong}")
    for name in data["files"]:
        if Path(name).name != name:
            raise CheckpointError(
                f"'{path}': expected names of files in the same folder, got {name!r}"
            )
    return Description(**data)


def site_of(name: str, sites: Container[str]) -> str | None:
    """The key of the site that a tensor belongs to: the part of its name that is one."""
    parts = name.split(".")
    keys = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((key for key in keys if key in sites), None)
