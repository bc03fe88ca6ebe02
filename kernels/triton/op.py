"""The operators ``t5fx::ttt_triton_forward`` and ``t5fx::ttt_triton_backward``: the kernels for
compilers. Inductor sees the launches themselves; torch.export keeps one node.

The annotations are the operators' schemas.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import pair
from ..explicit import token_major_empty
from .backward import backward
from .forward import empty_saved, forward
from .launch import check_dtype


@torch.library.triton_op("t5fx::ttt_triton_forward", mutates_args=())
def ttt_triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    scale: float,
    grid: Sequence[int],
    prefix: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output ``[B, H, N, Dv]`` and what the backward needs: see `forward`."""
    for tensor in (*weights, *conv):
        check_dtype("parameters", tensor)
    out, saved = forward(q, k, v, weights, conv, **_named(conv, scale, grid, prefix, eps))
    return out, *saved


# Shapes alone: torch would run the body itself, launches and all.
@ttt_triton_forward.register_fake
def _forward_fake(q, k, v, weights, conv, scale, grid, prefix, eps):  # type: ignore[no-untyped-def]
    return token_major_empty(q, v.shape[3]), *empty_saved(q, k, v, conv, grid, eps)


@torch.library.triton_op("t5fx::ttt_triton_backward", mutates_args=())
def ttt_triton_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    saved: Sequence[Tensor],
    scale: float,
    grid: Sequence[int],
    prefix: int,
    eps: float,
) -> list[Tensor]:
    """Gradients of q, k, v, the weights and conv, each in its dtype; see `backward`."""
    named = _named(conv, scale, grid, prefix, eps)
    dq, dk, dv, dw, dconv = backward(grad, q, k, v, weights, conv, saved, **named)
    return [dq, dk, dv, *dw, *dconv]


def _named(
    conv: Sequence[Tensor], scale: float, grid: Sequence[int], prefix: int, eps: float
) -> dict[str, Any]:
    named = {"scale": scale, "grid": grid, "prefix": prefix, "key_norm_eps": eps}
    return {**named, "locality": "dwc_qk" if conv else "none"}


pair.join(torch.ops.t5fx.ttt_triton_forward.default, torch.ops.t5fx.ttt_triton_backward.default)
