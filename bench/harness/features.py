"""What a vision transformer's tokens say: agreement of two models, and maps to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def tokens(model: nn.Module, images: Tensor) -> Tensor:
    """The tokens [B, 1 + N, C] of images [B, 3, H, W], one image at a time to bound memory."""
    return torch.cat([model(image) for image in images.split(1)])


class Agreement(NamedTuple):
    """Mean cosine similarity with the original model's tokens of the same images, in -1..1."""

    class_token: float
    patches: float


def agreement(original: Tensor, converted: Tensor) -> Agreement:
    """Agreement of two models' tokens [B, 1 + N, C], the mean over images and patches."""
    cosine = F.cosine_similarity(original.double(), converted.double(), dim=-1)
    return Agreement(cosine[:, 0].mean().item(), cosine[:, 1:].mean().item())


@dataclass(frozen=True)
class PrincipalColours:
    """Three principal components of one image's patch tokens, shown as red, green and blue.

    Fitted on one model's tokens and applied to any other's, so that equal colours mean equal
    features: a map that fitted itself to each model would hide what a conversion broke.
    """

    mean: Tensor  # [C]
    axes: Tensor  # [C, 3]
    low: Tensor  # [3]
    high: Tensor  # [3]

    @classmethod
    def fit(cls, patches: Tensor) -> PrincipalColours:
        """From patch tokens [N, C]; the range of colours is the 1st to the 99th percentile."""
        mean = patches.mean(0)
        axes = torch.linalg.svd(patches - mean, full_matrices=False).Vh[:3].T
        # A component's sign is arbitrary: make its longest tail positive.
        axes = axes * torch.sign(((patches - mean) @ axes).pow(3).sum(0))
        low, high = torch.quantile((patches - mean) @ axes, torch.tensor([0.01, 0.99]), dim=0)
        return cls(mean, axes, low, high)

    def __call__(self, patches: Tensor) -> Tensor:
        """Patch tokens [N, C] of a square grid to an image [sqrt(N), sqrt(N), 3] in 0..1."""
        values = ((patches - self.mean) @ self.axes - self.low) / (self.high - self.low)
        return _square(values.clamp(0, 1))


def similarity(patches: Tensor, place: tuple[float, float]) -> Tensor:
    """Cosine of each patch with the patch at a place: [N, C] to [sqrt(N), sqrt(N)].

    `place` is (row, column) as fractions of the sides of a square grid.
    """
    grid = _square(patches)
    row, column = (min(int(fraction * len(grid)), len(grid) - 1) for fraction in place)
    return F.cosine_similarity(grid, grid[row, column], dim=-1)


def _square(patches: Tensor) -> Tensor:
    """[N, C] to [sqrt(N), sqrt(N), C]."""
    side = round(len(patches) ** 0.5)
    return patches.reshape(side, side, -1)
