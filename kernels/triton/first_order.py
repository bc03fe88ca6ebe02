"""The inner gradient: what -v . f_W(k) (or any other cotangent of f_W(x)) says about W and x.

With A = x W1, B = x W2, Z = silu(A) B of a tile of tokens and g the cotangent of Z W3::

    dZ = g W3^T, dA = dZ B silu'(A), dB = dZ silu(A)
    G1 = x^T dA, G2 = x^T dB, G3 = Z^T g, dx = dA W1^T + dB W2^T

Hidden units do not see each other: columns of W1 and W2 and rows of W3 can be dealt with in blocks
of BLOCK_M, by one program each for G and one after the other for dx.
"""

import triton
import triton.language as tl

from .statistics import merged_statistics
from .tiles import (
    SIZES,
    convolved_tile,
    head_base,
    load_tile,
    load_weights,
    silu_and_slope,
    store_tile,
)


@triton.jit
def hidden_gradients(x, g, w1, w2, w3, PRECISION: tl.constexpr):
    """Z, dA and dB of a block of hidden units, ``[BLOCK_N, BLOCK_M]`` float32."""
    a = tl.dot(x, w1, input_precision=PRECISION)
    b = tl.dot(x, w2, input_precision=PRECISION)
    dz = tl.dot(g, tl.trans(w3), input_precision=PRECISION)
    silu, slope = silu_and_slope(a)
    return silu * b, dz * b * slope, dz * silu


@triton.jit
def store_gradients(base, g1, g2, g3, channels, hidden, values, D: tl.constexpr, DV: tl.constexpr):
    """Writes a block of hidden units of G1, G2 and G3, which lie one behind the other."""
    columns = (channels < D)[:, None] & (hidden < D)[None, :]
    at = base + channels[:, None] * D + hidden[None, :]
    tl.store(at, g1, mask=columns)
    tl.store(at + D * D, g2, mask=columns)
    rows = (hidden < D)[:, None] & (values < DV)[None, :]
    tl.store(base + 2 * D * D + hidden[:, None] * DV + values[None, :], g3, mask=rows)


