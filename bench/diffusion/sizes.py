"""Diffusion transformers of diffusers at their real sizes, random weights, and a call of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: A model with the keyword arguments of one call.
Built = tuple[nn.Module, dict[str, Any]]

#: Sides of square images, in pixels; (height, width) of a video, in pixels, and its frames.
IMAGES, TINY_IMAGES = (512, 1024, 2048, 4096), (512,)
VIDEOS, TINY_VIDEOS = ((480, 832), (720, 1280)), ((256, 512),)
FRAMES, TINY_FRAMES = 81, 5  # 81: five seconds of 16 a second


@dataclass(frozen=True)
class Case:
    """A model at a size.

    build: takes a batch size and whether one block of each kind will do; makes the model and its
    inputs on the default device, in the default dtype. options: of t5fx, for what the graph does
    not tell.
    """

    model: str
    size: str
    build: Callable[[int, bool], Built] = field(compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        return f"{self.model} {self.size}"


def cases(tiny: bool = False) -> Iterator[Case]:
    """Every model at every size; tiny ones for tests."""
    for pixels in TINY_IMAGES if tiny else IMAGES:
        yield sd3("SD3.5-Medium", pixels, 24, 24, 13, tiny)
        yield sd3("SD3.5-Large", pixels, 38, 38, 0, tiny)
        yield dit(pixels, tiny)
        yield flux(pixels, tiny)
        yield qwen_image(pixels, tiny)
    for height, width in TINY_VIDEOS if tiny else VIDEOS:
        yield wan(height, width, tiny)


def sd3(name: str, pixels: int, layers: int, heads: int, dual: int, tiny: bool) -> Case:
    """SD3.5: joint attention to 333 text tokens, heads of 64; of Medium 13 layers have two."""

    def build(batch: int, short: bool = False) -> Built:
        from diffusers import SD3Transformer2DModel

        width, words, text = (2, 7, 32) if tiny else (heads, 333, 4096)
        kinds = 2 if dual else 1
        number = kinds if tiny or short else layers
        model = SD3Transformer2DModel(
            num_layers=number,
            num_attention_heads=width,
            joint_attention_dim=text,
            caption_projection_dim=64 * width,
            pos_embed_max_size=max(384, pixels // 16),
            dual_attention_layers=tuple(range(min(dual, number - 1))),
            qk_norm="rms_norm",
        ).eval()
        return model, {
            "hidden_states": torch.randn(batch, 16, pixels // 8, pixels // 8),
            "encoder_hidden_states": torch.randn(batch, words, text),
            "pooled_projections": torch.randn(batch, 2048),
            "timestep": torch.full((batch,), 500),
        }

    return Case(name, f"{pixels} px", build)


def dit(pixels: int, tiny: bool) -> Case:
    """DiT-XL/2: 28 layers of 16 heads of 72."""

    def build(batch: int, short: bool = False) -> Built:
        from diffusers import DiTTransformer2DModel

        model = DiTTransformer2DModel(
            num_layers=1 if short else 2 if tiny else 28,
            num_attention_heads=2 if tiny else 16,
            attention_head_dim=16 if tiny else 72,
            in_channels=4,
            out_channels=8,
            sample_size=pixels // 8,
        ).eval()
        return model, {
            "hidden_states": torch.randn(batch, 4, pixels // 8, pixels // 8),
            "timestep": torch.full((batch,), 500),
            "class_labels": torch.ones(batch, dtype=torch.long),
        }

    return Case("DiT-XL/2", f"{pixels} px", build)


def flux(pixels: int, tiny: bool) -> Case:
    """FLUX.1: 19 double and 38 single blocks of 24 heads of 128, 512 text tokens."""
    side, words = pixels // 16, 7 if tiny else 512

    def build(batch: int, short: bool = False) -> Built:
        from diffusers import FluxTransformer2DModel

        blocks = {"num_layers": 1, "num_single_layers": 1} if tiny or short else {}
        narrow = {"num_attention_heads": 1} if tiny else {}
        model = FluxTransformer2DModel(**blocks, **narrow).eval()
        return model, {
            "hidden_states": torch.randn(batch, side * side, 64),
            "encoder_hidden_states": torch.randn(batch, words, 4096),
            "pooled_projections": torch.randn(batch, 768),
            "timestep": torch.full((batch,), 0.5),
            "img_ids": places(side),
            "txt_ids": torch.zeros(words, 3),
        }

    return Case("FLUX.1", f"{pixels} px", build, {"grid": (side, side), "prefix": words})


def places(side: int) -> Tensor:
    """Flux's positions [side * side, 3] of the tokens of an image: 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    found = torch.stack([torch.zeros_like(rows), rows, columns], -1)
    return found.flatten(0, 1).to(torch.get_default_dtype())


def qwen_image(pixels: int, tiny: bool) -> Case:
    """Qwen-Image: 60 layers of 24 heads of 128, 256 text tokens."""
    side, words = pixels // 16, 7 if tiny else 256

    def build(batch: int, short: bool = False) -> Built:
        from diffusers import QwenImageTransformer2DModel

        blocks = {"num_layers": 1} if tiny or short else {}
        narrow = {"num_attention_heads": 1, "joint_attention_dim": 32} if tiny else {}
        model = QwenImageTransformer2DModel(**blocks, **narrow).eval()
        return model, {
            "hidden_states": torch.randn(batch, side * side, 64),
            "encoder_hidden_states": torch.randn(batch, words, 32 if tiny else 3584),
            "timestep": torch.full((batch,), 0.5),
            "img_shapes": [[(1, side, side)]] * batch,
        }

    return Case("Qwen-Image", f"{pixels} px", build, {"grid": (side, side), "prefix": words})


def wan(height: int, width: int, tiny: bool) -> Case:
    """Wan 2.1 14B: 40 layers of 40 heads of 128, each with cross-attention to 512 words."""
    frames = TINY_FRAMES if tiny else FRAMES

    def build(batch: int, short: bool = False) -> Built:
        from diffusers import WanTransformer3DModel

        blocks = {"num_layers": 1} if tiny or short else {}
        narrow = {"num_attention_heads": 1, "ffn_dim": 64, "text_dim": 32} if tiny else {}
        model = WanTransformer3DModel(**blocks, **narrow).eval()
        latents = ((frames - 1) // 4 + 1, height // 8, width // 8)
        return model, {
            "hidden_states": torch.randn(batch, 16, *latents),
            "timestep": torch.full((batch,), 500),
            "encoder_hidden_states": torch.randn(batch, 512, 32 if tiny else 4096),
        }

    return Case("Wan2.1-14B", f"{frames} frames, {width} x {height}", build)
