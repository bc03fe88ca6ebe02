"""Back through x + conv(x) and the key norm: from the gradient at the convolved keys or queries.

Let g be that gradient, x^ = (x - mean) rstd, y = x^ + conv(x^). Then, t a tap and d_t its place::

    dx^[n] = g[n] + sum over t of w_t g[n - d_t]
    dw_t   = sum over n of x^[n] g[n - d_t]
    dx     = rstd (dx^ - sum(dx^) / N - x^ sum(dx^ x^) / N)      sums over the tokens of a channel

The first two read the same neighbours of g, so that one pass has both, and the last two sums; the
second pass has no neighbours.
"""

import triton
import triton.language as tl

from .tiles import (
    SIZES,
    has_neighbour,
    head_base,
    load_row,
    load_statistics,
    load_tile,
    store_tile,
    tap_offset,
)


@triton.jit
def add_at(sums, place: tl.constexpr, term):
    """The tuple with a term added to one of its members."""
    return sums[:place] + (sums[place] + term,) + sums[place + 1 :]


@triton.jit
def normed_tile(
    base, start, lanes, channels, inside, D: tl.constexpr, stride_n, stride_d, mean, rstd,
    NORM: tl.constexpr,
):  # fmt: skip
    """x^ in float32; x itself unless ``NORM``."""
    x = load_tile(base, start, lanes, channels, inside, D, stride_n, stride_d).to(tl.float32)
    if NORM:
        x = (x - mean[None, :]) * rstd[None, :]
    return x


@triton.jit(do_not_specialize=SIZES)
def convolution_gradient(
    x, g, codes, taps, mean, rstd, partial, dx,
    stride_b, stride_h, stride_n, stride_d, groups, heads, num_tokens, chunk, splits, g1, g2,
    D: tl.constexpr, NDIM: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx^ ``[B, N, H, D]`` and partial ``[splits, B*H, COUNT, D]`` float32 of a chunk of tokens:
    sum(dx^) and sum(dx^ x^) if ``KEYS``, what the bias gets, and what each tap gets.

    g is ``[B, N, H, D]``, contiguous. Without a convolution dx^ is g and is not written.
    """
    TAPS: tl.constexpr = 3**NDIM if NDIM > 0 else 0
    OWN: tl.constexpr = 2 if KEYS else 0
    COUNT: tl.constexpr = OWN + TAPS + (1 if NDIM > 0 else 0)
    group = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    head = group % heads
    lanes = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    mean_row, rstd_row = None, None
    if KEYS:
        mean_row, rstd_row = load_statistics(mean, rstd, group, channels, D)
    x_base = head_base(x, group, heads, stride_b, stride_h)
    first_token = (group // heads).to(tl.int64) * num_tokens * heads + head
    g_base = g + first_token * D
    dx_base = dx + first_token * D
    taps += head * (3**NDIM * D)

    # Sums of each lane; lanes are added up at the end.
    sums = (tl.zeros([BLOCK_N, BLOCK_D], tl.float32),) * COUNT
    begin = split * chunk
    for start in range(begin, tl.minimum(begin + chunk, num_tokens), BLOCK_N):
        tokens = start + lanes
        inside = tokens < num_tokens
        normed = normed_tile(
            x_base, start, lanes, channels, inside, D, stride_n, stride_d, mean_row, rstd_row, KEYS
        )
        here = load_tile(g_base, start, lanes, channels, inside, D, heads * D, 1).to(tl.float32)
        out = here
        if NDIM > 0:
            code = tl.load(codes + tokens, mask=inside, other=4**NDIM).to(tl.int32)
            for tap in tl.static_range(TAPS):
                o0, o1, o2 = tap_offset(tap, NDIM)
                valid = has_neighbour(code, -o0, -o1, -o2, NDIM)
                if tap == TAPS // 2:
                    near = tl.where(valid[:, None], here, 0.0)
                    sums = add_at(sums, OWN, near)
                else:
                    near = load_tile(
                        g_base, start - ((o0 * g1 + o1) * g2 + o2), lanes, channels, valid, D,
                        heads * D, 1,
                    ).to(tl.float32)  # fmt: skip
                out += load_row(taps + tap * D, channels, D)[None, :] * near
                sums = add_at(sums, OWN + 1 + tap, normed * near)
            store_tile(dx_base, out, start, lanes, channels, inside, D, heads * D)
            # The sums are of what is stored: where all tokens agree, nothing must be left.
            out = out.to(dx.dtype.element_ty).to(tl.float32)
        if KEYS:  # 0 outside, where g is 0
            sums = add_at(sums, 0, out)
            sums = add_at(sums, 1, out * normed)

    row = partial + (split.to(tl.int64) * groups + group) * (COUNT * D) + channels
    for i in tl.static_range(COUNT):
        tl.store(row + i * D, tl.sum(sums[i], 0), mask=channels < D)


@triton.jit(do_not_specialize=SIZES)
def key_norm_gradient(
    k, dx, sums, mean, rstd, stride_b, stride_h, stride_n, stride_d,
    heads, num_tokens, chunk, splits,
    D: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From dx^ to dx, in its place; ``sums`` ``[B*H, COUNT, D]``: sum(dx^), sum(dx^ x^), others."""
    group = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    lanes = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    mean_row, rstd_row = load_statistics(mean, rstd, group, channels, D)
    sums += group.to(tl.int64) * (COUNT * D)
    first = load_row(sums, channels, D) / num_tokens
    second = load_row(sums + D, channels, D) / num_tokens
    k_base = head_base(k, group, heads, stride_b, stride_h)
    dx += ((group // heads).to(tl.int64) * num_tokens * heads + group % heads) * D

    begin = split * chunk
    for start in range(begin, tl.minimum(begin + chunk, num_tokens), BLOCK_N):
        inside = start + lanes < num_tokens
        normed = normed_tile(
            k_base, start, lanes, channels, inside, D, stride_n, stride_d, mean_row, rstd_row, True
        )
        out = load_tile(dx, start, lanes, channels, inside, D, heads * D, 1).to(tl.float32)
        out = rstd_row[None, :] * (out - first[None, :] - normed * second[None, :])
        store_tile(dx, out, start, lanes, channels, inside, D, heads * D)
