"""Sizes that are integers or expressions, and what is provable about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    import sympy

#: A size of a tensor: a number, or the expression of one that is symbolic.
Size: TypeAlias = "int | sympy.Expr"


def expr(size: Size | torch.SymInt) -> Size:
    """An integer, or the sympy expression of a symbolic size."""
    if isinstance(size, int):
        return size
    if isinstance(size, torch.SymInt):
        value = _rounded(size.node.expr)
        return int(value) if value.is_Integer else value
    return size


def _rounded(value: sympy.Expr) -> sympy.Expr:
    """n where an expression has ceil(float(n) - 0.5): as many numbers as arange(0.5, n) has."""
    from torch.utils._sympy.functions import CeilToInt, FloatTrueDiv, ToFloat

    if not value.has(ToFloat):
        return value

    def rounded(ratio: sympy.Expr) -> sympy.Expr:
        exact = ratio.replace(
            FloatTrueDiv, lambda a, b: a if b.is_number and float(b) == 1 else FloatTrueDiv(a, b)
        )
        constant, rest = exact.replace(ToFloat, lambda n: n).as_coeff_Add()
        return rest + math.ceil(constant) if rest.is_integer else CeilToInt(ratio)

    return value.replace(CeilToInt, rounded)


#: Stands for a size that depends on data, which an example does not tell.
_UNKNOWN = 4099


def hint(size: int | torch.SymInt) -> int:
    """The size in the captured example, some number where it depends on data. Adds no guard."""
    if isinstance(size, int):
        return size
    value = size.node.hint
    if value is not None:
        return int(value)
    environment, expression = size.node.shape_env, size.node.expr
    known = environment.backed_var_to_val
    values = {symbol: int(known.get(symbol, _UNKNOWN)) for symbol in expression.free_symbols}
    return int(expression.xreplace(values))


def same(a: Size | None, b: Size | None) -> bool:
    """Whether two sizes are provably equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if a is b or a == b:
        return True
    if isinstance(a, int | float) or isinstance(b, int | float) or a is None or b is None:
        return False  # an expression that is not a number cannot be proved equal to one
    import sympy

    return bool(sympy.expand(a - b) == 0)


def guard_equal(sizes: Sequence[int | torch.SymInt]) -> None:
    """Guard that sizes are equal, if they are in the captured example.

    Where they are computed alike, 8 * (a // 2) and 8 * (b // 2), it is a and b that are equal.
    """
    hints = [size if isinstance(size, int) else size.node.hint for size in sizes]
    if None in hints or len(set(hints)) != 1:
        return
    for size in sizes[1:]:
        if isinstance(size, torch.SymInt) and isinstance(sizes[0], torch.SymInt):
            _guard_symbols(size, sizes[0])
        if not size == sizes[0]:
            raise AssertionError(f"expected the size {sizes[0]} of the example, got {size}")


def _guard_symbols(size: torch.SymInt, other: torch.SymInt) -> None:
    """Guard that the symbols of two sizes are equal in pairs, in the order that they came in."""
    import sympy

    env, wanted, given = size.node.shape_env, size.node.expr, other.node.expr
    known = list(env.backed_var_to_val)
    there = sorted(given.free_symbols - wanted.free_symbols, key=known.index)
    for here in permutations(sorted(wanted.free_symbols - given.free_symbols, key=known.index)):
        pairs = list(zip(here, there, strict=False))
        equal = all(env.backed_var_to_val[a] == env.backed_var_to_val[b] for a, b in pairs)
        if equal and wanted.xreplace(dict(pairs)) == given:
            for pair in pairs:
                env.evaluate_expr(sympy.Eq(*pair))
            return


def exactly(whole: Size, parts: Size) -> bool:
    """Whether a size equals a product of others provided that the divisions in that are exact.

    Either those that round up or those that round down are taken to be, never both at once, so that
    any remainder would show in the product.
    """
    if isinstance(parts, int):
        return False
    import sympy
    from torch.utils._sympy.functions import CeilToInt, FloorDiv, IntTrueDiv

    rounded = next((kind for kind in (CeilToInt, FloorDiv) if parts.has(kind)), None)
    if rounded is None:
        return False

    def divided(size: Size) -> sympy.Expr:
        if isinstance(size, int):
            return sympy.Integer(size)
        if rounded is FloorDiv:
            return size.replace(FloorDiv, lambda base, divisor: base / divisor)
        inner = size.replace(CeilToInt, lambda ratio: ratio)
        return inner.replace(IntTrueDiv, lambda base, divisor: base / divisor)

    return bool(sympy.expand(divided(whole) - divided(parts)) == 0)


def quotient(total: Size, others: list[Size]) -> Size | None:
    """A size of which, times others, a total is the product, or None."""
    import sympy

    left = sympy.cancel(sympy.sympify(total) / sympy.prod(map(sympy.sympify, others)))
    if left.is_Integer:
        return int(left)
    return left if sympy.fraction(left)[1] == 1 else None


def plus(a: Any, b: Any) -> int | None:
    """The sum of two arguments that are numbers; None where one is a node."""
    return a + b if isinstance(a, int) and isinstance(b, int) else None
