"""The operators ``t5fx::ttt_forward`` and ``t5fx::ttt_backward``: `explicit` behind a closed door.

No compiler looks into them. A graph of many sites is traced, differentiated and compiled in the
time of a few calls, and only q, k, v, the parameters and W' are kept for the backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from t5fx.errors import T5Error

from . import explicit
from .inner import inner_model
from .precision import no_autocast, widest

_SETTINGS = "float scale, SymInt[] grid, SymInt prefix, float eps"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor[] weights, Tensor[] conv"

torch.library.define(
    "t5fx::ttt_forward",
    f"({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "t5fx::ttt_backward",
    f"(Tensor grad, {_INPUTS}, Tensor[] updated, {_SETTINGS}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def supports(*, inner: str, inner_loss: str, key_norm: str, locality: str) -> bool:
    """Whether the operators compute the node with these settings."""
    return (inner, inner_loss, key_norm) == ("swiglu", "dot", "instance") and (
        locality in ("dwc_qk", "none")
    )


@torch.library.impl("t5fx::ttt_forward", "CompositeExplicitAutograd")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    scale: float,
    grid: Sequence[int],
    prefix: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """The output ``[B, H, N, Dv]`` and W1', W2', W3', ``[B, H, in, out]``."""
    wide = widest(q, k, v, *weights, *conv)
    with torch.no_grad(), no_autocast(q.device.type):
        out, updated = explicit.forward(
            *(q, k, v, [w.to(wide) for w in weights], [c.to(wide) for c in conv]),
            **_settings(scale, grid, prefix, eps),
        )
    return out, *updated


@torch.library.register_fake("t5fx::ttt_forward")
def _forward_fake(q, k, v, weights, conv, scale, grid, prefix, eps):  # type: ignore[no-untyped-def]
    wide = widest(q, k, v, *weights, *conv)
    updated = (w.new_empty(q.shape[0], *w.shape, dtype=wide) for w in weights)
    return explicit.token_major_empty(q, v.shape[3]), *updated


@torch.library.impl("t5fx::ttt_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    updated: Sequence[Tensor],
    scale: float,
    grid: Sequence[int],
    prefix: int,
    eps: float,
) -> list[Tensor]:
    """Gradients of q, k, v, the weights and conv, each in its dtype; see `explicit.backward`."""
    wide = updated[0].dtype
    with torch.no_grad(), no_autocast(q.device.type):
        grads = explicit.backward(
            *(grad, q, k, v, [w.to(wide) for w in weights], [c.to(wide) for c in conv], updated),
            **_settings(scale, grid, prefix, eps),
        )
    inputs = (q, k, v, *weights, *conv)
    return [g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]


@torch.library.register_fake("t5fx::ttt_backward")
def _backward_fake(grad, q, k, v, weights, conv, updated, scale, grid, prefix, eps):  # type: ignore[no-untyped-def]
    token_major = [explicit.token_major_empty(x, x.shape[3]) for x in (q, k, v)]
    return [*token_major, *(x.new_empty(x.shape) for x in (*weights, *conv))]


def _settings(scale: float, grid: Sequence[int], prefix: int, eps: float) -> dict[str, Any]:
    return {"scale": scale, "grid": grid, "prefix": prefix, "eps": eps}


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, weights, conv, *ctx.settings = inputs
    ctx.counts = len(weights), len(conv)
    ctx.save_for_backward(q, k, v, *weights, *conv, *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    weights, conv = ctx.counts
    q, k, v, *rest = ctx.saved_tensors
    parts = rest[:weights], rest[weights : weights + conv], rest[weights + conv :]
    grads = torch.ops.t5fx.ttt_backward(grad, q, k, v, *parts, *ctx.settings)
    nothing = [None] * len(ctx.settings)
    return *grads[:3], grads[3 : 3 + weights], grads[3 + weights :], *nothing


def _refuse(ctx: Any, *grads: Any) -> None:
    raise T5Error(
        "the TTT node: expected to be differentiated once, got a second derivative of "
        "impl='auto'; use impl='reference', which is differentiable any number of times"
    )


torch.library.register_autograd("t5fx::ttt_forward", _differentiate, setup_context=_save)
torch.library.register_autograd("t5fx::ttt_backward", _refuse)


@register_flop_formula(torch.ops.t5fx.ttt_forward)
def _forward_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """FLOP of the matrix products, from shapes."""
    batch, heads, tokens, head_dim = q
    return batch * heads * inner_model("swiglu").flops(tokens, head_dim, v[3])


@register_flop_formula(torch.ops.t5fx.ttt_backward)
def _backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """FLOP of the matrix products: 16 with W1 and W2, 7 with W3, the recomputed ones included."""
    batch, heads, tokens, head_dim = q
    return batch * heads * tokens * head_dim * (32 * head_dim + 14 * v[3])
