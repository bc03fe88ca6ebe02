"""Which modules' calls the nodes of a graph are part of."""

from __future__ import annotations

import re

from torch import fx

#: What torch.export gives the nodes of its own.
_NO_STACK = "_empty_nn_module_stack_from_metadata_hook"


def module_stack(node: fx.Node) -> list[tuple[str, str]]:
    """(identity of the call, module name) of the calls around a node, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = []
    for key, value in stack.items():
        if key == _NO_STACK:
            continue
        path = value[0] if isinstance(value, tuple) else value
        entries.append((str(key), module_name(str(path))))
    return entries


def module_name(path: str) -> str:
    """A module's name as in `named_modules`, from the ways tracers write it."""
    path = through_attributes(path)
    path = re.sub(r"\._modules\[['\"]([^'\"]+)['\"]\]|\[['\"]?([^'\"\]]+)['\"]?\]", r".\1\2", path)
    path = path.split("@")[0]
    for root in ("L.self", "L__self__", "self"):
        if path == root or path.startswith(root + "."):
            path = path[len(root) :].lstrip(".")
    return path


def through_attributes(path: str) -> str:
    """A path of Dynamo's without `__dict__`, through which it reads what `__getattr__` looks up."""
    return re.sub(r"\.__dict__\[['\"](_modules|_parameters|_buffers)['\"]\]", r".\1", path)
