"""Pipelines of images that pack the latents into tokens before the transformer."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .family import TEXT, Setup, encoders, family, prompt, ready
from .images import an_image, autoencoder, flow

_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
_FLUX = _HEADS | {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1}
_FLUX |= {"joint_attention_dim": 32}
#: The true guidance of models that have a distilled one, too.
_TRUE = {"guided": {"true_cfg_scale": 4.0}, "plain": {"true_cfg_scale": 1.0}}


def _flux(kind: Any) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        **_FLUX, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8]
    )
    parts = {"transformer": transformer, "vae": autoencoder(), "scheduler": flow()}
    return ready(kind, *encoders(2), **parts)


def _flux_prompt() -> dict[str, Any]:
    pooled = torch.randn(1, 32)
    both = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled}
    return prompt(32) | both


@family("Flux")
def flux() -> Setup:
    return Setup(_flux(diffusers.FluxPipeline), _flux_prompt(), **_TRUE)


@family("Flux Kontext")
def flux_kontext() -> Setup:
    def sized(height: int, width: int) -> dict[str, Any]:
        return {"image": an_image(height, width), "max_area": height * width}

    pipe = _flux(diffusers.FluxKontextPipeline)
    call = _flux_prompt() | {"_auto_resize": False}
    return Setup(pipe, call, **_TRUE, sized=sized)


@family("Flux 2")
def flux_2() -> Setup:
    transformer = diffusers.Flux2Transformer2DModel(
        **_FLUX, timestep_guidance_channels=32, axes_dims_rope=[4, 4, 4, 4]
    )
    vae = diffusers.AutoencoderKLFlux2(
        **{"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4},
        **{"down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1},
        **{"up_block_types": ("UpDecoderBlock2D",) * 2, "use_quant_conv": False},
        use_post_quant_conv=False,
    )
    parts = {"transformer": transformer, "vae": vae, "scheduler": flow()}
    pipe = ready(diffusers.Flux2Pipeline, *encoders(1), **parts)
    call = {"prompt_embeds": torch.randn(1, TEXT, 32)}
    # Its guidance is distilled: a number among the arguments.
    plain = {"guided": {"guidance_scale": 4.0}, "plain": {"guidance_scale": 1.0}}
    return Setup(pipe, call, **plain)


@family("QwenImage")
def qwen_image() -> Setup:
    transformer = diffusers.QwenImageTransformer2DModel(
        **_HEADS,
        **{"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2},
        **{"joint_attention_dim": 32, "guidance_embeds": False, "axes_dims_rope": (8, 4, 4)},
    )
    vae = diffusers.AutoencoderKLQwenImage(
        **{"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1},
        **{"temperal_downsample": [False], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
    )
    parts = {"transformer": transformer, "vae": vae, "scheduler": flow()}
    pipe = ready(diffusers.QwenImagePipeline, *encoders(1), **parts)
    masks = {"of": "prompt_embeds_mask", "not_of": "negative_prompt_embeds_mask"}
    call = {k: v.long() if "mask" in k else v for k, v in prompt(32, **masks).items()}
    return Setup(pipe, call, **_TRUE)


@family("Chroma")
def chroma() -> Setup:
    transformer = diffusers.ChromaTransformer2DModel(
        **_FLUX,
        **{"axes_dims_rope": [4, 4, 8], "approximator_num_channels": 8},
        **{"approximator_hidden_dim": 16, "approximator_layers": 1},
    )
    parts = {"transformer": transformer, "vae": autoencoder(), "scheduler": flow()}
    pipe = ready(diffusers.ChromaPipeline, *encoders(1), **parts)
    masks = {"of": "prompt_attention_mask", "not_of": "negative_prompt_attention_mask"}
    return Setup(pipe, prompt(32, **masks))


@family("Z-Image")
def z_image() -> Setup:
    transformer = diffusers.ZImageTransformer2DModel(
        **{"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32},
        **{"n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
        **{"qk_norm": True, "cap_feat_dim": 16, "axes_dims": [8, 4, 4]},
        axes_lens=[256, 32, 32],
    )
    parts = {"transformer": transformer, "vae": autoencoder(), "scheduler": flow()}
    pipe = ready(diffusers.ZImagePipeline, *encoders(1), **parts)
    text = torch.randn(16, 16)
    call = {"prompt_embeds": [text], "negative_prompt_embeds": [-text]}
    return Setup(pipe, call, plain={"guidance_scale": 0.0})


@family("Lumina 2")
def lumina_2() -> Setup:
    transformer = diffusers.Lumina2Transformer2DModel(
        **{"sample_size": 16, "in_channels": 4, "hidden_size": 24, "num_layers": 2},
        **{"num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2},
        **{"num_refiner_layers": 1, "axes_dim_rope": (4, 2, 2), "cap_feat_dim": 32},
        axes_lens=(128, 128, 128),
    )
    parts = {"transformer": transformer, "vae": autoencoder(), "scheduler": flow()}
    pipe = ready(diffusers.Lumina2Pipeline, *encoders(1), **parts)
    masks = {"of": "prompt_attention_mask", "not_of": "negative_prompt_attention_mask"}
    call = {k: v.bool() if "mask" in k else v for k, v in prompt(32, **masks).items()}
    return Setup(pipe, call)
