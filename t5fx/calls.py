"""Calls of a model: one form for every way of writing one, and which tensors a capture serves."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from t5fx.canon import expr


class Signature:
    """Brings every way of writing a call of `forward` to one: arguments by name."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.signature = inspect.signature(forward)
        kinds = {p.kind for p in self.signature.parameters.values()}
        self.positional = bool(
            kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}
        )
        self.defaults = {n: p.default for n, p in self.signature.parameters.items()}
        self.rest = next(
            (n for n, p in self.signature.parameters.items() if p.kind == p.VAR_KEYWORD), None
        )

    def bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) in canonical form; arguments equal to their defaults are left out.

        Raises TypeError like the original for arguments that do not fit.
        """
        bound = self.signature.bind(*args, **kwargs)
        if self.positional:
            return bound.args, bound.kwargs
        named = dict(bound.arguments)
        if self.rest in named:
            named.update(named.pop(self.rest))
        return (), {n: v for n, v in named.items() if not self._is_default(n, v)}

    def _is_default(self, name: str, value: Any) -> bool:
        default = self.defaults.get(name, inspect.Parameter.empty)
        plain = value is None or isinstance(value, bool | int | float | str)
        return plain and type(value) is type(default) and bool(value == default)


@dataclass
class Guards:
    """For which tensors a capture is valid: dtypes, ranks, sizes, and relations between sizes.

    leaves: for each argument leaf None, or (dtype, device, sizes); a size is a number or the name
    of a symbol. check: takes the symbols' values, says whether every relation holds. pinned: a
    relation leaves a symbol only one value.
    """

    leaves: list[tuple[torch.dtype, torch.device, tuple[int | str, ...]] | None]
    symbols: tuple[str, ...] = ()
    source: str = "True"
    pinned: bool = False
    check: Callable[..., bool] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = ", ".join(self.symbols)
        helpers: dict[str, Any] = {"Min": min, "Max": max, "Mod": lambda a, b: a % b}
        self.check = eval(f"lambda {names}: {self.source}", {**helpers, **_math()})

    def accept(self, leaves: list[Any]) -> bool:
        values: dict[str, Any] = {}
        for leaf, wanted in zip(leaves, self.leaves, strict=True):
            if wanted is None:
                continue
            dtype, device, sizes = wanted
            if leaf.dtype != dtype or leaf.dim() != len(sizes) or leaf.device != device:
                return False
            for size, want in zip(leaf.shape, sizes, strict=True):
                if isinstance(want, str):
                    if values.setdefault(want, size) != size:
                        return False
                elif size != want:
                    return False
        return bool(self.check(**values))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "check"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()


def guards_of(users: list[fx.Node], leaves: list[Any]) -> Guards:
    """Read dtypes, sizes and the relations between sizes off the placeholders' fake tensors."""
    from torch.utils._sympy.printers import PythonPrinter

    wanted: list[tuple[torch.dtype, torch.device, tuple[int | str, ...]] | None] = []
    symbols: dict[str, Any] = {}
    environment = None
    for node, leaf in zip(users, leaves, strict=True):
        value = node.meta.get("val")
        if not isinstance(leaf, torch.Tensor) or not isinstance(value, torch.Tensor):
            wanted.append(None)
            continue
        sizes = tuple(n if isinstance(n, int) else str(n) for n in map(expr, value.shape))
        for size, symbol in zip(value.shape, map(expr, value.shape), strict=True):
            if isinstance(size, torch.SymInt) and not isinstance(symbol, int):
                symbols.setdefault(str(symbol), symbol)
                environment = size.node.shape_env
        wanted.append((leaf.dtype, leaf.device, sizes))
    relations: list[str] = []
    pinned = False
    if environment is not None:
        printer = PythonPrinter()
        for name, symbol in symbols.items():
            bounds = environment.var_to_range.get(symbol)
            if bounds is not None and bounds.lower.is_Integer and bounds.lower > 0:
                relations.append(f"{name} >= {int(bounds.lower)}")
            if bounds is not None and bounds.upper.is_Integer:
                relations.append(f"{name} <= {int(bounds.upper)}")
        for guard in environment.guards:
            relation = environment.replace(guard.expr)
            free = {str(s) for s in relation.free_symbols}
            if free and free <= set(symbols):
                relations.append(printer.doprint(relation))
                pinned |= (
                    relation.is_Equality and relation.rhs.is_Integer and relation.lhs.is_Symbol
                )
    source = " and ".join(f"({r})" for r in dict.fromkeys(relations)) or "True"
    return Guards(wanted, tuple(symbols), source, pinned)


def _math() -> dict[str, Any]:
    return {"math": math, "torch": torch}
