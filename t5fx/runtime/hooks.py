"""The hooks through which a linearized model learns of its calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from t5fx.rewrite.forms import size_of
from t5fx.runtime.state import Runtime


@dataclass
class Before:
    """A forward pre-hook of the model: which kind of call is this?"""

    runtime: Runtime

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        runtime = self.runtime
        if runtime.original:
            return
        found = runtime.kind_of(args, kwargs, module.training)
        if found is None:
            runtime.end()
            _judge(runtime, module, args, kwargs)
            found = runtime.kind_of(args, kwargs, module.training)
            assert found is not None
        runtime.check(found[0], args, kwargs)
        runtime.begin(*found)
        if not torch.compiler.is_compiling():
            runtime.local.call = (module, args, kwargs)


@torch.compiler.disable(
    reason="no call of this linearized model like this one was judged yet: call the model once "
    "without torch.compile, in this train/eval mode and with arguments like these, then compile it"
)
def _judge(runtime: Runtime, module: nn.Module, args: Any, kwargs: Any) -> None:
    runtime.judge(runtime, module, args, kwargs)


@dataclass
class After:
    """A forward hook of the model, also after errors: the call is over."""

    runtime: Runtime

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.runtime.end()


@dataclass
class Origin:
    """A forward hook of a module whose output shows sides of the grid."""

    runtime: Runtime
    name: str
    axes: tuple[tuple[int, int], ...] = ()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        leaves = [output] if isinstance(output, torch.Tensor) else pytree.tree_leaves(output)
        if all(leaf < len(leaves) and axis < leaves[leaf].dim() for leaf, axis in self.axes):
            sizes = [size_of(leaves[leaf], axis) for leaf, axis in self.axes]
            self.runtime.record(self.name, sizes)


@dataclass
class Entry:
    """A forward pre-hook of a module that contains owners, or is one."""

    runtime: Runtime
    name: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            self.runtime.enter(self.name, args, kwargs)
