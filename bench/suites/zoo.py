"""The models that the `models` suite times: real widths and sizes, random weights.

Where a machine is too small for a whole model, its name says how many of its blocks it has: all
blocks are alike, so that ratios of times are nearly those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

#: A model with the keyword arguments of one call.
Built = tuple[nn.Module, dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A model at one size.

    name: library, model, blocks where they are fewer, size. build: makes it and its inputs, on the
    default device in the default dtype. options: of t5fx, for what the graph does not tell.
    training: time a forward and backward pass. compiling: time the compilation, cold and warm, too.
    """

    name: str
    build: Callable[[], Built] = field(compare=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    training: bool = False
    compiling: bool = False


def entries(gpu: bool, small: bool = False) -> list[Entry]:
    """What is timed on a GPU, or on a CPU; with `small`, tiny models for tests."""
    if small:
        tiny = {"depth": 1, "embed_dim": 32, "num_heads": 8}
        return [
            timm("timm/tiny", 112, compiling=True, **tiny),
            timm("timm/tiny", 112, training=True, **tiny),
        ]
    return list(_on_gpu() if gpu else _on_cpu())


def _on_cpu() -> tuple[Entry, ...]:
    return (
        timm("timm/DINOv2-S/14", 224),
        timm("timm/DINOv2-S/14", 518, compiling=True),
        timm("timm/DINOv2-S/14", 1036),
        timm("timm/DINOv2-S/14, 2 of 12 blocks", 518, training=True, depth=2),
        siglip(512, layers=2),
        dit(512, layers=2),
        sd35(512, layers=1),
    )


def _on_gpu() -> tuple[Entry, ...]:
    return (
        timm("timm/DINOv2-S/14", 518, batch=8, compiling=True),
        timm("timm/DINOv2-S/14", 1036),
        timm("timm/DINOv2-S/14", 2072),
        timm("timm/DINOv2-L/14", 518, batch=8, **LARGE),
        timm("timm/DINOv2-L/14", 1036, **LARGE),
        timm("timm/DINOv2-S/14", 1036, training=True),
        siglip(512, layers=27, batch=8),
        siglip(1024, layers=27),
        dit(512, layers=28),
        dit(1024, layers=28),
        dit(2048, layers=28),
        sd35(1024, layers=8),
        sd35(2048, layers=8),
        flux(1024),
        flux(2048),
        wan(81),
    )


LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}


def timm(
    name: str,
    pixels: int,
    *,
    batch: int = 1,
    training: bool = False,
    compiling: bool = False,
    **shape: int,
) -> Entry:
    """A DINOv2 of timm, small unless `shape` says otherwise; images [B, 3, pixels, pixels]."""

    def build() -> Built:
        import timm

        architecture = "vit_small_patch14_dinov2"
        # Its layers would begin as almost nothing (init_values=1e-5), and errors be invisible.
        about = {"img_size": pixels, "init_values": 1.0, **shape}
        model = timm.create_model(architecture, **about).train(training)
        return model, {"x": torch.randn(batch, 3, pixels, pixels)}

    return Entry(_name(name, pixels, batch, training), build, {}, training, compiling)


def siglip(pixels: int, layers: int, batch: int = 1) -> Entry:
    """transformers' SigLIP vision tower, so400m/16: 27 layers of 16 heads of 72."""

    def build() -> Built:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        config = SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=layers,
            num_attention_heads=16,
            image_size=pixels,
            patch_size=16,
            vision_use_head=False,
        )
        model = SiglipVisionModel(config).eval()
        return model, {"pixel_values": torch.randn(batch, 3, pixels, pixels)}

    return Entry(_name(f"transformers/SigLIP-so400m/16{_of(layers, 27)}", pixels, batch), build)


def dit(pixels: int, layers: int) -> Entry:
    """diffusers' DiT-XL/2: 28 layers of 16 heads of 72, latents an eighth of the image."""

    def build() -> Built:
        from diffusers import DiTTransformer2DModel

        side = pixels // 8
        model = DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=layers,
            sample_size=side,
        ).eval()
        return model, {
            "hidden_states": torch.randn(1, 4, side, side),
            "timestep": torch.tensor([500]),
            "class_labels": torch.tensor([1]),
        }

    return Entry(_name(f"diffusers/DiT-XL/2{_of(layers, 28)}", pixels), build)


def sd35(pixels: int, layers: int) -> Entry:
    """diffusers' SD3.5 medium: 24 layers of 24 heads of 64, 13 of them dual, 333 text tokens."""

    def build() -> Built:
        from diffusers import SD3Transformer2DModel

        side = pixels // 8
        model = SD3Transformer2DModel(
            sample_size=128,
            num_layers=layers,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(min(13, max(1, layers // 2)))),
            qk_norm="rms_norm",
        ).eval()
        return model, {
            "hidden_states": torch.randn(1, 16, side, side),
            "encoder_hidden_states": torch.randn(1, 333, 4096),
            "pooled_projections": torch.randn(1, 2048),
            "timestep": torch.tensor([500]),
        }

    return Entry(_name(f"diffusers/SD3.5-M{_of(layers, 24)}", pixels), build)


def flux(pixels: int) -> Entry:
    """diffusers' Flux: 4 of 19 double and 8 of 38 single blocks of 24 heads of 128, 512 words."""
    side, words = pixels // 16, 512

    def build() -> Built:
        from diffusers import FluxTransformer2DModel

        model = FluxTransformer2DModel(num_layers=4, num_single_layers=8).eval()
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
        return model, {
            "hidden_states": torch.randn(1, side * side, 64),
            "encoder_hidden_states": torch.randn(1, words, 4096),
            "pooled_projections": torch.randn(1, 768),
            "timestep": torch.tensor([0.5]),
            "img_ids": places.to(torch.get_default_dtype()),
            "txt_ids": torch.zeros(words, 3),
        }

    given = {"grid": (side, side), "prefix": words}
    return Entry(_name("diffusers/Flux, 4+8 of 19+38 blocks", pixels), build, given)


def wan(frames: int) -> Entry:
    """diffusers' Wan 2.1, 1.3B: 30 layers of 12 heads of 128; a video of 480 x 832 pixels."""
    layers = 8

    def build() -> Built:
        from diffusers import WanTransformer3DModel

        model = WanTransformer3DModel(
            num_attention_heads=12, ffn_dim=8960, num_layers=layers
        ).eval()
        return model, {
            "hidden_states": torch.randn(1, 16, (frames - 1) // 4 + 1, 60, 104),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 512, 4096),
        }

    return Entry(f"diffusers/Wan2.1-1.3B{_of(layers, 30)} {frames} frames of 480 x 832", build)


def _of(layers: int, every: int) -> str:
    return "" if layers == every else f", {layers} of {every} blocks"


def _name(model: str, pixels: int, batch: int = 1, training: bool = False) -> str:
    many = f", batch {batch}" if batch > 1 else ""
    return f"{model} {pixels} px{many}{', training' if training else ''}"
