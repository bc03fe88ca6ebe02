"""The calls of modules inside one trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Recorded:
    """The calls of each module in a trace: (args, kwargs) and outputs, as the trace had them."""

    calls: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)
    outputs: dict[str, list[Any]] = field(default_factory=dict)

    def watch(self, template: nn.Module) -> list[Any]:
        handles = []
        for name, module in template.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it has no hooks, and nothing in it has code to be rewritten

            def before(_m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self.calls.setdefault(name, []).append((args, kwargs))

            def after(_m: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                self.outputs.setdefault(name, []).append(output)

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        return handles

    def clear(self) -> None:
        self.calls.clear()
        self.outputs.clear()
