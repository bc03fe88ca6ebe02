"""The TTT node in plain PyTorch, in closed form: what other implementations are checked with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .inner import inner_model
from .key_norm import KEY_NORMS
from .locality import add_depthwise_conv
from .masked import hidden, shares
from .precision import no_autocast, widest


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    key_mask: Tensor | None = None,
    *,
    scale: float,
    grid: Sequence[int],
    prefix: int,
    inner: str,
    inner_loss: str,
    key_norm: str,
    key_norm_eps: float,
    locality: str,
) -> Tensor:
    """``t5fx.kernels.ttt`` without its checks.

    Computes in the widest of the arguments' dtypes and float32, also under autocast.
    """
    out_dtype = q.dtype
    wide = widest(q, k, v, *weights, *conv)
    with no_autocast(q.device.type):
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        weights = [w.to(wide) for w in weights]
        conv = [c.to(wide) for c in conv]

        seen = None if key_mask is None else key_mask[:, None, :, None]
        k = KEY_NORMS[key_norm](k, key_norm_eps, seen)
        if seen is not None:
            k, v = torch.where(seen, k, 0), torch.where(seen, v, 0)
            if locality == "dwc_qk":
                q = hidden(q, seen, grid, prefix)
        if locality == "dwc_qk":
            q = add_depthwise_conv(q, conv[0], conv[1], grid, prefix)
            k = add_depthwise_conv(k, conv[2], conv[3], grid, prefix)
        elif locality == "dwc_v":
            v = add_depthwise_conv(v, conv[0], conv[1], grid, prefix)

        batch, heads = q.shape[:2]
        # Pairs (batch item, head) become one leading axis. That is a view of a contiguous tensor
        # or of a single batch item; otherwise one copy here, instead of one in every product.
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        weights = [w.expand(batch, -1, -1, -1).flatten(0, 1) for w in weights]

        share = None
        if seen is not None:
            share = shares(seen, wide).expand(-1, heads, -1, -1).flatten(0, 1)
        out = inner_model(inner).mix(q, k, v, weights, scale, inner_loss, share)
        return out.unflatten(0, (batch, heads)).to(out_dtype)
