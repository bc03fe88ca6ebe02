"""The launches of near attention, forward and backward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..choice import cells_obstacle
from ..errors import NodeArgumentError
from .launch import (
    check_dtype,
    check_inputs,
    is_scaled,
    is_wide,
    launch,
    on_its_device,
    padded,
    precision,
    strides,
)
from .near_key_gradient import near_key_gradient, near_shared_gradient
from .near_places import near_means
from .near_query import near_exact, near_queries
from .near_query_gradient import near_exact_gradient, near_query_gradient
from .share import ceil_div

#: Queries of the grid whose gradients of what they share one program sums up.
CHUNK = 1024


class Block(NamedTuple):
    """Rows of a program, columns of a turn of its loops, and warps."""

    rows: int
    columns: int
    warps: int


#: By the width that a head is padded to, for products of 16 bits: guesses that compile with little
#: spilling. None of them has been measured.
BLOCKS = {
    16: Block(64, 64, 4),
    32: Block(64, 64, 4),
    64: Block(32, 64, 4),
    128: Block(32, 32, 8),
    256: Block(16, 32, 4),
}
#: The same of float32, whose multiply-adds are all unrolled.
WIDE_BLOCKS = {
    16: Block(32, 32, 4),
    32: Block(32, 32, 4),
    64: Block(16, 32, 4),
    128: Block(16, 16, 4),
    256: Block(16, 16, 8),
}
#: Cells from which on a program has as few rows as a product can have: it has all cells of each.
MANY_CELLS = 64


@dataclass(frozen=True)
class NearSite:
    """Sizes of one call; those of tokens, grid and batch may be symbolic."""

    batch: int
    heads: int
    tokens: int
    dim: int
    value_dim: int
    prefix: int
    grid: tuple[int, ...]  # of three axes, missing ones first, of size 1
    axes: int
    side: int
    coarse: int
    gated: bool
    wide: bool  # products of float32
    scaled: bool  # the gradient is scaled: products of float16

    @property
    def groups(self) -> int:
        """Pairs of batch item and head."""
        return self.batch * self.heads

    @property
    def grid_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def off_grid(self) -> int:
        """Prefix and suffix tokens."""
        return self.tokens - self.grid_tokens

    @property
    def cells(self) -> int:
        return cell_count(self.axes, self.coarse)

    @property
    def block(self) -> Block:
        rows = WIDE_BLOCKS if self.wide else BLOCKS
        found = rows[padded(max(self.dim, self.value_dim))]
        return found._replace(rows=16) if self.cells >= MANY_CELLS else found

    def programs(self, rows: int) -> int:
        """The number of programs for ``rows``, a block each; one program if there are no rows."""
        return self.groups * torch.sym_max(1, ceil_div(rows, self.block.rows))

    def places(self) -> tuple[int, ...]:
        """What kernels are told of the tokens that need to know the grid."""
        return self.heads, self.tokens, self.prefix, *self.grid

    def shape(self, unit: int) -> dict[str, Any]:
        """The compile-time arguments that all kernels have but the first."""
        return {
            **self.widths(unit),
            "WIDE": self.wide,
            "PRECISION": precision(),
            "BLOCK_M": self.block.rows,
            "BLOCK_S": self.block.columns,
        }

    def widths(self, unit: int) -> dict[str, Any]:
        """The compile-time arguments for the width of a head and for Triton's compiler."""
        return {
            "D": self.dim,
            "DV": self.value_dim,
            "UNIT": unit,
            "BLOCK_D": padded(self.dim),
            "BLOCK_V": padded(self.value_dim),
            "num_warps": self.block.warps,
            "num_stages": 1,
        }

    def on_grid(self) -> dict[str, Any]:
        """The compile-time arguments of kernels that compute tokens of the grid."""
        cells = {"COARSE": self.coarse, "CELLS": self.cells}
        return {"NDIM": self.axes, "SIDE": self.side, "GATED": self.gated, **cells}

    def by_query(self) -> dict[str, Any]:
        """The compile-time arguments of kernels in which a row is a query of the grid."""
        return {**self.on_grid(), "BLOCK_C": padded(max(self.cells, 1))}


def cell_count(axes: int, coarse: int) -> int:
    """Cells of a grid."""
    return coarse**axes if coarse else 0


