"""Device code that the kernels of near attention share: windows, cells, and rows of tensors.

The equations are those of ``t5fx.kernels.near``. Nothing of the grid is read from memory: where a
window begins, which cell a token is in and how many tokens of a cell a window leaves to it follow
from the sizes of the grid, ``grid``: (g0, g1, g2), missing axes first, of size 1. A place on it is
(i0, i1, i2) in the same order.

A tensor is a ``source``: (where its first token lies, the strides of tokens and of channels); see
``tiles.head_base`` for their unit. Tokens that do not exist are never asked for: kernels take the
last that does and give it no weight.
"""

import triton
import triton.language as tl

from .tiles import SIZES, head_base

#: As ``tiles.SIZES``, of these kernels.
NEAR_SIZES = [
    *SIZES,
    *(f"{tensor}_stride_{axis}" for tensor in "qkvy" for axis in "bhn"),
]


@triton.jit
def source(ptr, group, heads, stride_b, stride_h, stride_n, stride_d, UNIT: tl.constexpr):
    """A tensor of one (batch item, head); ``group`` is b * heads + h."""
    return head_base(ptr, group, heads, stride_b, stride_h, UNIT), stride_n, stride_d


@triton.jit
def load_rows(source, tokens, channels, D: tl.constexpr, UNIT: tl.constexpr):
    """``[tokens, channels]`` in the dtype of the memory, 0 in channels that do not exist."""
    start, stride_n, stride_d = source
    at = tokens.to(tl.int64) * stride_n
    if UNIT > 1:
        ptrs = start + (at * UNIT)[:, None] + channels[None, :]
    else:
        ptrs = start + at[:, None] + (channels.to(tl.int64) * stride_d)[None, :]
    if channels.shape[0] == D:
        rows = tl.load(ptrs)
    else:
        rows = tl.load(ptrs, mask=(channels < D)[None, :], other=0.0)
    return rows


@triton.jit
def store_rows(start, rows, tokens, channels, exist, D: tl.constexpr, step):
    """Writes rows that lie ``step`` elements apart, in the dtype of the memory."""
    ptrs = start + (tokens.to(tl.int64) * step)[:, None] + channels[None, :]
    mask = exist[:, None] & (channels < D)[None, :]
    tl.store(ptrs, rows.to(start.dtype.element_ty), mask=mask)


@triton.jit
def load_gate(gate, head, GATED: tl.constexpr):
    """By what the output of grid tokens is multiplied before it is added."""
    if GATED:
        factor = tl.load(gate + head).to(tl.float32)
    else:
        factor = 0.5
    return factor


@triton.jit
def off_grid(rows, prefix, grid_tokens):
    """The numbers of prefix and suffix tokens, which are counted without the grid."""
    return tl.where(rows < prefix, rows, rows + grid_tokens)


@triton.jit
def place_of(tokens, grid):
    """Where tokens of the grid are on it."""
    _, g1, g2 = grid
    return tokens // g2 // g1, tokens // g2 % g1, tokens % g2


