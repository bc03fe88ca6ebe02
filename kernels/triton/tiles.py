"""Device code that the kernels share: tiles of tokens, depthwise convolution, activations.

A tile is ``[BLOCK_N, BLOCK_D]``: some tokens of one (batch item, head) by all its channels, padded
to a power of two. What lies outside of the tensor is 0 in every tile. Where a tile begins
is an offset of 64 bits.
"""

import triton
import triton.language as tl

#: Arguments that Triton must not specialise on: they differ from one resolution or batch to the
#: next, and a kernel is compiled once for all of them.
SIZES = [
    *("groups", "owners", "num_tokens", "chunk", "splits", "key_chunk", "key_splits"),
    *("rows", "base_rows", "conv_rows", "prefix", "g0", "g1", "g2"),
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
def load_tile(base, start, lanes, channels, num_tokens, D: tl.constexpr, stride_n, stride_d):
    """The tile of a tensor, in its own dtype."""
    mask = (start + lanes < num_tokens)[:, None] & (channels < D)[None, :]
    ptrs = tile_pointers(base, start, lanes, channels, stride_n, stride_d)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_tile(base, tile, start, lanes, channels, num_tokens, D: tl.constexpr, stride_n):
    """Writes a tile where channels are adjacent, in the dtype of the memory."""
    mask = (start + lanes < num_tokens)[:, None] & (channels < D)[None, :]
    ptrs = tile_pointers(base, start, lanes, channels, stride_n, 1)
    tl.store(ptrs, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_weights(
    w1, w2, w3, first, units, channels, values, D: tl.constexpr, DV: tl.constexpr, rate,
    dtype: tl.constexpr,
):  # fmt: skip
    """``rate`` times the weights of the hidden units ``first + units``, in a dtype.

    Columns of W1 and W2 ``[D, D]`` and rows of W3 ``[D, Dv]``, all contiguous.
    """
    rate = tl.cast(rate, tl.float32)
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
def is_on_grid(cell, o0, o1, o2, g0, g1, g2):
    """Which cells of the grid, counted in row-major order, have a neighbour at (o0, o1, o2) on it.

    False for cells that are not on the grid themselves.
    """
    i2 = cell % g2 + o2
    i1 = cell // g2 % g1 + o1
    i0 = cell // (g2 * g1) + o0
    valid = (i2 >= 0) & (i2 < g2) & (i1 >= 0) & (i1 < g1) & (i0 >= 0) & (i0 < g0)
    return valid & (cell >= 0) & (cell < g0 * g1 * g2)


@triton.jit
def row_offset(row, NDIM: tl.constexpr):
    """Where a row of three taps lies on the first two of three axes; missing axes come first."""
    o0 = row // 3 - 1 if NDIM == 3 else 0
    o1 = row % 3 - 1 if NDIM > 1 else 0
    return o0, o1


@triton.jit
def load_centred(
    base, start, lanes, channels, valid, mean, D: tl.constexpr, stride_n, stride_d,
    NORM: tl.constexpr,
):  # fmt: skip
    """The tile of the valid tokens ``start + lanes``, float32, minus the mean if ``NORM``.

    0 where there is none: the padding of the convolution comes after the norm.
    """
    ptrs = tile_pointers(base, start, lanes, channels, stride_n, stride_d)
    mask = valid[:, None] & (channels < D)[None, :]
    x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        x = tl.where(mask, x - mean[None, :], 0.0)
    return x


@triton.jit
def convolved_tile(
    base, start, lanes, channels, num_tokens, D: tl.constexpr, stride_n, stride_d,
    taps, bias, mean, rstd, conv_rows, prefix, g0, g1, g2,
    NDIM: tl.constexpr, NORM: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """x + conv(x) in float32, with x <- (x - mean) rstd before it if ``NORM``.

    ``taps``: ``[3 * conv_rows, D]`` and ``bias``: ``[D]`` of one head; ``NDIM`` axes of
    the grid, 0 for no convolution.
    ``SIGN`` -1: the adjoint, whose taps are mirrored and which has no bias.
    """
    tokens = start + lanes
    out = load_centred(
        base, start, lanes, channels, tokens < num_tokens, mean, D, stride_n, stride_d, NORM
    )  # fmt: skip
    if NDIM > 0:
        in_head = channels < D
        cell = tokens - prefix
        # A loop that stays one: unrolled, its loads would fill the registers.
        for row in range(conv_rows):
            o0, o1 = row_offset(row, NDIM)
            for o2 in tl.static_range(-1, 2):
                valid = is_on_grid(cell, o0, o1, o2, g0, g1, g2)
                delta = (o0 * g1 + o1) * g2 + o2
                near = load_centred(
                    base, start + delta, lanes, channels, valid, mean, D, stride_n, stride_d, NORM
                )  # fmt: skip
                tap = row * 3 + 1 + o2
                if SIGN < 0:
                    tap = conv_rows * 3 - 1 - tap
                w = tl.load(taps + tap * D + channels, mask=in_head, other=0.0)
                out += w[None, :] * near
    if NORM:  # the convolution is linear
        out *= rstd[None, :]
    if NDIM > 0 and SIGN > 0:
        b = tl.load(bias + channels, mask=channels < D, other=0.0)
        on_grid = (tokens >= prefix) & (tokens < prefix + g0 * g1 * g2)
        out += tl.where(on_grid[:, None], b[None, :], 0.0)
    return out


@triton.jit
def silu_and_slope(a):
    """silu(a) and its derivative."""
    sigma = tl.sigmoid(a)
    return a * sigma, sigma * (1 + a * (1 - sigma))


@triton.jit
def silu_curvature(a):
    """The second derivative of silu."""
    sigma = tl.sigmoid(a)
    return sigma * (1 - sigma) * (2 + a * (1 - 2 * sigma))
