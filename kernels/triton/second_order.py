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

from .convolution import convolved_tile, group_offsets, head_taps, load_statistics
from .first_order import add_tile, store_gradients
from .tiles import (
    NONE,
    SIZES,
    head_base,
    load_scale,
    load_tile,
    load_weights,
    own_tiles,
    pair,
    power_of_two,
    quad_places,
    silu_terms,
    tile_place,
    tile_tokens,
    unpair,
)

#: Magnitudes that are compared at a time.
LANES = tl.constexpr(128)


@triton.jit
def second_order_terms(
    x, g, weights, scale, part: tl.constexpr, TANH: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a part of the hidden units, in x's dtype: a `pair` of dL/dA and dL/dB, dL/d dZ, a pair of
    dA and dB, and one of dL/d dZ and Z. ``weights``: what `load_part` gave, of all parts;
    ``scale``: of dZ and T, if ``SCALED``.
    """
    w12, u12, w3u3 = weights[3 * part : 3 * part + 3]
    a, b = unpair(tl.dot(x, w12, input_precision=PRECISION))
    p, r = unpair(tl.dot(x, u12, input_precision=PRECISION))
    dz, t = unpair(tl.dot(g, w3u3, input_precision=PRECISION))
    if SCALED:
        dz, t = dz * scale, t * scale
    silu, slope, curvature = silu_terms(a, TANH)
    b_slope, dz_slope = b * slope, dz * slope
    at_dz = p * b_slope + r * silu
    at_a = p * (dz * (b * curvature)) + r * dz_slope + t * b_slope
    at_b = p * dz_slope + t * silu
    dtype: tl.constexpr = x.dtype
    at_dz = at_dz.to(dtype)
    return (
        pair(at_a, at_b).to(dtype), at_dz, pair(dz * b_slope, dz * silu).to(dtype),
        pair(at_dz, (silu * b).to(dtype)),
    )  # fmt: skip


@triton.jit
def load_part(
    w1, w2, w3, u1, u2, u3, first, units, channels, values, rate, dtype: tl.constexpr,
    TANH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Of the hidden units ``first + units``: a `pair` of W1 and W2, one of U1 and U2, and one of
    W3^T and U3^T.
    """
    w12, w3 = load_weights(w1, w2, w3, first, units, channels, values, D, DV, 1.0, dtype, TANH)
    u12, u3 = load_weights(u1, u2, u3, first, units, channels, values, D, DV, rate, dtype, TANH)
    return w12, u12, pair(tl.trans(w3), tl.trans(u3))


@triton.jit
def zero_sums(BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PART_M: tl.constexpr):
    """Of the gradients of W1 and W2, as a `pair` transposed, and of W3, transposed."""
    return tl.zeros([2 * PART_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_V, PART_M], tl.float32)


@triton.jit
def add_sums(sums, part: tl.constexpr, x, g, terms, PRECISION: tl.constexpr):
    """Those of a part with a tile's added."""
    sum3 = tl.dot(tl.trans(g), terms[1], sums[2 * part + 1], input_precision=PRECISION)
    sum12 = tl.dot(tl.trans(terms[0]), x, sums[2 * part], input_precision=PRECISION)
    return sum12, sum3


@triton.jit
def gradient_at_g(
    terms, weights, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dL/dg of a tile, from all parts."""
    back = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for part in tl.static_range(PARTS):
        w3u3 = tl.trans(weights[3 * part + 2])
        back = tl.dot(terms[4 * part + 3], w3u3, back, input_precision=PRECISION)
    return back


@triton.jit
def gradient_at_x(
    terms, weights, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dL/dx of a tile, from all parts."""
    back = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for part in tl.static_range(PARTS):
        w12, u12 = tl.trans(weights[3 * part]), tl.trans(weights[3 * part + 1])
        back = tl.dot(terms[4 * part + 2], u12, back, input_precision=PRECISION)
        back = tl.dot(terms[4 * part], w12, back, input_precision=PRECISION)
    return back


@triton.jit
def scale_of_gradient(largest, group, blocks, rate):
    """`power_of_two` for U, small enough for its products; ``largest`` ``[B*H, blocks]``: of parts
    of dL/dW'.
    """
    most = tl.zeros([LANES], tl.float32)
    for first in range(0, blocks, LANES):
        at = first + tl.arange(0, LANES)
        more = tl.load(largest + group * blocks + at, mask=at < blocks, other=0.0)
        most = tl.maximum(most, more)
    return power_of_two(tl.max(most, 0) * tl.abs(rate), -4)


@triton.jit(do_not_specialize=SIZES)
def second_order_gradient(
    x, g, w1, w2, w3, u1, u2, u3, taps, offsets, mean, rstd, largest_g, largest_u,
    partial, dx, dg, dx_unscale,
    x_stride_b, x_stride_h, x_stride_n, x_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    groups, heads, chunk, splits, tiles, scale, u_blocks,
    quads, num_quads, prefix, grid_tokens, num_tokens, g1, g2,
    D: tl.constexpr, DV: tl.constexpr, NDIM: tl.constexpr, UNIT: tl.constexpr,
    CENTRED: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    TANH: tl.constexpr, UNROLL: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What comes back through the inner gradient; u is dL/dW', ``[B*H, ...]``, U / r, and r is
    scale / num_tokens.

    partial ``[splits, B*H, 2*D*D + D*Dv]`` float32 of the tokens of a chunk of tiles, dx
    ``[B, N, H, D]`` and dg ``[B, N, H, Dv]``. One program for each (batch item, head) and chunk.
    PARTS of a block of hidden units are computed one after the other, for want of registers; they
    share the convolved tile and what is added to dx and dg.
    """
    BLOCKS_M: tl.constexpr = (D + BLOCK_M - 1) // BLOCK_M
    PART_M: tl.constexpr = BLOCK_M // PARTS
    dtype: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    group = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    head = group % heads
    at_group = group.to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    values = tl.arange(0, BLOCK_V)
    units = tl.arange(0, PART_M)
    statistics = load_statistics(mean, rstd, group, tl.arange(0, BLOCK_D // 2))
    taps = head_taps(taps, head, NDIM, BLOCK_D)
    offsets = group_offsets(offsets, group, NDIM, BLOCK_D)
    x_base = head_base(x, group, heads, x_stride_b, x_stride_h, UNIT)
    g_base = head_base(g, group, heads, g_stride_b, g_stride_h, UNIT)
    first_token = (group // heads).to(tl.int64) * num_tokens * heads + head
    dx_base = dx + first_token * D
    dg_base = dg + first_token * DV
    at = partial + (split.to(tl.int64) * groups + group) * (2 * D * D + D * DV)
    places = (num_quads, prefix, grid_tokens, num_tokens, g1, g2)
    begin, end = own_tiles(split, chunk, tiles)

    rate = tl.cast(scale, tl.float32) / num_tokens
    g_scale, g_unscale = load_scale(largest_g, group, SCALED)
    u_unscale = 1.0
    if SCALED:
        u_scale, u_unscale = scale_of_gradient(largest_u, at_group, u_blocks, rate)
        rate *= u_scale
        if split == 0:
            tl.store(dx_unscale + group, g_unscale * u_unscale)
    for block in range(BLOCKS_M):
        weights, sums = (), ()
        for part in tl.static_range(PARTS):
            weights += load_part(
                w1 + head * (D * D), w2 + head * (D * D), w3 + head * (D * DV),
                u1 + at_group * (D * D), u2 + at_group * (D * D), u3 + at_group * (D * DV),
                block * BLOCK_M + part * PART_M, units, channels, values, rate, dtype, TANH, D, DV,
            )  # fmt: skip
            sums += zero_sums(BLOCK_D, BLOCK_V, PART_M)
        for tile in range(begin, end):
            at_quads, known = quad_places(tile, 0, places, BLOCK_N)
            first_quad = tl.load(quads + at_quads, mask=known, other=0)
            place = tile_place(tile, first_quad, places, NDIM, BLOCK_N)
            x_tile = convolved_tile(
                x_base, quads, place, places, x_stride_n, x_stride_d, taps, offsets, statistics,
                D, NDIM, True, CENTRED, UNIT, UNROLL, BLOCK_N, BLOCK_D,
            ).to(dtype)  # fmt: skip
            at_quads, known = quad_places(tile, tl.arange(0, BLOCK_N), places, BLOCK_N)
            quad = tl.load(quads + at_quads, mask=known, other=NONE)
            tokens, exist = tile_tokens(place, quad, places, NDIM, BLOCK_N)
            g_tile = load_tile(
                g_base + place[2] * (g_stride_n * UNIT), tokens, values, exist, DV, g_stride_n,
                g_stride_d, UNIT,
            ).to(dtype)  # fmt: skip
            terms, more = (), ()
            for part in tl.static_range(PARTS):
                of_part = second_order_terms(
                    x_tile, g_tile, weights, g_scale, part, TANH, SCALED, PRECISION
                )
                more += add_sums(sums, part, x_tile, g_tile, of_part, PRECISION)
                terms += of_part
            sums = more
            back = gradient_at_g(terms, weights, PARTS, PRECISION, BLOCK_N, BLOCK_V)
            if SCALED:
                back *= u_unscale
            add_tile(
                dg_base + place[2] * heads * DV, back, tokens, values, exist, DV, heads, block,
                BLOCKS_M,
            )  # fmt: skip
            back = gradient_at_x(terms, weights, PARTS, PRECISION, BLOCK_N, BLOCK_D)
            add_tile(
                dx_base + place[2] * heads * D, back, tokens, channels, exist, D, heads, block,
                BLOCKS_M,
            )  # fmt: skip
        for part in tl.static_range(PARTS):
            hidden = block * BLOCK_M + part * PART_M + units
            store_gradients(
                at, tl.trans(sums[2 * part]), sums[2 * part + 1], channels, hidden, values,
                g_unscale * u_unscale, u_unscale, D, DV, TANH, SCALED,
            )  # fmt: skip
        tl.debug_barrier()  # the next block reads dx and dg
