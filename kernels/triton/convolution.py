"""x + conv(x) of a tile of tokens, depthwise: device code of the kernels that multiply it.

Rows of channels that the kernels keep for one another are as wide as a tile, 0 where channels are
missing, and split: even channels, then odd ones, as the convolution takes two channels of 16 bits
from one register.
"""

import triton
import triton.language as tl

from .tiles import NONE, load_quads, tile_mask


@triton.jit
def split_place(channels):
    """Where channels lie in a split row."""
    return channels % 2 * (channels.shape[0] // 2) + channels // 2


@triton.jit
def load_row(ptr, channels):
    """``[BLOCK_D]`` of one split row, in order."""
    return tl.load(ptr + split_place(channels))


@triton.jit
def store_row(ptr, row, channels, D: tl.constexpr):
    """Writes a row of channels as a split one."""
    tl.store(ptr + split_place(channels), tl.where(channels < D, row, 0.0))


@triton.jit
def load_split(ptr, halves):
    """The even and the odd channels of one split row, ``[1, BLOCK_D / 2]`` each."""
    return tl.load(ptr + halves)[None, :], tl.load(ptr + halves.shape[0] + halves)[None, :]


@triton.jit
def load_splits(ptr, rows, halves):
    """The same of several rows of a table, ``[number of rows, BLOCK_D / 2]`` each."""
    at = (rows * (2 * halves.shape[0]))[:, None] + halves[None, :]
    return tl.load(ptr + at), tl.load(ptr + halves.shape[0] + at)


@triton.jit
def load_statistics(mean, rstd, group, halves):
    """Mean and 1/std of the keys of a (batch item, head): even and odd channels of both."""
    at = group.to(tl.int64) * (2 * halves.shape[0])
    return load_split(mean + at, halves) + load_split(rstd + at, halves)


@triton.jit
def group_offsets(offsets, group, NDIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The table of a (batch item, head), with a row for each code that a token can have."""
    return offsets + group.to(tl.int64) * ((4**NDIM + (1 if NDIM > 0 else 0)) * BLOCK_D)


@triton.jit
def head_taps(taps, head, NDIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows of a head: one for each tap, then the bias."""
    return taps + head * ((3**NDIM + 1) * BLOCK_D if NDIM > 0 else 0)


@triton.jit
def tap_offset(tap, NDIM: tl.constexpr):
    """The place (o0, o1, o2) of one of the 3**NDIM taps; missing axes come first."""
    o0 = tap // 9 - 1 if NDIM == 3 else 0
    o1 = tap // 3 % 3 - 1 if NDIM > 1 else 0
    return o0, o1, tap % 3 - 1


@triton.jit
def has_neighbour(code, o0, o1, o2, NDIM: tl.constexpr):
    """Which tokens, given their codes, have a neighbour at (o0, o1, o2) on the grid."""
    side = (
        tl.where(o2 < 0, 1, tl.where(o2 > 0, 2, 0))
        + tl.where(o1 < 0, 4, tl.where(o1 > 0, 8, 0))
        + tl.where(o0 < 0, 16, tl.where(o0 > 0, 32, 0))
    )
    return (code & (side + 4**NDIM)) == 0


@triton.jit
def member_code(flags, row: tl.constexpr, column: tl.constexpr):
    """The codes of those tokens of quads that are at (row, column) from the first ones."""
    OWN: tl.constexpr = 63 - (3 if column > 0 else 0) - (12 if row > 0 else 0)
    code = flags & OWN
    if column > 0:
        code += (flags >> (5 + column)) & 2
    if row > 0:
        code += (flags >> 3) & 8
    return code


@triton.jit
def quads_with(flags, frame, row: tl.constexpr, column):
    """Which quads have something at (frame, row, column) from their first token."""
    FAR: tl.constexpr = 8 if row == 1 else 64
    ROW: tl.constexpr = 0 if row == 0 else (4 if row < 0 else FAR)
    front = tl.where(frame < 0, 16, tl.where(frame > 0, 32, 0))
    far = tl.where(column == 1, 2, 32 << tl.maximum(column, 0))
    side = tl.where(column < 0, 1, tl.where(column == 0, 0, far))
    return (flags & (NONE + ROW + side + front)) == 0


@triton.jit
def step(stride_n, UNIT: tl.constexpr):
    """From one token to the next, in what `load_halves` counts: words of two channels or, with an
    odd UNIT, elements.
    """
    return stride_n * (UNIT // 2 if UNIT > 1 else 1)


@triton.jit
def load_halves(
    start, at, halves, shift, valid, D: tl.constexpr, stride_d, UNIT: tl.constexpr,
    POINTERS: tl.constexpr = False,
):  # fmt: skip
    """The even and the odd channels of the valid tokens, float32; 0 elsewhere.

    ``at``: where they lie, counted in `step` from ``start`` and ``shift``; the shift is added to
    offsets of 32 bits or, if ``POINTERS``, to pointers: fewer instructions, more registers.
    With an even UNIT two channels are loaded as one word: of 16 bits they are a shift and a mask
    (of bfloat16 that is the conversion too).
    """
    if UNIT > 1:
        words = load_words(start, at, halves, shift, valid, D, POINTERS)
        even, odd = halved(words, start.dtype.element_ty)
    else:
        at_even = at[:, None] + (2 * halves * stride_d)[None, :] + shift
        even_mask = valid[:, None] & (2 * halves < D)[None, :]
        odd_mask = valid[:, None] & (2 * halves + 1 < D)[None, :]
        even = tl.load(start + at_even, mask=even_mask, other=0.0).to(tl.float32)
        odd = tl.load(start + stride_d + at_even, mask=odd_mask, other=0.0).to(tl.float32)
    return even, odd


@triton.jit
def load_words(start, at, halves, shift, valid, D: tl.constexpr, POINTERS: tl.constexpr):
    """The same with an even UNIT, as it lies in memory: words of two channels."""
    WORD: tl.constexpr = tl.int64 if start.dtype.element_ty == tl.float32 else tl.int32
    start_words = start.to(tl.pointer_type(WORD))
    if POINTERS:
        ptrs = start_words + (at[:, None] + halves[None, :]) + shift
    else:
        ptrs = start_words + (at[:, None] + halves[None, :] + shift)
    return tl.load(ptrs, mask=tile_mask(valid, halves, D // 2), other=0)


@triton.jit
def halved(words, dtype: tl.constexpr):
    """Words of two numbers of a dtype, as two numbers in float32, the lower half first."""
    if dtype == tl.float32:
        even = words.to(tl.int32).to(tl.float32, bitcast=True)
        odd = (words >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    elif dtype == tl.bfloat16:
        even = (words << 16).to(tl.float32, bitcast=True)
        odd = (words & -65536).to(tl.float32, bitcast=True)
    else:
        even = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return even, odd


@triton.jit
def centred(even, odd, mean_even, mean_odd, valid, CENTRED: tl.constexpr):
    """The valid tokens with the mean subtracted, if ``CENTRED``."""
    if CENTRED:
        even = tl.where(valid[:, None], even - mean_even, 0.0)
        odd = tl.where(valid[:, None], odd - mean_odd, 0.0)
    return even, odd


@triton.jit
def add_at(sums, place: tl.constexpr, even, odd):
    """A tuple of even, odd, even, odd, ... sums with a term added to one of them."""
    return (
        sums[: 2 * place]
        + (sums[2 * place] + even, sums[2 * place + 1] + odd)
        + sums[2 * place + 2 :]
    )


@triton.jit
def scaled(sums, place: tl.constexpr, even, odd):
    """The same with one of them multiplied."""
    return (
        sums[: 2 * place]
        + (sums[2 * place] * even, sums[2 * place + 1] * odd)
        + sums[2 * place + 2 :]
    )


@triton.jit
def add_frame(
    sums, start, at, halves, flags, frame, right, down, stride_d, taps, mean_even, mean_odd,
    D: tl.constexpr, NDIM: tl.constexpr, CENTRED: tl.constexpr, UNIT: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Sums of the four tokens of quads with what all around them in a frame gives them; ``frame``
    from -1 to 1, ``start`` and ``taps`` those of it.

    ``right``, ``down``: to the next column and row, in `step`.
    ``UNROLL``: one after the other without a loop over columns: fewer instructions where there are
    registers for what is then loaded ahead.
    """
    WIDTH: tl.constexpr = 4 if NDIM == 1 else 2  # of a quad
    if UNROLL:
        for column in tl.static_range(-1, WIDTH + 1):
            sums = add_column(
                sums, start, at, halves, flags, frame, column, right, down, stride_d, taps,
                mean_even, mean_odd, D, WIDTH, CENTRED, UNIT, UNROLL,
            )  # fmt: skip
    else:
        for column in range(-1, WIDTH + 1):
            sums = add_column(
                sums, start, at, halves, flags, frame, column, right, down, stride_d, taps,
                mean_even, mean_odd, D, WIDTH, CENTRED, UNIT, UNROLL,
            )  # fmt: skip
    return sums


@triton.jit
def add_column(
    sums, start, at, halves, flags, frame, column, right, down, stride_d, taps, mean_even, mean_odd,
    D: tl.constexpr, WIDTH: tl.constexpr, CENTRED: tl.constexpr, UNIT: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """The same for what is in one column, from the one before a quad to the one behind it."""
    HEIGHT: tl.constexpr = 4 // WIDTH
    MORE: tl.constexpr = 1 if HEIGHT > 1 else 0  # rows above and below a quad
    STRIP: tl.constexpr = 2 if MORE else 1  # rows that are loaded before they are used
    for top in tl.static_range(-MORE, HEIGHT + MORE, STRIP):
        near = ()
        for row in tl.static_range(STRIP):
            there = quads_with(flags, frame, top + row, column)
            shift = (top + row) * down + column * right
            even, odd = load_halves(start, at, halves, shift, there, D, stride_d, UNIT, not UNROLL)
            near += centred(even, odd, mean_even, mean_odd, there, CENTRED)
        for x in tl.static_range(WIDTH):
            if (column >= x - 1) & (column <= x + 1):
                tap = taps + (column - x + 1) * (2 * halves.shape[0])
                sums = add_taps(sums, near, tap, halves, top, STRIP, x, WIDTH)
    return sums


@triton.jit
def add_taps(
    sums, near, taps, halves, top: tl.constexpr, STRIP: tl.constexpr, x: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The same for some rows of that column and one column of quads; ``taps`` from one to the
    other.
    """
    HEIGHT: tl.constexpr = 4 // WIDTH
    MORE: tl.constexpr = 1 if HEIGHT > 1 else 0
    for row in tl.static_range(STRIP):
        for y in tl.static_range(HEIGHT):
            if top + row - y >= -1 and top + row - y <= 1:
                tap = taps + (top + row - y + MORE) * (6 * halves.shape[0])
                even, odd = load_split(tap, halves)
                even, odd = even * near[2 * row], odd * near[2 * row + 1]
                sums = add_at(sums, y * WIDTH + x, even, odd)
    return sums


@triton.jit
def convolved_tile(
    base, quads, place, places, stride_n, stride_d, taps, offsets, statistics,
    D: tl.constexpr, NDIM: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr,
    UNIT: tl.constexpr, UNROLL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x + conv(x) in float32, with x <- (x - mean) rstd before it if ``NORM``.

    ``taps``: the rows of one head (``head_taps``), of which the middle one has the x that the
    convolution is added to; ``NDIM`` axes of the grid, 0 for no convolution.
    ``CENTRED``: the mean is subtracted before anything else. Otherwise, the convolution being
    linear, after it: ``offsets``, by code, has what that comes to, with the bias. It saves
    instructions, and costs |mean| rstd ulps of float32.
    """
    _, on_grid, first, count = place
    start = base + first * (stride_n * UNIT)
    right = step(stride_n, UNIT)
    if on_grid:
        _, _, _, _, g1, g2 = places
        sums = convolved_quads(
            start, quads, place, places, right, g2 * right,
            (g1 * g2) * tl.cast(stride_n, tl.int64) * UNIT, stride_d, taps, offsets, statistics,
            D, NDIM, NORM, CENTRED, UNIT, UNROLL, BLOCK_N // 4, BLOCK_D,
        )  # fmt: skip
    else:
        sums = other_tokens(
            start, count, right, stride_d, offsets, statistics,
            D, NDIM, NORM, CENTRED, UNIT, BLOCK_N // 4, BLOCK_D,
        )  # fmt: skip
    return joined(sums)


@triton.jit
def convolved_quads(
    start, quads, place, places, right, down, frame_stride, stride_d, taps, offsets, statistics,
    D: tl.constexpr, NDIM: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr,
    UNIT: tl.constexpr, UNROLL: tl.constexpr, L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of the grid: even and odd channels of the four tokens of L quads.

    ``right``, ``down``: as `add_frame` takes them; ``frame_stride``: elements to the next frame.
    """
    HALF_D: tl.constexpr = BLOCK_D // 2
    WIDTH: tl.constexpr = 4 if NDIM == 1 else 2  # of a quad
    SUBTRACT: tl.constexpr = NORM and CENTRED
    halves = tl.arange(0, HALF_D)
    mean_even, mean_odd, rstd_even, rstd_odd = statistics
    tokens, flags = load_quads(quads, place, places, tl.arange(0, L), L)
    at = tokens * right
    b_even, b_odd = load_split(taps + 3**NDIM * BLOCK_D, halves)
    sums = (tl.zeros([L, HALF_D], tl.float32),) * 8
    if not NORM:
        bias = tl.broadcast_to(b_even, [L, HALF_D]), tl.broadcast_to(b_odd, [L, HALF_D])
        sums = bias + bias + bias + bias
    if NDIM == 3:
        for frame in range(3):
            sums = add_frame(
                sums, start + (frame - 1) * frame_stride, at, halves, flags, frame - 1, right,
                down, stride_d, taps + frame * (9 * BLOCK_D), mean_even, mean_odd,
                D, NDIM, SUBTRACT, UNIT, UNROLL,
            )  # fmt: skip
    else:
        sums = add_frame(
            sums, start, at, halves, flags, 0, right, down, stride_d, taps,
            mean_even, mean_odd, D, NDIM, SUBTRACT, UNIT, UNROLL,
        )  # fmt: skip
    if NORM:
        for member in tl.static_range(4):
            sums = scaled(sums, member, rstd_even, rstd_odd)
            if CENTRED:
                sums = add_at(sums, member, b_even, b_odd)
            else:
                code = member_code(flags, member // WIDTH, member % WIDTH)
                even, odd = load_splits(offsets, code, halves)
                sums = add_at(sums, member, even, odd)
    return only_existing(sums, flags, start.dtype.element_ty, WIDTH)


@triton.jit
def only_existing(sums, flags, dtype: tl.constexpr, WIDTH: tl.constexpr):
    """The sums of the four tokens of quads, 0 for those that do not exist if float16 is to be
    multiplied: what neighbours give them may be too much for it, and infinity times 0 is not 0.
    """
    if dtype == tl.float16:
        for member in tl.static_range(4):
            there = quads_with(flags, 0, member // WIDTH, member % WIDTH)
            exists = tl.where(there, 1.0, 0.0)[:, None]
            sums = scaled(sums, member, exists, exists)
    return sums


@triton.jit
def other_tokens(
    start, count, right, stride_d, offsets, statistics,
    D: tl.constexpr, NDIM: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr,
    UNIT: tl.constexpr, L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same of tokens that follow each other and are not convolved."""
    halves = tl.arange(0, BLOCK_D // 2)
    mean_even, mean_odd, rstd_even, rstd_odd = statistics
    sums = ()
    for member in tl.static_range(4):
        lanes = tl.arange(0, L)
        there = lanes + member * L < count
        even, odd = load_halves(
            start, lanes * right, halves, member * L * right, there, D, stride_d, UNIT
        )
        sums += centred(even, odd, mean_even, mean_odd, there, NORM and CENTRED)
        if NORM:
            sums = scaled(sums, member, rstd_even, rstd_odd)
            if not CENTRED:
                row = offsets + (4**NDIM if NDIM > 0 else 0) * BLOCK_D
                more_even, more_odd = load_split(row, halves)
                exists = tl.where(there, 1.0, 0.0)[:, None]
                sums = add_at(sums, member, exists * more_even, exists * more_odd)
    return sums


@triton.jit
def joined(sums):
    """``[4 L, 2 C]`` from even and odd channels, ``[L, C]`` each, of the tokens of quads.

    No data moves: a thread has the same numbers as before.
    """
    L: tl.constexpr = sums[0].shape[0]
    C: tl.constexpr = sums[0].shape[1]
    even = tl.join(tl.join(sums[0], sums[4]), tl.join(sums[2], sums[6]))
    odd = tl.join(tl.join(sums[1], sums[5]), tl.join(sums[3], sums[7]))
    return tl.join(even, odd).permute(2, 3, 0, 1, 4).reshape(4 * L, 2 * C)
