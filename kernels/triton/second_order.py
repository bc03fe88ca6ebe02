"""Back through the inner gradient: from dL/dW' to the keys, the values and the static weights.

W' = W + r G with G1 = x^T dA, G2 = x^T dB, G3 = Z^T g (``first_order``; x the keys, g the values).
With U = r dL/dW', the gradient that arrives at G, and P = x U1, R = x U2, T = g U3^T::

    dL/d dZ = P B silu'(A) + R silu(A)
    dL/dB   = P dZ silu'(A) + T silu(A)
    dL/dA   = P dZ B silu''(A) + R dZ silu'(A) + T B silu'(A)

from which follow x^T dL/dA, x^T dL/dB and (dL/d dZ)^T g, what the static W1, W2 and W3 get beside
dL/dW', and ::

    dL/dx = dA U1^T + dB U2^T + dL/dA W1^T + dL/dB W2^T
    dL/dg = Z U3 + dL/d dZ W3
"""

import triton
import triton.language as tl

from .first_order import add_tile, store_gradients
from .tiles import (
    SIZES,
    convolved_tile,
    group_offsets,
    head_base,
    head_taps,
    load_statistics,
    load_tile,
    load_weights,
    own_tiles,
    pair,
    silu_terms,
    tile_start,
    tile_tokens,
    unpair,
)


@triton.jit
def second_order_terms(x, g, w12, u12, w3u3, PRECISION: tl.constexpr):
    """Of a block of hidden units, in x's dtype: a `pair` of dL/dA and dL/dB, dL/d dZ, a pair of dA
    and dB, and one of dL/d dZ and Z. ``w12``, ``u12``: pairs; ``w3u3``: one of W3^T and U3^T.
    """
    a, b = unpair(tl.dot(x, w12, input_precision=PRECISION))
    dz, t = unpair(tl.dot(g, w3u3, input_precision=PRECISION))
    p, r = unpair(tl.dot(x, u12, input_precision=PRECISION))
    silu, slope, curvature = silu_terms(a)
    b_slope, dz_slope = b * slope, dz * slope
    at_dz = p * b_slope + r * silu
    at_a = p * (dz * (b * curvature)) + r * dz_slope + t * b_slope
    at_b = p * dz_slope + t * silu
    dtype: tl.constexpr = x.dtype
    at_ab = pair(at_a, at_b).to(dtype)
    dab = pair(dz * b_slope, dz * silu).to(dtype)
    at_dz = at_dz.to(dtype)
    return at_ab, at_dz, dab, pair(at_dz, (silu * b).to(dtype))


@triton.jit(do_not_specialize=SIZES)
def second_order_gradient(
    x, g, w1, w2, w3, u1, u2, u3, taps, offsets, mean, rstd, partial, dx, dg,
    x_stride_b, x_stride_h, x_stride_n, x_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    groups, heads, chunk, splits, tiles, scale,
    quads, num_quads, prefix, grid_tokens, num_tokens, g1, g2,
    D: tl.constexpr, DV: tl.constexpr, NDIM: tl.constexpr, UNIT: tl.constexpr,
    CENTRED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What comes back through the inner gradient; u is dL/dW', ``[B*H, ...]``, U / r, and r is
    scale / num_tokens.

    partial ``[splits, B*H, 2*D*D + D*Dv]`` float32 of the tokens of a chunk of tiles, dx
    ``[B, N, H, D]`` and dg ``[B, N, H, Dv]``. One program for each (batch item, head) and chunk.
    """
    BLOCKS_M: tl.constexpr = (D + BLOCK_M - 1) // BLOCK_M
    dtype: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    group = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    head = group % heads
    at_group = group.to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    values = tl.arange(0, BLOCK_V)
    units = tl.arange(0, BLOCK_M)
    statistics = load_statistics(mean, rstd, group, tl.arange(0, BLOCK_D // 2))
    taps = head_taps(taps, head, NDIM, BLOCK_D)
    offsets = group_offsets(offsets, group, NDIM, BLOCK_D)
    x_base = head_base(x, group, heads, x_stride_b, x_stride_h, UNIT)
    g_base = head_base(g, group, heads, g_stride_b, g_stride_h, UNIT)
    first_token = (group // heads).to(tl.int64) * num_tokens * heads + head
    dx_base = dx + first_token * D
    dg_base = dg + first_token * DV
    at = partial + (split.to(tl.int64) * groups + group) * (2 * D * D + D * DV)
    begin, end = own_tiles(split, chunk, tiles)

    rate = tl.cast(scale, tl.float32) / num_tokens
    for block in range(BLOCKS_M):
        w12_block, w3_block = load_weights(
            w1 + head * (D * D), w2 + head * (D * D), w3 + head * (D * DV),
            block * BLOCK_M, units, channels, values, D, DV, 1.0, dtype,
        )  # fmt: skip
        u12_block, u3_block = load_weights(
            u1 + at_group * (D * D), u2 + at_group * (D * D), u3 + at_group * (D * DV),
            block * BLOCK_M, units, channels, values, D, DV, rate, dtype,
        )  # fmt: skip
        w3u3_block = pair(tl.trans(w3_block), tl.trans(u3_block))
        sum12 = tl.zeros([BLOCK_D, 2 * BLOCK_M], tl.float32)
        sum3 = tl.zeros([BLOCK_V, BLOCK_M], tl.float32)
        for tile in range(begin, end):
            on_grid, first, count = tile_start(
                tile, quads, num_quads, prefix, grid_tokens, num_tokens, NDIM, BLOCK_N
            )
            x_tile = convolved_tile(
                x_base, tile, on_grid, first, count, x_stride_n, x_stride_d, quads, num_quads,
                taps, offsets, statistics, g1, g2,
                D, NDIM, True, CENTRED, UNIT, UNROLL, BLOCK_N, BLOCK_D,
            ).to(dtype)  # fmt: skip
            tokens, exist = tile_tokens(
                tile, on_grid, first, count, quads, num_quads, g2, NDIM, BLOCK_N
            )
            g_tile = load_tile(
                g_base + first * (g_stride_n * UNIT), tokens, values, exist, DV, g_stride_n,
                g_stride_d, UNIT,
            ).to(dtype)  # fmt: skip
            at_ab, at_dz, dab, at_dz_z = second_order_terms(
                x_tile, g_tile, w12_block, u12_block, w3u3_block, PRECISION
            )
            sum3 = tl.dot(tl.trans(g_tile), at_dz, sum3, input_precision=PRECISION)
            sum12 = tl.dot(tl.trans(x_tile), at_ab, sum12, input_precision=PRECISION)
            back = tl.dot(dab, tl.trans(u12_block), input_precision=PRECISION)
            back = tl.dot(at_ab, tl.trans(w12_block), back, input_precision=PRECISION)
            add_tile(
                dx_base + first * heads * D,
                back,
                tokens,
                channels,
                exist,
                D,
                heads,
                block,
                BLOCKS_M,
            )
            back = tl.dot(at_dz_z, tl.trans(w3u3_block), input_precision=PRECISION)
            add_tile(
                dg_base + first * heads * DV,
                back,
                tokens,
                values,
                exist,
                DV,
                heads,
                block,
                BLOCKS_M,
            )
        store_gradients(at, sum12, sum3, channels, block * BLOCK_M + units, values, D, DV)
        tl.debug_barrier()  # the next block reads dx and dg
