"""Device code that the kernels share: tiles of tokens, depthwise convolution, activations.

A tile is ``[BLOCK_N, BLOCK_D]``: some tokens of one (batch item, head) by all its channels, padded
to a power of two. What lies outside of the tensor is 0 in every tile. Where a tile begins
is an offset of 64 bits.

A token's code says where on the grid it lies, so that a kernel need not divide: for the last axis
bit 0 at its first place and bit 1 at its last, for the axis before bits 2 and 3, and so on;
``4 ** NDIM`` for a token that is not on the grid.
"""

import triton
import triton.language as tl

#: Arguments that Triton must not specialise on: they differ from one resolution or batch to the
#: next, and a kernel is compiled once for all of them.
SIZES = [
    *("groups", "owners", "num_tokens", "chunk", "splits", "rows", "base_rows"),
    *("conv_rows", "prefix", "g0", "g1", "g2"),
]


@triton.jit
def head_base(ptr, group, heads, stride_b, stride_h):
    """Where the first token of a (batch item, head) lies; ``group`` is b * heads + h."""
    batch = (group // heads).to(tl.int64)
    head = (group % heads).to(tl.int64)
    return ptr + batch * stride_b + head * stride_h


@triton.jit
def tile_pointers(base, start, lanes, channels, stride_n, stride_d):
    """Pointers to the tokens ``start + lanes``. Offsets within a tile fit in 32 bits (``near``)."""
    within = lanes[:, None] * stride_n + channels[None, :] * stride_d
    return base + tl.cast(start, tl.int64) * stride_n + within


@triton.jit
def tile_mask(valid, channels, D: tl.constexpr):
    """Which elements of a tile exist, given which tokens do."""
    mask = valid[:, None]
    if channels.shape[0] != D:
        mask = mask & (channels < D)[None, :]
    return mask


@triton.jit
def load_tile(base, start, lanes, channels, valid, D: tl.constexpr, stride_n, stride_d):
    """The valid tokens among ``start + lanes``, in their own dtype."""
    ptrs = tile_pointers(base, start, lanes, channels, stride_n, stride_d)
    return tl.load(ptrs, mask=tile_mask(valid, channels, D), other=0.0)


@triton.jit
def store_tile(base, tile, start, lanes, channels, valid, D: tl.constexpr, stride_n):
    """Writes a tile where channels are adjacent, in the dtype of the memory."""
    ptrs = tile_pointers(base, start, lanes, channels, stride_n, 1)
    mask = tile_mask(valid, channels, D)
    tl.store(ptrs, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_row(ptr, channels, D: tl.constexpr):
    """``[BLOCK_D]`` of one row of channels, float32."""
    return tl.load(ptr + channels, mask=channels < D, other=0.0).to(tl.float32)


@triton.jit
def load_statistics(mean, rstd, group, channels, D: tl.constexpr):
    """Mean and 1/std of the keys of a (batch item, head), ``[BLOCK_D]`` each."""
    at = group.to(tl.int64) * D
    return load_row(mean + at, channels, D), load_row(rstd + at, channels, D)


@triton.jit
def group_offsets(offsets, group, D: tl.constexpr, NDIM: tl.constexpr):
    """The table of a (batch item, head), with a row for each code that a token can have."""
    return offsets + group.to(tl.int64) * ((4**NDIM + (1 if NDIM > 0 else 0)) * D)


@triton.jit
def load_weights(
    w1, w2, w3, first, units, channels, values, D: tl.constexpr, DV: tl.constexpr, rate,
    dtype: tl.constexpr,
):  # fmt: skip
    """``rate`` times the weights of the hidden units ``first + units``, in a dtype.

    Columns of W1 and W2 ``[D, D]`` and rows of W3 ``[D, Dv]``, all contiguous.
    """
    inside = first + units < D
    columns = (channels < D)[:, None] & inside[None, :]
    rows = inside[:, None] & (values < DV)[None, :]
    at = channels[:, None] * D + units[None, :]
    w1_block = tl.load(w1 + first + at, mask=columns, other=0.0).to(tl.float32) * rate
    w2_block = tl.load(w2 + first + at, mask=columns, other=0.0).to(tl.float32) * rate
    at = units[:, None] * DV + values[None, :]
    w3_block = tl.load(w3 + first * DV + at, mask=rows, other=0.0).to(tl.float32) * rate
    return w1_block.to(dtype), w2_block.to(dtype), w3_block.to(dtype)


@triton.jit
def row_offset(row, NDIM: tl.constexpr):
    """Where a row of three taps lies on the first two of three axes; missing axes come first."""
    o0 = row // 3 - 1 if NDIM == 3 else 0
    o1 = row % 3 - 1 if NDIM > 1 else 0
    return o0, o1


@triton.jit
def tap_offset(tap, NDIM: tl.constexpr):
    """The place (o0, o1, o2) of one of the 3**NDIM taps; missing axes come first."""
    o0, o1 = row_offset(tap // 3, NDIM)
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
def convolved_tile(
    base, start, lanes, channels, num_tokens, stride_n, stride_d,
    codes, taps, bias, offsets, mean, rstd, conv_rows, g1, g2,
    D: tl.constexpr, NDIM: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """x + conv(x) in float32, with x <- (x - mean) rstd before it if ``NORM``.

    ``taps``: ``[3**NDIM, D]`` and ``bias``: ``[D]`` of one head; ``NDIM`` axes of the grid, 0 for
    no convolution.
    ``CENTRED``: the mean is subtracted before anything else. Otherwise, the convolution being
    linear, after it: ``offsets``, ``[4**NDIM + 1, D]`` by code, has what that comes to, with the
    bias. It saves a third of the arithmetic, and costs |mean| rstd ulps of float32.
    """
    SUBTRACT: tl.constexpr = NORM and CENTRED
    tokens = start + lanes
    inside = tokens < num_tokens
    x = load_tile(base, start, lanes, channels, inside, D, stride_n, stride_d).to(tl.float32)
    if SUBTRACT:
        x = tl.where(inside[:, None], x - mean[None, :], 0.0)
    out = x
    code = tl.zeros_like(lanes)
    if NDIM > 0:
        code = tl.load(codes + tokens, mask=inside, other=4**NDIM).to(tl.int32)
        tap_row = taps + channels
        # A loop that stays one: unrolled, its loads would fill the registers.
        for row in range(conv_rows):
            o0, o1 = row_offset(row, NDIM)
            first = tl.cast(start, tl.int64) + (o0 * g1 + o1) * g2
            row_base = base + first * stride_n
            for column in tl.static_range(-1, 2):
                valid = has_neighbour(code, o0, o1, column, NDIM)
                near = load_tile(
                    row_base + column * stride_n, 0, lanes, channels, valid, D, stride_n, stride_d
                ).to(tl.float32)
                if SUBTRACT:  # the padding of the convolution comes after the norm
                    near = tl.where(valid[:, None], near - mean[None, :], 0.0)
                w = tl.load(tap_row + (column + 1) * D, mask=channels < D, other=0.0)
                out += w[None, :] * near
            tap_row += 3 * D
    if NORM:
        out *= rstd[None, :]
    if NORM and not CENTRED:
        row = tl.load(
            offsets + code[:, None] * D + channels[None, :],
            mask=tile_mask(inside, channels, D),
            other=0.0,
        )
        out += row
    elif NDIM > 0:
        out += tl.where((code < 4**NDIM)[:, None], load_row(bias, channels, D)[None, :], 0.0)
    return out


@triton.jit
def sigmoid(a):
    """1 / (1 + exp(-a)), to a few ulps: the division is a squared reciprocal root.

    Five instructions; Triton's own sigmoid is twelve, most of them for a divisor out of range.
    """
    root = tl.math.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * a))
    return root * root


@triton.jit
def silu_terms(a):
    """silu(a), its derivative and its second derivative."""
    sigma = sigmoid(a)
    silu = a * sigma
    rest = 1 - sigma
    slope = sigma + silu * rest
    return silu, slope, rest * (sigma + slope - silu * sigma)
