"""Conditional position encoding, a convolution of what enters a block: a row of the paper's table.

It changes the block and not its attention, so that it is a module in front of each block and no
field of `LinearizeConfig`.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn


class ConditionalPositionEncoding(nn.Module):
    """x + conv(x), depthwise, 3 x 3, on the grid of the patches ("Conditional Positional Encodings
    for Vision Transformers", arXiv 2102.10882); the class token passes through.

    [B, 1 + n^2, C] to the same.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        first, patches = x[:, :1], x[:, 1:]
        side = math.isqrt(patches.shape[1])
        image = self.conv(patches.mT.unflatten(2, (side, side)))
        return torch.cat([first, patches + image.flatten(2).mT], dim=1)


def with_encodings(model: nn.Module) -> nn.Module:
    """A copy of a timm ViT with such an encoding in front of each block."""
    model = copy.deepcopy(model)
    model.blocks = nn.Sequential(
        *(
            nn.Sequential(ConditionalPositionEncoding(model.embed_dim), block)
            for block in model.blocks
        )
    )
    return model


def encodings(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model's encodings."""
    found = (m for m in model.modules() if isinstance(m, ConditionalPositionEncoding))
    return [parameter for module in found for parameter in module.parameters()]