def near_site(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Sequence[Tensor],
    *,
    grid: Sequence[int],
    prefix: int,
    neighborhood: int,
    coarse: int,
) -> NearSite:
    """The sizes of a call.

    Raises:
        NodeArgumentError: a device, a dtype, a width of heads or a number of cells that the kernels
            do not know.
    """
    check_inputs(q, k, v)
    for gate in mixing:
        check_dtype("gate", gate)
    batch, heads, tokens, dim = q.shape
    axes = len(grid)
    obstacle = cells_obstacle(axes, coarse, padded(max(dim, v.shape[3])))
    if obstacle is not None:
        raise NodeArgumentError(
            f"coarse: expected a number of cells that the kernels take; got {obstacle}; use "
            'impl="reference"'
        )
    return NearSite(
        batch=batch,
        heads=int(heads),
        tokens=tokens,
        dim=int(dim),
        value_dim=int(v.shape[3]),
        prefix=prefix,
        grid=(1,) * (3 - axes) + tuple(grid),
        axes=axes,
        side=int(neighborhood),
        coarse=int(coarse),
        gated=bool(mixing),
        wide=is_wide(q, k, v),
        scaled=is_scaled(q, k, v),
    )


class NearSaved(NamedTuple):
    """What the backward wants to have saved, float32."""

    lse: Tensor  # the logarithms of the sums of exponentials, [B, H, N]
    mean_k: Tensor  # of the keys in each cell, [B, H, cells, D]
    mean_v: Tensor  # of the values, [B, H, cells, Dv]


def empty_saved(q: Tensor, v: Tensor, axes: int, coarse: int) -> NearSaved:
    """Room for it."""
    batch, heads, tokens, dim = q.shape
    cells = cell_count(axes, coarse)
    return NearSaved(
        q.new_empty(batch, heads, tokens, dtype=torch.float32),
        q.new_empty(batch, heads, cells, dim, dtype=torch.float32),
        q.new_empty(batch, heads, cells, v.shape[3], dtype=torch.float32),
    )


@on_its_device
def near_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor,
    mixing: Sequence[Tensor],
    *,
    scale: float,
    **settings: Any,
) -> tuple[Tensor, NearSaved]:
    """``t5fx.kernels.near.reference`` and what the backward needs.

    Args: as that one takes them; float32, float16 or bfloat16, any strides, D and Dv up to 256.
    Products are of float32 unless q, k and v share a 16-bit dtype, and with tokens of the window in
    any case; sums are float32.

    Returns:
        The output ``[B, H, N, Dv]`` in q's dtype, a view of contiguous ``[B, N, H, Dv]``, and what
        the backward wants to have saved.

    Raises:
        NodeArgumentError: what the kernels cannot take.
    """
    shape = near_site(q, k, v, mixing, **settings)
    check_dtype("base", base)
    saved = empty_saved(q, v, shape.axes, shape.coarse)
    lse, *means = saved
    if shape.cells:
        _fill_means(k, v, saved, shape)
    out = q.new_empty(shape.batch, shape.tokens, shape.heads, shape.value_dim)
    unit, steps = strides(q, k, v, base)
    launch(
        near_queries,
        shape.programs(shape.grid_tokens),
        *(q, k, v, base, _gate(mixing, q), *means, out, lse),
        *(*steps, *shape.places(), scale),
        **shape.shape(unit),
        **shape.by_query(),
    )
    if _may_be(shape.off_grid):
        unit, steps = strides(q, k, v)
        launch(
            near_exact,
            shape.programs(shape.off_grid),
            *(q, k, v, out, lse, *steps),
            *(shape.heads, shape.tokens, shape.prefix, shape.grid_tokens, scale),
            **shape.shape(unit),
        )
    return out.transpose(1, 2), saved


