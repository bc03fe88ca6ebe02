"""What each implementation as a pair of operators, forward and backward, has in common.

The forward takes q, k, v, the weights, the convolutions' tensors and the settings, and returns the
output and what it wants saved; the backward takes the output's gradient, the same tensors, what was
saved and as many of the settings as it knows, and returns a gradient of each tensor. Both are
closed to autograd: the pair can be differentiated once.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from t5fx.errors import T5Error

from .explicit import token_major_empty
from .inner import inner_model


def join(forward: Any, backward: Any) -> None:
    """Make the two overloads a pair: autograd, the backward's fake, FLOP formulas."""
    names = [argument.name for argument in backward._schema.arguments]
    known = len(names) - names.index("saved") - 1  # settings

    def differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
        weights, conv = ctx.counts
        q, k, v, *rest = ctx.saved_tensors
        parts = rest[:weights], rest[weights : weights + conv], rest[weights + conv :]
        grads = backward(grad, q, k, v, *parts, *ctx.settings[:known])
        # torch takes an empty list, such as no grid, for one of tensors.
        nothing: list[Any] = [[] if isinstance(x, list) and not x else None for x in ctx.settings]
        return *grads[:3], grads[3 : 3 + weights], grads[3 + weights :], *nothing

    torch.library.register_autograd(forward.name(), differentiate, setup_context=_save)
    torch.library.register_autograd(backward.name(), refuse)
    torch.library.register_fake(backward.name(), _backward_fake)
    register_flop_formula(forward.overloadpacket)(_forward_flops)
    register_flop_formula(backward.overloadpacket)(_backward_flops)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, weights, conv, *ctx.settings = inputs
    ctx.counts = len(weights), len(conv)
    ctx.save_for_backward(q, k, v, *weights, *conv, *output[1:])


def refuse(ctx: Any, *grads: Any) -> None:
    raise T5Error(
        "the TTT node: expected to be differentiated once, got a second derivative; use "
        "impl='reference', which is differentiable any number of times"
    )


def _backward_fake(grad, q, k, v, weights, conv, *_):  # type: ignore[no-untyped-def]
    token_major = [token_major_empty(x, x.shape[3]) for x in (q, k, v)]
    return [*token_major, *(x.new_empty(x.shape) for x in (*weights, *conv))]


def _forward_flops(
    q: Any, k: Any, v: Any, weights: Any, conv: Any, scale: Any, grid: Any, *_: Any, **__: Any
) -> int:
    """FLOP of the matrix products and convolutions, from shapes."""
    batch, heads, tokens, head_dim = q
    products = batch * heads * inner_model("swiglu").flops(tokens, head_dim, v[3])
    return products + _conv_flops(batch, conv, grid)


def _backward_flops(
    grad: Any, q: Any, k: Any, v: Any, weights: Any, conv: Any, saved: Any, scale: Any, grid: Any,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    """FLOP of the products, 16 with W1 and W2, 7 with W3, and of the convolutions: what is
    computed again, and the gradients of inputs and kernels."""
    batch, heads, tokens, head_dim = q
    products = batch * heads * tokens * head_dim * (32 * head_dim + 14 * v[3])
    return products + 3 * _conv_flops(batch, conv, grid)


def _conv_flops(batch: int, conv: Any, grid: Any) -> int:
    """Of the convolutions of q and k: [H*D, 1, 3, ...], a bias after each."""
    return sum(2 * batch * math.prod(grid) * math.prod(weight) for weight in conv[::2])
