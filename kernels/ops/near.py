"""Near attention: softmax over a window of the grid, coarse cells of it, and prefix and suffix.

For a grid token t, on the raw queries, keys and values of a head, one softmax over

- the tokens j of the window W around t, moved inwards at the borders, as in the natten package:
  logit s q_t . k_j, value v_j;
- the prefix and suffix tokens: the same;
- the cells c into which the grid is cut, as far as they are outside of the window: with R the
  tokens of c that are not in W, logit s q_t . mean of k in R + log |R|, value the mean of v in R.

So every token of the grid is seen once, near ones by themselves and far ones by a mean. A prefix or
suffix token sees every key: what it gets is softmax attention. All of it is linear in the tokens of
the grid.

What is returned joins it with the output o of the TTT node: o_t + gate a_t, a gate a head, or the
published (o_t + a_t) / 2 without one, on the grid; a_t alone for prefix and suffix tokens.

The tokens are ordered prefix, grid (row-major), suffix. On an axis that is shorter than the window
the whole axis is seen; of an axis that is shorter than its cells some are empty. With a key mask
all that is seen is tokens that count; a query that sees none of them gets 0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .precision import no_autocast, widest


class Window(NamedTuple):
    """tokens: [n, K], which tokens of the grid each one sees; beyond: [n, K] or [B, 1, n, K],
    whether that is none, past the end of an axis that is shorter than the window, or one that does
    not count."""

    tokens: Tensor
    beyond: Tensor


class Cells(NamedTuple):
    """inside: for each axis [cells, size], 1 where a position is in a cell; of: [n], the cell of
    each token of the grid; sizes: [cells ** axes] or [B, 1, 1, cells ** axes], the tokens in each
    that count."""

    inside: list[Tensor]
    of: Tensor
    sizes: Tensor


class Near(NamedTuple):
    """What the queries of a grid see beside prefix and suffix; None of what there is none.

    left: [n, cells ** axes] or [B, 1, n, cells ** axes], the tokens of each cell that a query's
    window leaves to it. seen: [B, 1, N, 1], the tokens that count; None for all.
    """

    grid: Sequence[int]
    prefix: int
    window: Window | None
    cells: Cells | None
    left: Tensor | None
    seen: Tensor | None = None

    @classmethod
    def of(
        cls,
        like: Tensor,
        grid: Sequence[int],
        prefix: int,
        side: int,
        cells: int,
        key_mask: Tensor | None = None,
    ) -> "Near":
        """On the device and in the dtype of ``like``; sizes may be symbolic."""
        window = _window(grid, side, like) if side else None
        seen = count = None
        if key_mask is not None:
            seen = key_mask[:, None, :, None]
            count = seen.narrow(2, prefix, math.prod(grid))
            if window is not None:
                masked = ~count.squeeze(-1)[:, :, window.tokens]
                window = window._replace(beyond=window.beyond | masked)
        if not cells:
            return cls(grid, prefix, window, None, None, seen)
        cut = _cells(grid, cells, like)
        if count is not None:
            cut = cut._replace(sizes=pooled(count.to(like.dtype), cut.inside, grid).mT)
        left = cut.sizes.expand(*cut.sizes.shape[:-2], math.prod(grid), -1)
        if window is not None:
            own = cut.of[window.tokens]
            less = window.beyond.to(like.dtype) - 1
            left = left.scatter_add(-1, own.expand(less.shape[:-2] + own.shape), less)
        return cls(grid, prefix, window, cut, left, seen)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prefix, grid and suffix of [..., N, D]."""
        count = math.prod(self.grid)
        rest = x.shape[-2] - self.prefix - count
        return (
            x.narrow(-2, 0, self.prefix),
            x.narrow(-2, self.prefix, count),
            x.narrow(-2, self.prefix + count, rest),
        )

    def shared(self, x: Tensor) -> Tensor:
        """Of keys or values what every query of the grid sees: prefix, suffix, sums of cells."""
        before, on_grid, after = self.split(x)
        if self.cells is None:
            return torch.cat([before, after], dim=-2)
        return torch.cat([before, after, pooled(on_grid, self.cells.inside, self.grid)], dim=-2)

    def shown(self, x: Tensor) -> Tensor:
        """Keys or values [B, H, N, D], 0 where they do not count."""
        return x if self.seen is None else torch.where(self.seen, x, 0)

    def softmax(self, logits: Tensor) -> Tensor:
        """Over the last axis; 0 where all of it is masked."""
        if self.seen is None:
            return logits.softmax(-1)
        none = (logits == -math.inf).all(-1, keepdim=True)
        return logits.masked_fill(none, 0).softmax(-1).masked_fill(none, 0)

    def masked_ends(self, logits: Tensor) -> Tensor:
        """Of prefix and suffix keys, [..., n, M], with -inf for those that do not count."""
        if self.seen is None:
            return logits
        before, _, after = self.split(self.seen)
        return logits.masked_fill(~torch.cat([before, after], dim=2).mT, -math.inf)

    def exact(self, x: Tensor, keys: Tensor) -> Tensor:
        """The weights of all tokens for scaled queries of the prefix or suffix."""
        logits = x @ keys.mT
        if self.seen is not None:
            logits = logits.masked_fill(~self.seen.mT, -math.inf)
        return self.softmax(logits)

    def per_cell(self, own: Tensor) -> Tensor:
        """Sums over the window's tokens in each cell: [..., n, K] to [..., n, cells ** axes]."""
        assert self.window is not None and self.cells is not None
        index = self.cells.of[self.window.tokens].expand(own.shape)
        own = own.masked_fill(self.window.beyond, 0)
        sums = own.new_zeros(*own.shape[:-1], self.cells.sizes.shape[-1])
        return sums.scatter_add(own.dim() - 1, index, own)

    def at_window(self, cells: Tensor) -> Tensor:
        """Of each token of the window the value of its cell: [..., n, cells ** axes] to [.., K]."""
        assert self.window is not None and self.cells is not None
        index = self.cells.of[self.window.tokens]
        return cells.gather(cells.dim() - 1, index.expand(*cells.shape[:-1], -1))


