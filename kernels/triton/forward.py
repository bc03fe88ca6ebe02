"""The forward: five launches, nothing of N x D written but the output and, to be trained, the
convolved keys.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .configs import keeps_keys
from .first_order import inner_gradient
from .launch import (
    Site,
    code_count,
    is_centred,
    is_scaled,
    is_wide,
    largest,
    launch,
    near,
    on_its_device,
    padded,
    quad_count,
    site,
    strides,
    sum_partials,
)
from .prepare import key_norm, prepare
from .query import query_output


class Saved(NamedTuple):
    """What ``backward`` wants to have saved."""

    # Rows of D channels are padded and split: see ``tiles``.
    mean: Tensor  # of the keys, [B, H, D] float32
    rstd: Tensor  # the same: 1 / sqrt(var + eps)
    offsets: Tensor  # [B, H, codes, D] float32: see ``key_norm``; empty if centred
    taps: Tensor  # [2, H, 3**ndim + 1, D] float32: of q's and k's convolution, and the biases
    quads: Tensor  # [quads] int64: tokens of the grid four by four (see ``tiles``)
    w1: Tensor  # W', [B, H, D, D] in the dtype of the products
    w2: Tensor
    w3: Tensor  # [B, H, D, Dv]
    largest_v: Tensor  # magnitude of v, [B, H] float32; [B, 0] unless products are of float16
    keys: Tensor  # convolved, [B, N, H, D] in the dtype of the products; [B, N, H, 0] if not kept

    @property
    def keeps_keys(self) -> bool:
        return bool(self.keys.shape[3])


def empty_saved(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    conv: Sequence[Tensor],
    grid: Sequence[int],
    key_norm_eps: float,
    training: bool = False,
) -> Saved:
    """Room for it."""
    batch, heads, tokens, dim = q.shape
    ndim = conv[0].dim() - 2 if conv else 0
    codes = 0 if is_centred(q, k, v, key_norm_eps) else code_count(ndim)
    taps = 3**ndim + 1 if ndim else 0
    row = padded(dim)
    dtype = torch.float32 if is_wide(q, k, v) else q.dtype
    keep = training and keeps_keys(padded(max(dim, v.shape[3])), ndim)
    return Saved(
        q.new_empty(batch, heads, row, dtype=torch.float32),
        q.new_empty(batch, heads, row, dtype=torch.float32),
        q.new_empty(batch, heads, codes, row, dtype=torch.float32),
        q.new_empty(2, heads, taps, row, dtype=torch.float32),
        q.new_empty(quad_count(grid) if ndim else 0, dtype=torch.int64),
        q.new_empty(batch, heads, dim, dim, dtype=dtype),
        q.new_empty(batch, heads, dim, dim, dtype=dtype),
        q.new_empty(batch, heads, dim, v.shape[3], dtype=dtype),
        q.new_empty(batch, heads if is_scaled(q, k, v) else 0, dtype=torch.float32),
        q.new_empty(batch, tokens, heads, dim if keep else 0, dtype=dtype),
    )


@on_its_device
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    *,
    scale: float,
    grid: Sequence[int],
    prefix: int,
    key_norm_eps: float,
    locality: str,
    training: bool = False,
) -> tuple[Tensor, Saved]:
    """The node with inner model "swiglu", inner loss "dot" and key norm "instance".

    Args: as ``t5fx.kernels.ttt`` takes them; float32, float16 or bfloat16, any strides, D and Dv
    up to 256. Products are of float32 unless q, k and v share a 16-bit dtype; sums are float32.
    In bfloat16 on an NVIDIA GPU silu is by its own tanh, an eighth of a rounding off at most.
    ``training``: a backward will follow, for which the convolved keys are kept where that pays
    (``configs.keeps_keys``); otherwise it convolves them again.

    Returns:
        The output ``[B, H, N, Dv]`` in q's dtype, a view of contiguous ``[B, N, H, Dv]``, and what
        ``backward`` wants to have saved.

    Raises:
        NodeArgumentError: what the kernels cannot take.
    """
    shape = site(q, k, v, grid=grid, prefix=prefix, locality=locality, key_norm_eps=key_norm_eps)
    q, k, v = (near(t, shape) for t in (q, k, v))
    weights = [w.contiguous() for w in weights]
    saved = empty_saved(q, k, v, conv, grid, key_norm_eps, training)
    saved = saved._replace(largest_v=largest(v, shape))
    fill_tables(saved, k, conv, shape, key_norm_eps)
    mean, rstd, offsets, taps, quads, *updated, largest_v, keys = saved

    blocks = shape.hidden_blocks("inner_gradient")
    parts = shape.tile_chunks(shape.config("inner_gradient"), blocks)
    partial = k.new_empty(parts.splits, shape.groups, shape.matrices, dtype=torch.float32)
    unit, steps = strides(k, v)
    launch(
        inner_gradient,
        shape.groups * parts.splits * blocks,
        *(k, v, *weights, taps[1], offsets, mean, rstd, largest_v, partial, partial, partial),
        *(keys if saved.keeps_keys else partial, *steps, shape.groups, shape.heads, *parts),
        *shape.places(quads),
        UNIT=unit,
        KEYS=True,
        KEEP=saved.keeps_keys,
        CENTRED=shape.centred,
        SCALED=shape.scaled,
        **shape.shape("inner_gradient"),
    )
    sum_partials(
        partial,
        updated,
        shape,
        owners=shape.groups,
        scale=scale,
        tokens=shape.tokens,
        base=weights,
    )

    out = q.new_empty(shape.batch, shape.tokens, shape.heads, shape.value_dim)
    parts = shape.tile_chunks(shape.config("query_output"))
    unit, steps = strides(q)
    launch(
        query_output,
        shape.groups * parts.splits,
        *(q, *updated, taps[0], out),
        *(*steps, shape.heads, *parts),
        *shape.places(quads),
        UNIT=unit,
        AHEAD=shape.config("query_output").ahead,
        **shape.shape("query_output"),
    )
    return out.transpose(1, 2), saved


def fill_tables(
    saved: Saved, k: Tensor, conv: Sequence[Tensor], shape: Site, key_norm_eps: float
) -> None:
    """Writes the rows of channels and ``quads`` of ``saved``."""
    # What is not there is not read.
    weight_q, bias_q, weight_k, bias_k = [c.contiguous() for c in conv] or [k] * 4
    settings = shape.config("prepare")
    chunk, splits = shape.chunks(settings)
    statistics = k.new_empty(shape.groups, splits, 2, shape.dim, dtype=torch.float32)
    unit, steps = strides(k)
    launch(
        prepare,
        shape.groups * splits,
        *(k, weight_q, bias_q, weight_k, bias_k, statistics, saved.quads, saved.taps, *steps),
        *(shape.heads, shape.tokens, chunk, splits, shape.num_quads, shape.prefix, *shape.grid),
        D=shape.dim,
        NDIM=shape.conv_ndim,
        UNIT=unit,
        BLOCK_D=padded(shape.dim),
        **settings.launched(),
    )
    launch(
        key_norm,
        shape.groups * max(1, saved.offsets.shape[2]),
        *(statistics, saved.taps[1], saved.mean, saved.rstd, saved.offsets),
        *(shape.heads, shape.tokens, chunk, splits, key_norm_eps),
        D=shape.dim,
        NDIM=shape.conv_ndim,
        CENTRED=shape.centred,
        BLOCK_D=padded(shape.dim),
        num_warps=1,
    )
