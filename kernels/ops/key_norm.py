"""Key norms, step 1 of the node."""

from collections.abc import Callable

import torch
from torch import Tensor

from .masked import moments

_CHANNELS = -1


def _instance(k: Tensor, eps: float, seen: Tensor | None) -> Tensor:
    var, mean = moments(k, seen)
    return (k - mean) * torch.rsqrt(var + eps)


def _instance_center(k: Tensor, eps: float, seen: Tensor | None) -> Tensor:
    return k - moments(k, seen)[1]


def _instance_scale(k: Tensor, eps: float, seen: Tensor | None) -> Tensor:
    return k * torch.rsqrt(moments(k, seen)[0] + eps)


def _rms(k: Tensor, eps: float, seen: Tensor | None) -> Tensor:
    return k * torch.rsqrt(k.square().mean(dim=_CHANNELS, keepdim=True) + eps)


def _layer(k: Tensor, eps: float, seen: Tensor | None) -> Tensor:
    var, mean = torch.var_mean(k, dim=_CHANNELS, correction=0, keepdim=True)
    return (k - mean) * torch.rsqrt(var + eps)


def _none(k: Tensor, eps: float, seen: Tensor | None) -> Tensor:
    return k


#: Norms of keys ``[B, H, N, D]``, by name. The instance norms take statistics over all N tokens of
#: a batch item, head and channel, or those that are `seen`, ``[B, 1, N, 1]``; "rms" and "layer"
#: over the D channels of a token. Variances are biased; none has an affine part.
KEY_NORMS: dict[str, Callable[[Tensor, float, Tensor | None], Tensor]] = {
    "instance": _instance,
    "instance_center": _instance_center,
    "instance_scale": _instance_scale,
    "rms": _rms,
    "layer": _layer,
    "none": _none,
}
