"""The forward: five launches, nothing of N x D written but the output."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .first_order import inner_gradient
from .launch import code_count, is_centred, is_wide, launch, near, padded, site, sum_partials
from .prepare import key_norm, prepare
from .query import query_output


class Saved(NamedTuple):
    """What ``backward`` wants to have saved."""

    mean: Tensor  # of the keys, [B, H, D] float32
    rstd: Tensor  # the same: 1 / sqrt(var + eps)
    offsets: Tensor  # [B, H, codes, D] float32: see ``key_norm``; empty if centred
    taps: Tensor  # [2, H, 3**ndim, D] float32: the kernels of q's and k's convolution
    codes: Tensor  # [N] uint8: where each token lies on the grid; empty without a convolution
    w1: Tensor  # W', [B, H, D, D] in the dtype of the products
    w2: Tensor
    w3: Tensor  # [B, H, D, Dv]


def empty_saved(
    q: Tensor, k: Tensor, v: Tensor, conv: Sequence[Tensor], key_norm_eps: float
) -> Saved:
    """Room for it."""
    batch, heads, tokens, dim = q.shape
    ndim = conv[0].dim() - 2 if conv else 0
    codes = 0 if is_centred(q, k, v, key_norm_eps) else code_count(ndim)
    taps = 3**ndim if ndim else 0
    dtype = torch.float32 if is_wide(q, k, v) else q.dtype
    return Saved(
        q.new_empty(batch, heads, dim, dtype=torch.float32),
        q.new_empty(batch, heads, dim, dtype=torch.float32),
        q.new_empty(batch, heads, codes, dim, dtype=torch.float32),
        q.new_empty(2, heads, taps, dim, dtype=torch.float32),
        q.new_empty(tokens if ndim else 0, dtype=torch.uint8),
        q.new_empty(batch, heads, dim, dim, dtype=dtype),
        q.new_empty(batch, heads, dim, dim, dtype=dtype),
        q.new_empty(batch, heads, dim, v.shape[3], dtype=dtype),
    )


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
) -> tuple[Tensor, Saved]:
    """The node with inner model "swiglu", inner loss "dot" and key norm "instance".

    Args: as ``t5fx.kernels.ttt`` takes them; float32, float16 or bfloat16, any strides, D and Dv
    up to 256. Products are of float32 unless q, k and v share a 16-bit dtype; sums are float32.

    Returns:
        The output ``[B, H, N, Dv]`` in q's dtype, a view of contiguous ``[B, N, H, Dv]``, and what
        ``backward`` wants to have saved.

    Raises:
        NodeArgumentError: what the kernels cannot take.
    """
    shape = site(q, k, v, grid=grid, prefix=prefix, locality=locality, key_norm_eps=key_norm_eps)
    q, k, v = near(q), near(k), near(v)
    weights = [w.contiguous() for w in weights]
    weight_q, bias_q, weight_k, bias_k = [c.contiguous() for c in conv] or [q] * 4
    saved = empty_saved(q, k, v, conv, key_norm_eps)
    mean, rstd, offsets, taps, codes, *updated = saved

    settings = shape.config("prepare")
    key_chunk, key_splits = shape.chunks(settings)
    statistics = k.new_empty(shape.groups, key_splits, 2, shape.dim, dtype=torch.float32)
    launch(
        prepare,
        shape.groups * key_splits,
        *(k, weight_q, weight_k, statistics, codes, taps, *k.stride()),
        *(shape.heads, shape.tokens, key_chunk, key_splits, shape.prefix, *shape.grid),
        D=shape.dim,
        NDIM=shape.conv_ndim,
        BLOCK_D=padded(shape.dim),
        **settings.launched(),
    )
    launch(
        key_norm,
        shape.groups * max(1, offsets.shape[2]),
        *(statistics, taps[1], bias_k, mean, rstd, offsets),
        *(shape.heads, shape.tokens, key_chunk, key_splits, key_norm_eps),
        D=shape.dim,
        NDIM=shape.conv_ndim,
        CENTRED=shape.centred,
        BLOCK_D=padded(shape.dim),
        num_warps=1,
    )

    blocks = shape.hidden_blocks("inner_gradient")
    chunk, splits = shape.chunks(shape.config("inner_gradient"), blocks)
    partial = k.new_empty(splits, shape.groups, shape.matrices, dtype=torch.float32)
    launch(
        inner_gradient,
        shape.groups * splits * blocks,
        *(k, v, *weights, codes, taps[1], bias_k, offsets, mean, rstd, partial, partial),
        *(*k.stride(), *v.stride(), shape.groups, shape.heads, shape.tokens, chunk, splits),
        *shape.convolved,
        KEYS=True,
        CENTRED=shape.centred,
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
    chunk, splits = shape.chunks(shape.config("query_output"))
    launch(
        query_output,
        shape.groups * splits,
        *(q, *updated, codes, taps[0], bias_q, out),
        *(*q.stride(), shape.heads, shape.tokens, chunk, splits, *shape.convolved),
        **shape.shape("query_output"),
    )
    return out.transpose(1, 2), saved
