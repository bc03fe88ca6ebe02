"""The backward: gradients of everything, recomputing what the forward did not save.

Two temporaries of N x D: the gradients at the convolved queries and keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .convolution_gradient import convolution_gradient, key_norm_gradient
from .first_order import inner_gradient
from .forward import Saved
from .launch import (
    Site,
    largest,
    launch,
    near,
    on_its_device,
    padded,
    site,
    strides,
    sum_blocks,
    sum_partials,
)
from .second_order import second_order_gradient


@on_its_device
def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    saved: Sequence[Tensor],
    *,
    scale: float,
    grid: Sequence[int],
    prefix: int,
    key_norm_eps: float,
    locality: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Gradients of q, k, v, the weights and the convolutions' tensors, each in its tensor's dtype.

    Args: ``grad_out`` ``[B, H, N, Dv]``, any strides; ``saved``: what ``forward`` returned beside
    its output; the rest as ``forward`` takes it.

    Returns:
        (dq, dk, dv, [dW1, dW2, dW3], [a gradient for each tensor of ``conv``]). Those of q, k and v
        are ``[B, H, N, ...]`` views of contiguous ``[B, N, H, ...]``.

    Raises:
        NodeArgumentError: what the kernels cannot take.
    """
    shape = site(q, k, v, grid=grid, prefix=prefix, locality=locality, key_norm_eps=key_norm_eps)
    q, k, v, grad_out = (near(t, shape) for t in (q, k, v, grad_out))
    weights = [w.contiguous() for w in weights]
    kept = Saved(*saved)

    grad_updated, largest_u, at_q, unscale_q = _updated_weights(grad_out, q, kept, shape)
    grad_weights, grad_v, at_k, unscale_k = _inner_gradient(
        k, v, weights, grad_updated, largest_u, kept, scale, shape
    )
    grad_q, conv_q_grads = _inputs(at_q, unscale_q, q, kept, shape, keys=False)
    grad_k, conv_k_grads = _inputs(at_k, unscale_k, k, kept, shape, keys=True)
    conv_grads = [
        grad.reshape(tensor.shape).to(
            tensor.dtype, copy=True, memory_format=torch.contiguous_format
        )
        for grad, tensor in zip(conv_q_grads + conv_k_grads, conv, strict=True)
    ]
    grad_q, grad_k, grad_v = (grad.transpose(1, 2) for grad in (grad_q, grad_k, grad_v))
    return grad_q, grad_k, grad_v, grad_weights, conv_grads


