"""Where the tokens of a site are, and which of them are meant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from t5fx.errors import T5Error

#: A token by its position (negative ones count from the end), or a place on the grid: for each
#: axis a fraction of its length, such as (0.5, 0.5) for the token in the middle.
Query = int | tuple[float, ...]


@dataclass(frozen=True)
class Layout:
    """The tokens of a site in their order: prefix, grid (row-major; () where it is unknown and all
    tokens count as prefix), suffix. tokens: all of them."""

    tokens: int
    prefix: int
    grid: tuple[int, ...]

    @classmethod
    def of(cls, tokens: int, grid: Sequence[int], prefix: int) -> Layout:
        """What a node was called with."""
        return cls(tokens, prefix if grid else tokens, tuple(grid))

    @property
    def cells(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.grid) if self.grid else 0

    @property
    def suffix(self) -> int:
        return self.tokens - self.prefix - self.cells

    @property
    def defaults(self) -> tuple[Query, ...]:
        """The first prefix token, such as a class token, and two places on the grid."""
        if not self.grid:
            return (0, self.tokens // 2)
        axes = len(self.grid)
        return (*((0,) if self.prefix else ()), (0.5,) * axes, (0.25,) * axes)

    def token(self, query: Query) -> int:
        """The position of the token that is meant.

        Raises `T5Error` for one that there is not.
        """
        if isinstance(query, int) and not isinstance(query, bool):
            if -self.tokens <= query < self.tokens:
                return query % self.tokens
            raise T5Error(
                f"queries: expected the position of one of {self.tokens} tokens, got {query}"
            )
        if (
            isinstance(query, tuple)
            and self.grid
            and len(query) == len(self.grid)
            and all(isinstance(f, int | float) and 0 <= f <= 1 for f in query)
        ):
            index = 0
            for fraction, size in zip(query, self.grid, strict=True):
                index = index * size + min(int(fraction * size), size - 1)
            return self.prefix + index
        raise T5Error(
            f"queries: expected positions of tokens, or places on a grid of {len(self.grid)} axes "
            f"as tuples of that many fractions from 0 to 1, got {query!r}"
        )

    def place(self, token: int) -> tuple[int, ...] | None:
        """Where a token is on the grid, an index for each axis; None for one that is not on it."""
        index = token - self.prefix
        if not 0 <= index < self.cells:
            return None
        found: list[int] = []
        for size in reversed(self.grid):
            index, last = divmod(index, size)
            found.insert(0, last)
        return tuple(found)
