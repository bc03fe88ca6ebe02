"""The backward of near attention, a row a key: the gradients of keys and values.

What every query of the grid sees, tokens off the grid and cells, is dealt with first, in chunks of
queries: `near_shared_gradient`. Then each token gathers, from the queries in whose windows it is,
from its cell, and from the queries off the grid: `near_key_gradient`. No sum depends on an order of
programs.
"""

import triton
import triton.language as tl

from .near_places import (
    NEAR_SIZES,
    cell_of,
    counts,
    load_gate,
    load_rows,
    off_grid,
    place_of,
    source,
    store_rows,
)
from .tiles import load_scale


@triton.jit(do_not_specialize=NEAR_SIZES)
def near_shared_gradient(
    grad, q, k, v, lse, largest, delta, shares, slopes, partial,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, y_stride_b, y_stride_h, y_stride_n, y_stride_d,
    groups, heads, splits, num_tokens, prefix, g0, g1, g2, scale,
    D: tl.constexpr, DV: tl.constexpr, NDIM: tl.constexpr, COARSE: tl.constexpr,
    CELLS: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """partial ``[splits, B*H, rows, D + Dv]`` float32: sums over CHUNK queries of the grid, without
    the gate, of the gradients of keys, but for ``scale``, and of values. The rows are the tokens
    off the grid, then the means of cells.

    One program for each (batch item, head), BLOCK_M rows of one kind and chunk.
    """
    dtype: tl.constexpr = tl.float32 if WIDE else q.dtype.element_ty
    grid = (g0, g1, g2)
    grid_tokens = g0 * g1 * g2
    count = num_tokens - grid_tokens
    off_blocks = tl.cdiv(count, BLOCK_M)
    blocks = tl.maximum(off_blocks + (CELLS + BLOCK_M - 1) // BLOCK_M, 1)
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits % blocks
    group = tl.program_id(0) // splits // blocks
    channels = tl.arange(0, BLOCK_D)
    values = tl.arange(0, BLOCK_V)
    lanes = tl.arange(0, BLOCK_M)
    scale = tl.cast(scale, tl.float32)
    queries = source(q, group, heads, q_stride_b, q_stride_h, q_stride_n, q_stride_d, UNIT)
    keys = source(k, group, heads, k_stride_b, k_stride_h, k_stride_n, k_stride_d, UNIT)
    vals = source(v, group, heads, v_stride_b, v_stride_h, v_stride_n, v_stride_d, UNIT)
    grads = source(grad, group, heads, y_stride_b, y_stride_h, y_stride_n, y_stride_d, UNIT)
    up, down = load_scale(largest, group, SCALED)
    at_lse = group.to(tl.int64) * num_tokens + prefix
    in_cells = block >= off_blocks
    rows = block * BLOCK_M + lanes
    if in_cells:
        rows = (block - off_blocks) * BLOCK_M + lanes
    limit = tl.where(in_cells, CELLS, count)
    exist = rows < limit

    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    begin = split * CHUNK
    end = tl.minimum(begin + CHUNK, grid_tokens)
    if in_cells:
        if CELLS > 0:
            cells = tl.minimum(rows, CELLS - 1)
            sizes = counts(cells, grid, NDIM, COARSE)[:, None]
            for first in range(begin, end, BLOCK_S):
                seeing = first + tl.arange(0, BLOCK_S)
                there = exist[:, None] & (seeing < end)[None, :]
                seeing = tl.minimum(seeing, grid_tokens - 1)
                x = load_rows(queries, prefix + seeing, channels, D, UNIT).to(dtype)
                g = load_rows(grads, prefix + seeing, values, DV, UNIT).to(tl.float32) * up
                at = (group.to(tl.int64) * grid_tokens + seeing)[None, :] * CELLS + cells[:, None]
                share = tl.load(shares + at, mask=there, other=0.0) * sizes
                slope = tl.load(slopes + at, mask=there, other=0.0) * (sizes * up)
                dk = tl.dot(slope.to(dtype), x, dk, input_precision=PRECISION)
                dv = tl.dot(share.to(dtype), g.to(dtype), dv, input_precision=PRECISION)
    else:
        tokens = off_grid(tl.maximum(tl.minimum(rows, count - 1), 0), prefix, grid_tokens)
        key = load_rows(keys, tokens, channels, D, UNIT).to(dtype)
        value = load_rows(vals, tokens, values, DV, UNIT).to(dtype)
        for first in range(begin, end, BLOCK_S):
            seeing = first + tl.arange(0, BLOCK_S)
            there = exist[:, None] & (seeing < end)[None, :]
            seeing = tl.minimum(seeing, grid_tokens - 1)
            x = load_rows(queries, prefix + seeing, channels, D, UNIT).to(dtype)
            g = load_rows(grads, prefix + seeing, values, DV, UNIT).to(tl.float32) * up
            norm = tl.load(lse + at_lse + seeing)
            along = tl.load(delta + at_lse + seeing) * up
            logits = tl.dot(key, tl.trans(x), input_precision=PRECISION) * scale
            share = tl.where(there, tl.exp(logits - norm[None, :]), 0.0)
            dp = tl.dot(value, tl.trans(g.to(dtype)), input_precision=PRECISION)
            slope = share * (dp - along[None, :])
            dk = tl.dot(slope.to(dtype), x, dk, input_precision=PRECISION)
            dv = tl.dot(share.to(dtype), g.to(dtype), dv, input_precision=PRECISION)
    row = (split.to(tl.int64) * groups + group) * (count + CELLS)
    row += tl.where(in_cells, count, 0)
    at = partial + row * (D + DV)
    store_rows(at, dk * down, rows, channels, exist, D, D + DV)
    store_rows(at + D, dv * down, rows, values, exist, DV, D + DV)


@triton.jit
def seen_from(i, size, SIDE: tl.constexpr):
    """Of an axis, the first and the last position whose windows position i is in."""
    first = tl.where(i < SIDE, 0, i - SIDE // 2)
    last = tl.where(i >= size - SIDE, size - 1, i + SIDE // 2)
    return tl.maximum(first, 0), tl.minimum(last, size - 1)


@triton.jit(do_not_specialize=NEAR_SIZES)
def near_key_gradient(
    grad, q, k, v, gate, lse, largest, delta, shares, slopes, sums, dk, dv,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, y_stride_b, y_stride_h, y_stride_n, y_stride_d,
    heads, num_tokens, prefix, g0, g1, g2, scale,
    D: tl.constexpr, DV: tl.constexpr, NDIM: tl.constexpr, SIDE: tl.constexpr,
    COARSE: tl.constexpr, CELLS: tl.constexpr, GATED: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dk ``[B, N, H, D]`` and dv ``[B, N, H, Dv]``, contiguous, whole.

    ``sums``: what `near_shared_gradient` found, over all queries, ``[B*H, rows, D + Dv]``. One
    program for BLOCK_M tokens, all on the grid or all off it, of one (batch item, head).
    """
    dtype: tl.constexpr = tl.float32 if WIDE else q.dtype.element_ty
    grid = (g0, g1, g2)
    grid_tokens = g0 * g1 * g2
    count = num_tokens - grid_tokens
    grid_blocks = tl.cdiv(grid_tokens, BLOCK_M)
    blocks = grid_blocks + tl.cdiv(count, BLOCK_M)
    group = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    head = group % heads
    on_grid = block < grid_blocks
    rows = tl.where(on_grid, block, block - grid_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    limit = tl.where(on_grid, grid_tokens, count)
    exist = rows < limit
    own = tl.minimum(rows, limit - 1)
    tokens = tl.where(on_grid, prefix + own, off_grid(own, prefix, grid_tokens))
    channels = tl.arange(0, BLOCK_D)
    values = tl.arange(0, BLOCK_V)
    scale = tl.cast(scale, tl.float32)
    queries = source(q, group, heads, q_stride_b, q_stride_h, q_stride_n, q_stride_d, UNIT)
    keys = source(k, group, heads, k_stride_b, k_stride_h, k_stride_n, k_stride_d, UNIT)
    vals = source(v, group, heads, v_stride_b, v_stride_h, v_stride_n, v_stride_d, UNIT)
    grads = source(grad, group, heads, y_stride_b, y_stride_h, y_stride_n, y_stride_d, UNIT)
    key = load_rows(keys, tokens, channels, D, UNIT)
    value = load_rows(vals, tokens, values, DV, UNIT)
    at_lse = group.to(tl.int64) * num_tokens
    sums_of = sums + group.to(tl.int64) * (count + CELLS) * (D + DV)

    if on_grid:
        i0, i1, i2 = place_of(own, grid)
        cell = cell_of((i0, i1, i2), grid, NDIM, COARSE)
        sum_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        sum_v = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        if CELLS > 0:
            size = counts(cell, grid, NDIM, COARSE)[:, None]
            sum_k += load_rows((sums_of, D + DV, 1), count + cell, channels, D, 1) / size
            sum_v += load_rows((sums_of + D, D + DV, 1), count + cell, values, DV, 1) / size
        if SIDE > 0:
            scaled = key.to(tl.float32) * scale
            v_wide = value.to(tl.float32)
            b0, e0 = seen_from(i0, g0, SIDE if NDIM > 2 else 1)
            b1, e1 = seen_from(i1, g1, SIDE if NDIM > 1 else 1)
            b2, e2 = seen_from(i2, g2, SIDE)
            n0, n1, n2 = tl.max(e0 - b0, 0) + 1, tl.max(e1 - b1, 0) + 1, tl.max(e2 - b2, 0) + 1
            for offset in range(n0 * n1 * n2):
                j0, j1, j2 = b0 + offset // n2 // n1, b1 + offset // n2 % n1, b2 + offset % n2
                inside = (j0 <= e0) & (j1 <= e1) & (j2 <= e2)
                j0, j1, j2 = tl.minimum(j0, e0), tl.minimum(j1, e1), tl.minimum(j2, e2)
                seeing = (j0 * g1 + j1) * g2 + j2
                x = load_rows(queries, prefix + seeing, channels, D, UNIT).to(tl.float32)
                g = load_rows(grads, prefix + seeing, values, DV, UNIT).to(tl.float32)
                norm = tl.load(lse + at_lse + prefix + seeing)
                share = tl.exp(tl.sum(x * scaled, 1) - norm)
                along = tl.load(delta + at_lse + prefix + seeing)
                slope = share * (tl.sum(g * v_wide, 1) - along)
                if CELLS > 0:
                    at = (group.to(tl.int64) * grid_tokens + seeing) * CELLS + cell
                    share -= tl.load(shares + at)
                    slope -= tl.load(slopes + at)
                sum_k += tl.where(inside, slope, 0.0)[:, None] * x
                sum_v += tl.where(inside, share, 0.0)[:, None] * g
    else:
        sum_k = load_rows((sums_of, D + DV, 1), own, channels, D, 1)
        sum_v = load_rows((sums_of + D, D + DV, 1), own, values, DV, 1)

    up, down = load_scale(largest, group, SCALED)
    factor = load_gate(gate, head, GATED) * up
    sum_k *= factor
    sum_v *= factor
    key = key.to(dtype)
    value = value.to(dtype)
    for begin in range(0, count, BLOCK_S):
        lanes = begin + tl.arange(0, BLOCK_S)
        seeing = off_grid(tl.minimum(lanes, count - 1), prefix, grid_tokens)
        x = load_rows(queries, seeing, channels, D, UNIT).to(dtype)
        g = (load_rows(grads, seeing, values, DV, UNIT).to(tl.float32) * up).to(dtype)
        norm = tl.load(lse + at_lse + seeing)
        along = tl.load(delta + at_lse + seeing) * up
        logits = tl.dot(key, tl.trans(x), input_precision=PRECISION) * scale
        share = tl.where((lanes < count)[None, :], tl.exp(logits - norm[None, :]), 0.0)
        dp = tl.dot(value, tl.trans(g), input_precision=PRECISION)
        slope = (share * (dp - along[None, :])).to(dtype)
        sum_k = tl.dot(slope, x, sum_k, input_precision=PRECISION)
        sum_v = tl.dot(share.to(dtype), g, sum_v, input_precision=PRECISION)
    first = (group // heads).to(tl.int64) * num_tokens * heads + head
    place = tl.where(on_grid, prefix + rows, off_grid(rows, prefix, grid_tokens))
    store_rows(dk + first * D, sum_k * (scale * down), place, channels, exist, D, heads * D)
    store_rows(dv + first * DV, sum_v * down, place, values, exist, DV, heads * DV)
