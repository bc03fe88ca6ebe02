"""Calls of a model: one form for every way of writing one, and which tensors a capture serves."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from t5fx.graph.sizes import Size, expr


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


#: Of one argument leaf: dtype, device and sizes of a tensor, or the symbol that an integer is.
#: A size is a number or the name of a symbol.
Wanted = tuple[torch.dtype, torch.device, tuple[int | str, ...]] | str | None


@dataclass
class Guards:
    """For which arguments a capture is valid: dtypes, ranks, sizes, and relations between sizes.

    leaves: for each argument leaf what it has to be; None where nothing is asked of it. check:
    takes the symbols' values, says whether every relation holds. pinned: a relation leaves a
    symbol only one value.
    """

    leaves: list[Wanted]
    symbols: tuple[str, ...] = ()
    source: str = "True"
    pinned: bool = False
    check: Callable[..., bool] = field(init=False, repr=False)
    _formulas: dict[str, Callable[..., Any]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.check = formula(self.symbols, self.source)

    def accept(self, leaves: list[Any], *, typed: bool = True) -> dict[str, Any] | None:
        """The symbols' values where the capture serves a call, else None.

        typed: dtypes and devices have to be those of the capture; else only whether they are
        floating-point.
        """
        values: dict[str, Any] = {}
        derived: list[tuple[str, Any]] = []
        for leaf, wanted in zip(leaves, self.leaves, strict=True):
            if wanted is None:
                continue
            if isinstance(wanted, str):
                if not isinstance(leaf, int | torch.SymInt) or isinstance(leaf, bool):
                    return None
                pairs: Any = ((leaf, wanted),)
            else:
                dtype, device, sizes = wanted
                if not isinstance(leaf, torch.Tensor) or leaf.dim() != len(sizes):
                    return None
                if typed and (leaf.dtype != dtype or leaf.device != device):
                    return None
                if leaf.dtype.is_floating_point != dtype.is_floating_point:
                    return None
                pairs = zip(leaf.shape, sizes, strict=True)
            for size, want in pairs:
                if isinstance(want, str) and want in self.symbols:
                    if want not in values:
                        values[want] = size
                    elif size != values[want]:
                        return None
                elif isinstance(want, str):
                    derived.append((want, size))
                elif size != want:
                    return None
        known = [values[name] for name in self.symbols]
        if not all(self._formula(source)(*known) == size for source, size in derived):
            return None
        return values if self.check(*known) else None

    def _formula(self, source: str) -> Callable[..., Any]:
        if source not in self._formulas:
            self._formulas[source] = formula(self.symbols, source)
        return self._formulas[source]


def formula(symbols: tuple[str, ...], source: str) -> Callable[..., Any]:
    """A function of the symbols' values, from the Python that sympy's printer writes."""
    helpers: dict[str, Any] = {"Min": min, "Max": max, "Mod": lambda a, b: a % b}
    names = {"math": math, "torch": torch}
    function: Callable[..., Any] = eval(
        f"lambda {', '.join(symbols)}: {source}", {**helpers, **names}
    )
    return function


def printed(expression: Size) -> str:
    """Python for a sympy expression of sizes."""
    from torch.utils._sympy.printers import PythonPrinter

    return str(PythonPrinter().doprint(expression))


def guards_of(placeholders: list[fx.Node]) -> Guards:
    """Read dtypes, sizes and the relations between sizes off the placeholders' fake values."""
    wanted: list[Wanted] = []
    symbols: dict[str, Size] = {}
    environment = None
    for node in placeholders:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            shown: list[int | str] = []
            sizes: list[int | torch.SymInt] = list(value.shape)
            for size in sizes:
                symbol = expr(size)
                shown.append(symbol if isinstance(symbol, int) else printed(symbol))
            wanted.append((value.dtype, value.device, tuple(shown)))
        elif isinstance(value, torch.SymInt):
            sizes = [value]
            symbol = expr(value)
            wanted.append(None if isinstance(symbol, int) else printed(symbol))
        else:
            wanted.append(None)
            continue
        for size in sizes:
            symbol = expr(size)
            if isinstance(size, torch.SymInt) and not isinstance(symbol, int):
                environment = size.node.shape_env
                if symbol.is_Symbol:
                    symbols.setdefault(str(symbol), symbol)
    relations: list[str] = []
    pinned = False
    if environment is not None:
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
                relations.append(printed(relation))
                pinned |= (
                    relation.is_Equality and relation.rhs.is_Integer and relation.lhs.is_Symbol
                )
    source = " and ".join(f"({r})" for r in dict.fromkeys(relations)) or "True"
    return Guards(wanted, tuple(symbols), source, pinned)
