"""What the other kernels want to know before they begin.

Mean and reciprocal standard deviation of the keys of each (batch item, head), by channel, come in
two steps, so that the tokens of one head can be shared among programs: each of ``prepare`` writes
mean and sum of squared deviations of its tokens, and ``key_norm`` merges them, in one fixed order.
Deviations are from tokens at hand, never from 0: a shift that all keys share costs no digits.
"""

import triton
import triton.language as tl

from .convolution import has_neighbour, head_taps, load_row, store_row, tap_offset
from .tiles import QUAD, SIZES, head_base, load_tile

#: Splits that are merged at a time, and tokens whose mean is the origin of a chunk's sums.
MERGED = tl.constexpr(16)


@triton.jit(do_not_specialize=SIZES)
def prepare(
    k, weight_q, bias_q, weight_k, bias_k, partial, quads, taps,
    stride_b, stride_h, stride_n, stride_d, heads, num_tokens, chunk, splits,
    num_quads, prefix, g0, g1, g2,
    D: tl.constexpr, NDIM: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program for each (batch item, head) and chunk of tokens; three things, of which only
    some programs have the others to do:

    partial ``[B*H, splits, 2, D]`` float32: mean and sum of squared deviations of a chunk of keys;
    quads ``[num_quads]`` int64: which tokens of the grid are convolved together (see ``tiles``);
    taps ``[2, H, 3**NDIM + 1, D]`` float32, split rows: of q's and k's convolution the kernel, to
    which the x that is added is added, and the bias.
    """
    group = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    base = head_base(k, group, heads, stride_b, stride_h, UNIT)
    channels = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_N)
    begin = split * chunk
    end = tl.minimum(begin + chunk, num_tokens)

    few = tl.arange(0, MERGED)
    ptr = base + tl.cast(begin, tl.int64) * (stride_n * UNIT)
    some = load_tile(ptr, few, channels, begin + few < end, D, stride_n, stride_d, UNIT)
    origin = tl.sum(some.to(tl.float32), 0) / tl.minimum(end - begin, MERGED)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        inside = start + lanes < end
        ptr = base + tl.cast(start, tl.int64) * (stride_n * UNIT)
        x = load_tile(ptr, lanes, channels, inside, D, stride_n, stride_d, UNIT).to(tl.float32)
        x = tl.where(inside[:, None], x - origin[None, :], 0.0)
        total += x
        squares += x * x
    count = (end - begin).to(tl.float32)
    shift = tl.sum(total, 0) / count
    row = partial + tl.program_id(0).to(tl.int64) * 2 * D + channels
    tl.store(row, origin + shift, mask=channels < D)
    deviations = tl.maximum(tl.sum(squares, 0) - count * shift * shift, 0.0)
    tl.store(row + D, deviations, mask=channels < D)

    if NDIM > 0:
        if group == 0:
            each = tl.cdiv(num_quads, splits)
            last = tl.minimum(split * each + each, num_quads)
            for at in range(split * each, last, BLOCK_N):
                tl.store(
                    quads + at + lanes,
                    quad_at(at + lanes, prefix, g0, g1, g2, NDIM),
                    mask=at + lanes < last,
                )
        if (group < heads) & (split == 0):
            target = head_taps(taps, group, NDIM, BLOCK_D)
            store_taps(target, weight_q, bias_q, group, channels, D, NDIM)
            target = head_taps(target, heads, NDIM, BLOCK_D)
            store_taps(target, weight_k, bias_k, group, channels, D, NDIM)


@triton.jit
def quad_at(at, prefix, g0, g1, g2, NDIM: tl.constexpr):
    """Members of ``quads``."""
    WIDTH: tl.constexpr = 4 if NDIM == 1 else 2
    HEIGHT: tl.constexpr = 4 // WIDTH
    width, height = tl.cdiv(g2, WIDTH), tl.cdiv(g1, HEIGHT)  # of a frame, in quads
    column = at % width * WIDTH
    row = at // width % height * HEIGHT
    frame = at // width // height
    flags = tl.where(column == 0, 1, 0) + tl.where(column + 1 >= g2, 2, 0)
    for i in tl.static_range(2, WIDTH + 1):
        flags += tl.where(column + i >= g2, 2 ** (i + 5), 0)
    if NDIM > 1:
        flags += tl.where(row == 0, 4, 0) + tl.where(row + 1 >= g1, 8, 0)
        flags += tl.where(row + 2 >= g1, 64, 0)
    if NDIM > 2:
        flags += tl.where(frame == 0, 16, 0) + tl.where(frame == g0 - 1, 32, 0)
    return ((prefix + (frame * g1 + row) * g2 + column).to(tl.int64) << QUAD) + flags


@triton.jit
def store_taps(target, weight, bias, head, channels, D: tl.constexpr, NDIM: tl.constexpr):
    """The rows of one head, from weight ``[H*D, 1, 3, ...]`` and bias ``[H*D]``."""
    at = head * D + channels
    for tap in range(3**NDIM):
        row = tl.load(weight + at * 3**NDIM + tap, mask=channels < D, other=0.0).to(tl.float32)
        row += tl.where(tap == 3**NDIM // 2, 1.0, 0.0)
        store_row(target + tap * channels.shape[0], row, channels, D)
    row = tl.load(bias + at, mask=channels < D, other=0.0).to(tl.float32)
    store_row(target + 3**NDIM * channels.shape[0], row, channels, D)


@triton.jit(do_not_specialize=SIZES)
def key_norm(
    partial, taps, mean, rstd, offsets, heads, num_tokens, chunk, splits, eps,
    D: tl.constexpr, NDIM: tl.constexpr, CENTRED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mean and rstd ``[B*H, D]``, split rows: of all tokens, and 1 / sqrt(biased variance + eps).

    Unless ``CENTRED`` also offsets ``[B*H, rows, D]``, a split row for each code that a token can
    have: bias - mean rstd (the taps that have a neighbour). One program for each row.
    """
    ROWS: tl.constexpr = 1 if CENTRED or NDIM == 0 else 4**NDIM + 1
    group = tl.program_id(0) // ROWS
    row = tl.program_id(0) % ROWS
    channels = tl.arange(0, BLOCK_D)
    mean_row, rstd_row = merged_statistics(
        partial, group, channels, num_tokens, chunk, splits, eps, D, BLOCK_D
    )
    if row == 0:
        at = group.to(tl.int64) * BLOCK_D
        store_row(mean + at, mean_row, channels, D)
        store_row(rstd + at, rstd_row, channels, D)
    if not CENTRED:
        own = tl.full([BLOCK_D], 1.0, tl.float32)
        added = tl.zeros([BLOCK_D], tl.float32)
        if NDIM > 0:
            if row < 4**NDIM:
                rows = head_taps(taps, group % heads, NDIM, BLOCK_D)
                own = tl.zeros([BLOCK_D], tl.float32)
                for tap in range(3**NDIM):
                    o0, o1, o2 = tap_offset(tap, NDIM)
                    w = load_row(rows + tap * BLOCK_D, channels)
                    own += tl.where(has_neighbour(row, o0, o1, o2, NDIM), w, 0.0)
                added = load_row(rows + 3**NDIM * BLOCK_D, channels)
        at = offsets + tl.program_id(0).to(tl.int64) * BLOCK_D
        store_row(at, added - mean_row * rstd_row * own, channels, D)


@triton.jit
def merged_statistics(
    partial, group, channels, num_tokens, chunk, splits, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(biased variance + eps) of all tokens, ``[BLOCK_D]`` float32.

    Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    base = partial + group.to(tl.int64) * splits * 2 * D + channels[None, :]
    origin = tl.load(
        partial + group.to(tl.int64) * splits * 2 * D + channels, mask=channels < D, other=0.0
    )
    shift = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, splits, MERGED):
        split = first + tl.arange(0, MERGED)
        mask = (split < splits)[:, None] & (channels < D)[None, :]
        means = tl.load(base + split[:, None] * (2 * D), mask=mask, other=0.0)
        count = tl.minimum(chunk, num_tokens - split * chunk).to(tl.float32)[:, None]
        shift += tl.sum(tl.where(mask, count * (means - origin[None, :]), 0.0), 0)
    mean = origin + shift / num_tokens
    squares = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, splits, MERGED):
        split = first + tl.arange(0, MERGED)
        mask = (split < splits)[:, None] & (channels < D)[None, :]
        means = tl.load(base + split[:, None] * (2 * D), mask=mask, other=0.0)
        within = tl.load(base + split[:, None] * (2 * D) + D, mask=mask, other=0.0)
        count = tl.minimum(chunk, num_tokens - split * chunk).to(tl.float32)[:, None]
        step = means - mean[None, :]
        squares += tl.sum(tl.where(mask, within + count * step * step, 0.0), 0)
    variance = squares / num_tokens
    return mean, 1.0 / tl.sqrt(variance + tl.cast(eps, tl.float32))
