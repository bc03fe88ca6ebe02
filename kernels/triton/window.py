"""x + conv(x) of a tile that is loaded before the products of the tile before it.

A program that loads a tile when it wants it waits for the memory, then for its products. Here what
is around the quads of the next tile is on its way while this one's products are computed, as words
of two channels that are not converted yet: half the registers of what they become.
"""

import triton
import triton.language as tl

from .convolution import (
    add_taps,
    halved,
    joined,
    load_split,
    load_words,
    only_existing,
    other_tokens,
    quads_with,
    step,
)
from .tiles import NONE, QUAD, load_quads


@triton.constexpr_function
def loadable_ahead(ndim, unit, ahead):
    """``ahead``, or 0 where `load_window` does not know such a grid or such strides."""
    return ahead if ndim in (1, 2) and unit > 1 else 0


@triton.constexpr_function
def place_ahead(row, column, ndim, ahead):
    """Where `load_window` has what is at (row, column) from the first tokens of quads; -1 where it
    does not have it. ``ahead``: 1 for the columns that quads have themselves, 2 for those beside
    them too.
    """
    width, rows = (4, range(1)) if ndim == 1 else (2, range(-1, 3))
    columns = range(width) if ahead == 1 else range(-1, width + 1)
    places = [(r, c) for c in columns for r in rows]
    return places.index((row, column)) if (row, column) in places else -1


@triton.jit
def window_quads(quads, tile, end, places, L: tl.constexpr):
    """Of the L quads of a tile: the first token of the first one, the first tokens of all, counted
    from it, and flags. In a tile that is off the grid, or from ``end`` on, no quad exists.
    """
    num_quads, _, _, _, _, _ = places
    limit = tl.minimum(num_quads, end * L)
    at = tile * L
    first = tl.load(quads + at, mask=at < limit, other=0) >> QUAD
    at += tl.arange(0, L)
    quad = tl.load(quads + at, mask=at < limit, other=NONE)
    return first, ((quad >> QUAD) - first).to(tl.int32), quad.to(tl.int32)


@triton.jit
def load_window(
    base, window, places, stride_n,
    D: tl.constexpr, NDIM: tl.constexpr, UNIT: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What is around the quads that `window_quads` told of, as far as it is loaded ahead, by column
    and then by row: words ``[L, BLOCK_D / 2]``; 0 where no token is.
    """
    WIDTH: tl.constexpr = 4 if NDIM == 1 else 2  # of a quad
    HEIGHT: tl.constexpr = 4 // WIDTH
    MORE: tl.constexpr = 1 if HEIGHT > 1 else 0  # rows above and below it
    first, at, flags = window
    _, _, _, _, _, g2 = places
    halves = tl.arange(0, BLOCK_D // 2)
    right = step(stride_n, UNIT)
    start = base + first * (stride_n * UNIT)
    words = ()
    for column in tl.static_range(-1, WIDTH + 1):
        for row in tl.static_range(-MORE, HEIGHT + MORE):
            if place_ahead(row, column, NDIM, AHEAD) >= 0:
                there = quads_with(flags, 0, row, column)
                shift = row * (g2 * right) + column * right
                words += (load_words(start, at * right, halves, shift, there, D, False),)  # type: ignore[assignment]
    return words


@triton.jit
def convolved_window(
    words, base, quads, place, places, stride_n, stride_d, taps,
    D: tl.constexpr, NDIM: tl.constexpr, UNIT: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What ``convolved_tile`` gives without a norm, to the bit. ``words``: of this tile, if it is
    on the grid; the rest is loaded now.
    """
    _, on_grid, first, count = place
    start = base + first * (stride_n * UNIT)
    right = step(stride_n, UNIT)
    L: tl.constexpr = BLOCK_N // 4
    if on_grid:
        _, _, _, _, _, g2 = places
        sums = window_sums(
            words, start, quads, place, places, right, g2 * right, taps, D, NDIM, AHEAD, L, BLOCK_D
        )
    else:
        sums = other_tokens(
            start, count, right, stride_d, None, (None, None, None, None),
            D, NDIM, False, False, UNIT, L, BLOCK_D,
        )  # fmt: skip
    return joined(sums)


@triton.jit
def window_sums(
    words, start, quads, place, places, right, down, taps,
    D: tl.constexpr, NDIM: tl.constexpr, AHEAD: tl.constexpr, L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Even and odd channels of the four tokens of L quads; terms in the order of ``add_frame``."""
    HALF_D: tl.constexpr = BLOCK_D // 2
    WIDTH: tl.constexpr = 4 if NDIM == 1 else 2
    HEIGHT: tl.constexpr = 4 // WIDTH
    MORE: tl.constexpr = 1 if HEIGHT > 1 else 0
    halves = tl.arange(0, HALF_D)
    at, flags = load_quads(quads, place, places, tl.arange(0, L), L)
    b_even, b_odd = load_split(taps + 3**NDIM * BLOCK_D, halves)
    bias = tl.broadcast_to(b_even, [L, HALF_D]), tl.broadcast_to(b_odd, [L, HALF_D])
    sums = bias + bias + bias + bias
    for column in tl.static_range(-1, WIDTH + 1):
        for row in tl.static_range(-MORE, HEIGHT + MORE):
            if place_ahead(row, column, NDIM, AHEAD) >= 0:
                word = words[place_ahead(row, column, NDIM, AHEAD)]
            else:
                there = quads_with(flags, 0, row, column)
                shift = row * down + column * right
                word = load_words(start, at * right, halves, shift, there, D, False)
            near = halved(word, start.dtype.element_ty)
            for x in tl.static_range(WIDTH):
                if (column >= x - 1) & (column <= x + 1):
                    tap = taps + (column - x + 1) * BLOCK_D
                    sums = add_taps(sums, near, tap, halves, row, 1, x, WIDTH)
    return only_existing(sums, flags, start.dtype.element_ty, WIDTH)
