"""Back through x + conv(x) and the key norm: from the gradient at the convolved keys or queries.

Let g be that gradient, x^ = (x - mean) rstd, y = x^ + conv(x^). The convolution is linear, so that
everything else than conv's own gradients needs its adjoint only::

    dx^ = g + conv^T(g)
    dx  = rstd (dx^ - sum(dx^) / N - x^ sum(dx^ x^) / N)      sums over the tokens of a channel
    sum(dx^) = sum(g (1 + conv(1))),  sum(dx^ x^) = sum(g (x^ + conv(x^)))      conv without bias

The right-hand sides of the last line are summed up together with conv's gradients, in one pass.
"""

import triton
import triton.language as tl

from .tiles import (
    SIZES,
    convolved_tile,
    head_base,
    is_on_grid,
    load_centred,
    load_tile,
    row_offset,
    store_tile,
)

#: What ``convolution_sums`` writes for each row of taps: three of the weight's gradient, the bias's
#: (of the middle row), and what the row adds to sum(dx^) and sum(dx^ x^).
SUMS = 6


@triton.jit(do_not_specialize=SIZES)
def convolution_sums(
    x, g, taps, mean, rstd, partial,
    stride_b, stride_h, stride_n, stride_d,
    groups, heads, num_tokens, chunk, splits, conv_rows, prefix, g0, g1, g2,
    D: tl.constexpr, NDIM: tl.constexpr, NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial ``[splits, B*H, conv_rows, 6, D]`` float32; g is ``[B, N, H, D]``, contiguous.

    One program for each (batch item, head), chunk of tokens and row of taps. Without ``NORM`` the
    last two sums are not written.
    """
    row = tl.program_id(0) % conv_rows
    program = tl.program_id(0) // conv_rows
    group = program // splits
    split = program % splits
    head = group % heads
    lanes = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    in_head = channels < D
    mean_row = tl.zeros([BLOCK_D], tl.float32)
    rstd_row = mean_row
    if NORM:
        mean_row = tl.load(mean + group.to(tl.int64) * D + channels, mask=in_head, other=0.0)
        rstd_row = tl.load(rstd + group.to(tl.int64) * D + channels, mask=in_head, other=0.0)
    x_base = head_base(x, group, heads, stride_b, stride_h)
    g_base = g + ((group // heads).to(tl.int64) * num_tokens * heads + head) * D
    own = tl.where(row == conv_rows // 2, 1.0, 0.0)  # x^ itself belongs to the middle row

    # Sums of each lane; lanes are added up at the end.
    left = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    middle = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    right = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    ones = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin = split * chunk
    for start in range(begin, tl.minimum(begin + chunk, num_tokens), BLOCK_N):
        tokens = start + lanes
        g_tile = load_tile(g_base, start, lanes, channels, num_tokens, D, heads * D, 1)
        g_tile = g_tile.to(tl.float32)
        if NORM:
            inside = tokens < num_tokens
            near = load_centred(
                x_base, start, lanes, channels, inside, mean_row, D, stride_n, stride_d, NORM
            )  # fmt: skip
            ones += own * g_tile
            keys += own * g_tile * near
        if NDIM > 0:
            cell = tokens - prefix
            on_grid = is_on_grid(cell, 0, 0, 0, g0, g1, g2)
            total += tl.where(on_grid[:, None], g_tile, 0.0)
            o0, o1 = row_offset(row, NDIM)
            for o2 in tl.static_range(-1, 2):
                valid = is_on_grid(cell, o0, o1, o2, g0, g1, g2)
                delta = (o0 * g1 + o1) * g2 + o2
                near = load_centred(
                    x_base, start + delta, lanes, channels, valid, mean_row, D,
                    stride_n, stride_d, NORM,
                )  # fmt: skip
                product = g_tile * near
                if o2 < 0:
                    left += product
                elif o2 == 0:
                    middle += product
                else:
                    right += product
                if NORM:
                    tap = head * (3**NDIM) + row * 3 + 1 + o2
                    w = tl.load(taps + tap * D + channels, mask=in_head, other=0.0)
                    ones += tl.where(valid[:, None], w[None, :] * g_tile, 0.0)
                    keys += w[None, :] * product

    scale = rstd_row if NORM else 1.0
    at = (split.to(tl.int64) * groups + group) * conv_rows + row
    out = partial + at * (6 * D) + channels
    tl.store(out, tl.sum(left, 0) * scale, mask=in_head)
    tl.store(out + D, tl.sum(middle, 0) * scale, mask=in_head)
    tl.store(out + 2 * D, tl.sum(right, 0) * scale, mask=in_head)
    tl.store(out + 3 * D, tl.sum(total, 0), mask=in_head)
    if NORM:
        tl.store(out + 4 * D, tl.sum(ones, 0), mask=in_head)
        tl.store(out + 5 * D, tl.sum(keys, 0) * scale, mask=in_head)


@triton.jit(do_not_specialize=SIZES)
def input_gradient(
    x, g, taps, mean, rstd, sums, dx,
    stride_b, stride_h, stride_n, stride_d,
    heads, num_tokens, chunk, splits, conv_rows, prefix, g0, g1, g2,
    D: tl.constexpr, NDIM: tl.constexpr, NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx from g, both ``[B, N, H, D]`` and contiguous.

    ``sums``: sum(dx^) and sum(dx^ x^), ``[B*H, 2, D]`` float32. Without ``NORM`` dx = dx^, and of x
    nothing is read.
    """
    group = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    head = group % heads
    lanes = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    in_head = channels < D
    zeros = tl.zeros([BLOCK_D], tl.float32)
    if NORM:
        mean_row = tl.load(mean + group.to(tl.int64) * D + channels, mask=in_head, other=0.0)
        rstd_row = tl.load(rstd + group.to(tl.int64) * D + channels, mask=in_head, other=0.0)
        share = 1.0 / num_tokens
        at = sums + group.to(tl.int64) * (2 * D) + channels
        mean_gradient = tl.load(at, mask=in_head, other=0.0) * share
        mean_product = tl.load(at + D, mask=in_head, other=0.0) * share
    x_base = head_base(x, group, heads, stride_b, stride_h)
    first_token = (group // heads).to(tl.int64) * num_tokens * heads + head
    g_base = g + first_token * D
    dx_base = dx + first_token * D

    begin = split * chunk
    for start in range(begin, tl.minimum(begin + chunk, num_tokens), BLOCK_N):
        out = convolved_tile(
            g_base, start, lanes, channels, num_tokens, D, heads * D, 1,
            taps + head * (3**NDIM * D), taps, zeros, zeros,
            conv_rows, prefix, g0, g1, g2, NDIM, False, -1,
        )  # fmt: skip
        if NORM:
            inside = start + lanes < num_tokens
            normed = load_centred(
                x_base, start, lanes, channels, inside, mean_row, D, stride_n, stride_d, NORM
            )  # fmt: skip
            normed *= rstd_row[None, :]
            out = out - mean_gradient[None, :] - normed * mean_product[None, :]
            out *= rstd_row[None, :]
        store_tile(dx_base, out, start, lanes, channels, num_tokens, D, heads * D)
