"""The new parameters of models that backend="t5" compiles without touching them.

They are kept beside the model, not in it: a node belongs to the module that owns its site, and
lives as long as that. Dynamo's compiled code serves any module with the same code, so a graph
cannot hold nodes either: for each site one parameter of the model, its anchor, is chosen among the
graph's inputs, and the node is looked up by it in every call, and by the owner where the anchor is
a new one.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from t5fx.analysis.variant import variant_of
from t5fx.checkpoint.files import Checkpoint
from t5fx.config import LinearizeConfig
from t5fx.errors import AdapterError
from t5fx.kernels import TTT
from t5fx.runtime.lookup import config_of, configs
from t5fx.wrappers import plain_name


class Place(NamedTuple):
    """Where a node is, seen from its anchor: how many parts of the anchor's name to leave, and
    what to append. It is the same in whatever module both are named from."""

    up: int
    down: tuple[str, ...]

    @classmethod
    def between(cls, anchor: str, key: str) -> Place:
        """From the parameter `anchor` to the node `key`."""
        here, there = anchor.split("."), key.split(".")
        pairs = zip(here, there, strict=False)
        shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        return cls(len(here) - shared, tuple(there[shared:]))

    def key(self, anchor: str) -> str | None:
        """The node's key where the anchor has this name; None for one outside of that module."""
        parts = anchor.split(".")
        if self.up > len(parts):
            return None
        return ".".join((*parts[: len(parts) - self.up], *self.down))


@dataclass
class Held:
    """A node, what its owner was like when it was last moved or cast with it, and the options
    under which its site was rewritten. owner: None where only the anchor is known."""

    node: TTT
    like: tuple[torch.dtype, torch.device]
    owner: weakref.ref[nn.Module] | None
    configs: list[LinearizeConfig] = field(default_factory=list)

    def follow(self, anchor: torch.Tensor) -> TTT:
        """The node, on the device and in the dtype of its owner."""
        like = _like(None if self.owner is None else self.owner(), anchor)
        if like != self.like:
            self.node.to(dtype=like[0], device=like[1])
            self.like = like
        return self.node


def _like(owner: nn.Module | None, anchor: torch.Tensor) -> tuple[torch.dtype, torch.device]:
    """dtype and device of an owner's first floating-point parameter, as `linearize` has it."""
    tensors = [anchor] if owner is None else [*owner.parameters(), anchor]
    first = next((t for t in tensors if t.is_floating_point()), None)
    return (torch.float32, anchor.device) if first is None else (first.dtype, first.device)


@dataclass(frozen=True)
class Identity:
    """What makes two sites one: place, settings of the node, and the adapter it was loaded from."""

    place: Place
    settings: tuple[tuple[str, Any], ...]
    source: Hashable = None

    def owned(self) -> Identity:
        """This identity with the place of the node seen from the owner instead of the anchor."""
        return replace(self, place=Place(0, self.place.down[-1:]))


#: By the module that owns the site.
_OWNED: weakref.WeakKeyDictionary[nn.Module, dict[Identity, Held]] = weakref.WeakKeyDictionary()
#: By anchor: what a compiled graph looks up.
_HELD: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_LOCK = threading.RLock()


def held(anchor: torch.Tensor, identity: Identity) -> Held | None:
    """The node of a site that was looked up by this anchor before, if there is one."""
    found = _HELD.get(anchor)
    return None if found is None else found.get(identity)


def was_rewritten(
    owner: nn.Module | None, anchor: torch.Tensor, place: Place, config: LinearizeConfig
) -> bool:
    """Whether an earlier graph, compiled with the same options, rewrote a site."""
    nodes = dict(_HELD.get(anchor, {}))
    if owner is not None:
        place = Place(0, place.down[-1:])
        nodes = _OWNED.get(owner, {})
    return any(i.place == place and config in entry.configs for i, entry in nodes.items())