@triton.jit
def first_seen(i, size, SIDE: tl.constexpr):
    """Of an axis, where the window of position i begins."""
    return tl.maximum(tl.minimum(i - SIDE // 2, size - SIDE), 0)


@triton.jit
def window_starts(place, grid, NDIM: tl.constexpr, SIDE: tl.constexpr):
    """Where windows begin; missing axes have a window of one."""
    i0, i1, i2 = place
    g0, g1, g2 = grid
    return (
        first_seen(i0, g0, SIDE if NDIM > 2 else 1),
        first_seen(i1, g1, SIDE if NDIM > 1 else 1),
        first_seen(i2, g2, SIDE),
    )


@triton.jit
def seen(starts, offset, grid, NDIM: tl.constexpr, SIDE: tl.constexpr, COARSE: tl.constexpr):
    """The token with the number ``offset`` in each window, whether it exists, and its cell."""
    s0, s1, s2 = starts
    g0, g1, g2 = grid
    if NDIM == 1:
        i0, i1, i2 = s0, s1, s2 + offset
    elif NDIM == 2:
        i0, i1, i2 = s0, s1 + offset // SIDE, s2 + offset % SIDE
    else:
        i0, i1, i2 = s0 + offset // (SIDE * SIDE), s1 + offset // SIDE % SIDE, s2 + offset % SIDE
    exists = (i0 < g0) & (i1 < g1) & (i2 < g2)
    i0, i1, i2 = tl.minimum(i0, g0 - 1), tl.minimum(i1, g1 - 1), tl.minimum(i2, g2 - 1)
    return (i0 * g1 + i1) * g2 + i2, exists, cell_of((i0, i1, i2), grid, NDIM, COARSE)


@triton.jit
def cell_of(place, grid, NDIM: tl.constexpr, COARSE: tl.constexpr):
    """Which cell a place is in; without cells, 0."""
    i0, i1, i2 = place
    g0, g1, g2 = grid
    cell = i2 * COARSE // g2
    if NDIM > 1:
        cell += i1 * COARSE // g1 * COARSE
    if NDIM > 2:
        cell += i0 * COARSE // g0 * (COARSE * COARSE)
    return cell


@triton.jit
def interval(c, size, COARSE: tl.constexpr):
    """Of an axis, the first position in cell c and the one behind its last."""
    return tl.cdiv(c * size, COARSE), tl.cdiv((c + 1) * size, COARSE)


@triton.jit
def boxes(cells, grid, NDIM: tl.constexpr, COARSE: tl.constexpr):
    """What cells hold: (first, behind the last) of each axis, of a missing one (0, 1)."""
    g0, g1, g2 = grid
    b2, e2 = interval(cells % COARSE, g2, COARSE)
    b1, e1 = b2 * 0, b2 * 0 + 1
    b0, e0 = b1, e1
    if NDIM > 1:
        b1, e1 = interval(cells // COARSE % COARSE, g1, COARSE)
    if NDIM > 2:
        b0, e0 = interval(cells // (COARSE * COARSE), g0, COARSE)
    return b0, e0, b1, e1, b2, e2


@triton.jit
def counts(cells, grid, NDIM: tl.constexpr, COARSE: tl.constexpr):
    """How many tokens there are in cells, at least 1, as float32: what sums are divided by."""
    b0, e0, b1, e1, b2, e2 = boxes(cells, grid, NDIM, COARSE)
    return tl.maximum((e0 - b0) * (e1 - b1) * (e2 - b2), 1).to(tl.float32)


@triton.jit
def overlap(start, size, begin, end, SIDE: tl.constexpr):
    """Of an axis, how many tokens of windows ``[M]`` are in cells ``[C]``: ``[M, C]``."""
    last = tl.minimum(start + SIDE, size)
    common = tl.minimum(last[:, None], end[None, :]) - tl.maximum(start[:, None], begin[None, :])
    return tl.maximum(common, 0)


@triton.jit
def tokens_left(
    starts, cells, grid, NDIM: tl.constexpr, SIDE: tl.constexpr, COARSE: tl.constexpr
):  # fmt: skip
    """How many tokens of cells ``[C]`` are outside of windows ``[M]``, ``[M, C]`` float32; none of
    cells that do not exist.
    """
    s0, s1, s2 = starts
    g0, g1, g2 = grid
    b0, e0, b1, e1, b2, e2 = boxes(cells, grid, NDIM, COARSE)
    left = ((e0 - b0) * (e1 - b1) * (e2 - b2))[None, :]
    if SIDE > 0:
        taken = overlap(s2, g2, b2, e2, SIDE)
        if NDIM > 1:
            taken *= overlap(s1, g1, b1, e1, SIDE)
        if NDIM > 2:
            taken *= overlap(s0, g0, b0, e0, SIDE)
        left = left - taken
    else:
        left = left + s2[:, None] * 0
    CELLS: tl.constexpr = COARSE * (COARSE if NDIM > 1 else 1) * (COARSE if NDIM > 2 else 1)
    return tl.where((cells < CELLS)[None, :], left, 0).to(tl.float32)


@triton.jit
def of_cell(values, cells, cell):
    """Of ``[M, C]``, in each row what stands at its own cell: ``[M]``."""
    return tl.sum(tl.where(cells[None, :] == cell[:, None], values, 0.0), 1)


@triton.jit
def times_means(x, means, PRECISION: tl.constexpr):
    """x means^T, float32, as if the means, float32, were not rounded to 16 bits where x is of 16.

    What is left of a cell is a difference of sums, in which their roundings would grow.
    """
    high = means.to(x.dtype)
    product = tl.dot(x, tl.trans(high), input_precision=PRECISION)
    if x.dtype != tl.float32:
        low = (means - high.to(tl.float32)).to(x.dtype)
        product = tl.dot(x, tl.trans(low), product, input_precision=PRECISION)
    return product


@triton.jit(do_not_specialize=NEAR_SIZES)
def near_means(
    k, v, mean_k, mean_v,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d, v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    heads, prefix, g0, g1, g2,
    D: tl.constexpr, DV: tl.constexpr, NDIM: tl.constexpr, COARSE: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Mean key and value of each cell, ``[B*H, cells, ...]`` float32; 0 of an empty one.

    One program for each (batch item, head) and cell.
    """
    CELLS: tl.constexpr = COARSE * (COARSE if NDIM > 1 else 1) * (COARSE if NDIM > 2 else 1)
    group = tl.program_id(0) // CELLS
    cell = tl.program_id(0) % CELLS
    channels = tl.arange(0, BLOCK_D)
    values = tl.arange(0, BLOCK_V)
    keys = source(k, group, heads, k_stride_b, k_stride_h, k_stride_n, k_stride_d, UNIT)
    vals = source(v, group, heads, v_stride_b, v_stride_h, v_stride_n, v_stride_d, UNIT)
    b0, e0, b1, e1, b2, e2 = boxes(cell, (g0, g1, g2), NDIM, COARSE)
    n1, n2 = e1 - b1, e2 - b2
    total = (e0 - b0) * n1 * n2
    sum_k = tl.zeros([BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_V], tl.float32)
    for begin in range(0, total, BLOCK_N):
        lanes = begin + tl.arange(0, BLOCK_N)
        exist = (lanes < total).to(tl.float32)[:, None]
        lanes = tl.minimum(lanes, total - 1)
        i0, i1, i2 = b0 + lanes // n2 // n1, b1 + lanes // n2 % n1, b2 + lanes % n2
        tokens = prefix + (i0 * g1 + i1) * g2 + i2
        sum_k += tl.sum(load_rows(keys, tokens, channels, D, UNIT).to(tl.float32) * exist, 0)
        sum_v += tl.sum(load_rows(vals, tokens, values, DV, UNIT).to(tl.float32) * exist, 0)
    count = tl.maximum(total, 1).to(tl.float32)
    row = tl.program_id(0).to(tl.int64)
    tl.store(mean_k + row * D + channels, sum_k / count, mask=channels < D)
    tl.store(mean_v + row * DV + values, sum_v / count, mask=values < DV)
