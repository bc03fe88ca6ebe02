"""Putting what was judged into the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from t5fx.analysis.policy import Plan
from t5fx.errors import CaptureError, ConfigError
from t5fx.reports import Tried
from t5fx.runtime.hooks import After, Before, Entry, Origin
from t5fx.runtime.owned import own, state_of
from t5fx.runtime.state import Kind, Runtime
from t5fx.wrappers import module_at


@dataclass
class Outcome:
    """What judging a call came to.

    nodes: of the rewritten sites by key; origins: by module, which (leaf, axis) of its output
    shows a side of the grid; constants: what the code reads beside the model's tensors; opaque:
    operators that may be attention, where none was found.
    """

    kind: Kind
    plans: list[Plan]
    nodes: dict[str, nn.Module]
    origins: dict[str, tuple[tuple[int, int], ...]]
    note: str
    tried: dict[str, Tried]
    constants: list[Any]
    opaque: list[str]


def install(runtime: Runtime, model: nn.Module, nodes: Mapping[str, nn.Module]) -> None:
    """Make the owners of nodes owners, with the nodes as their children, in place."""
    owners: dict[str, nn.Module] = {}
    for key, node in nodes.items():
        name, _, child = key.rpartition(".")
        owner = owners[name] = module_at(model, name)
        if hasattr(owner, child):
            raise ConfigError(
                f"'{key}': expected a free name for the node, got a module with an attribute of "
                f"that name; leave it out with exclude=({name!r},)"
            )
        node.train(owner.training)
        owner.add_module(child, node)
    inside = {name.rpartition(".")[0] for name in owners if name}
    around = {".".join(name.split(".")[:i]) for name in inside for i in range(name.count(".") + 2)}
    for name in sorted((around | set(owners)) - {""}):
        module_at(model, name).register_forward_pre_hook(Entry(runtime, name), with_kwargs=True)
    for name, owner in owners.items():
        if state_of(owner) is None:
            own(owner, runtime, name)
    model.register_forward_pre_hook(Before(runtime), with_kwargs=True)
    model.register_forward_hook(After(runtime), always_call=True)


def keep(runtime: Runtime, model: nn.Module, outcome: Outcome) -> None:
    """From now on calls of that kind are served."""
    for name, axes in outcome.origins.items():
        module = module_at(model, name)
        hooks = [h for h in module._forward_hooks.values() if isinstance(h, Origin)]
        mine = next((h for h in hooks if h.runtime is runtime), None)
        if mine is None:
            module.register_forward_hook(Origin(runtime, name, axes))
        elif mine.axes != axes:
            mine.axes = axes
    first = not runtime.kinds
    runtime.keep(outcome.kind)
    if first:
        runtime.report.sites = [entry.site for entry in outcome.plans]
        runtime.report.patterns = outcome.tried
        runtime.report.capture = outcome.note


def refuse_missing(model: nn.Module, wanted: set[str], outcome: Outcome) -> None:
    """Raise where a call has no attention at the place of a node."""
    missing = sorted(wanted - set(outcome.nodes))
    if missing:
        raise CaptureError(
            f"expected attention at {', '.join(map(repr, missing))} in this call of "
            f"{type(model).__name__}, found none there"
        )


def refuse_foreign(model: nn.Module, outcome: Outcome) -> None:
    """Raise where the code of a copy reads tensors of the model that it is a copy of."""
    named = {_memory(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    for value in outcome.constants:
        name = named.get(_memory(value)) if isinstance(value, torch.Tensor) else None
        if name is not None:
            raise CaptureError(
                f"expected a model whose code reads its own tensors, got a copy of "
                f"{type(model).__name__} that reads '{name}' of the original: a "
                f"forward or an attribute was replaced by something that holds the original's "
                f"modules; undo that first, or give inplace=True"
            )


def _memory(tensor: torch.Tensor) -> Any:
    """What two tensors have in common that are the same numbers in the same place."""
    if tensor.is_meta or not tensor.numel() or type(tensor) not in (torch.Tensor, nn.Parameter):
        return id(tensor)
    return (tensor.data_ptr(), tensor.shape, tensor.device)
