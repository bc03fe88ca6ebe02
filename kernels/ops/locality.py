"""Depthwise convolution over the token grid, step 2 of the node."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

#: Which of q, k and v each locality convolves.
CONVOLVED = {"dwc_qk": "qk", "dwc_v": "v", "none": ""}

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def add_depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor, grid: Sequence[int], prefix: int
) -> Tensor:
    """x + conv(x) on the grid tokens, x on the prefix and suffix tokens around them.

    ``x``: ``[B, H, N, D]``, N = prefix + prod(grid) + suffix; ``weight``: ``[H*D, 1, 3, ...]`` and
    ``bias``: ``[H*D]``, channel h*D + d. Zero padding 1, so the grid keeps its size. Sizes may be
    symbolic.
    """
    batch, heads, tokens, channels = x.shape
    cells = math.prod(grid)
    suffix = tokens - prefix - cells
    on_grid = x.narrow(2, prefix, cells)
    # [B, h*D + d, *grid], channels last in memory: a view of what a packed projection returns.
    image = on_grid.transpose(1, 2).reshape(batch, *grid, heads * channels).movedim(-1, 1)
    # The padding is explicit because Inductor of torch 2.11 fails on a convolution's input that is
    # a view with symbolic sizes. It is fused into whatever made x.
    image = F.pad(image, (1, 1) * len(grid))
    image = _CONV[len(grid)](image, weight, bias, groups=heads * channels)
    image = image.movedim(1, -1).reshape(batch, cells, heads, channels).transpose(1, 2)
    on_grid = on_grid + image
    if _is_true(prefix + suffix == 0):
        return on_grid
    parts = x.narrow(2, 0, prefix), on_grid, x.narrow(2, prefix + cells, suffix)
    return torch.cat(parts, dim=2)


def _is_true(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes is known to hold, without a guard."""
    if isinstance(condition, bool):
        return condition
    # It imports sympy, which takes longer than all of `import t5fx`.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)
