"""Device code that the kernels share: where tiles of tokens lie, loads and stores, activations.

A tile is ``[BLOCK_N, BLOCK_D]``: some tokens of one (batch item, head) by all its channels, padded
to a power of two. The tokens of the grid come four by four: 2 x 2 along the last two axes, or four
in a row if there is only one axis. Such a quad has 36 neighbours, counting each token's, but 16
different ones, and each of those is loaded and converted once. A tile has BLOCK_N / 4 quads, the
first tokens of all of them before the second ones, and so on. After the tiles of quads come those
of the tokens before the grid, then of those behind it.

A token's code says where on the grid it lies, so that a kernel need not divide: of the last axis
bit 0 at the first place and bit 1 at the last, of the axis before bits 2 and 3, and so on;
``4 ** NDIM`` for a token that is not on the grid. ``quads[i]``, int64, has the first token of a
quad from bit ``QUAD`` on and below it the flags of what is missing around it: bits 0 to 5 are the
first token's code, then bit 6 for row 2 (counted from the first token), 7, 8 and 9 for columns 2, 3
and 4, and 10 for the quad itself.

What kernels are told of the tokens is passed on as one tuple, ``places``: (num_quads, prefix,
grid_tokens, num_tokens, g1, g2); that of one tile as another (see ``tile_place``).

torch finds out what a kernel writes by following the pointers of its stores back to its arguments,
through all arguments of a function on the way, but not through a load. So what says where to write
comes from functions that are not given what is only read: kernels load ``quads`` themselves.
"""

import triton
import triton.language as tl

#: Where the number of the first token begins in a member of ``quads``.
QUAD = tl.constexpr(16)
#: The flag of a quad that does not exist.
NONE = tl.constexpr(2**10)

#: Arguments that Triton must not specialise on: they differ from one resolution or batch to the
#: next, and a kernel that is called directly is compiled once for all of them. Inductor disregards
#: that (``define_user_defined_triton_kernel`` in torch 2.11 to 2.15): of the integers that it knows
#: when it makes a graph, all of a static one, it makes those that are 1 constants, and tells Triton
#: which are multiples of 16. So two static graphs share a kernel's binary only if they agree in
#: both; a graph with symbolic sizes has one for all of them.
SIZES = [
    *("groups", "owners", "num_tokens", "chunk", "splits", "tiles", "rows", "base_rows"),
    *("num_quads", "prefix", "grid_tokens", "g0", "g1", "g2"),
    *(f"{tensor}stride_{axis}" for tensor in ("", "x_", "g_") for axis in "bhn"),
]