def obtain(
    anchor: torch.Tensor,
    identity: Identity,
    name: str,
    adapter: Adapter | None,
    config: LinearizeConfig,
    owner: nn.Module | None,
) -> tuple[TTT, bool]:
    """The node of a site, and whether it had to be made.

    name: the site's key in the model, which chooses the fresh values, or those of `adapter`.
    """
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        entry = held(anchor, identity) if owner is None else None
        if owner is not None:
            entry = _OWNED.get(owner, {}).get(identity.owned())
        made = entry is None
        if entry is None:
            dtype, device = _like(owner, anchor)
            node = TTT(**dict(identity.settings), name=name, device=device, dtype=dtype)
            if adapter is not None:
                adapter.fill(node, name)
            reference = None if owner is None else weakref.ref(owner)
            entry = Held(node, (dtype, device), reference)
            if owner is not None:
                _OWNED.setdefault(owner, {})[identity.owned()] = entry
        _HELD.setdefault(anchor, {})[identity] = entry
        if config not in entry.configs:
            entry.configs.append(config)
        return entry.follow(anchor), made


def forget(anchor: torch.Tensor, identity: Identity, owner: nn.Module | None) -> None:
    """Drop a node that was made for a rewrite that failed."""
    with _LOCK:
        _HELD.get(anchor, {}).pop(identity, None)
        if owner is not None:
            _OWNED.get(owner, {}).pop(identity.owned(), None)


_serials: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_serial = itertools.count()


class Adapter:
    """Trained parameters by site, from the option "adapter": a file, a checkpoint or a module.

    A module may be a linearized model, what `t5fx.adapter` returned, or any other whose state_dict
    has keys such as `blocks.0.attn.t5.w1`. Values are copied.
    """

    def __init__(self, origin: str | os.PathLike[str] | nn.Module) -> None:
        self.config: LinearizeConfig | None = None
        self.source: Hashable
        if isinstance(origin, nn.Module):
            tensors = origin.state_dict()
            self.label = f"a {type(origin).__name__}"
            self.source = _serials.setdefault(origin, next(_serial))
            self.config = _config_of(origin)
        elif isinstance(origin, str | os.PathLike) and Path(origin).is_dir():
            checkpoint = Checkpoint(Path(origin))
            self.label, self.source = f"'{origin}'", checkpoint.digest
            self.config = checkpoint.config()
            tensors = dict(checkpoint.tensors(lambda name: checkpoint.site(name) is not None))
        elif isinstance(origin, str | os.PathLike):
            tensors, self.label, self.source = _file(Path(origin))
        else:
            raise AdapterError(
                f"adapter: expected the path of a safetensors file, a directory that "
                f"t5fx.save_pretrained wrote, or an nn.Module, got a {type(origin).__name__}"
            )
        self.sites: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            match = re.match(r"((?:.*\.)?t5(?:_\d+)?)\.(.+)$", plain_name(name))
            if match is not None:
                self.sites.setdefault(match[1], {})[match[2]] = tensor
        if not self.sites:
            raise AdapterError(
                f"adapter: expected keys such as 'blocks.0.attn.t5.w1', got none in {self.label}"
            )

    def fill(self, node: TTT, name: str) -> None:
        """Copy a site's values. Raises `AdapterError` where they are missing or do not fit."""
        values = self.sites.get(name)
        if values is None:
            raise AdapterError(
                f"adapter: expected parameters of the site '{name}', got those of "
                f"{', '.join(map(repr, sorted(self.sites)))} in {self.label}"
            )
        try:
            node.load_state_dict(values)
        except RuntimeError as error:
            raise AdapterError(
                f"adapter: the parameters of '{name}' in {self.label} are not those of the node "
                f"that the options describe: {error}"
            ) from error


def _file(path: Path) -> tuple[dict[str, torch.Tensor], str, Hashable]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stamp = path.stat().st_mtime_ns
        return load_file(path), f"'{path}'", (str(path.resolve()), stamp)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"adapter: expected a safetensors file, got '{path}': {error}"
        ) from error


