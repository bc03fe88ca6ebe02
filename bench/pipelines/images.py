"""Pipelines of images whose transformer or UNet sees the latents as a grid."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .family import Setup, encoders, family, prompt, ready

_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def autoencoder(**more: Any) -> Any:
    """Pixels to a half as many latents each way, of four channels."""
    sizes = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4}
    return diffusers.AutoencoderKL(**_BLOCKS | sizes | {"shift_factor": 0.1} | more)


def flow(**more: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


_SD3 = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2}
_SD3 |= {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
_SD3 |= {"joint_attention_dim": 32, "pooled_projection_dim": 64, "out_channels": 4}
_SD3 |= {"pos_embed_max_size": 24, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}


def _sd3(kind: Any, channels: int = 4, **more: Any) -> Any:
    latents = {"in_channels": channels, "out_channels": channels}
    transformer = diffusers.SD3Transformer2DModel(**_SD3 | latents)
    parts = {"transformer": transformer, "scheduler": flow()}
    parts["vae"] = autoencoder(latent_channels=channels)
    return ready(kind, *encoders(3), **parts, **more)


def _sd3_prompt() -> dict[str, Any]:
    pooled = torch.randn(1, 64)
    both = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled}
    return prompt(32) | both


def an_image(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def a_mask(height: int, width: int) -> torch.Tensor:
    return (torch.arange(width) < width // 2).float().expand(1, 1, height, width)


@family("Stable Diffusion 3.5")
def stable_diffusion_3() -> Setup:
    return Setup(_sd3(diffusers.StableDiffusion3Pipeline), _sd3_prompt())


@family("Stable Diffusion 3.5, ControlNet")
def stable_diffusion_3_controlnet() -> Setup:
    options = {k: v for k, v in _SD3.items() if k not in ("qk_norm", "dual_attention_layers")}
    controlnet = diffusers.SD3ControlNetModel(**options | {"num_layers": 1})
    with torch.no_grad():  # those of a fresh one are zero
        for block in controlnet.controlnet_blocks:
            block.weight.normal_(std=0.1)
    pipe = _sd3(diffusers.StableDiffusion3ControlNetPipeline, controlnet=controlnet)
    return Setup(pipe, _sd3_prompt(), sized=lambda *size: {"control_image": an_image(*size)})


@family("Stable Diffusion 3.5, img2img")
def stable_diffusion_3_img2img() -> Setup:
    pipe = _sd3(diffusers.StableDiffusion3Img2ImgPipeline)
    call = _sd3_prompt() | {"strength": 1.0}
    return Setup(pipe, call, sized=lambda *size: {"image": an_image(*size)})


@family("Stable Diffusion 3.5, inpainting")
def stable_diffusion_3_inpainting() -> Setup:
    pipe = _sd3(diffusers.StableDiffusion3InpaintPipeline, channels=16)
    call = _sd3_prompt() | {"strength": 1.0}
    return Setup(
        *(pipe, call),
        sized=lambda *size: {"image": an_image(*size), "mask_image": a_mask(*size)},
    )


@family("DiT")
def dit() -> Setup:
    transformer = diffusers.DiTTransformer2DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2},
        **{"in_channels": 4, "out_channels": 8, "sample_size": 16},
    )
    parts = {"vae": autoencoder(), "scheduler": diffusers.DDIMScheduler()}
    pipe = ready(diffusers.DiTPipeline, transformer=transformer, **parts)
    call = {"class_labels": [1], "output_type": "np"}
    return Setup(pipe, call, sizes=())


@family("PixArt Sigma")
def pixart() -> Setup:
    transformer = diffusers.PixArtTransformer2DModel(
        **{"sample_size": 16, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8},
        **{"num_attention_heads": 2, "caption_channels": 32, "in_channels": 4},
        **{"cross_attention_dim": 16, "out_channels": 8, "norm_type": "ada_norm_single"},
        norm_elementwise_affine=False,
    )
    parts = {"vae": autoencoder(), "scheduler": diffusers.DDIMScheduler()}
    pipe = ready(*(diffusers.PixArtSigmaPipeline, *encoders(1)), transformer=transformer, **parts)
    masks = {"of": "prompt_attention_mask", "not_of": "negative_prompt_attention_mask"}
    call = prompt(32, **masks) | {"negative_prompt": None, "use_resolution_binning": False}
    return Setup(pipe, call)


@family("HunyuanDiT")
def hunyuan_dit() -> Setup:
    transformer = diffusers.HunyuanDiT2DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "patch_size": 2},
        **{"sample_size": 8, "in_channels": 4, "cross_attention_dim": 8, "hidden_size": 16},
        **{"cross_attention_dim_t5": 8, "pooled_projection_dim": 4, "text_len": 7},
        **{"text_len_t5": 7, "activation_fn": "gelu-approximate"},
    )
    blocks = {"block_out_channels": (8,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4}
    vae = autoencoder(**blocks, up_block_types=("UpDecoderBlock2D",) * 4)
    missing = [*encoders(2), "safety_checker", "feature_extractor"]
    pipe = ready(
        *(diffusers.HunyuanDiTPipeline, *missing),
        **{"transformer": transformer, "vae": vae, "scheduler": diffusers.DDPMScheduler()},
        requires_safety_checker=False,
    )
    call: dict[str, Any] = {"use_resolution_binning": False}
    for negative in ("", "negative_"):
        for number in ("", "_2"):
            call[f"{negative}prompt_embeds{number}"] = torch.randn(1, 7, 8)
            call[f"{negative}prompt_attention_mask{number}"] = torch.ones(1, 7)
    # Its table of rotations counts latents an eighth of the pixels.
    return Setup(pipe, call, sizes=((128, 128), (128, 192), (192, 128)))


@family("AuraFlow")
def aura_flow() -> Setup:
    transformer = diffusers.AuraFlowTransformer2DModel(
        **{"attention_head_dim": 8, "num_attention_heads": 2, "sample_size": 16},
        **{"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1},
        **{"num_single_dit_layers": 1, "caption_projection_dim": 16},
        **{"joint_attention_dim": 32, "pos_embed_max_size": 256},
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(2.0)  # as they are, its outputs hardly depend on its attention
    parts = {"transformer": transformer, "vae": autoencoder(), "scheduler": flow()}
    pipe = ready(diffusers.AuraFlowPipeline, *encoders(1), **parts)
    masks = {"of": "prompt_attention_mask", "not_of": "negative_prompt_attention_mask"}
    return Setup(pipe, prompt(32, **masks))


@family("Stable Diffusion XL")
def stable_diffusion_xl() -> Setup:
    unet = diffusers.UNet2DConditionModel(
        **{"block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 16},
        **{"norm_num_groups": 4, "attention_head_dim": (2, 2), "use_linear_projection": True},
        **{"transformer_layers_per_block": (1, 1), "cross_attention_dim": 32},
        **{"addition_embed_type": "text_time", "addition_time_embed_dim": 8},
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        projection_class_embeddings_input_dim=64 + 6 * 8,
    )
    missing = [*encoders(2), "image_encoder", "feature_extractor"]
    pipe = ready(
        *(diffusers.StableDiffusionXLPipeline, *missing),
        **{"unet": unet, "vae": autoencoder(), "scheduler": diffusers.EulerDiscreteScheduler()},
        add_watermarker=False,
    )
    return Setup(pipe, _sd3_prompt(), part="unet")


@family("Sana")
def sana() -> Setup:
    transformer = diffusers.SanaTransformer2DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2},
        **{"patch_size": 1, "in_channels": 4, "out_channels": 4, "sample_size": 16},
        **{"num_cross_attention_heads": 2, "cross_attention_head_dim": 8},
        **{"cross_attention_dim": 16, "caption_channels": 8},
    )
    blocks, scales = ("ResBlock", "EfficientViTBlock"), ((), (5,))
    vae = diffusers.AutoencoderDC(
        **{"in_channels": 3, "latent_channels": 4, "attention_head_dim": 2},
        **{"encoder_block_types": blocks, "decoder_block_types": blocks},
        **{"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)},
        **{"encoder_qkv_multiscales": scales, "decoder_qkv_multiscales": scales},
        **{"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)},
        **{"downsample_block_type": "conv", "upsample_block_type": "interpolate"},
        **{"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"},
    )
    parts = {"transformer": transformer, "vae": vae, "scheduler": flow()}
    pipe = ready(diffusers.SanaPipeline, *encoders(1), **parts)
    masks = {"of": "prompt_attention_mask", "not_of": "negative_prompt_attention_mask"}
    call = prompt(8, **masks) | {"use_resolution_binning": False, "negative_prompt": None}
    return Setup(pipe, call, sizes=((32, 32), (32, 64), (64, 32)))
