"""Pipelines of videos."""

from __future__ import annotations

from typing import Any

import diffusers
import PIL.Image
import torch
import transformers

from .family import Setup, encoders, family, prompt, ready
from .images import an_image, flow

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}
_WAN = _HEADS | {"patch_size": (1, 2, 2), "text_dim": 16, "ffn_dim": 32, "freq_dim": 32}
_WAN |= {"cross_attn_norm": True, "rope_max_seq_len": 32, "out_channels": 16}
_WAN |= {"qk_norm": "rms_norm_across_heads"}
_SIZES = ((64, 64), (64, 96), (96, 64))


def _wan(kind: Any, options: dict[str, Any], **parts: Any) -> Any:
    vae = diffusers.AutoencoderKLWan(
        **{"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        temperal_downsample=[False, True, True],
    )
    return ready(
        *(kind, *encoders(1)),
        **{"transformer": diffusers.WanTransformer3DModel(**_WAN | options), "vae": vae},
        **parts,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


@family("Wan, text to video")
def wan() -> Setup:
    call = prompt(16) | {"num_frames": 5}
    return Setup(_wan(diffusers.WanPipeline, {"in_channels": 16}), call, sizes=_SIZES)


@family("Wan, image to video")
def wan_i2v() -> Setup:
    pipe = _wan(
        diffusers.WanImageToVideoPipeline,
        {"in_channels": 36, "image_dim": 16, "added_kv_proj_dim": 24},
        image_encoder=transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
                **{"image_size": 32, "intermediate_size": 16, "patch_size": 16},
            )
        ),
        image_processor=transformers.CLIPImageProcessor(crop_size=32, size=32),
    )

    def sized(height: int, width: int) -> dict[str, Any]:
        pixels = (255 * an_image(height, width)[0].permute(1, 2, 0)).byte().numpy()
        return {"image": PIL.Image.fromarray(pixels)}

    # The transformer tells the text from the image by its 512 tokens.
    call = prompt(16, tokens=512) | {"num_frames": 5}
    return Setup(pipe, call, sizes=_SIZES, sized=sized)


@family("LTX Video")
def ltx() -> Setup:
    transformer = diffusers.LTXVideoTransformer3DModel(
        **_HEADS | {"attention_head_dim": 8},
        **{"in_channels": 8, "out_channels": 8, "cross_attention_dim": 16},
        **{"caption_channels": 16, "qk_norm": "rms_norm_across_heads"},
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        **{"latent_channels": 8, "patch_size": 1, "patch_size_t": 1, "encoder_causal": True},
        **{"block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4},
        **{"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5},
        **{"spatio_temporal_scaling": (True, True, False, False), "decoder_causal": False},
        **{"decoder_spatio_temporal_scaling": (True, True, False, False)},
        **{"decoder_inject_noise": (False,) * 5, "upsample_residual": (False,) * 4},
        **{"upsample_factor": (1,) * 4, "timestep_conditioning": False},
    )
    parts = {"transformer": transformer, "vae": vae, "scheduler": flow()}
    pipe = ready(diffusers.LTXPipeline, *encoders(1), **parts)
    masks = {"of": "prompt_attention_mask", "not_of": "negative_prompt_attention_mask"}
    call = prompt(16, **masks) | {"num_frames": 9}
    return Setup(pipe, call, sizes=((32, 32), (32, 64), (64, 32)))


@family("HunyuanVideo")
def hunyuan_video() -> Setup:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1},
        **{"in_channels": 4, "out_channels": 4, "num_single_layers": 1, "patch_size": 1},
        **{"num_refiner_layers": 1, "patch_size_t": 1, "guidance_embeds": True},
        **{"text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)},
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        **{"latent_channels": 4, "block_out_channels": (8,) * 4, "layers_per_block": 1},
        **{"down_block_types": ("HunyuanVideoDownBlock3D",) * 4, "norm_num_groups": 4},
        **{"up_block_types": ("HunyuanVideoUpBlock3D",) * 4},
    )
    parts = {"transformer": transformer, "vae": vae, "scheduler": flow()}
    pipe = ready(diffusers.HunyuanVideoPipeline, *encoders(2), **parts)
    masks = {"of": "prompt_attention_mask", "not_of": "negative_prompt_attention_mask"}
    pooled = torch.randn(1, 8)
    both = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled}
    call = prompt(16, **masks) | both | {"num_frames": 5}
    guidance = {"guided": {"true_cfg_scale": 4.0}, "plain": {"true_cfg_scale": 1.0}}
    return Setup(pipe, call, **guidance, sizes=_SIZES)


@family("CogVideoX")
def cogvideox() -> Setup:
    transformer = diffusers.CogVideoXTransformer3DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4},
        **{"out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 32, "num_layers": 2},
        **{"sample_width": 8, "sample_height": 8, "sample_frames": 9, "patch_size": 2},
        **{"temporal_compression_ratio": 4, "max_text_seq_length": 16},
        use_rotary_positional_embeddings=True,  # as in CogVideoX 5B
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        **{"down_block_types": ("CogVideoXDownBlock3D",) * 4, "latent_channels": 4},
        **{"up_block_types": ("CogVideoXUpBlock3D",) * 4, "block_out_channels": (8,) * 4},
        **{"layers_per_block": 1, "norm_num_groups": 2, "temporal_compression_ratio": 4},
    )
    parts = {"transformer": transformer, "vae": vae}
    parts["scheduler"] = diffusers.CogVideoXDDIMScheduler()
    pipe = ready(diffusers.CogVideoXPipeline, *encoders(1), **parts)
    call = prompt(32, tokens=16) | {"num_frames": 9}
    return Setup(pipe, call, sizes=_SIZES)
