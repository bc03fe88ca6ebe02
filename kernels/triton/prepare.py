"""What the other kernels want to know before they begin.

Mean and reciprocal standard deviation of the keys of each (batch item, head), by channel, come in
two steps, so that the tokens of one head can be shared among programs: each of ``prepare`` writes
mean and sum of squared deviations of its tokens, and ``key_norm`` merges them, in one fixed order.
Deviations are from tokens at hand, never from 0: a shift that all keys share costs no digits.
"""

import triton
import triton.language as tl

from .tiles import SIZES, has_neighbour, head_base, load_row, load_tile, tap_offset

#: Splits that are merged at a time, and tokens whose mean is the origin of a chunk's sums.
MERGED = tl.constexpr(16)


@triton.jit(do_not_specialize=SIZES)
def prepare(
    k, weight_q, weight_k, partial, codes, taps,
    stride_b, stride_h, stride_n, stride_d, heads, num_tokens, chunk, splits, prefix, g0, g1, g2,
    D: tl.constexpr, NDIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program for each (batch item, head) and chunk of tokens; three things, of which only
    some programs have the others to do:

    partial ``[B*H, splits, 2, D]`` float32: mean and sum of squared deviations of a chunk of keys;
    codes ``[N]`` uint8: where each token lies on the grid (see ``tiles``);
    taps ``[2, H, 3**NDIM, D]`` float32: the kernels of q's and k's convolution, channels last.
    """
    group = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    base = head_base(k, group, heads, stride_b, stride_h)
    channels = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_N)
    begin = split * chunk
    end = tl.minimum(begin + chunk, num_tokens)

    few = tl.arange(0, MERGED)
    some = load_tile(base, begin, few, channels, begin + few < end, D, stride_n, stride_d)
    origin = tl.sum(some.to(tl.float32), 0) / tl.minimum(end - begin, MERGED)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        inside = start + lanes < end
        x = load_tile(base, start, lanes, channels, inside, D, stride_n, stride_d).to(tl.float32)
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
            for start in range(begin, end, BLOCK_N):
                cell = start + lanes - prefix
                i2, i1, i0 = cell % g2, cell // g2 % g1, cell // (g2 * g1)
                code = tl.where(i2 == 0, 1, 0) + tl.where(i2 == g2 - 1, 2, 0)
                if NDIM > 1:
                    code += tl.where(i1 == 0, 4, 0) + tl.where(i1 == g1 - 1, 8, 0)
                if NDIM > 2:
                    code += tl.where(i0 == 0, 16, 0) + tl.where(i0 == g0 - 1, 32, 0)
                code = tl.where((cell >= 0) & (cell < g0 * g1 * g2), code, 4**NDIM)
                tl.store(codes + start + lanes, code.to(tl.uint8), mask=start + lanes < end)
        if (group < heads) & (split == 0):
            for tap in range(3**NDIM):
                source = (group * D + channels) * 3**NDIM + tap
                target = taps + (group * 3**NDIM + tap) * D + channels
                of_q = tl.load(weight_q + source, mask=channels < D, other=0.0)
                of_k = tl.load(weight_k + source, mask=channels < D, other=0.0)
                tl.store(target, of_q.to(tl.float32), mask=channels < D)
                target += heads * (3**NDIM * D)
                tl.store(target, of_k.to(tl.float32), mask=channels < D)


@triton.jit(do_not_specialize=SIZES)
def key_norm(
    partial, taps, bias, mean, rstd, offsets, heads, num_tokens, chunk, splits, eps,
    D: tl.constexpr, NDIM: tl.constexpr, CENTRED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mean and rstd ``[B*H, D]``: of all tokens, and 1 / sqrt(biased variance + eps).

    Unless ``CENTRED`` also offsets ``[B*H, rows, D]``, with a row for each code that a token can
    have: bias - mean rstd (1 + the taps that have a neighbour). One program for each row.
    """
    ROWS: tl.constexpr = 1 if CENTRED or NDIM == 0 else 4**NDIM + 1
    group = tl.program_id(0) // ROWS
    row = tl.program_id(0) % ROWS
    channels = tl.arange(0, BLOCK_D)
    inside = channels < D
    mean_row, rstd_row = merged_statistics(
        partial, group, channels, num_tokens, chunk, splits, eps, D, BLOCK_D
    )
    if row == 0:
        tl.store(mean + group.to(tl.int64) * D + channels, mean_row, mask=inside)
        tl.store(rstd + group.to(tl.int64) * D + channels, rstd_row, mask=inside)
    if not CENTRED:
        own = tl.full([BLOCK_D], 1.0, tl.float32)
        added = tl.zeros([BLOCK_D], tl.float32)
        if NDIM > 0:
            head = group % heads
            for tap in range(3**NDIM):
                o0, o1, o2 = tap_offset(tap, NDIM)
                w = load_row(taps + (head * 3**NDIM + tap) * D, channels, D)
                own += tl.where(has_neighbour(row, o0, o1, o2, NDIM), w, 0.0)
            on_grid = row < 4**NDIM
            added = tl.where(on_grid, load_row(bias + head * D, channels, D), 0.0)
        at = offsets + tl.program_id(0).to(tl.int64) * D + channels
        tl.store(at, added - mean_row * rstd_row * own, mask=inside)


@triton.jit
def merged_statistics(
    partial, group, channels, num_tokens, chunk, splits, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(biased variance + eps) of all tokens, ``[BLOCK_D]`` float32.

    Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    base = partial + group.to(tl.int64) * splits * 2 * D + channels[None, :]
    origin = load_row(partial + group.to(tl.int64) * splits * 2 * D, channels, D)
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