@on_its_device
def near_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Sequence[Tensor],
    saved: Sequence[Tensor],
    *,
    scale: float,
    **settings: Any,
) -> list[Tensor]:
    """Gradients of q, k, v, base and mixing, each in its tensor's dtype, that of base in q's.

    Args: ``grad`` ``[B, H, N, Dv]``, any strides; ``saved``: what ``near_forward`` returned beside
    its output; the rest as that takes it. The first four of the results are ``[B, H, N, ...]``
    views of contiguous ``[B, N, H, ...]``.

    Raises:
        NodeArgumentError: what the kernels cannot take.
    """
    shape = near_site(q, k, v, mixing, **settings)
    lse, *means = saved
    largest = _largest(grad, shape)
    gate = _gate(mixing, q)
    delta = torch.empty_like(lse)
    table = shape.groups, shape.grid_tokens, shape.cells
    shares, slopes = (q.new_empty(table, dtype=torch.float32) for _ in range(2))
    dq, dk, dv = (torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format)
                  for x in (q, k, v))  # fmt: skip
    unit, steps = strides(q, k, v, grad)
    known = {**shape.shape(unit), "SCALED": shape.scaled}
    launch(
        near_query_gradient,
        shape.programs(shape.grid_tokens),
        *(grad, q, k, v, gate, *means, lse, largest, delta, shares, slopes, dq),
        *(*steps, *shape.places(), scale),
        **known,
        **shape.by_query(),
    )
    if _may_be(shape.off_grid):
        launch(
            near_exact_gradient,
            shape.programs(shape.off_grid),
            *(grad, q, k, v, lse, largest, delta, dq, *steps),
            *(shape.heads, shape.tokens, shape.prefix, shape.grid_tokens, scale),
            **known,
        )
    on_grid = shape.on_grid()
    rows = shape.block.rows
    sums = _shared(grad, (q, k, v), lse, largest, delta, shares, slopes, shape, scale, known)
    launch(
        near_key_gradient,
        shape.groups * (ceil_div(shape.grid_tokens, rows) + ceil_div(shape.off_grid, rows)),
        *(grad, q, k, v, gate, lse, largest, delta, shares, slopes, sums, dk, dv),
        *(*steps, *shape.places(), scale),
        **known,
        **on_grid,
    )
    of_grid = delta.narrow(2, shape.prefix, shape.grid_tokens)
    base = _of_base(grad, shape).to(q.dtype)
    found = [x.transpose(1, 2) for x in (dq, dk, dv, base)]
    return [*found, *(of_grid.sum((0, 2)).to(gate.dtype) for gate in mixing)]


def _shared(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    lse: Tensor,
    largest: Tensor,
    delta: Tensor,
    shares: Tensor,
    slopes: Tensor,
    shape: NearSite,
    scale: float,
    known: dict[str, Any],
) -> Tensor:
    """What `near_shared_gradient` finds, over all queries."""
    rows = shape.off_grid + shape.cells
    if not _may_be(rows):
        return lse  # not read
    splits = ceil_div(shape.grid_tokens, CHUNK)
    size = shape.dim + shape.value_dim
    partial = lse.new_empty(splits, shape.groups, rows, size)
    blocks = ceil_div(shape.off_grid, shape.block.rows) + ceil_div(shape.cells, shape.block.rows)
    on_grid = {name: shape.on_grid()[name] for name in ("NDIM", "COARSE", "CELLS")}
    _, steps = strides(*inputs, grad)
    launch(
        near_shared_gradient,
        shape.groups * torch.sym_max(1, blocks) * splits,
        *(grad, *inputs, lse, largest, delta, shares, slopes, partial),
        *(*steps, shape.groups, shape.heads, splits, *shape.places()[1:], scale),
        **known,
        **on_grid,
        CHUNK=CHUNK,
    )
    return partial.sum(0)


def _fill_means(k: Tensor, v: Tensor, saved: NearSaved, shape: NearSite) -> None:
    """Writes the means of the cells."""
    unit, steps = strides(k, v)
    launch(
        near_means,
        shape.groups * shape.cells,
        *(k, v, saved.mean_k, saved.mean_v, *steps),
        *(shape.heads, shape.prefix, *shape.grid),
        NDIM=shape.axes,
        COARSE=shape.coarse,
        BLOCK_N=shape.block.rows,
        **shape.widths(unit),
    )


def _largest(grad: Tensor, shape: NearSite) -> Tensor:
    """The largest magnitude in each (batch item, head), ``[B, H]`` float32; empty where nothing is
    scaled.
    """
    if not shape.scaled:
        return grad.new_empty(shape.batch, 0, dtype=torch.float32)
    return torch.linalg.vector_norm(grad, math.inf, (2, 3), dtype=torch.float32)


def _of_base(grad: Tensor, shape: NearSite) -> Tensor:
    """The gradient of base ``[B, N, H, Dv]``, nothing off the grid."""
    token_major = grad.transpose(1, 2)
    whole = grad.new_zeros(token_major.shape)
    on_grid = (1, shape.prefix, shape.grid_tokens)
    part = token_major.narrow(*on_grid)
    whole.narrow(*on_grid).copy_(part if shape.gated else 0.5 * part)
    return whole


def _gate(mixing: Sequence[Tensor], otherwise: Tensor) -> Tensor:
    """Something to point at where there is none."""
    return mixing[0].contiguous() if mixing else otherwise


def _may_be(size: int) -> bool:
    """Whether there may be so many; symbols are not compared, which would guard."""
    return not isinstance(size, int) or size > 0
