"""The inner gradient: what -v . f_W(k) (or any other cotangent of f_W(x)) says about W and x.

With A = x W1, B = x W2, Z = silu(A) B of a tile of tokens and g the cotangent of Z W3::

    dZ = g W3^T, dA = dZ B silu'(A), dB = dZ silu(A)
    G1 = x^T dA, G2 = x^T dB, G3 = Z^T g, dx = dA W1^T + dB W2^T

Hidden units do not see each other: columns of W1 and W2 and rows of W3 can be dealt with in blocks
of BLOCK_M. Programs share them out where only G is wanted; where dx is, the sum over all of them,
each program goes through its tokens once for every block.
"""

import triton
import triton.language as tl

from .convolution import convolved_tile, group_offsets, head_taps, load_statistics
from .tiles import (
    NONE,
    SIZES,
    head_base,
    load_scale,
    load_tile,
    load_weights,
    own_tiles,
    pair,
    quad_places,
    silu_terms,
    store_tile,
    tile_place,
    tile_tokens,
    unpair,
)


@triton.jit
def hidden_gradients(
    x, g, w12, w3, scale, TANH: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr
):
    """Of a block of hidden units, in x's dtype: Z ``[BLOCK_N, BLOCK_M]``, dA and dB as a `pair`;
    the latter times ``scale`` if ``SCALED``.
    """
    a, b = unpair(tl.dot(x, w12, input_precision=PRECISION))
    dz = tl.dot(g, tl.trans(w3), input_precision=PRECISION)
    if SCALED:
        dz *= scale
    silu, slope, _ = silu_terms(a, TANH)
    dtype: tl.constexpr = x.dtype
    return (silu * b).to(dtype), pair(dz * (b * slope), dz * silu).to(dtype)


