"""The forward: four launches, nothing of N x D written but the output."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .first_order import inner_gradient
from .launch import convolutions, launch, near, new_matrices, padded, site, sum_partials
from .query import query_output
from .statistics import key_statistics


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
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The node with inner model "swiglu", inner loss "dot" and key norm "instance".

    Args: as ``t5fx.kernels.ttt`` takes them; float32, float16 or bfloat16, any strides, D and Dv
    up to 256. Products are of float32 unless q, k and v share a 16-bit dtype; sums are float32.

    Returns:
        The output ``[B, H, N, Dv]`` in q's dtype, a view of contiguous ``[B, N, H, Dv]``, and what
        ``backward`` wants to have saved, all float32: mean and 1/std of the keys ``[B, H, D]``, and
        the updated weights ``[B, H, D, D], [B, H, D, D], [B, H, D, Dv]``.

    Raises:
        NodeArgumentError: what the kernels cannot take.
    """
    shape = site(q, k, v, grid=grid, prefix=prefix, locality=locality)
    q, k, v = near(q), near(k), near(v)
    weights = [w.contiguous() for w in weights]
    conv_q, conv_k = convolutions(conv, shape, unread=q)

    mean, rstd = (_float32(q, shape.batch, shape.heads, shape.dim) for _ in range(2))
    settings = shape.config("key_statistics")
    key_chunk, key_splits = shape.chunks(settings)
    key_partial = _float32(k, shape.groups, key_splits, 2, shape.dim)
    launch(
        key_statistics,
        shape.groups * key_splits,
        *(k, key_partial, *k.stride(), shape.heads, shape.tokens, key_chunk, key_splits),
        D=shape.dim,
        BLOCK_D=padded(shape.dim),
        **settings.launched(),
    )

    blocks = shape.hidden_blocks("inner_gradient")
    chunk, splits = shape.chunks(shape.config("inner_gradient"), blocks)
    partial = _float32(k, splits, shape.groups, shape.matrices)
    launch(
        inner_gradient,
        shape.groups * splits * blocks,
        *(k, v, *weights, *conv_k, key_partial, mean, rstd, partial, partial),
        *(*k.stride(), *v.stride(), shape.groups, shape.heads, shape.tokens, chunk, splits),
        *(key_chunk, key_splits, *shape.convolved, key_norm_eps),
        NORM=True,
        BATCHED=False,
        STORE_DX=False,
        **shape.shape("inner_gradient"),
    )

    updated = new_matrices(q, torch.float32, shape, shape.batch, shape.heads)
    rate = scale / shape.tokens
    sum_partials(partial, updated, shape, owners=shape.groups, rate=rate, base=weights)

    out = q.new_empty(shape.batch, shape.tokens, shape.heads, shape.value_dim)
    chunk, splits = shape.chunks(shape.config("query_output"))
    launch(
        query_output,
        shape.groups * splits,
        *(q, *updated, *conv_q, out),
        *(*q.stride(), shape.heads, shape.tokens, chunk, splits, *shape.convolved),
        **shape.shape("query_output"),
    )
    return out.transpose(1, 2), (mean, rstd, *updated)


def _float32(like: Tensor, *sizes: int) -> Tensor:
    return like.new_empty(sizes, dtype=torch.float32)
