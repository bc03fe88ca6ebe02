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

from .first_order import store_gradients
from .tiles import (
    SIZES,
    convolved_tile,
    head_base,
    load_tile,
    load_weights,
    silu_and_slope,
    silu_curvature,
    store_tile,
)


@triton.jit
def second_order_terms(x, g, w1, w2, w3, u1, u2, u3, PRECISION: tl.constexpr):
    """Z, dA, dB and the gradients of L at dZ, A and B, ``[BLOCK_N, BLOCK_M]`` in x's dtype."""
    a = tl.dot(x, w1, input_precision=PRECISION)
    b = tl.dot(x, w2, input_precision=PRECISION)
    dz = tl.dot(g, tl.trans(w3), input_precision=PRECISION)
    p = tl.dot(x, u1, input_precision=PRECISION)
    r = tl.dot(x, u2, input_precision=PRECISION)
    t = tl.dot(g, tl.trans(u3), input_precision=PRECISION)
    silu, slope = silu_and_slope(a)
    at_dz = p * b * slope + r * silu
    at_a = p * dz * b * silu_curvature(a) + (r * dz + t * b) * slope
    at_b = p * dz * slope + t * silu
    z, da, db = silu * b, dz * b * slope, dz * silu
    dtype: tl.constexpr = x.dtype
    return (
        z.to(dtype), da.to(dtype), db.to(dtype), at_dz.to(dtype), at_a.to(dtype), at_b.to(dtype)
    )  # fmt: skip


@triton.jit
def token_gradients(
    dx, dg, z, da, db, at_dz, at_a, at_b, w1, w2, w3, u1, u2, u3, PRECISION: tl.constexpr
):
    """dL/dx and dL/dg with what one block of hidden units adds to them."""
    dx = tl.dot(da, tl.trans(u1), dx, input_precision=PRECISION)
    dx = tl.dot(db, tl.trans(u2), dx, input_precision=PRECISION)
    dx = tl.dot(at_a, tl.trans(w1), dx, input_precision=PRECISION)
    dx = tl.dot(at_b, tl.trans(w2), dx, input_precision=PRECISION)
    dg = tl.dot(z, u3, dg, input_precision=PRECISION)
    dg = tl.dot(at_dz, w3, dg, input_precision=PRECISION)
    return dx, dg


@triton.jit(do_not_specialize=SIZES)
def second_order_gradient(
    x, g, w1, w2, w3, u1, u2, u3, taps, bias, mean, rstd, partial, dx, dg,
    x_stride_b, x_stride_h, x_stride_n, x_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    groups, heads, num_tokens, chunk, splits, conv_rows, prefix, g0, g1, g2, rate,
    D: tl.constexpr, DV: tl.constexpr, NDIM: tl.constexpr,
    WEIGHTS: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What comes back through the inner gradient; u is dL/dW', ``[B*H, ...]``, U / r.

    WEIGHTS: partial ``[splits, B*H, 2*D*D + D*Dv]`` float32, of the tokens of a chunk; one program
    for each block of hidden units too. TOKENS: dx ``[B, N, H, D]`` and dg ``[B, N, H, Dv]``; one
    program for all hidden units. Both together need all of them in one block.
    """
    BLOCKS_M: tl.constexpr = (D + BLOCK_M - 1) // BLOCK_M if WEIGHTS else 1
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

    in_head = channels < D
    mean_row = tl.load(mean + group.to(tl.int64) * D + channels, mask=in_head, other=0.0)
    rstd_row = tl.load(rstd + group.to(tl.int64) * D + channels, mask=in_head, other=0.0)
    x_base = head_base(x, group, heads, x_stride_b, x_stride_h)
    g_base = head_base(g, group, heads, g_stride_b, g_stride_h)
    first_token = (group // heads).to(tl.int64) * num_tokens * heads + head
    w1_base, u1_base = w1 + head * (D * D), u1 + group.to(tl.int64) * (D * D)
    w2_base, u2_base = w2 + head * (D * D), u2 + group.to(tl.int64) * (D * D)
    w3_base, u3_base = w3 + head * (D * DV), u3 + group.to(tl.int64) * (D * DV)
    if WEIGHTS:
        w1_block, w2_block, w3_block = load_weights(
            w1_base, w2_base, w3_base, block * BLOCK_M, units, channels, values, D, DV, 1.0, dtype
        )
        u1_block, u2_block, u3_block = load_weights(
            u1_base, u2_base, u3_base, block * BLOCK_M, units, channels, values, D, DV, rate, dtype
        )
        sum1 = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
        sum2 = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
        sum3 = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    begin = split * chunk
    for start in range(begin, tl.minimum(begin + chunk, num_tokens), BLOCK_N):
        x_tile = convolved_tile(
            x_base, start, lanes, channels, num_tokens, D, x_stride_n, x_stride_d,
            taps + head * (3**NDIM * D), bias + head * D, mean_row, rstd_row,
            conv_rows, prefix, g0, g1, g2, NDIM, True, 1,
        ).to(dtype)  # fmt: skip
        g_tile = load_tile(g_base, start, lanes, values, num_tokens, DV, g_stride_n, g_stride_d)
        g_tile = g_tile.to(dtype)
        dx_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dg_tile = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        if WEIGHTS:
            z, da, db, at_dz, at_a, at_b = second_order_terms(
                x_tile, g_tile, w1_block, w2_block, w3_block, u1_block, u2_block, u3_block,
                PRECISION,
            )  # fmt: skip
            x_transposed = tl.trans(x_tile)
            sum1 = tl.dot(x_transposed, at_a, sum1, input_precision=PRECISION)
            sum2 = tl.dot(x_transposed, at_b, sum2, input_precision=PRECISION)
            sum3 = tl.dot(tl.trans(at_dz), g_tile, sum3, input_precision=PRECISION)
            if TOKENS:
                dx_tile, dg_tile = token_gradients(
                    dx_tile, dg_tile, z, da, db, at_dz, at_a, at_b,
                    w1_block, w2_block, w3_block, u1_block, u2_block, u3_block, PRECISION,
                )  # fmt: skip
        else:
            for first in range(0, D, BLOCK_M):
                w1_block, w2_block, w3_block = load_weights(
                    w1_base, w2_base, w3_base, first, units, channels, values, D, DV, 1.0, dtype
                )
                u1_block, u2_block, u3_block = load_weights(
                    u1_base, u2_base, u3_base, first, units, channels, values, D, DV, rate, dtype
                )
                z, da, db, at_dz, at_a, at_b = second_order_terms(
                    x_tile, g_tile, w1_block, w2_block, w3_block, u1_block, u2_block, u3_block,
                    PRECISION,
                )  # fmt: skip
                dx_tile, dg_tile = token_gradients(
                    dx_tile, dg_tile, z, da, db, at_dz, at_a, at_b,
                    w1_block, w2_block, w3_block, u1_block, u2_block, u3_block, PRECISION,
                )  # fmt: skip
        if TOKENS:
            dx_base = dx + first_token * D
            dg_base = dg + first_token * DV
            store_tile(dx_base, dx_tile, start, lanes, channels, num_tokens, D, heads * D)
            store_tile(dg_base, dg_tile, start, lanes, values, num_tokens, DV, heads * DV)

    if WEIGHTS:
        at = partial + (split.to(tl.int64) * groups + group) * (2 * D * D + D * DV)
        store_gradients(at, sum1, sum2, sum3, channels, block * BLOCK_M + units, values, D, DV)