@triton.jit
def store_gradients(
    base, g12, g3, channels, hidden, values, unscale, unscale3, D: tl.constexpr, DV: tl.constexpr,
    TANH: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Writes a block of hidden units of G1, G2 and G3, which lie one behind the other, if
    ``SCALED`` times ``unscale`` and, the last, ``unscale3``.

    If ``TANH``, ``g12`` has the gradient of W1 / 2.

    ``g3`` comes as its transpose, ``[BLOCK_V, BLOCK_M]``, like the others: with as many rows as a
    product of 8 warps wants.
    """
    columns = (channels < D)[:, None] & (hidden < D)[None, :]
    at = base + channels[:, None] * D + hidden[None, :]
    g1, g2 = unpair(g12)
    if TANH:
        g1 *= 0.5
    if SCALED:
        g1, g2, g3 = g1 * unscale, g2 * unscale, g3 * unscale3
    tl.store(at, g1, mask=columns)
    tl.store(at + D * D, g2, mask=columns)
    rows = (values < DV)[:, None] & (hidden < D)[None, :]
    tl.store(base + 2 * D * D + hidden[None, :] * DV + values[:, None], g3, mask=rows)


@triton.jit
def add_tile(
    start, tile, tokens, channels, valid, D: tl.constexpr, heads, block, BLOCKS_M: tl.constexpr
):
    """Writes a tile of ``[B, N, H, D]``; after the first block of hidden units, adds to it."""
    if BLOCKS_M > 1:
        if block > 0:
            tile += load_tile(start, tokens, channels, valid, D, heads, 1, D)
    store_tile(start, tile, tokens, channels, valid, D, heads)


@triton.jit(do_not_specialize=SIZES)
def inner_gradient(
    x, g, w1, w2, w3, taps, offsets, mean, rstd, largest, partial, dx, dx_unscale,
    x_stride_b, x_stride_h, x_stride_n, x_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    groups, heads, chunk, splits, tiles,
    quads, num_quads, prefix, grid_tokens, num_tokens, g1, g2,
    D: tl.constexpr, DV: tl.constexpr, NDIM: tl.constexpr, UNIT: tl.constexpr,
    KEYS: tl.constexpr, CENTRED: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, TANH: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """partial ``[splits, B*H, 2*D*D + D*Dv]`` float32: G1, G2, G3 of a chunk of tiles.

    KEYS: x is normalised with mean and rstd, and the weights are ``[H, ...]``; one program for each
    (batch item, head), chunk and block of hidden units. Otherwise x are the queries, the weights
    are ``[B*H, ...]``, dx ``[B, N, H, D]`` is written too, and one program does all blocks.
    SCALED: dZ is scaled by a power of two, from ``largest`` ``[B*H]``, the largest magnitude of g,
    and with it dA and dB; ``partial`` is not. If there is a convolution to go back through, dx is
    scaled too, and ``dx_unscale`` ``[B*H]`` is written, which undoes it.
    WIDE: products of float32, not of the dtype of x.
    """
    BLOCKS_M: tl.constexpr = (D + BLOCK_M - 1) // BLOCK_M
    SHARED_AMONG: tl.constexpr = BLOCKS_M if KEYS else 1
    dtype: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    program = tl.program_id(0) // SHARED_AMONG
    group = program // splits
    split = program % splits
    head = group % heads
    channels = tl.arange(0, BLOCK_D)
    values = tl.arange(0, BLOCK_V)
    units = tl.arange(0, BLOCK_M)
    owner = head if KEYS else group.to(tl.int64)
    statistics = (None, None, None, None)
    if KEYS:
        statistics = load_statistics(mean, rstd, group, tl.arange(0, BLOCK_D // 2))
        offsets = group_offsets(offsets, group, NDIM, BLOCK_D)
    taps = head_taps(taps, head, NDIM, BLOCK_D)
    x_base = head_base(x, group, heads, x_stride_b, x_stride_h, UNIT)
    g_base = head_base(g, group, heads, g_stride_b, g_stride_h, UNIT)
    dx_base = dx + ((group // heads).to(tl.int64) * num_tokens * heads + head) * D
    at = partial + (split.to(tl.int64) * groups + group) * (2 * D * D + D * DV)
    places = (num_quads, prefix, grid_tokens, num_tokens, g1, g2)
    begin, end = own_tiles(split, chunk, tiles)
    scale, unscale = load_scale(largest, group, SCALED)
    if SCALED and NDIM > 0 and not KEYS:
        if split == 0:
            tl.store(dx_unscale + group, unscale)

    for turn in range(BLOCKS_M // SHARED_AMONG):
        block = turn + tl.program_id(0) % SHARED_AMONG
        w12_block, w3_block = load_weights(
            w1 + owner * (D * D), w2 + owner * (D * D), w3 + owner * (D * DV),
            block * BLOCK_M, units, channels, values, D, DV, 1.0, dtype, TANH,
        )  # fmt: skip
        # Transposed, as the left operand of a product stays in registers: x need not.
        sum12 = tl.zeros([2 * BLOCK_M, BLOCK_D], tl.float32)
        sum3 = tl.zeros([BLOCK_V, BLOCK_M], tl.float32)
        for tile in range(begin, end):
            at_quads, known = quad_places(tile, 0, places, BLOCK_N)
            first_quad = tl.load(quads + at_quads, mask=known, other=0)
            place = tile_place(tile, first_quad, places, NDIM, BLOCK_N)
            x_tile = convolved_tile(
                x_base, quads, place, places, x_stride_n, x_stride_d, taps, offsets, statistics,
                D, NDIM, KEYS, CENTRED, UNIT, UNROLL, BLOCK_N, BLOCK_D,
            ).to(dtype)  # fmt: skip
            at_quads, known = quad_places(tile, tl.arange(0, BLOCK_N), places, BLOCK_N)
            quad = tl.load(quads + at_quads, mask=known, other=NONE)
            tokens, exist = tile_tokens(place, quad, places, NDIM, BLOCK_N)
            g_tile = load_tile(
                g_base + place[2] * (g_stride_n * UNIT), tokens, values, exist, DV, g_stride_n,
                g_stride_d, UNIT,
            ).to(dtype)  # fmt: skip
            z, dab = hidden_gradients(
                x_tile, g_tile, w12_block, w3_block, scale, TANH, SCALED, PRECISION
            )
            if not KEYS:
                back = tl.dot(dab, tl.trans(w12_block), input_precision=PRECISION)
                if SCALED and NDIM == 0:
                    back *= unscale
                add_tile(
                    dx_base + place[2] * heads * D, back, tokens, channels, exist, D, heads, block,
                    BLOCKS_M,
                )  # fmt: skip
            sum3 = tl.dot(tl.trans(g_tile), z, sum3, input_precision=PRECISION)
            sum12 = tl.dot(tl.trans(dab), x_tile, sum12, input_precision=PRECISION)
        hidden = block * BLOCK_M + units
        store_gradients(
            at, tl.trans(sum12), sum3, channels, hidden, values, unscale, 1.0, D, DV, TANH, SCALED
        )
        if not KEYS:  # the next block reads dx
            tl.debug_barrier()
