"""Mean and reciprocal standard deviation of the keys of each (batch item, head), by channel.

Two steps, so that the tokens of one head can be shared among programs: each writes mean and sum of
squared deviations of its tokens, and whoever reads them merges them, in one fixed order. Deviations
are from means of the tokens at hand, never from 0: a shift that all keys share costs no digits.
"""

import triton
import triton.language as tl

from .tiles import SIZES, head_base, load_tile

#: Splits that are merged at a time.
MERGED = tl.constexpr(16)


@triton.jit(do_not_specialize=SIZES)
def key_statistics(
    k, partial, stride_b, stride_h, stride_n, stride_d, heads, num_tokens, chunk, splits,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial ``[B*H, splits, 2, D]`` float32: mean and sum of squared deviations of a chunk."""
    group = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    base = head_base(k, group, heads, stride_b, stride_h)
    channels = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_N)
    begin = split * chunk
    end = tl.minimum(begin + chunk, num_tokens)

    # The first token is the origin of all sums.
    first = base + begin.to(tl.int64) * stride_n + channels * stride_d
    origin = tl.load(first, mask=channels < D, other=0.0).to(tl.float32)
    mean = tl.zeros([BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        inside = (start + lanes < end)[:, None]
        x = load_tile(base, start, lanes, channels, num_tokens, D, stride_n, stride_d).to(
            tl.float32
        )
        x = tl.where(inside, x - origin[None, :], 0.0)
        count = tl.minimum(end - start, BLOCK_N).to(tl.float32)
        tile_mean = tl.sum(x, 0) / count
        deviation = tl.where(inside, x - tile_mean[None, :], 0.0)
        # Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances"
        seen = (start - begin).to(tl.float32)
        step = tile_mean - mean
        squares += tl.sum(deviation * deviation, 0) + step * step * (seen * count / (seen + count))
        mean += step * (count / (seen + count))

    row = partial + tl.program_id(0).to(tl.int64) * 2 * D + channels
    tl.store(row, origin + mean, mask=channels < D)
    tl.store(row + D, squares, mask=channels < D)


@triton.jit
def merged_statistics(
    partial, group, channels, num_tokens, chunk, splits, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(biased variance + eps) of all tokens, ``[BLOCK_D]`` float32."""
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
