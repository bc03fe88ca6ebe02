"""The backward of near attention, a row a query: the gradients of queries, and what keys need.

With p the weights that the softmax gave, dp their gradients and delta the sum of p dp, a logit's
gradient is p (dp - delta). A token of the window is taken out of its cell's mean, which gives it
the cell's weight and gradient with the sign turned: see ``near_explicit``. All of it is linear in
the gradient of the output, ``grad``, which is scaled by a power of two where products are of
float16 (``tiles.power_of_two``); nothing that is written is.
"""

import triton
import triton.language as tl

from .near_places import (
    NEAR_SIZES,
    counts,
    load_gate,
    load_rows,
    of_cell,
    off_grid,
    place_of,
    seen,
    source,
    store_rows,
    times_means,
    tokens_left,
    window_starts,
)
from .near_query import cell_logits, off_grid_logits
from .tiles import load_scale


@triton.jit
def off_grid_weights(
    x, g, norm, keys, vals, begin, count, channels, values, scale, prefix, grid_tokens,
    D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_S tokens off the grid: keys, weights and the gradients of those."""
    tokens, block, logits = off_grid_logits(
        x, keys, begin, count, channels, scale, prefix, grid_tokens, D, UNIT, PRECISION, BLOCK_S
    )
    rows = load_rows(vals, tokens, values, DV, UNIT).to(x.dtype)
    dp = tl.dot(g, tl.trans(rows), input_precision=PRECISION)
    return block, tl.exp(logits - norm[:, None]), dp


@triton.jit(do_not_specialize=NEAR_SIZES)
def near_query_gradient(
    grad, q, k, v, gate, mean_k, mean_v, lse, largest, delta, shares, slopes, dq,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, y_stride_b, y_stride_h, y_stride_n, y_stride_d,
    heads, num_tokens, prefix, g0, g1, g2, scale,
    D: tl.constexpr, DV: tl.constexpr, NDIM: tl.constexpr, SIDE: tl.constexpr,
    COARSE: tl.constexpr, CELLS: tl.constexpr, GATED: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tokens of the grid in dq ``[B, N, H, D]``, contiguous, and in delta ``[B, H, N]`` float32,
    the latter without the gate; for each of them and each cell, ``[B*H, n, cells]`` float32 and
    without the gate, in ``shares`` the weight of a token in it, in ``slopes`` that of its logit.

    One program for BLOCK_M tokens of one (batch item, head). CELLS: how many, 0 for none.
    """
    WINDOW: tl.constexpr = SIDE * (SIDE if NDIM > 1 else 1) * (SIDE if NDIM > 2 else 1)
    dtype: tl.constexpr = tl.float32 if WIDE else q.dtype.element_ty
    grid = (g0, g1, g2)
    grid_tokens = g0 * g1 * g2
    blocks = tl.cdiv(grid_tokens, BLOCK_M)
    group = tl.program_id(0) // blocks
    head = group % heads
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    exist = rows < grid_tokens
    own = tl.minimum(rows, grid_tokens - 1)
    channels = tl.arange(0, BLOCK_D)
    values = tl.arange(0, BLOCK_V)
    scale = tl.cast(scale, tl.float32)
    queries = source(q, group, heads, q_stride_b, q_stride_h, q_stride_n, q_stride_d, UNIT)
    keys = source(k, group, heads, k_stride_b, k_stride_h, k_stride_n, k_stride_d, UNIT)
    vals = source(v, group, heads, v_stride_b, v_stride_h, v_stride_n, v_stride_d, UNIT)
    grads = source(grad, group, heads, y_stride_b, y_stride_h, y_stride_n, y_stride_d, UNIT)
    x = load_rows(queries, prefix + own, channels, D, UNIT).to(dtype)
    scaled = x.to(tl.float32) * scale
    up, down = load_scale(largest, group, SCALED)
    g_wide = load_rows(grads, prefix + own, values, DV, UNIT).to(tl.float32) * up
    g = g_wide.to(dtype)
    starts = window_starts(place_of(own, grid), grid, NDIM, SIDE)
    count = num_tokens - grid_tokens
    at_lse = group.to(tl.int64) * num_tokens + prefix
    norm = tl.load(lse + at_lse + own)

    total = tl.zeros([BLOCK_M], tl.float32)
    if CELLS > 0:
        cells = tl.arange(0, BLOCK_C)
        taken = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        taken_dp = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for offset in range(WINDOW):
        tokens, inside, cell = seen(starts, offset, grid, NDIM, SIDE, COARSE)
        row = load_rows(keys, prefix + tokens, channels, D, UNIT).to(tl.float32)
        logit = tl.sum(scaled * row, 1)
        value = load_rows(vals, prefix + tokens, values, DV, UNIT).to(tl.float32)
        dp = tl.sum(g_wide * value, 1)
        if CELLS > 0:
            at = (cells[None, :] == cell[:, None]) & inside[:, None]
            taken += tl.where(at, logit[:, None], 0.0)
            taken_dp += tl.where(at, dp[:, None], 0.0)
        total += tl.where(inside, tl.exp(logit - norm) * dp, 0.0)
    for begin in range(0, count, BLOCK_S):
        _, weights, dps = off_grid_weights(
            x, g, norm, keys, vals, begin, count, channels, values, scale, prefix, grid_tokens, D,
            DV, UNIT, PRECISION, BLOCK_S,
        )  # fmt: skip
        total += tl.sum(weights * dps, 1)
    if CELLS > 0:
        left = tokens_left(starts, cells, grid, NDIM, SIDE, COARSE)
        most = tl.maximum(left, 1.0)
        sizes = counts(cells, grid, NDIM, COARSE)
        known = tl.minimum(cells, CELLS - 1)
        mean_keys = load_rows(
            (mean_k + group.to(tl.int64) * (CELLS * D), D, 1), known, channels, D, 1
        )
        logits = cell_logits(times_means(x, mean_keys, PRECISION) * scale, left, sizes, taken)
        share = tl.exp(logits - norm[:, None])
        mean_values = load_rows(
            (mean_v + group.to(tl.int64) * (CELLS * DV), DV, 1), known, values, DV, 1
        )
        cell_dp = (times_means(g, mean_values, PRECISION) * sizes[None, :] - taken_dp) / most
        total += tl.sum(share * cell_dp, 1)

    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if CELLS > 0:
        slope = share * (cell_dp - total[:, None]) / most
        of_means = (slope * sizes[None, :]).to(dtype)
        result = tl.dot(of_means, mean_keys.to(dtype), result, input_precision=PRECISION)
        there = exist[:, None] & (cells < CELLS)[None, :]
        first = (group.to(tl.int64) * grid_tokens + own) * CELLS
        tl.store(shares + first[:, None] + cells[None, :], share / most, mask=there)
        tl.store(slopes + first[:, None] + cells[None, :], slope * down, mask=there)
    for begin in range(0, count, BLOCK_S):
        block, weights, dps = off_grid_weights(
            x, g, norm, keys, vals, begin, count, channels, values, scale, prefix, grid_tokens, D,
            DV, UNIT, PRECISION, BLOCK_S,
        )  # fmt: skip
        slopes_of = (weights * (dps - total[:, None])).to(dtype)
        result = tl.dot(slopes_of, block, result, input_precision=PRECISION)
    for offset in range(WINDOW):
        tokens, inside, cell = seen(starts, offset, grid, NDIM, SIDE, COARSE)
        value = load_rows(vals, prefix + tokens, values, DV, UNIT).to(tl.float32)
        dp = tl.sum(g_wide * value, 1)
        row = load_rows(keys, prefix + tokens, channels, D, UNIT).to(tl.float32)
        weight = tl.exp(tl.sum(scaled * row, 1) - norm) * (dp - total)
        if CELLS > 0:
            weight -= of_cell(slope, cells, cell)
        result += tl.where(inside, weight, 0.0)[:, None] * row

    tl.store(delta + at_lse + rows, total * down, mask=exist)
    result *= scale * load_gate(gate, head, GATED) * down
    first = (group // heads).to(tl.int64) * num_tokens + prefix
    store_rows(dq + (first * heads + head) * D, result, rows, channels, exist, D, heads * D)


@triton.jit(do_not_specialize=NEAR_SIZES)
def near_exact_gradient(
    grad, q, k, v, lse, largest, delta, dq,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, y_stride_b, y_stride_h, y_stride_n, y_stride_d,
    heads, num_tokens, prefix, grid_tokens, scale,
    D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The tokens off the grid in ``dq`` and ``delta``: they see every key.

    One program for BLOCK_M of them in one (batch item, head).
    """
    dtype: tl.constexpr = tl.float32 if WIDE else q.dtype.element_ty
    count = num_tokens - grid_tokens
    blocks = tl.maximum(tl.cdiv(count, BLOCK_M), 1)
    group = tl.program_id(0) // blocks
    head = group % heads
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    exist = rows < count
    own = off_grid(rows, prefix, grid_tokens)
    channels = tl.arange(0, BLOCK_D)
    values = tl.arange(0, BLOCK_V)
    scale = tl.cast(scale, tl.float32)
    queries = source(q, group, heads, q_stride_b, q_stride_h, q_stride_n, q_stride_d, UNIT)
    keys = source(k, group, heads, k_stride_b, k_stride_h, k_stride_n, k_stride_d, UNIT)
    vals = source(v, group, heads, v_stride_b, v_stride_h, v_stride_n, v_stride_d, UNIT)
    grads = source(grad, group, heads, y_stride_b, y_stride_h, y_stride_n, y_stride_d, UNIT)
    at = tl.minimum(own, num_tokens - 1)
    x = load_rows(queries, at, channels, D, UNIT).to(dtype)
    up, down = load_scale(largest, group, SCALED)
    g = (load_rows(grads, at, values, DV, UNIT).to(tl.float32) * up).to(dtype)
    at_lse = group.to(tl.int64) * num_tokens
    norm = tl.load(lse + at_lse + own, mask=exist, other=0.0)

    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for second in range(2):
        for begin in range(0, num_tokens, BLOCK_S):
            tokens = begin + tl.arange(0, BLOCK_S)
            known = tl.minimum(tokens, num_tokens - 1)
            block = load_rows(keys, known, channels, D, UNIT).to(dtype)
            logits = tl.dot(x, tl.trans(block), input_precision=PRECISION) * scale
            seen_by = exist[:, None] & (tokens < num_tokens)[None, :]
            weights = tl.where(seen_by, tl.exp(logits - norm[:, None]), 0.0)
            value = load_rows(vals, known, values, DV, UNIT).to(dtype)
            dps = tl.dot(g, tl.trans(value), input_precision=PRECISION)
            if second == 0:
                total += tl.sum(weights * dps, 1)
            else:
                slopes = (weights * (dps - total[:, None])).to(dtype)
                result = tl.dot(slopes, block, result, input_precision=PRECISION)
    tl.store(delta + at_lse + own, total * down, mask=exist)
    first = (group // heads).to(tl.int64) * num_tokens
    result *= scale * down
    store_rows(dq + (first * heads + head) * D, result, own, channels, exist, D, heads * D)