@triton.jit(do_not_specialize=SIZES)
def inner_gradient(
    x, g, w1, w2, w3, taps, bias, key_partial, mean, rstd, partial, dx,
    x_stride_b, x_stride_h, x_stride_n, x_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    groups, heads, num_tokens, chunk, splits, key_chunk, key_splits,
    conv_rows, prefix, g0, g1, g2, eps,
    D: tl.constexpr, DV: tl.constexpr, NDIM: tl.constexpr, NORM: tl.constexpr,
    BATCHED: tl.constexpr, STORE_DX: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """partial ``[splits, B*H, 2*D*D + D*Dv]`` float32: G1, G2, G3 of the tokens of a chunk.

    One program for each (batch item, head), chunk of tokens and block of hidden units.

    NORM: normalise x with the statistics in ``key_partial``, and write them to mean and rstd.
    BATCHED: the weights are ``[B*H, ...]``, not ``[H, ...]``.
    STORE_DX: write dx ``[B, N, H, D]`` too; needs all hidden units in one block.
    WIDE: products of float32, not of the dtype of x.
    """
    BLOCKS_M: tl.constexpr = (D + BLOCK_M - 1) // BLOCK_M
    dtype: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    program = tl.program_id(0) // BLOCKS_M
    block = tl.program_id(0) % BLOCKS_M
    group = program // splits
    split = program % splits
    head = group % heads
    lanes = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    values = tl.arange(0, BLOCK_V)
    units = tl.arange(0, BLOCK_M)

    mean_row = tl.zeros([BLOCK_D], tl.float32)
    rstd_row = mean_row
    if NORM:
        mean_row, rstd_row = merged_statistics(
            key_partial, group, channels, num_tokens, key_chunk, key_splits, eps, D, BLOCK_D
        )
        if split + block == 0:
            tl.store(mean + group.to(tl.int64) * D + channels, mean_row, mask=channels < D)
            tl.store(rstd + group.to(tl.int64) * D + channels, rstd_row, mask=channels < D)

    owner = (group if BATCHED else head).to(tl.int64)
    w1_block, w2_block, w3_block = load_weights(
        w1 + owner * (D * D), w2 + owner * (D * D), w3 + owner * (D * DV),
        block * BLOCK_M, units, channels, values, D, DV, 1.0, dtype,
    )  # fmt: skip
    x_base = head_base(x, group, heads, x_stride_b, x_stride_h)
    g_base = head_base(g, group, heads, g_stride_b, g_stride_h)
    dx_base = dx + ((group // heads).to(tl.int64) * num_tokens * heads + head) * D

    sum1 = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    sum2 = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    sum3 = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    begin = split * chunk
    for start in range(begin, tl.minimum(begin + chunk, num_tokens), BLOCK_N):
        x_tile = convolved_tile(
            x_base, start, lanes, channels, num_tokens, D, x_stride_n, x_stride_d,
            taps + head * (3**NDIM * D), bias + head * D, mean_row, rstd_row,
            conv_rows, prefix, g0, g1, g2, NDIM, NORM, 1,
        ).to(dtype)  # fmt: skip
        g_tile = load_tile(g_base, start, lanes, values, num_tokens, DV, g_stride_n, g_stride_d).to(
            dtype
        )
        z, da, db = hidden_gradients(x_tile, g_tile, w1_block, w2_block, w3_block, PRECISION)
        z, da, db = z.to(dtype), da.to(dtype), db.to(dtype)
        x_transposed = tl.trans(x_tile)
        sum1 = tl.dot(x_transposed, da, sum1, input_precision=PRECISION)
        sum2 = tl.dot(x_transposed, db, sum2, input_precision=PRECISION)
        sum3 = tl.dot(tl.trans(z), g_tile, sum3, input_precision=PRECISION)
        if STORE_DX:
            back = tl.dot(da, tl.trans(w1_block), input_precision=PRECISION)
            back = tl.dot(db, tl.trans(w2_block), back, input_precision=PRECISION)
            store_tile(dx_base, back, start, lanes, channels, num_tokens, D, heads * D)

    at = partial + (split.to(tl.int64) * groups + group) * (2 * D * D + D * DV)
    store_gradients(at, sum1, sum2, sum3, channels, block * BLOCK_M + units, values, D, DV)


@triton.jit(do_not_specialize=SIZES)
def query_gradient(
    x, g, w1, w2, w3, taps, bias, dx,
    x_stride_b, x_stride_h, x_stride_n, x_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    heads, num_tokens, chunk, splits, conv_rows, prefix, g0, g1, g2,
    D: tl.constexpr, DV: tl.constexpr, NDIM: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dx ``[B, N, H, D]`` alone, of weights ``[B*H, ...]``, over any number of blocks."""
    dtype: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    group = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    head = group % heads
    lanes = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    values = tl.arange(0, BLOCK_V)
    units = tl.arange(0, BLOCK_M)
    unused = tl.zeros([BLOCK_D], tl.float32)
    w1_base = w1 + group.to(tl.int64) * (D * D)
    w2_base = w2 + group.to(tl.int64) * (D * D)
    w3_base = w3 + group.to(tl.int64) * (D * DV)
    x_base = head_base(x, group, heads, x_stride_b, x_stride_h)
    g_base = head_base(g, group, heads, g_stride_b, g_stride_h)
    dx_base = dx + ((group // heads).to(tl.int64) * num_tokens * heads + head) * D

    begin = split * chunk
    for start in range(begin, tl.minimum(begin + chunk, num_tokens), BLOCK_N):
        x_tile = convolved_tile(
            x_base, start, lanes, channels, num_tokens, D, x_stride_n, x_stride_d,
            taps + head * (3**NDIM * D), bias + head * D, unused, unused,
            conv_rows, prefix, g0, g1, g2, NDIM, False, 1,
        ).to(dtype)  # fmt: skip
        g_tile = load_tile(g_base, start, lanes, values, num_tokens, DV, g_stride_n, g_stride_d)
        g_tile = g_tile.to(dtype)
        back = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first in range(0, D, BLOCK_M):
            w1_block, w2_block, w3_block = load_weights(
                w1_base, w2_base, w3_base, first, units, channels, values, D, DV, 1.0, dtype
            )
            _, da, db = hidden_gradients(x_tile, g_tile, w1_block, w2_block, w3_block, PRECISION)
            back = tl.dot(da.to(dtype), tl.trans(w1_block), back, input_precision=PRECISION)
            back = tl.dot(db.to(dtype), tl.trans(w2_block), back, input_precision=PRECISION)
        store_tile(dx_base, back, start, lanes, channels, num_tokens, D, heads * D)
