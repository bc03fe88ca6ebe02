"""The TTT node in plain PyTorch, in closed form: what other implementations are checked with."""

from collections.abc import Sequence

from torch import Tensor

from .inner import inner_model
from .key_norm import KEY_NORMS
from .locality import add_depthwise_conv
from .precision import no_autocast, widest


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
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

        k = KEY_NORMS[key_norm](k, key_norm_eps)
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

        out = inner_model(inner).mix(q, k, v, weights, scale, inner_loss)
        return out.unflatten(0, (batch, heads)).to(out_dtype)
