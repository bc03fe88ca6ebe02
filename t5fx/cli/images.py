"""A folder of photographs as batches: random crops to train on, the model's own view to compare."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from t5fx.cli.running import UsageError
from t5fx.errors import T5Error

#: The least and the most of a photograph's area that a random crop has.
SCALE = (0.4, 1.0)


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its photographs.

    mean, std: of each channel, of values in 0..1; evaluate: a picture (PIL, RGB) as the tensor
    [3, H, W] that the model's authors compare it on.
    """

    mean: Sequence[float]
    std: Sequence[float]
    evaluate: Callable[[Any], Tensor]

    def crops(self, size: tuple[int, int]) -> Callable[[Any], Tensor]:
        """A picture as a random crop of it, half the time mirrored: [3, height, width]."""
        from torchvision import transforms

        return transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    size, SCALE, interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(self.mean, self.std),
            ]
        )


@dataclass(frozen=True)
class Photographs:
    """Batches of a folder, to train on and those that are kept from training.

    A batch is images [B, 3, H, W] and the numbers of their classes [B].

    classes: the names of the subfolders, or none where the pictures lie in the folder itself.
    """

    training: DataLoader[Any]
    held_out: DataLoader[Any]
    classes: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many pictures there are of each."""
        loaders = {"training": self.training, "held_out": self.held_out}
        return {name: len(loader.dataset) for name, loader in loaders.items()}  # type: ignore[arg-type]


def add_data(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """--data and what goes with it."""
    group = parser.add_argument_group("the photographs")
    group.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        required=required,
        help="a folder of photographs, or of a subfolder of them for each class",
    )
    group.add_argument(
        "--held-out",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="the share of them that is kept from training, to compare on (default: %(default)s)",
    )
    group.add_argument(
        "--workers", type=int, default=0, help="processes that read them (default: %(default)s)"
    )


@dataclass(frozen=True)
class Folder:
    """Photographs, each a path and the number of its class, and the names of the classes."""

    pictures: tuple[tuple[str, int], ...]
    classes: tuple[str, ...]


def listed(options: argparse.Namespace) -> Folder:
    """The folder that the options name: what can be wrong with it is found before a model is built.

    Raises:
        T5Error: no such folder, or fewer than two photographs in it.
        UsageError: a share or a number of processes that there cannot be.
    """
    if not 0 < options.held_out < 1:
        raise UsageError(f"--held-out: expected a share between 0 and 1, got {options.held_out}")
    if options.workers < 0:
        raise UsageError(f"--workers: expected 0 or more, got {options.workers}")
    folder = _found(options.data)
    if len(folder.pictures) < 2:
        raise T5Error(
            f"--data: expected two photographs or more, of which some are kept from training, got "
            f"{len(folder.pictures)} in {options.data}"
        )
    return folder


def photographs(
    options: argparse.Namespace,
    folder: Folder,
    preprocessing: Preprocessing,
    size: tuple[int, int],
) -> Photographs:
    """A folder in two parts, by the options' seed: random crops and the model's own view."""
    paths = folder.pictures
    generator = torch.Generator().manual_seed(options.seed or 0)
    order = torch.randperm(len(paths), generator=generator).tolist()
    kept = min(max(1, round(options.held_out * len(paths))), len(paths) - 1)
    training = Subset(_Pictures(paths, preprocessing.crops(size)), order[kept:])
    held_out = Subset(_Pictures(paths, preprocessing.evaluate), sorted(order[:kept]))
    settings: dict[str, Any] = {"num_workers": options.workers}
    return Photographs(
        # Of one size, so that a model with static shapes is judged for it once.
        DataLoader(
            training,
            min(options.batch, len(training)),
            shuffle=True,
            drop_last=True,
            generator=generator,
            **settings,
        ),
        DataLoader(held_out, min(options.batch, kept), **settings),
        folder.classes,
    )


class _Pictures(Dataset[tuple[Tensor, int]]):
    def __init__(
        self, paths: Sequence[tuple[str, int]], transform: Callable[[Any], Tensor]
    ) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.datasets.folder import pil_loader

        path, label = self.paths[index]
        try:
            picture = pil_loader(path)
        except OSError as error:
            raise T5Error(f"--data: expected a photograph in {path}, got none: {error}") from error
        return self.transform(picture), label


def _found(folder: Path) -> Folder:
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not folder.is_dir():
        raise T5Error(f"--data: expected a folder of photographs, found none at {folder}")
    flat = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
    if flat:
        return Folder(tuple((str(path), 0) for path in flat), ())
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:  # no subfolders, or empty ones
        raise T5Error(
            f"--data: expected photographs ({', '.join(IMG_EXTENSIONS)}) in {folder}, or a "
            f"subfolder of them for each class: {str(error).partition(' Supported')[0]}"
        ) from error
    return Folder(tuple(found.samples), tuple(found.classes))
