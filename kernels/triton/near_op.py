"""The operators ``t5fx::near_triton_forward`` and ``t5fx::near_triton_backward``: as those of
``op`` are of the node, these are of near attention.

The annotations are the operators' schemas.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import near_op, pair
from ..explicit import token_major_empty
from .near_launch import empty_saved, near_backward, near_forward


@torch.library.triton_op("t5fx::near_triton_forward", mutates_args=())
def near_triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor,
    mixing: Sequence[Tensor],
    scale: float,
    grid: Sequence[int],
    prefix: int,
    neighborhood: int,
    coarse: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output ``[B, H, N, Dv]`` and what the backward needs: see `near_forward`."""
    places = {"grid": grid, "prefix": prefix, "neighborhood": neighborhood, "coarse": coarse}
    out, saved = near_forward(q, k, v, base, mixing, scale=scale, **places)
    return out, *saved


# Shapes alone: torch would run the body itself, launches and all.
@near_triton_forward.register_fake
def _forward_fake(  # type: ignore[no-untyped-def]
    q, k, v, base, mixing, scale, grid, prefix, neighborhood, coarse
):
    return token_major_empty(q, v.shape[3]), *empty_saved(q, v, len(grid), int(coarse))


@torch.library.triton_op("t5fx::near_triton_backward", mutates_args=())
def near_triton_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Sequence[Tensor],
    saved: Sequence[Tensor],
    scale: float,
    grid: Sequence[int],
    prefix: int,
    neighborhood: int,
    coarse: int,
) -> list[Tensor]:
    """Gradients of q, k, v, base and mixing: see `near_backward`."""
    places = {"grid": grid, "prefix": prefix, "neighborhood": neighborhood, "coarse": coarse}
    return near_backward(grad, q, k, v, mixing, saved, scale=scale, **places)


@near_triton_backward.register_fake
def _backward_fake(grad, q, k, v, mixing, *_):  # type: ignore[no-untyped-def]
    token_major = [token_major_empty(x, x.shape[3]) for x in (q, k, v)]
    base = token_major_empty(q, v.shape[3])
    return [*token_major, base, *(x.new_empty(x.shape) for x in mixing)]


def _attention(*args: Any) -> Tensor:
    out: Tensor = torch.ops.t5fx.near_triton_forward(*args)[0]
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, mixing, *ctx.settings = inputs
    ctx.gates = len(mixing)
    ctx.save_for_backward(q, k, v, *mixing, *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    q, k, v, *rest = ctx.saved_tensors
    mixing, saved = rest[: ctx.gates], rest[ctx.gates :]
    if not any(ctx.needs_input_grad[:3]):
        found = near_op.of_parameters(_attention, ctx.settings, grad, q, k, v, mixing)
        return *found, *[None] * len(ctx.settings)
    backward = torch.ops.t5fx.near_triton_backward
    dq, dk, dv, dbase, *gates = backward(grad, q, k, v, mixing, saved, *ctx.settings)
    return dq, dk, dv, dbase, gates, *[None] * len(ctx.settings)


near_triton_forward.register_autograd(_differentiate, setup_context=_save)
near_triton_backward.register_autograd(pair.refuse)


@register_flop_formula(torch.ops.t5fx.near_triton_forward)
def _forward_flops(*args, **kwargs):  # type: ignore[no-untyped-def]
    return near_op._forward_flops(*args, **kwargs)


@register_flop_formula(torch.ops.t5fx.near_triton_backward)
def _backward_flops(grad, q, k, v, mixing, saved, *args, **kwargs):  # type: ignore[no-untyped-def]
    return near_op._backward_flops(grad, q, k, v, mixing, *args, **kwargs)