def _window(grid: Sequence[int], side: int, like: Tensor) -> Window:
    axes = len(grid)
    tokens = torch.zeros((), dtype=torch.int64, device=like.device)
    beyond = torch.zeros((), dtype=torch.bool, device=like.device)
    for axis, size in enumerate(grid):
        first = torch.arange(size, device=like.device) - side // 2
        first = first.clamp(max=size - side).clamp(min=0)
        places = first[:, None] + torch.arange(side, device=like.device)
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = size, side
        beyond = beyond | (places >= size).view(shape)
        tokens = tokens * size + places.clamp(max=size - 1).view(shape)
    count = math.prod(grid)
    return Window(tokens.reshape(count, -1), beyond.reshape(count, -1))


def _cells(grid: Sequence[int], count: int, like: Tensor) -> Cells:
    """Position i of an axis is in the cell i * count // size."""
    inside = []
    tokens, of = like.new_ones(1), torch.zeros(1, dtype=torch.int64, device=like.device)
    for size in grid:
        cell = torch.arange(size, device=like.device) * count // size
        matrix = (cell == torch.arange(count, device=like.device)[:, None]).to(like.dtype)
        inside.append(matrix)
        tokens = (tokens[:, None] * matrix.sum(1)).flatten()
        of = (of[:, None] * count + cell).flatten()
    return Cells(inside, of, tokens)


def pooled(x: Tensor, inside: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
    """The sums of grid tokens in cells: [..., n, D] to [..., cells ** axes, D]."""
    done = 1
    for axis, matrix in enumerate(inside):
        rest = math.prod(grid[axis + 1 :]) * x.shape[-1]
        image = x.reshape(*x.shape[:-2], done, grid[axis], rest)
        x = (matrix @ image).reshape(*x.shape[:-2], -1, x.shape[-1])
        done *= matrix.shape[0]
    return x


def spread(x: Tensor, inside: Sequence[Tensor]) -> Tensor:
    """To each grid token what its cell has: [..., cells ** axes, D] to [..., n, D]."""
    return pooled(x, [m.mT for m in inside], [m.shape[0] for m in inside])


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor,
    mixing: Sequence[Tensor],
    *,
    scale: float,
    grid: Sequence[int],
    prefix: int,
    neighborhood: int,
    coarse: int,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Near attention joined with ``base``, the node's output, in ordinary operators.

    q, k: [B, H, N, D]; v, base: [B, H, N, Dv]; mixing: [] or [gate], [H]; key_mask: [B, N], which
    tokens count. Returns [B, H, N, Dv] in q's dtype; computed in the widest of the dtypes and
    float32, also under autocast.
    """
    wide = widest(q, k, v, base, *mixing)
    with no_autocast(q.device.type):
        near = Near.of(q.to(wide), grid, prefix, neighborhood, coarse, key_mask)
        queries, k, v = q.to(wide) * scale, near.shown(k.to(wide)), near.shown(v.to(wide))
        before, x, after = near.split(queries)
        shared = near.shared(v)
        weights, own = weigh(near, x, near.shared(k), near.split(k)[1])
        found = weights @ shared
        if near.window is not None:
            around = near.split(v)[1][:, :, near.window.tokens]
            found = found + (own[..., None, :] @ around).squeeze(-2)
        found = joined(near.split(base.to(wide))[1], found, mixing)
        first, last = (near.exact(t, k) @ v for t in (before, after))
        return torch.cat([first, found, last], dim=2).to(q.dtype)


def weigh(near: Near, x: Tensor, shared: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of what is shared, [B, H, n, M], a cell's that of its sums; and of the window.

    x: the scaled queries of the grid; shared: `Near.shared` of the keys; keys: of the grid. A
    token of the window is in the sums of its cell too, which its own weight takes out again.
    """
    plain = x @ shared.mT
    own = plain.narrow(-1, 0, 0)
    if near.window is not None:
        own = (keys[:, :, near.window.tokens] @ x[..., None]).squeeze(-1)
    cells = 0 if near.left is None else near.left.shape[-1]
    rest = plain.shape[-1] - cells
    logits = [near.masked_ends(plain.narrow(-1, 0, rest))]
    if near.left is not None:
        sums = plain.narrow(-1, rest, cells)
        if near.window is not None:
            sums = sums - near.per_cell(own)
        seen = near.left > 0
        means = sums / near.left.clamp(min=1) + near.left.clamp(min=1).log()
        logits.append(means.masked_fill(~seen, -math.inf))
    if near.window is not None:
        logits.append(own.masked_fill(near.window.beyond, -math.inf))
    weights = near.softmax(torch.cat(logits, dim=-1))
    own = weights.narrow(-1, rest + cells, own.shape[-1])
    if near.left is None:
        return weights.narrow(-1, 0, rest), own
    of_cells = weights.narrow(-1, rest, cells) / near.left.clamp(min=1)
    if near.window is not None:
        own = own - near.at_window(of_cells).masked_fill(near.window.beyond, 0)
    return torch.cat([weights.narrow(-1, 0, rest), of_cells], dim=-1), own


def joined(base: Tensor, near: Tensor, mixing: Sequence[Tensor]) -> Tensor:
    """The outputs of grid tokens: with a gate a head, or half of each."""
    if not mixing:
        return 0.5 * (base + near)
    return base + mixing[0].to(near.dtype)[:, None, None] * near