class Parameters(nn.Module):
    """The new parameters of a model, under the keys that `linearize` gives them.

    An optimizer takes its parameters, and its state_dict is an adapter; it computes nothing.
    """

    def __init__(self, config: LinearizeConfig) -> None:
        super().__init__()
        #: The options that the nodes were made with.
        self.linearize_config = config

    def add(self, key: str, node: TTT) -> None:
        module: nn.Module = self
        *path, last = key.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.add_module(last, node)

    def nodes(self) -> dict[str, TTT]:
        """The nodes by key."""
        return {name: m for name, m in self.named_modules() if isinstance(m, TTT)}


def adapter(model: nn.Module, *, config: LinearizeConfig | None = None) -> Parameters:
    """The new parameters of a model compiled with backend="t5", or of a linearized one.

    The model itself is not touched by `torch.compile(model, backend="t5")`: its state_dict and its
    parameters do not have the new ones. Train them with an optimizer that takes these too::

        fast = torch.compile(model, backend="t5")
        fast(x)  # compiles: from now on the new parameters exist
        optimizer = torch.optim.AdamW([*model.parameters(), *t5fx.adapter(model).parameters()])

    They are moved and cast with the model, at its next call or at the next call of this function.

    Args:
        model: the model, what torch.compile made of it, or a module that it is part of (or that is
            part of it); keys are seen from there.
        config: only where the model was compiled with several: the one that is meant.

    Returns:
        An nn.Module whose parameters are the new ones themselves, not copies, with the keys
        `<owner>.t5.w1` and so on of a linearized model; its state_dict is what the option
        "adapter" takes, as a module or saved with safetensors.

    Raises:
        AdapterError: nothing was rewritten in this model yet, or several nodes have one key.
    """
    result: Parameters | None = None
    origins: dict[str, str] = {}
    for key, node, label, found in _found(model):
        if config is not None and not matches(node, config.at(key.rpartition(".")[0])):
            continue
        if result is None:
            result = Parameters(found[0] if config is None else config)
        if origins.setdefault(key, label) != label or result.nodes().get(key, node) is not node:
            raise AdapterError(
                f"'{key}' is the key of several nodes, as the model was compiled with several "
                f"options; say which with config=LinearizeConfig(...), or, where they differ by "
                f"their adapter, make a copy of the model for each"
            )
        result.add(key, node)
    if result is None:
        raise AdapterError(
            f"{type(model).__name__} has no new parameters (yet): expected a model that was "
            f'compiled with backend="t5" and called once, or a linearized one'
        )
    return result


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has TTT nodes, in it or beside it."""
    return next(_found(model), None) is not None


def _found(model: nn.Module) -> Iterator[tuple[str, TTT, str, list[LinearizeConfig]]]:
    with _LOCK:
        own: list[LinearizeConfig] = [LinearizeConfig()]
        for name, module in model.named_modules():
            found = config_of(module)
            if found is not None:
                own = [found]
            if isinstance(module, TTT):
                yield _clean(name), module, "own", own
            for identity, entry in _OWNED.get(module, {}).items():
                first = next(module.parameters(), None)
                node = entry.node if first is None else entry.follow(first)
                key = _clean(".".join((name, *identity.place.down)))
                yield key, node, repr(identity), entry.configs
        for name, parameter in model.named_parameters():
            for identity, entry in _HELD.get(parameter, {}).items():
                key = identity.place.key(_clean(name))
                if key is not None and entry.owner is None:
                    yield key, entry.follow(parameter), repr(identity), entry.configs


def _config_of(module: nn.Module) -> LinearizeConfig | None:
    if isinstance(module, Parameters):
        return module.linearize_config
    return next(configs(module), None)


def _clean(name: str) -> str:
    return plain_name(name).strip(".")


def matches(node: TTT, config: LinearizeConfig) -> bool:
    """Whether a node is what these options describe."""
    names = ["seed"]
    if config.impl != "auto":  # of which a measurement may have made something else
        names.append("impl")
    same = all(getattr(node, name) == getattr(config, name) for name in names)
    return same and node.variant in [variant_of(config, axes=axes) for axes in range(4)]
