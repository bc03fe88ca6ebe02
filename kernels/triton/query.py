"""The query side: o = (silu(q W1') * (q W2')) W3' with q <- q + conv(q), in one pass."""

import triton
import triton.language as tl

from .convolution import convolved_tile, head_taps
from .tiles import (
    NONE,
    SIZES,
    head_base,
    load_weights,
    own_tiles,
    quad_places,
    silu,
    store_tile,
    tile_place,
    tile_tokens,
    unpair,
)
from .window import convolved_window, load_window, loadable_ahead, window_quads


@triton.jit
def gated(x, w12, TANH: tl.constexpr, PRECISION: tl.constexpr):
    """silu(x W1) * (x W2), float32."""
    a, b = unpair(tl.dot(x, w12, input_precision=PRECISION))
    return silu(a, TANH) * b


@triton.jit(do_not_specialize=SIZES)
def query_output(
    q, w1, w2, w3, taps, out, stride_b, stride_h, stride_n, stride_d, heads, chunk, splits, tiles,
    quads, num_quads, prefix, grid_tokens, num_tokens, g1, g2,
    D: tl.constexpr, DV: tl.constexpr, NDIM: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, TANH: tl.constexpr,
    UNROLL: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out ``[B, N, H, Dv]``, contiguous; the weights are ``[B*H, ...]``.

    One program for each (batch item, head) and chunk of tiles. Weights that fit in one block of
    hidden units stay on the chip over all tiles of the chunk.
    AHEAD: which columns around the quads of the next tile are loaded before this one's products
    (``window.place_ahead``); 0 for none.
    """
    BLOCKS_M: tl.constexpr = (D + BLOCK_M - 1) // BLOCK_M
    dtype: tl.constexpr = tl.float32 if WIDE else q.dtype.element_ty
    group = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    head = group % heads
    channels = tl.arange(0, BLOCK_D)
    values = tl.arange(0, BLOCK_V)
    q_base = head_base(q, group, heads, stride_b, stride_h, UNIT)
    out_base = out + ((group // heads).to(tl.int64) * num_tokens * heads + head) * DV
    w1_base = w1 + group.to(tl.int64) * (D * D)
    w2_base = w2 + group.to(tl.int64) * (D * D)
    w3_base = w3 + group.to(tl.int64) * (D * DV)
    units = tl.arange(0, BLOCK_M)
    if BLOCKS_M == 1:
        w12_block, w3_block = load_weights(
            w1_base, w2_base, w3_base, 0, units, channels, values, D, DV, 1.0, dtype, TANH
        )

    places = (num_quads, prefix, grid_tokens, num_tokens, g1, g2)
    begin, end = own_tiles(split, chunk, tiles)
    LOADED: tl.constexpr = loadable_ahead(NDIM, UNIT, AHEAD)
    taps = head_taps(taps, head, NDIM, BLOCK_D)
    if LOADED:
        window = window_quads(quads, begin, end, places, BLOCK_N // 4)
        words = load_window(q_base, window, places, stride_n, D, NDIM, UNIT, LOADED, BLOCK_D)
    for tile in range(begin, end):
        at, known = quad_places(tile, 0, places, BLOCK_N)
        first_quad = tl.load(quads + at, mask=known, other=0)
        place = tile_place(tile, first_quad, places, NDIM, BLOCK_N)
        if LOADED:
            window = window_quads(quads, tile + 1, end, places, BLOCK_N // 4)
            x = convolved_window(
                words, q_base, quads, place, places, stride_n, stride_d, taps,
                D, NDIM, UNIT, LOADED, BLOCK_N, BLOCK_D,
            ).to(dtype)  # fmt: skip
            words = load_window(q_base, window, places, stride_n, D, NDIM, UNIT, LOADED, BLOCK_D)
        else:
            x = convolved_tile(
                q_base, quads, place, places, stride_n, stride_d, taps, None,
                (None, None, None, None), D, NDIM, False, False, UNIT, UNROLL, BLOCK_N, BLOCK_D,
            ).to(dtype)  # fmt: skip
        if BLOCKS_M == 1:
            z = gated(x, w12_block, TANH, PRECISION).to(dtype)
            o = tl.dot(z, w3_block, input_precision=PRECISION)
        else:
            o = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
            for unit in range(0, D, BLOCK_M):
                w12_block, w3_block = load_weights(
                    w1_base, w2_base, w3_base, unit, units, channels, values, D, DV, 1.0, dtype,
                    TANH,
                )  # fmt: skip
                z = gated(x, w12_block, TANH, PRECISION).to(dtype)
                o = tl.dot(z, w3_block, o, input_precision=PRECISION)
        at, known = quad_places(tile, tl.arange(0, BLOCK_N), places, BLOCK_N)
        quad = tl.load(quads + at, mask=known, other=NONE)
        tokens, exist = tile_tokens(place, quad, places, NDIM, BLOCK_N)
        store_tile(out_base + place[2] * heads * DV, o, tokens, values, exist, DV, heads)
