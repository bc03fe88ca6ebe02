"""The operators ``t5fx::near_forward`` and ``t5fx::near_backward``: `near` behind a closed door.

As those of `opaque`, no compiler looks into them. On a CPU they are the C++ of
``t5fx.kernels.cpp``, where that can be compiled and takes the dtypes; all else is `near_explicit`.
They can be differentiated once.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import cpp, near_explicit, pair
from .explicit import token_major_empty
from .precision import no_autocast, widest
from .variant import Variant

_SETTINGS = (
    "float scale, SymInt[] grid, SymInt prefix, int neighborhood, int coarse, Tensor? key_mask"
)
_NAMES = ("scale", "grid", "prefix", "neighborhood", "coarse", "key_mask")
_SCHEMAS = {
    "t5fx::near_forward": (
        f"(Tensor q, Tensor k, Tensor v, Tensor base, Tensor[] mixing, {_SETTINGS}) -> Tensor"
    ),
    "t5fx::near_backward": (
        f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor[] mixing, {_SETTINGS}) -> Tensor[]"
    ),
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(_name, _schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl("t5fx::near_forward", "CompositeExplicitAutograd")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, base: Tensor, mixing: Sequence[Tensor], *settings: Any
) -> Tensor:
    """Near attention joined with the node's output ``base``: see `near.reference`."""
    wide = widest(q, k, v, base, *mixing)
    compiled = cpp.serves(q, wide, "near_forward")
    forward = cpp.near_forward if compiled else near_explicit.forward
    with torch.no_grad(), no_autocast(q.device.type):
        return forward(q, k, v, base, [gate.to(wide) for gate in mixing], **_named(settings))


@torch.library.register_fake("t5fx::near_forward")
def _forward_fake(q, k, v, *_):  # type: ignore[no-untyped-def]
    return token_major_empty(q, v.shape[3])


@torch.library.impl("t5fx::near_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mixing: Sequence[Tensor], *settings: Any
) -> list[Tensor]:
    """Gradients of q, k, v, base and mixing, each in its dtype, base in q's."""
    wide = widest(q, k, v, *mixing)
    compiled = cpp.serves(q, wide, "near_backward")
    backward = cpp.near_backward if compiled else near_explicit.backward
    with torch.no_grad(), no_autocast(q.device.type):
        gates = [gate.to(wide) for gate in mixing]
        grads = backward(grad, q, k, v, gates, **_named(settings))
    return [g.to(x.dtype) for g, x in zip(grads, (q, k, v, q, *mixing), strict=True)]


@torch.library.register_fake("t5fx::near_backward")
def _backward_fake(grad, q, k, v, mixing, *_):  # type: ignore[no-untyped-def]
    token_major = [token_major_empty(x, x.shape[3]) for x in (q, k, v)]
    base = token_major_empty(q, v.shape[3])
    return [*token_major, base, *(x.new_empty(x.shape) for x in mixing)]


def _named(settings: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(_NAMES, settings, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, _, mixing, *settings, key_mask = inputs
    ctx.settings = settings
    ctx.save_for_backward(q, k, v, key_mask, *mixing)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, key_mask, *mixing = ctx.saved_tensors
    settings = (*ctx.settings, key_mask)
    if not any(ctx.needs_input_grad[:3]):
        found = of_parameters(torch.ops.t5fx.near_forward, settings, grad, q, k, v, mixing)
        return *found, *[None] * len(settings)
    dq, dk, dv, dbase, *rest = torch.ops.t5fx.near_backward(grad, q, k, v, mixing, *settings)
    return dq, dk, dv, dbase, rest, *[None] * len(settings)


def of_parameters(
    forward: Callable[..., Tensor],
    settings: Sequence[Any],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Sequence[Tensor],
) -> tuple[Any, ...]:
    """The gradients where q, k and v need none: ``forward`` again, without its backward."""
    scale, grid, prefix, *rest = settings
    nothing = torch.zeros_like(grad)
    on_grid = nothing.index_fill(2, torch.arange(math.prod(grid), device=q.device) + prefix, 1)
    base = grad * on_grid if mixing else 0.5 * grad * on_grid
    if not mixing:
        return None, None, None, base, []
    ones = [torch.ones_like(mixing[0])]
    near = forward(q, k, v, nothing, ones, scale, grid, prefix, *rest)
    wide = widest(grad, *mixing)
    return None, None, None, base, [(base.to(wide) * near.to(wide)).sum((0, 2, 3)).to(ones[0])]


torch.library.register_autograd("t5fx::near_forward", _differentiate, setup_context=_save)
torch.library.register_autograd("t5fx::near_backward", pair.refuse)


@register_flop_formula(torch.ops.t5fx.near_forward)
def _forward_flops(q, k, v, base, mixing, scale, grid, prefix, side, cells, key_mask, **_):  # type: ignore
    batch, heads, tokens, head_dim = q
    variant = Variant(neighborhood=side, coarse=cells)
    return batch * heads * variant.near_flops(tokens, head_dim, v[3], grid)


@register_flop_formula(torch.ops.t5fx.near_backward)
def _backward_flops(grad, q, k, v, mixing, scale, grid, prefix, side, cells, key_mask, **_):  # type: ignore
    """The logits and their weights' gradients again, and a product for each of dq, dk and dv."""
    batch, heads, tokens, head_dim = q
    variant = Variant(neighborhood=side, coarse=cells)
    forward = variant.near_flops(tokens, head_dim, v[3], grid)
    keys = variant.near_flops(tokens, head_dim, 0, grid)
    return batch * heads * (2 * forward + keys)
