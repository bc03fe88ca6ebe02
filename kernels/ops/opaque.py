"""The operators ``t5fx::ttt_forward`` and ``t5fx::ttt_backward``: the node behind a closed door.

No compiler looks into them. A graph of many sites is traced, differentiated and compiled in the
time of a few calls, and only q, k, v, the parameters and W' are kept for the backward pass.

On a CPU they are the C++ of ``t5fx.kernels.cpp``, where that can be compiled and takes the dtypes;
all else is `explicit`.

``settings``: scale, grid, prefix and the key norm's eps, as the schemas have them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpp, explicit, pair
from .precision import no_autocast, widest

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor[] weights, Tensor[] conv"
_SETTINGS = "float scale, SymInt[] grid, SymInt prefix, float eps"
_SCHEMAS = {
    "t5fx::ttt_forward": f"({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    "t5fx::ttt_backward": f"(Tensor grad, {_INPUTS}, Tensor[] saved, {_SETTINGS}) -> Tensor[]",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(_name, _schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl("t5fx::ttt_forward", "CompositeExplicitAutograd")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    *settings: Any,
) -> tuple[Tensor, ...]:
    """The output ``[B, H, N, Dv]`` and W1', W2', W3', ``[B, H, in, out]``."""
    wide = widest(q, k, v, *weights, *conv)
    forward = cpp.forward if cpp.serves(q, wide, "forward") else explicit.forward
    with torch.no_grad(), no_autocast(q.device.type):
        out, updated = forward(
            *(q, k, v, [w.to(wide) for w in weights], [c.to(wide) for c in conv]),
            **_named(*settings),
        )
    return out, *updated


@torch.library.register_fake("t5fx::ttt_forward")
def _forward_fake(q, k, v, weights, conv, *_):  # type: ignore[no-untyped-def]
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
    saved: Sequence[Tensor],
    *settings: Any,
) -> list[Tensor]:
    """Gradients of q, k, v, the weights and conv, each in its dtype; see `explicit.backward`."""
    wide = saved[0].dtype
    backward = cpp.backward if cpp.serves(q, wide, "backward") else explicit.backward
    with torch.no_grad(), no_autocast(q.device.type):
        grads = backward(
            *(grad, q, k, v, [w.to(wide) for w in weights], [c.to(wide) for c in conv], saved),
            **_named(*settings),
        )
    inputs = (q, k, v, *weights, *conv)
    return [g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]


def _named(scale: float, grid: Sequence[int], prefix: int, eps: float) -> dict[str, Any]:
    return {"scale": scale, "grid": grid, "prefix": prefix, "eps": eps}


pair.join(torch.ops.t5fx.ttt_forward.default, torch.ops.t5fx.ttt_backward.default)
