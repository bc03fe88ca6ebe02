"""Tokens that do not count as keys: what a key mask does to the node, and how kernels get it.

``seen`` is the mask as ``[B, 1, N, 1]``, true for the n tokens of an item that count.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import no_autocast, widest


def shares(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, 1, N, 1]``: what a token's term weighs in a mean over all N, so that it is one over n.

    N / n for tokens that count, 1 where all do; else 0.
    """
    count = seen.sum(2, keepdim=True)
    every = torch.full_like(count, seen.shape[2])
    return torch.where(seen, every.to(dtype) / count.clamp(min=1).to(dtype), 0)


def moments(k: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Biased variance and mean over the tokens that count, ``[B, H, 1, D]``; 1 and 0 where none
    does.

    Where all do they are to the bit what they are without a mask.
    """
    var, mean = torch.var_mean(k, dim=2, correction=0, keepdim=True)
    if seen is None:
        return var, mean
    own, centred, count = _centred(k, seen)
    spread = centred.square().sum(2, keepdim=True) / count.clamp(min=1) + (count == 0)
    every = seen.all(2, keepdim=True)
    return torch.where(every, var, spread), torch.where(every, mean, own)


def _centred(k: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean over the tokens that count, the differences from it, 0 of others, and n."""
    count = seen.sum(2, keepdim=True).to(k.dtype)
    mean = torch.where(seen, k, 0).sum(2, keepdim=True) / count.clamp(min=1)
    return mean, torch.where(seen, k - mean, 0), count


def hidden(x: Tensor, seen: Tensor, grid: Sequence[int], prefix: int) -> Tensor:
    """``[B, H, N, D]`` with zeros at the tokens of the grid that do not count, as the padding of a
    convolution has them.
    """
    places = torch.arange(x.shape[2], device=x.device)[:, None]
    outside = (places < prefix) | (places >= prefix + math.prod(grid))
    return torch.where(seen | outside, x, 0)


def folded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    grid: Sequence[int],
    prefix: int,
    convolved: bool,
    eps: float,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v for which the node without a mask, inner loss "dot" and key norm "instance", gives
    what it gives for these with one: kernels need to know of no mask.

    The loss is linear in the values: those of a token that does not count are 0, of others N / n
    times as large. Its key is put where the mean is, and the others are moved from there by the
    factor that makes (n/N) factor^2 var + eps under the root what var + eps is: the squared factor
    is eps / (eps + (1 - n/N) var). An item all of whose tokens count stays as it is, to the bit.

    exact: keys and values are in the dtype of the computation, not in their own.
    """
    wide = widest(q, k, v)
    with no_autocast(q.device.type):
        _, centred, count = _centred(k.to(wide), seen)
        var = centred.square().sum(2, keepdim=True) / count.clamp(min=1)
        rest = (~seen).sum(2, keepdim=True).to(wide) / seen.shape[2]
        keys = centred * (eps / (eps + rest * var)).sqrt()
        keys = torch.where(seen.all(2, keepdim=True), k.to(wide), keys)
        values = v.to(wide) * shares(seen, wide)
    if convolved:
        q = hidden(q, seen, grid, prefix)
    return (q, keys, values) if exact else (q, keys.to(k.dtype), values.to(v.dtype))
