"""Near attention: softmax over a window of the grid, coarse cells of it, and prefix and suffix.

For a grid token t, on the raw queries, keys and values of a head::

    a_t = softmax over j of (s q_t . k_j + b_j), times v_j

where j goes through the tokens of the window around t (b = 0; moved inwards at the borders, as in
the natten package), the cells into which the grid is cut (mean key, mean value, b = log of the
number of tokens in it), and the prefix and suffix tokens (b = 0). A prefix or suffix token sees
every key: a_t is what softmax attention gives it. All of it is linear in the tokens of the grid.

What is returned joins it with the output o of the TTT node: o_t + gate a_t, a gate a head, or the
published (o_t + a_t) / 2 without one, on the grid; a_t alone for prefix and suffix tokens.

The tokens are ordered prefix, grid (row-major), suffix. On an axis that is shorter than the window
the whole axis is seen; of an axis that is shorter than its cells some are empty.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .precision import no_autocast, widest


class Window(NamedTuple):
    """tokens: [n, K], which tokens of the grid each one sees; bias: [n, K], -inf at those beyond
    an axis that is shorter than the window, which are clamped."""

    tokens: Tensor
    bias: Tensor


def window_of(grid: Sequence[int], side: int, like: Tensor) -> Window:
    """The windows of a grid's tokens, K = side ** axes; sizes may be symbolic."""
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
    bias = like.new_zeros(()).masked_fill(beyond, -math.inf)
    return Window(tokens.reshape(count, side**axes), bias.expand(tokens.shape).reshape(count, -1))


class Cells(NamedTuple):
    """means: for each axis [cells, size], the shares of the positions in a cell's mean; bias:
    [cells ** axes], the log of the tokens in each."""

    means: list[Tensor]
    bias: Tensor


def cells_of(grid: Sequence[int], count: int, like: Tensor) -> Cells:
    """The cells into which a grid is cut, position i of an axis in the cell i * count // size."""
    means = []
    bias = like.new_zeros(1)
    for size in grid:
        cell = torch.arange(size, device=like.device) * count // size
        inside = (cell == torch.arange(count, device=like.device)[:, None]).to(like.dtype)
        tokens = inside.sum(1)
        means.append(inside / tokens.clamp(min=1)[:, None])
        bias = (bias[:, None] + tokens.log()).flatten()
    return Cells(means, bias)


def pooled(x: Tensor, means: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
    """The cells' means of grid tokens: [..., n, D] to [..., cells ** axes, D]."""
    for axis, matrix in enumerate(means):
        rest = math.prod(grid[axis + 1 :])
        done = math.prod(m.shape[0] for m in means[:axis])
        shape = (*x.shape[:-2], done, grid[axis], rest * x.shape[-1])
        x = (matrix @ x.reshape(shape)).reshape(*x.shape[:-2], -1, x.shape[-1])
    return x


def spread(x: Tensor, means: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
    """The transpose of `pooled`: [..., cells ** axes, D] to [..., n, D]."""
    return pooled(x, [m.mT for m in means], [m.shape[0] for m in means])


class Parts(NamedTuple):
    """What the grid's queries see: windows of `on_grid`, and all of `shared`, with its bias."""

    window: Window | None
    cells: Cells | None
    bias: Tensor

    @classmethod
    def of(cls, like: Tensor, grid: Sequence[int], rest: int, side: int, count: int) -> "Parts":
        window = window_of(grid, side, like) if side else None
        cells = cells_of(grid, count, like) if count else None
        bias = like.new_zeros(rest)
        return cls(window, cells, bias if cells is None else torch.cat([bias, cells.bias]))

    def shared(self, x: Tensor, grid: Sequence[int], prefix: int) -> Tensor:
        """The keys or values that every query of the grid sees: prefix, suffix, cells."""
        before, on_grid, after = cut(x, grid, prefix)
        parts = [before, after]
        if self.cells is not None:
            parts.append(pooled(on_grid, self.cells.means, grid))
        return torch.cat(parts, dim=-2)


def cut(x: Tensor, grid: Sequence[int], prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prefix, grid and suffix of [..., N, D]."""
    count = math.prod(grid)
    rest = x.shape[-2] - prefix - count
    return (
        x.narrow(-2, 0, prefix),
        x.narrow(-2, prefix, count),
        x.narrow(-2, prefix + count, rest),
    )


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
) -> Tensor:
    """Near attention joined with ``base``, the node's output, in ordinary operators.

    q, k: [B, H, N, D]; v, base: [B, H, N, Dv]; mixing: [] or [gate], [H]. Returns [B, H, N, Dv] in
    the dtype of ``base``; computed in the widest of the dtypes and float32, also under autocast.
    """
    wide = widest(q, k, v, base, *mixing)
    with no_autocast(q.device.type):
        queries, k, v = q.to(wide) * scale, k.to(wide), v.to(wide)
        before, on_grid, after = cut(queries, grid, prefix)
        rest = q.shape[2] - math.prod(grid)
        parts = Parts.of(k, grid, rest, neighborhood, coarse)
        keys, values = (parts.shared(x, grid, prefix) for x in (k, v))
        logits = on_grid @ keys.mT + parts.bias
        if parts.window is None:
            near = logits.softmax(-1) @ values
        else:
            _, key_grid, _ = cut(k, grid, prefix)
            _, value_grid, _ = cut(v, grid, prefix)
            around = key_grid[:, :, parts.window.tokens]
            own = (around @ on_grid[..., None]).squeeze(-1) + parts.window.bias
            weights = torch.cat([logits, own], dim=-1).softmax(-1)
            shared = keys.shape[-2]
            near = weights.narrow(-1, 0, shared) @ values
            own = weights.narrow(-1, shared, own.shape[-1])
            near = near + (own[..., None, :] @ value_grid[:, :, parts.window.tokens]).squeeze(-2)
        _, base, _ = cut(base.to(wide), grid, prefix)
        near = joined(base, near, mixing)
        exact = [(x @ k.mT).softmax(-1) @ v for x in (before, after)]
        return torch.cat([exact[0], near, exact[1]], dim=2).to(q.dtype)


def joined(base: Tensor, near: Tensor, mixing: Sequence[Tensor]) -> Tensor:
    """The outputs of grid tokens: with a gate a head, or half of each."""
    if not mixing:
        return 0.5 * (base + near)
    return base + mixing[0].to(near.dtype)[:, None, None] * near
