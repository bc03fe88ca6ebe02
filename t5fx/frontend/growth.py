"""Sizes that grow into formulas too long for a trace with symbols."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.overrides import TorchFunctionMode

from t5fx.errors import T5Error

#: So many operations a formula may have. That of a ViT's tokens has 7. DaViT pads its grid to
#: whole windows in each block; its first block reaches 180, and one reshape there takes 25 s.
MOST = 60


class SizesGrewError(T5Error):
    """A size of a trace has a formula of more than `MOST` operations."""


class Growth(TorchFunctionMode):
    """Around a trace: raises `SizesGrewError` at the operator whose result has such a size."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[Any] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        leaves = [result] if isinstance(result, torch.Tensor) else pytree.tree_leaves(result)
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                for size in leaf.shape:
                    if isinstance(size, torch.SymInt):
                        self._check(size.node._expr)
        return result

    def _check(self, formula: Any) -> None:
        if formula in self._known:
            return
        self._known.add(formula)
        count = int(formula.count_ops())
        if count > MOST:
            raise SizesGrewError(f"a size became a formula of {count} operations")