@triton.jit
def head_base(ptr, group, heads, stride_b, stride_h, UNIT: tl.constexpr):
    """Where the first token of a (batch item, head) lies; ``group`` is b * heads + h.

    Strides of inputs are in units of UNIT elements (see ``launch.unit``).
    """
    batch = (group // heads).to(tl.int64)
    head = (group % heads).to(tl.int64)
    return ptr + (batch * stride_b + head * stride_h) * UNIT


@triton.jit
def quad_places(tile, lanes, places, BLOCK_N: tl.constexpr):
    """Which members of ``quads`` tokens ``lanes`` of a tile belong to, and whether they exist."""
    num_quads, _, _, _, _, _ = places
    at = tile * (BLOCK_N // 4) + lanes % (BLOCK_N // 4)
    return at, at < num_quads


@triton.jit
def tile_place(tile, quad, places, NDIM: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile, whether it is on the grid, its first token, int64, and, if it is not, how many there
    are from that one on. ``quad``: its first one.
    """
    num_quads, prefix, grid_tokens, num_tokens, _, _ = places
    grid_tiles = tl.cdiv(num_quads, BLOCK_N // 4)
    on_grid = tile < grid_tiles if NDIM > 0 else False
    first = tl.cast(0, tl.int64)
    count = tl.cast(0, tl.int32)
    if on_grid:
        first = quad >> QUAD
    else:
        first += (tile - grid_tiles) * BLOCK_N
        limit = tl.cast(prefix, tl.int64)
        if first >= limit:
            first -= tl.cdiv(prefix, BLOCK_N) * BLOCK_N - prefix - grid_tokens
            limit = tl.cast(num_tokens, tl.int64)
        count = tl.cast(limit - first, tl.int32)
    return tile, on_grid, first, count


@triton.jit
def own_tiles(split, chunk, tiles):
    """The first of the tiles of a program, and the one behind its last."""
    begin = split * tl.cast(chunk, tl.int32)
    return begin, tl.minimum(begin + tl.cast(chunk, tl.int32), tl.cast(tiles, tl.int32))


@triton.jit
def load_quads(quads, place, places, lanes, L: tl.constexpr):
    """Of the quads ``lanes`` of a tile of L: first tokens, counted from the tile's, and flags."""
    tile, _, first, _ = place
    at, known = quad_places(tile, lanes, places, 4 * L)
    quad = tl.load(quads + at, mask=known, other=NONE)
    return ((quad >> QUAD) - first).to(tl.int32), quad.to(tl.int32)


@triton.jit
def tile_tokens(place, quad, places, NDIM: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tokens of a tile, counted from its first one, int32, and which of them exist.

    ``quad``: the one that each of them belongs to.
    """
    L: tl.constexpr = BLOCK_N // 4
    _, on_grid, first, count = place
    _, _, _, _, _, g2 = places
    lanes = tl.arange(0, BLOCK_N)
    if on_grid:
        tokens = ((quad >> QUAD) - first).to(tl.int32)
        flags = quad.to(tl.int32)
        member = lanes // L
        if NDIM == 1:
            after = tl.where(member == 2, 128, tl.where(member == 3, 256, 0))
            missing = tl.where(member == 1, 2, after)
            further = member
        else:
            missing = tl.where(member >= 2, 8, 0) + tl.where(member % 2 > 0, 2, 0)
            further = tl.where(member >= 2, tl.cast(g2, tl.int32), 0) + member % 2
        tokens += further
        exist = (flags & (NONE + missing)) == 0
    else:
        tokens = lanes
        exist = lanes < count
    return tokens, exist


@triton.jit
def tile_mask(valid, channels, D: tl.constexpr):
    """Which elements of a tile exist, given which tokens do."""
    mask = valid[:, None]
    if channels.shape[0] != D:
        mask = mask & (channels < D)[None, :]
    return mask


@triton.jit
def load_tile(
    start, tokens, channels, valid, D: tl.constexpr, stride_n, stride_d, UNIT: tl.constexpr
):
    """The valid tokens, counted from where ``start`` points, in their own dtype; 0 elsewhere.

    Offsets within a tile fit in 32 bits (``launch.near``, ``launch.check_reach``).
    """
    if UNIT > 1:
        within = tokens[:, None] * (stride_n * UNIT) + channels[None, :]
    else:
        within = tokens[:, None] * stride_n + channels[None, :] * stride_d
    return tl.load(start + within, mask=tile_mask(valid, channels, D), other=0.0)


@triton.jit
def store_tile(start, tile, tokens, channels, valid, D: tl.constexpr, heads):
    """Writes a tile of ``[B, N, H, D]``, contiguous, in the dtype of the memory."""
    ptrs = start + (tokens * (heads * D))[:, None] + channels[None, :]
    mask = tile_mask(valid, channels, D)
    tl.store(ptrs, tile.to(start.dtype.element_ty), mask=mask)


@triton.jit
def pair(a, b):
    """``[R, 2 C]``: a, and b at its right. One product has both, and no data moves."""
    return tl.join(a, b).permute(0, 2, 1).reshape(a.shape[0], 2 * a.shape[1])


@triton.jit
def unpair(ab):
    """a and b again."""
    return tl.split(ab.reshape(ab.shape[0], 2, ab.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def load_weights(
    w1, w2, w3, first, units, channels, values, D: tl.constexpr, DV: tl.constexpr, rate,
    dtype: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """``rate`` times the weights of the hidden units ``first + units``, in a dtype: columns of W1
    (half of it if ``TANH``) and W2 ``[D, D]`` as a `pair`, and rows of W3 ``[D, Dv]``; all lie
    contiguous.
    """
    inside = first + units < D
    columns = (channels < D)[:, None] & inside[None, :]
    rows = inside[:, None] & (values < DV)[None, :]
    at = channels[:, None] * D + units[None, :]
    w1_block = tl.load(w1 + first + at, mask=columns, other=0.0).to(tl.float32) * rate
    if TANH:
        w1_block *= 0.5
    w2_block = tl.load(w2 + first + at, mask=columns, other=0.0).to(tl.float32) * rate
    at = units[:, None] * DV + values[None, :]
    w3_block = tl.load(w3 + first * DV + at, mask=rows, other=0.0).to(tl.float32) * rate
    return pair(w1_block, w2_block).to(dtype), w3_block.to(dtype)


@triton.jit
def sigmoid(a):
    """1 / (1 + exp(-a)), to a few ulps: the division is a squared reciprocal root.

    Five instructions; Triton's own sigmoid is twelve, most of them for a divisor out of range.
    """
    root = tl.math.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * a))
    return root * root


@triton.jit
def tanh(a):
    """By the GPU's own instruction, NVIDIA's from sm_75 on: its error is up to 2**-11 of the value
    (PTX ISA, ``tanh.approx.f32``), an eighth of a rounding to bfloat16.
    """
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def silu(a, TANH: tl.constexpr):
    """silu(a) or, if ``TANH``, silu(2 a) = a + a tanh(a): two instructions instead of six."""
    if TANH:
        return a + a * tanh(a)
    else:
        return a * sigmoid(a)


@triton.jit
def silu_terms(a, TANH: tl.constexpr):
    """That and its first and second derivative, by a."""
    if TANH:
        t = tanh(a)
        up, bend = 1 + t, 1 - t * t
        lean = a * bend
        return a * up, up + lean, 2 * (bend - t * lean)
    else:
        sigma = sigmoid(a)
        scaled = a * sigma
        rest = 1 - sigma
        slope = sigma + scaled * rest
        return scaled, slope, rest * (sigma + slope - scaled * sigma)
