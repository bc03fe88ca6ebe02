"""The backward: gradients of everything, recomputing what the forward did not save.

Two temporaries of N x D: the gradients at the convolved queries and keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .first_order import inner_gradient, query_gradient
from .input_gradient import SUMS, convolution_sums, input_gradient
from .launch import Site, convolutions, launch, near, new_matrices, padded, site, sum_partials
from .second_order import second_order_gradient


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
    shape = site(q, k, v, grid=grid, prefix=prefix, locality=locality)
    q, k, v, grad_out = near(q), near(k), near(v), near(grad_out)
    weights = [w.contiguous() for w in weights]
    conv_q, conv_k = convolutions(conv, shape, unread=q)
    mean, rstd, *updated = saved

    grad_updated, at_q = _updated_weights(grad_out, q, updated, conv_q, shape)
    grad_weights, at_k, grad_v = _inner_gradient(
        k, v, weights, grad_updated, conv_k, (mean, rstd), scale / shape.tokens, shape
    )
    grad_q, conv_q_grads = _inputs(at_q, q, conv_q, None, shape)
    grad_k, conv_k_grads = _inputs(at_k, k, conv_k, (mean, rstd), shape)
    conv_grads = [
        grad.reshape(tensor.shape).to(tensor.dtype)
        for grad, tensor in zip(conv_q_grads + conv_k_grads, conv, strict=True)
    ]
    grad_q, grad_k, grad_v = (grad.transpose(1, 2) for grad in (grad_q, grad_k, grad_v))
    return grad_q, grad_k, grad_v, grad_weights, conv_grads


def _updated_weights(
    grad_out: Tensor,
    q: Tensor,
    updated: Sequence[Tensor],
    conv: Sequence[Tensor],
    shape: Site,
) -> tuple[list[Tensor], Tensor]:
    """dL/dW' ``[B, H, ...]`` float32 and dL/dq' ``[B, N, H, D]``, q' the convolved queries."""
    blocks = shape.hidden_blocks("inner_gradient")
    chunk, splits = shape.chunks(shape.config("inner_gradient"), blocks)
    partial = _float32(q, splits, shape.groups, shape.matrices)
    at_q = q.new_empty(shape.batch, shape.tokens, shape.heads, shape.dim)
    inputs = q, grad_out, *updated, *conv
    strides = *q.stride(), *grad_out.stride()
    launch(
        inner_gradient,
        shape.groups * splits * blocks,
        *(*inputs, partial, partial, partial, partial, at_q, *strides),
        *(shape.groups, shape.heads, shape.tokens, chunk, splits, chunk, splits),
        *(*shape.convolved, 0.0),
        NORM=False,
        BATCHED=True,
        STORE_DX=blocks == 1,
        **shape.shape("inner_gradient"),
    )
    if blocks > 1:
        chunk, splits = shape.chunks(shape.config("query_gradient"))
        launch(
            query_gradient,
            shape.groups * splits,
            *(*inputs, at_q, *strides, shape.heads, shape.tokens, chunk, splits),
            *shape.convolved,
            **shape.shape("query_gradient"),
        )
    grads = new_matrices(q, torch.float32, shape, shape.batch, shape.heads)
    sum_partials(partial, grads, shape, owners=shape.groups)
    return grads, at_q


def _inner_gradient(
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    grad_updated: Sequence[Tensor],
    conv: Sequence[Tensor],
    statistics: tuple[Tensor, Tensor],
    rate: float,
    shape: Site,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """dL/dW, dL/dk' ``[B, N, H, D]``, k' the convolved keys, and dL/dv ``[B, N, H, Dv]``."""
    at_k = k.new_empty(shape.batch, shape.tokens, shape.heads, shape.dim)
    grad_v = v.new_empty(shape.batch, shape.tokens, shape.heads, shape.value_dim)
    inputs = k, v, *weights, *grad_updated, *conv, *statistics
    strides = *k.stride(), *v.stride()
    blocks = shape.hidden_blocks("second_order_weights")
    chunk, splits = shape.chunks(shape.config("second_order_weights"), blocks)
    partial = _float32(k, splits, shape.groups, shape.matrices)
    launch(
        second_order_gradient,
        shape.groups * splits * blocks,
        *(*inputs, partial, at_k, grad_v, *strides),
        *(shape.groups, shape.heads, shape.tokens, chunk, splits, *shape.convolved, rate),
        WEIGHTS=True,
        TOKENS=blocks == 1,
        **shape.shape("second_order_weights"),
    )
    if blocks > 1:
        chunk, splits = shape.chunks(shape.config("second_order_tokens"))
        launch(
            second_order_gradient,
            shape.groups * splits,
            *(*inputs, partial, at_k, grad_v, *strides),
            *(shape.groups, shape.heads, shape.tokens, chunk, splits, *shape.convolved, rate),
            WEIGHTS=False,
            TOKENS=True,
            **shape.shape("second_order_tokens"),
        )
    grads = [torch.empty_like(w) for w in weights]
    # Beside what went through G stands what W' = W + r G hands on.
    sum_partials(partial, grads, shape, owners=shape.heads, base=grad_updated)
    return grads, at_k, grad_v


def _inputs(
    at_x: Tensor,
    x: Tensor,
    conv: Sequence[Tensor],
    statistics: tuple[Tensor, Tensor] | None,
    shape: Site,
) -> tuple[Tensor, list[Tensor]]:
    """dL/dx ``[B, N, H, D]`` from that at the convolved x, and those of weight and bias, float32.

    ``statistics``: mean and 1/std of x where it was normalised, as k was.
    """
    if statistics is None and not shape.conv_ndim:
        return at_x, []
    norm = statistics is not None
    mean, rstd = statistics or (x, x)
    rows = shape.convolved[0]
    sizes = {"D": shape.dim, "NDIM": shape.conv_ndim, "NORM": norm, "BLOCK_D": padded(shape.dim)}

    settings = shape.config("convolution_sums")
    chunk, splits = shape.chunks(settings, rows)
    partial = _float32(x, splits, shape.batch, shape.heads, rows, SUMS, shape.dim)
    launch(
        convolution_sums,
        shape.groups * splits * rows,
        *(x, at_x, conv[0], mean, rstd, partial, *x.stride()),
        *(shape.groups, shape.heads, shape.tokens, chunk, splits, *shape.convolved),
        **sizes,
        **settings.launched(),
    )
    # [B, H, 2, D]
    sums = partial[:, :, :, :, 4:].sum((0, 3)) if norm else partial

    grad = torch.empty_like(at_x)
    settings = shape.config("input_gradient")
    chunk, splits = shape.chunks(settings)
    launch(
        input_gradient,
        shape.groups * splits,
        *(x, at_x, conv[0], mean, rstd, sums, grad, *x.stride()),
        *(shape.heads, shape.tokens, chunk, splits, *shape.convolved),
        **sizes,
        **settings.launched(),
    )
    if not shape.conv_ndim:
        return grad, []
    taps, bias = partial[..., :3, :].sum((0, 1)), partial[:, :, :, rows // 2, 3].sum((0, 1))
    # [H, rows, 3, D] to [H, D, rows, 3]
    return grad, [taps.movedim(-1, 1), bias]


def _float32(like: Tensor, *sizes: int) -> Tensor:
    return like.new_empty(sizes, dtype=torch.float32)