def _updated_weights(
    grad_out: Tensor, q: Tensor, saved: Saved, shape: Site
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """dL/dW' ``[B, H, ...]`` float32, the largest magnitudes in blocks of it, dL/dq'
    ``[B, N, H, D]``, q' the convolved queries, and ``[B*H]`` by which it is to be multiplied.

    The second and the last are empty unless products are of float16.
    """
    parts = shape.tile_chunks(shape.config("inner_gradient"))
    partial = _float32(q, parts.splits, shape.groups, shape.matrices)
    at_q = q.new_empty(shape.batch, shape.tokens, shape.heads, shape.dim)
    unscale = _float32(q, shape.groups if shape.scaled else 0)
    unit, steps = strides(q, grad_out)
    launch(
        inner_gradient,
        shape.groups * parts.splits,
        *(q, grad_out, saved.w1, saved.w2, saved.w3, saved.taps[0]),
        *(saved.offsets, saved.mean, saved.rstd, largest(grad_out, shape)),
        *(partial, at_q, unscale, partial, *steps),
        *(shape.groups, shape.heads, *parts, *shape.places(saved.quads)),
        UNIT=unit,
        KEYS=False,
        KEEP=False,
        CENTRED=False,
        SCALED=shape.scaled,
        **shape.shape("inner_gradient"),
    )
    grads = [torch.empty_like(w, dtype=torch.float32) for w in (saved.w1, saved.w2, saved.w3)]
    largest_u = _float32(q, shape.groups, sum_blocks(shape) if shape.scaled else 0)
    sum_partials(
        partial,
        grads,
        shape,
        owners=shape.groups,
        largest=largest_u if shape.scaled else None,
    )
    return grads, largest_u, at_q, unscale


def _inner_gradient(
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    grad_updated: Sequence[Tensor],
    largest_u: Tensor,
    saved: Saved,
    scale: float,
    shape: Site,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """dL/dW, dL/dv ``[B, N, H, Dv]``, dL/dk' ``[B, N, H, D]``, k' the convolved keys, and
    ``[B*H]`` by which it is to be multiplied, empty unless products are of float16.
    """
    at_k = k.new_empty(shape.batch, shape.tokens, shape.heads, shape.dim)
    grad_v = v.new_empty(shape.batch, shape.tokens, shape.heads, shape.value_dim)
    parts = shape.tile_chunks(shape.config("second_order_gradient"))
    partial = _float32(k, parts.splits, shape.groups, shape.matrices)
    unscale = _float32(k, shape.groups if shape.scaled else 0)
    keys = saved.keys.transpose(1, 2) if saved.keeps_keys else k
    unit, steps = strides(keys, v)
    launch(
        second_order_gradient,
        shape.groups * parts.splits,
        *(keys, v, *weights, *grad_updated, saved.taps[1], saved.offsets),
        *(saved.mean, saved.rstd, saved.largest_v, largest_u),
        *(partial, at_k, grad_v, unscale, *steps),
        *(shape.groups, shape.heads, *parts, scale, sum_blocks(shape), *shape.places(saved.quads)),
        UNIT=unit,
        KEPT=saved.keeps_keys,
        CENTRED=shape.centred,
        SCALED=shape.scaled,
        PARTS=shape.config("second_order_gradient").parts,
        **shape.shape("second_order_gradient"),
    )
    grads = [torch.empty_like(w) for w in weights]
    # Beside what went through G stands what W' = W + r G hands on.
    sum_partials(partial, grads, shape, owners=shape.heads, base=grad_updated)
    return grads, grad_v, at_k, unscale


def _inputs(
    at_x: Tensor, unscale: Tensor, x: Tensor, saved: Saved, shape: Site, *, keys: bool
) -> tuple[Tensor, list[Tensor]]:
    """dL/dx ``[B, N, H, D]`` from that at the convolved x, and those of weight and bias, float32.

    ``unscale``: ``[B*H]`` by which ``at_x`` is to be multiplied, if products are of float16.
    ``keys``: x was normalised before it was convolved.
    """
    convolved = bool(shape.conv_ndim)
    if not (keys or convolved):
        return at_x, []
    own = 2 if keys else 0
    count = own + shape.taps + convolved
    settings = shape.config("convolution_gradient")
    if shape.conv_ndim == 3:  # a sum for each of 27 taps: fewer tokens have to do
        settings = settings._replace(block_n=max(4, settings.block_n // 2))
    parts = shape.tile_chunks(settings)
    partial = _float32(x, parts.splits, shape.batch, shape.heads, count, shape.dim)
    unit, steps = strides(x)
    grad = torch.empty_like(at_x) if convolved else at_x
    launch(
        convolution_gradient,
        shape.groups * parts.splits,
        *(x, at_x, saved.taps[int(keys)], saved.mean, saved.rstd, unscale, partial, grad),
        *(*steps, shape.groups, shape.heads, *parts, *shape.places(saved.quads)),
        D=shape.dim,
        NDIM=shape.conv_ndim,
        UNIT=unit,
        KEYS=keys,
        SCALED=shape.scaled,
        BLOCK_D=padded(shape.dim),
        **settings.launched(),
    )
    # No sum of one batch item alone is wanted of the queries: one launch has them all.
    sums = partial.sum(0 if keys else (0, 1))
    if keys:
        settings = shape.config("key_norm_gradient")
        chunk, splits = shape.chunks(settings)
        launch(
            key_norm_gradient,
            shape.groups * splits,
            *(x, grad, sums, saved.mean, saved.rstd, unscale, *steps),
            *(shape.heads, shape.tokens, chunk, splits),
            D=shape.dim,
            COUNT=count,
            UNIT=unit,
            SCALED=shape.scaled,
            BLOCK_D=padded(shape.dim),
            **settings.launched(),
        )
    if not convolved:
        return grad, []
    if keys:  # symbols are not compared, which would guard
        one = isinstance(shape.batch, int) and shape.batch == 1
        sums = sums[0] if one else sums.sum(0)
    # [H, taps, D] to [H, D, taps]
    return grad, [sums[:, own + 1 :].transpose(1, 2), sums[:, own]]


def _float32(like: Tensor, *sizes: int) -> Tensor:
    return like.new_empty(sizes, dtype=torch.float32)
