"""The forward of near attention: the queries of the grid, and those off it.

A row is a query. The softmax over what it sees is taken in two passes: the first finds its sum, the
second adds up values. In between, what the window has of a cell is taken out of it.
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


@triton.jit
def cell_logits(sums, left, counts, taken):
    """The logits of cells: of ``sums``, the products with their means, without what windows have
    ``taken`` of them; minus infinity where nothing is left.
    """
    most = tl.maximum(left, 1.0)
    logits = (sums * counts[None, :] - taken) / most + tl.log(most)
    return tl.where(left > 0, logits, float("-inf"))


@triton.jit
def larger(top, total, logits):
    """A running maximum and the sum of exponentials relative to it, with more logits ``[M, S]``."""
    new = tl.maximum(top, tl.max(logits, 1))
    return new, total * tl.exp(top - new) + tl.sum(tl.exp(logits - new[:, None]), 1)


@triton.jit
def off_grid_logits(
    x, keys, begin, count, channels, scale, prefix, grid_tokens,
    D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_S tokens off the grid: their numbers, keys in x's dtype, and logits."""
    rows = begin + tl.arange(0, BLOCK_S)
    tokens = off_grid(tl.minimum(rows, count - 1), prefix, grid_tokens)
    block = load_rows(keys, tokens, channels, D, UNIT).to(x.dtype)
    logits = tl.dot(x, tl.trans(block), input_precision=PRECISION) * scale
    return tokens, block, tl.where((rows < count)[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=NEAR_SIZES)
def near_queries(
    q, k, v, base, gate, mean_k, mean_v, out, lse,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, y_stride_b, y_stride_h, y_stride_n, y_stride_d,
    heads, num_tokens, prefix, g0, g1, g2, scale,
    D: tl.constexpr, DV: tl.constexpr, NDIM: tl.constexpr, SIDE: tl.constexpr,
    COARSE: tl.constexpr, CELLS: tl.constexpr, GATED: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tokens of the grid in out ``[B, N, H, Dv]``, contiguous, joined with ``base``, and in lse
    ``[B, H, N]`` float32 the logarithms of the sums of exponentials.

    One program for BLOCK_M of them in one (batch item, head). CELLS: how many, 0 for none.
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
    bases = source(base, group, heads, y_stride_b, y_stride_h, y_stride_n, y_stride_d, UNIT)
    x = load_rows(queries, prefix + own, channels, D, UNIT).to(dtype)
    scaled = x.to(tl.float32) * scale
    starts = window_starts(place_of(own, grid), grid, NDIM, SIDE)
    count = num_tokens - grid_tokens

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if CELLS > 0:
        cells = tl.arange(0, BLOCK_C)
        taken = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for offset in range(WINDOW):
        tokens, inside, cell = seen(starts, offset, grid, NDIM, SIDE, COARSE)
        row = load_rows(keys, prefix + tokens, channels, D, UNIT).to(tl.float32)
        logit = tl.sum(scaled * row, 1)
        if CELLS > 0:
            at = (cells[None, :] == cell[:, None]) & inside[:, None]
            taken += tl.where(at, logit[:, None], 0.0)
        logit = tl.where(inside, logit, float("-inf"))
        new = tl.maximum(top, logit)
        total = total * tl.exp(top - new) + tl.exp(logit - new)
        top = new
    for begin in range(0, count, BLOCK_S):
        _, _, logits = off_grid_logits(
            x, keys, begin, count, channels, scale, prefix, grid_tokens, D, UNIT, PRECISION, BLOCK_S
        )
        top, total = larger(top, total, logits)
    if CELLS > 0:
        left = tokens_left(starts, cells, grid, NDIM, SIDE, COARSE)
        sizes = counts(cells, grid, NDIM, COARSE)
        known = tl.minimum(cells, CELLS - 1)
        means = load_rows((mean_k + group.to(tl.int64) * (CELLS * D), D, 1), known, channels, D, 1)
        of_cells = cell_logits(times_means(x, means, PRECISION) * scale, left, sizes, taken)
        top, total = larger(top, total, of_cells)
    norm = top + tl.log(total)

    result = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if CELLS > 0:
        share = tl.exp(of_cells - norm[:, None]) / tl.maximum(left, 1.0)
        mean_values = load_rows(
            (mean_v + group.to(tl.int64) * (CELLS * DV), DV, 1), known, values, DV, 1
        ).to(dtype)
        of_means = (share * sizes[None, :]).to(dtype)
        result = tl.dot(of_means, mean_values, result, input_precision=PRECISION)
    for begin in range(0, count, BLOCK_S):
        off, _, logits = off_grid_logits(
            x, keys, begin, count, channels, scale, prefix, grid_tokens, D, UNIT, PRECISION, BLOCK_S
        )
        block = load_rows(vals, off, values, DV, UNIT).to(dtype)
        weights = tl.exp(logits - norm[:, None]).to(dtype)
        result = tl.dot(weights, block, result, input_precision=PRECISION)
    for offset in range(WINDOW):
        tokens, inside, cell = seen(starts, offset, grid, NDIM, SIDE, COARSE)
        row = load_rows(keys, prefix + tokens, channels, D, UNIT).to(tl.float32)
        weight = tl.exp(tl.sum(scaled * row, 1) - norm)
        if CELLS > 0:
            weight -= of_cell(share, cells, cell)
        weight = tl.where(inside, weight, 0.0)
        value = load_rows(vals, prefix + tokens, values, DV, UNIT).to(tl.float32)
        result += weight[:, None] * value

    joined = load_rows(bases, prefix + own, values, DV, UNIT).to(tl.float32)
    factor = load_gate(gate, head, GATED)
    if not GATED:
        joined *= 0.5
    joined += factor * result
    first = (group // heads).to(tl.int64) * num_tokens + prefix
    store_rows(out + (first * heads + head) * DV, joined, rows, values, exist, DV, heads * DV)
    tl.store(lse + group.to(tl.int64) * num_tokens + prefix + rows, norm, mask=exist)


@triton.jit(do_not_specialize=NEAR_SIZES)
def near_exact(
    q, k, v, out, lse,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    heads, num_tokens, prefix, grid_tokens, scale,
    D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The tokens off the grid in ``out`` and ``lse``: they see every key.

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
    x = load_rows(queries, tl.minimum(own, num_tokens - 1), channels, D, UNIT).to(dtype)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for begin in range(0, num_tokens, BLOCK_S):
        tokens = begin + tl.arange(0, BLOCK_S)
        known = tl.minimum(tokens, num_tokens - 1)
        block = load_rows(keys, known, channels, D, UNIT).to(dtype)
        logits = tl.dot(x, tl.trans(block), input_precision=PRECISION) * scale
        logits = tl.where((tokens < num_tokens)[None, :], logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp(logits - new[:, None])
        shrunk = tl.exp(top - new)
        total = total * shrunk + tl.sum(weights, 1)
        value = load_rows(vals, known, values, DV, UNIT).to(dtype)
        result = tl.dot(
            weights.to(dtype), value, result * shrunk[:, None], input_precision=PRECISION
        )
        top = new
    first = (group // heads).to(tl.int64) * num_tokens
    result /= total[:, None]
    store_rows(out + (first * heads + head) * DV, result, own, values, exist, DV, heads * DV)
    at = lse + group.to(tl.int64) * num_tokens + own
    tl.store(at, top + tl.log(total), mask=exist)
