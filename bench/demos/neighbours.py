"""Nearest neighbours: whether features find images of the same class among others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import dinov2
from .mnist import Labelled

NEIGHBOURS = 20
BATCH = 32


def parts(images: Labelled, *counts: int, seed: int = 0) -> list[Labelled]:
    """So many of the images in each part, drawn at random, none in two of them."""
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))
    drawn = order[: sum(counts)].split(counts)
    return [Labelled(images.images[i], images.labels[i]) for i in drawn]


def coloured(images: Tensor, size: int) -> Tensor:
    """Grey images [B, 1, h, w] as RGB [B, 3, size, size], bicubic."""
    large = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    return large.clamp(0, 1).expand(-1, 3, -1, -1)


@torch.no_grad()
def class_tokens(model: nn.Module, images: Tensor, size: int) -> Tensor:
    """The class tokens [B, C] of grey images [B, 1, h, w], of unit length."""
    found = [model(dinov2.preprocess(coloured(some, size)))[:, 0] for some in images.split(BATCH)]
    return F.normalize(torch.cat(found), dim=-1)


def hits(gallery: Tensor, labels: Tensor, queries: Tensor, wanted: Tensor) -> Tensor:
    """Whether the most frequent label among each query's nearest neighbours is its own: bool [Q].

    Args:
        gallery, queries: unit vectors [G, C], [Q, C]; labels, wanted: int64 [G], [Q]. Of labels
            that are as frequent that with the greater similarities goes first.
    """
    similar, index = (queries @ gallery.T).topk(min(NEIGHBOURS, len(gallery)))
    votes = queries.new_zeros(len(queries), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[index], 1 + 1e-3 * similar)
    return votes.argmax(1) == wanted


def interval(differences: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % of the mean of paired differences [Q], which are resampled 2,000 times."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(differences), (2000, len(differences)), generator=generator)
    means = differences.double()[drawn].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
