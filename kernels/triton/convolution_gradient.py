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

from .convolution import (
    add_at,
    centred,
    head_taps,
    joined,
    load_halves,
    load_row,
    load_split,
    load_statistics,
    quads_with,
    scaled,
    step,
)
from .tiles import (
    NONE,
    SIZES,
    head_base,
    load_quads,
    load_tile,
    own_tiles,
    quad_places,
    store_tile,
    tile_place,
    tile_tokens,
)


@triton.jit
def normed_halves(
    start, at, halves, shift, valid, D: tl.constexpr, stride_d, UNIT: tl.constexpr,
    statistics, NORM: tl.constexpr,
):  # fmt: skip
    """x^ of the valid tokens, even and odd channels in float32; x itself unless ``NORM``."""
    even, odd = load_halves(start, at, halves, shift, valid, D, stride_d, UNIT)
    if NORM:
        mean_even, mean_odd, rstd_even, rstd_odd = statistics
        even, odd = centred(even, odd, mean_even, mean_odd, valid, True)
        even, odd = even * rstd_even, odd * rstd_odd
    return even, odd


@triton.constexpr_function
def is_member(row, column, width):
    """Whether (row, column) from the first token of a quad is in it."""
    return 0 <= row < 4 // width and 0 <= column < width


@triton.constexpr_function
def near(row, column, member, width):
    """Whether it is next to a member of the quad, or that member."""
    return abs(row - member // width) <= 1 and abs(column - member % width) <= 1


@triton.constexpr_function
def tap_to(frame, row, column, member, ndim):
    """The tap by which it was given something by the member: the place of the member from there."""
    width = 4 if ndim == 1 else 2
    places = (-frame, member // width - row, member % width - column)[3 - ndim :]
    return sum(3**i * (place + 1) for i, place in enumerate(reversed(places)))


@triton.jit
def add_tap(
    outs, sums, member: tl.constexpr, even, odd, xs, taps, first: tl.constexpr, tap: tl.constexpr
):
    """What a neighbour's gradient gives to dx^ of a member of a quad, and to the sum of a tap."""
    w_even, w_odd = load_split(taps + tap * (2 * even.shape[1]), tl.arange(0, even.shape[1]))
    outs = add_at(outs, member, w_even * even, w_odd * odd)
    x_even, x_odd = xs[2 * member], xs[2 * member + 1]
    return outs, add_at(sums, first + tap, x_even * even, x_odd * odd)


@triton.jit
def add_own(sums, x_even, x_odd, even, odd, dtype: tl.constexpr):
    """sum(dx^) and sum(dx^ x^) with some tokens' added, of dx^ as it is stored: where all tokens
    agree, nothing must be left. dx^ is 0 where no tokens are.
    """
    even, odd = even.to(dtype).to(tl.float32), odd.to(dtype).to(tl.float32)
    return add_at(add_at(sums, 0, even, odd), 1, even * x_even, odd * x_odd)


@triton.jit(do_not_specialize=SIZES)
def convolution_gradient(
    x, g, taps, mean, rstd, unscale, partial, dx,
    stride_b, stride_h, stride_n, stride_d, groups, heads, chunk, splits, tiles,
    quads, num_quads, prefix, grid_tokens, num_tokens, g1, g2,
    D: tl.constexpr, NDIM: tl.constexpr, UNIT: tl.constexpr, KEYS: tl.constexpr,
    SCALED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx^ ``[B, N, H, D]`` and partial ``[splits, B*H, COUNT, D]`` float32 of a chunk of tiles:
    sum(dx^) and sum(dx^ x^) if ``KEYS``, what the bias gets, and what each tap gets.

    g is ``[B, N, H, D]``, contiguous. Without a convolution dx^ is g and is not written.
    SCALED: g is scaled, and ``unscale`` ``[B*H]`` undoes it: for what the taps and the bias get
    and, unless ``KEYS``, dx^.
    """
    TAPS: tl.constexpr = 3**NDIM if NDIM > 0 else 0
    OWN: tl.constexpr = 2 if KEYS else 0
    COUNT: tl.constexpr = OWN + TAPS + (1 if NDIM > 0 else 0)
    WIDTH: tl.constexpr = 4 if NDIM == 1 else 2  # of a quad
    HEIGHT: tl.constexpr = 4 // WIDTH
    MORE: tl.constexpr = 0 if NDIM == 1 else 1  # rows above and below it
    AHEAD: tl.constexpr = 1 if NDIM == 3 else 0  # frames before and behind it
    G_UNIT: tl.constexpr = 8 if D % 8 == 0 else (2 if D % 2 == 0 else 1)
    L: tl.constexpr = BLOCK_N // 4
    HALF_D: tl.constexpr = BLOCK_D // 2
    dtype: tl.constexpr = dx.dtype.element_ty
    group = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    head = group % heads
    lanes = tl.arange(0, L)
    halves = tl.arange(0, HALF_D)
    channels = tl.arange(0, BLOCK_D)
    statistics = (None, None, None, None)
    if KEYS:
        statistics = load_statistics(mean, rstd, group, halves)
    x_base = head_base(x, group, heads, stride_b, stride_h, UNIT)
    first_token = (group // heads).to(tl.int64) * num_tokens * heads + head
    g_base = g + first_token * D
    dx_base = dx + first_token * D
    x_right = step(stride_n, UNIT)
    right = step(heads * (D // G_UNIT), G_UNIT)
    taps = head_taps(taps, head, NDIM, BLOCK_D)
    undo = tl.load(unscale + group) if SCALED else 1.0

    # Sums of each lane; lanes are added up at the end.
    sums = (tl.zeros([L, HALF_D], tl.float32),) * (2 * COUNT)
    places = (num_quads, prefix, grid_tokens, num_tokens, g1, g2)
    begin, end = own_tiles(split, chunk, tiles)
    grid_tiles = tl.cast(tl.cdiv(num_quads, L), tl.int32)
    if NDIM > 0:
        for tile in range(begin, tl.minimum(end, grid_tiles)):
            at, known = quad_places(tile, 0, places, BLOCK_N)
            first_quad = tl.load(quads + at, mask=known, other=0)
            place = tile_place(tile, first_quad, places, NDIM, BLOCK_N)
            first = place[2]
            at, flags = load_quads(quads, place, places, lanes, L)
            x_start = x_base + first * (stride_n * UNIT)
            xs = ()
            for member in tl.static_range(4):
                there = quads_with(flags, 0, member // WIDTH, member % WIDTH)
                shift = member // WIDTH * g2 * x_right + member % WIDTH * x_right
                xs += normed_halves(
                    x_start, at * x_right, halves, shift, there, D, stride_d, UNIT, statistics, KEYS
                )
            outs = (tl.zeros([L, HALF_D], tl.float32),) * 8
            for frame in tl.static_range(-AHEAD, AHEAD + 1):
                start = g_base + (first + frame * g1 * g2) * heads * D
                for column in tl.static_range(-1, WIDTH + 1):
                    for row in tl.static_range(-MORE, HEIGHT + MORE):
                        there = quads_with(flags, frame, row, column)
                        shift = (row * g2 + column) * right
                        even, odd = load_halves(
                            start, at * right, halves, shift, there, D, 1, G_UNIT
                        )
                        if frame == 0 and is_member(row, column, WIDTH):
                            sums = add_at(sums, OWN, even, odd)
                        for member in tl.static_range(4):
                            if near(row, column, member, WIDTH):
                                outs, sums = add_tap(
                                    outs, sums, member, even, odd, xs, taps, OWN + 1,
                                    tap_to(frame, row, column, member, NDIM),
                                )  # fmt: skip
            if SCALED and not KEYS:
                for member in tl.static_range(4):
                    outs = scaled(outs, member, undo, undo)
            if KEYS:
                for member in tl.static_range(4):
                    there = quads_with(flags, 0, member // WIDTH, member % WIDTH)
                    outs = scaled(
                        outs, member, there.to(tl.float32)[:, None], there.to(tl.float32)[:, None]
                    )
                    sums = add_own(
                        sums, xs[2 * member], xs[2 * member + 1], outs[2 * member],
                        outs[2 * member + 1], dtype,
                    )  # fmt: skip
            at, known = quad_places(tile, tl.arange(0, BLOCK_N), places, BLOCK_N)
            quad = tl.load(quads + at, mask=known, other=NONE)
            tokens, exist = tile_tokens(place, quad, places, NDIM, BLOCK_N)
            dx_start = dx_base + first * heads * D
            store_tile(dx_start, joined(outs), tokens, channels, exist, D, heads)

    for tile in range(tl.maximum(begin, grid_tiles), end):  # off the grid dx^ is g
        _, _, first, count = tile_place(tile, tl.cast(0, tl.int64), places, NDIM, BLOCK_N)
        for member in tl.static_range(4):
            tokens = lanes + member * L
            there = tokens < count
            even, odd = load_halves(
                g_base + first * heads * D, tokens * right, halves, 0, there, D, 1, G_UNIT
            )
            if NDIM > 0:
                out = tl.join(even, odd).reshape(L, BLOCK_D)
                if SCALED and not KEYS:
                    out *= undo
                store_tile(dx_base + first * heads * D, out, tokens, channels, there, D, heads)
            if KEYS:
                x_even, x_odd = normed_halves(
                    x_base + first * (stride_n * UNIT), tokens * x_right, halves, 0, there, D,
                    stride_d, UNIT, statistics, KEYS,
                )  # fmt: skip
                sums = add_own(sums, x_even, x_odd, even, odd, dtype)

    row = partial + (split.to(tl.int64) * groups + group) * (COUNT * D) + 2 * halves
    for i in tl.static_range(COUNT):
        even, odd = tl.sum(sums[2 * i], 0), tl.sum(sums[2 * i + 1], 0)
        if SCALED and i >= OWN:
            even, odd = even * undo, odd * undo
        tl.store(row + i * D, even, mask=2 * halves < D)
        tl.store(row + i * D + 1, odd, mask=2 * halves + 1 < D)


@triton.jit(do_not_specialize=SIZES)
def key_norm_gradient(
    k, dx, sums, mean, rstd, unscale, stride_b, stride_h, stride_n, stride_d,
    heads, num_tokens, chunk, splits,
    D: tl.constexpr, COUNT: tl.constexpr, UNIT: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From dx^ to dx, in its place; ``sums`` ``[B*H, COUNT, D]``: sum(dx^), sum(dx^ x^), others.

    SCALED: dx^ and its sums are scaled, and ``unscale`` ``[B*H]`` undoes it.
    """
    group = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    lanes = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    at = group.to(tl.int64) * BLOCK_D
    mean_row, rstd_row = load_row(mean + at, channels), load_row(rstd + at, channels)
    sums += group.to(tl.int64) * (COUNT * D) + channels
    first = tl.load(sums, mask=channels < D, other=0.0) / num_tokens
    second = tl.load(sums + D, mask=channels < D, other=0.0) / num_tokens
    undo = tl.load(unscale + group) if SCALED else 1.0
    k_base = head_base(k, group, heads, stride_b, stride_h, UNIT)
    dx += ((group // heads).to(tl.int64) * num_tokens * heads + group % heads) * D

    begin = split * chunk
    for start in range(begin, tl.minimum(begin + chunk, num_tokens), BLOCK_N):
        inside = start + lanes < num_tokens
        k_start = k_base + tl.cast(start, tl.int64) * (stride_n * UNIT)
        dx_start = dx + tl.cast(start, tl.int64) * heads * D
        x = load_tile(k_start, lanes, channels, inside, D, stride_n, stride_d, UNIT).to(tl.float32)
        normed = (x - mean_row[None, :]) * rstd_row[None, :]
        out = load_tile(dx_start, lanes, channels, inside, D, heads, 1, D).to(tl.float32)
        out = rstd_row[None, :] * (out - first[None, :] - normed * second[None, :])
        if SCALED:
            out *= undo
        store_tile(dx_start, out, lanes, channels, inside, D, heads)
