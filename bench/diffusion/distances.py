"""How far samples are from images: Frechet distances, their table and a picture of samples."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..harness.tables import Table, mean_and_spread

#: The model that the others are compared with.
SOFTMAX = "softmax"


@dataclass(frozen=True)
class Distance:
    """Of `samples` samples, drawn in `steps` steps from one seed's noise, to the test images.

    attention: of the nodes, or "".
    """

    model: str
    attention: str
    seed: int
    samples: int
    steps: int
    distance: float | None

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        """What was measured."""
        return self.model, self.attention, self.seed, self.samples, self.steps


@torch.no_grad()
def features(classifier: Any, images: Tensor) -> Tensor:
    """What the classifier's last layer gets, [N, C], of images [N, 1, 28, 28] in 0..1."""
    return torch.cat(
        [
            classifier.forward_head(classifier.forward_features(some), pre_logits=True)
            for some in images.split(100)
        ]
    )


def frechet(one: Tensor, other: Tensor) -> float:
    """|m - n|^2 + tr(A + B - 2 (A B)^(1/2)) of the means m, n and covariances A, B of two sets.

    That is the Frechet distance, squared, of normal distributions with these moments (arXiv
    1706.08500), of features [N, C] and [M, C].
    """
    (m, a), (n, b) = ((x.mean(0), torch.cov(x.T)) for x in (one.double(), other.double()))
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # A B and the symmetric root B root have the same eigenvalues.
    both = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return ((m - n).square().sum() + a.trace() + b.trace() - 2 * both).item()


def distances_table(rows: Sequence[Distance], note: str) -> Table:
    """The mean over seeds of each model's distance, and how it compares with softmax's."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        assert row.distance is not None
        found.setdefault((row.model, row.attention), []).append(row.distance)
    softmax = statistics.mean(found[SOFTMAX, ""])
    return Table(
        title="Samples of a small DiT against test images",
        columns=("model", "nodes", "Frechet distance", "to softmax"),
        rows=tuple(
            (*name, mean_and_spread(v, 2), f"{100 * (statistics.mean(v) / softmax - 1):+.1f} %")
            for name, v in found.items()
        ),
        note=note,
    )


def draw_samples(path: Path, shown: Mapping[str, Tensor]) -> None:
    """A row a model and a column a class, as a PNG; every row is from the same noise."""
    from matplotlib.figure import Figure

    columns = max(map(len, shown.values()))
    figure = Figure(figsize=(1.6 + 0.9 * columns, 0.95 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), columns, squeeze=False)
    for row, (name, images) in zip(grid, shown.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image[0].cpu().numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
