"""diffusers' transformers and UNets for the coverage suite, and what their attentions are.

Sizes follow the ones of diffusers' own tests; images are not square, so that a grid that is read
the wrong way round shows.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .cases import Call, Case, integers, tensors

B = 2
STEP = torch.full((B,), 7)
NOW = torch.full((B,), 0.5)


def case(
    name: str,
    expected: str,
    options: dict[str, Any],
    inputs: dict[str, Any],
    cause: str = "",
    fixed: bool = False,
) -> Case:
    """A class by name (what follows a space is a variant), its options, its inputs by name."""

    def build() -> Call:
        model = getattr(diffusers, name.partition(" ")[0])(**options)
        return model, (), tensors(inputs)

    return Case("diffusers", name, build, expected, cause, batch=B, fixed=fixed)


def heads(number: int, size: int, layers: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": number,
        "attention_head_dim": size,
        "num_layers": layers,
        **more,
    }


IDS = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0))
IDS4 = torch.cartesian_prod(
    torch.zeros(1), torch.arange(4.0), torch.arange(6.0), torch.zeros(1)
).expand(B, -1, -1)
PACKED = {"hidden_states": (B, 24, 4), "encoder_hidden_states": (B, 7, 32), "img_ids": IDS}
PACKED |= {"txt_ids": torch.zeros(7, 3), "timestep": NOW}
FLUX = {"patch_size": 1, "in_channels": 4, "joint_attention_dim": 32, "num_single_layers": 1}
IMAGE = {"hidden_states": (B, 4, 8, 12), "timestep": STEP}
SIZES = {
    "original_size": torch.tensor([[64, 96]] * B),
    "target_size": torch.tensor([[64, 96]] * B),
    "crop_coords": torch.tensor([[0, 0]] * B),
}
VIDEO = {"hidden_states": (B, 4, 2, 8, 12), "timestep": STEP}
WAN = heads(2, 12, patch_size=(1, 2, 2), in_channels=4, out_channels=4, text_dim=16, ffn_dim=32)
WAN |= {"freq_dim": 32, "cross_attn_norm": True, "rope_max_seq_len": 32}
WAN |= {"qk_norm": "rms_norm_across_heads"}
UNET = {"block_out_channels": (8, 16), "norm_num_groups": 4, "in_channels": 4, "out_channels": 4}
UNET |= {"layers_per_block": 1, "sample_size": 16}
NOISE = {"sample": (B, 4, 16, 24), "timestep": torch.tensor([10])}
CROSS2D = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}

CASES = (
    case(
        "DiTTransformer2DModel",
        "2 0+4x4+0",
        heads(2, 8, in_channels=4, out_channels=8, sample_size=8, num_embeds_ada_norm=8),
        {"hidden_states": (B, 4, 8, 8), "timestep": STEP, "class_labels": integers(B, below=4)},
    ),
    case(
        "PixArtTransformer2DModel",
        "2 0+4x6+0, 2 cross-attention",
        heads(2, 8, sample_size=8, in_channels=4, cross_attention_dim=16, out_channels=8)
        | {"caption_channels": None, "norm_type": "ada_norm_single"},
        IMAGE
        | {
            "encoder_hidden_states": (B, 7, 16),
            "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
        },
    ),
    case(
        "PixArtTransformer2DModel masked text",
        "2 0+4x6+0, 2 masked",
        heads(2, 8, sample_size=8, in_channels=4, cross_attention_dim=16, out_channels=8)
        | {"caption_channels": None, "norm_type": "ada_norm_single"},
        IMAGE
        | {
            "encoder_hidden_states": (B, 7, 16),
            "encoder_attention_mask": torch.ones(B, 7),
            "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
        },
    ),
    case(
        "SD3Transformer2DModel",
        "2 0+4x6+7",
        heads(2, 8, sample_size=8, patch_size=2, in_channels=4, out_channels=4)
        | {"joint_attention_dim": 32, "caption_projection_dim": 16, "pos_embed_max_size": 16}
        | {"pooled_projection_dim": 16},
        IMAGE | {"encoder_hidden_states": (B, 7, 32), "pooled_projections": (B, 16)},
    ),
    case(
        "SD3Transformer2DModel dual",
        "1 0+4x6+0, 2 0+4x6+7",
        heads(2, 8, sample_size=8, patch_size=2, in_channels=4, out_channels=4)
        | {"joint_attention_dim": 32, "caption_projection_dim": 16, "pos_embed_max_size": 16}
        | {"pooled_projection_dim": 16, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        IMAGE | {"encoder_hidden_states": (B, 7, 32), "pooled_projections": (B, 16)},
    ),
    case(
        "FluxTransformer2DModel",
        "2 7+4x6+0",
        heads(2, 16, 1, **FLUX, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8]),
        PACKED | {"pooled_projections": (B, 32)},
    ),
    case(
        "Flux2Transformer2DModel",
        "2 7+4x6+0",
        heads(2, 16, 1, **FLUX, timestep_guidance_channels=256, axes_dims_rope=[4, 4, 4, 4]),
        PACKED | {"img_ids": IDS4, "txt_ids": torch.zeros(B, 7, 4), "guidance": NOW},
    ),
    case(
        "ChromaTransformer2DModel",
        "2 7+4x6+0",
        heads(2, 16, 1, **FLUX, axes_dims_rope=[4, 4, 8], approximator_num_channels=8)
        | {"approximator_hidden_dim": 16, "approximator_layers": 1},
        PACKED,
    ),
    case(
        "BriaTransformer2DModel",
        "2 7+4x6+0",
        heads(2, 8, 1, **FLUX, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4]),
        PACKED,
    ),
    case(
        "LongCatImageTransformer2DModel",
        "2 7+4x6+0",
        heads(2, 16, 1, **FLUX, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8]),
        PACKED | {"guidance": NOW},
    ),
    case(
        "OvisImageTransformer2DModel",
        "2 7+4x6+0",
        heads(2, 16, 1, **FLUX, out_channels=4, axes_dims_rope=(4, 4, 8)),
        PACKED,
    ),
    case(
        "AuraFlowTransformer2DModel",
        "2 15+4x4+0",
        {"attention_head_dim": 8, "num_attention_heads": 4, "sample_size": 8, "patch_size": 2}
        | {"in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1}
        | {"caption_projection_dim": 32, "joint_attention_dim": 32, "pos_embed_max_size": 64},
        {"hidden_states": (B, 4, 8, 8), "timestep": STEP, "encoder_hidden_states": (B, 7, 32)},
    ),
    case(
        "CogView3PlusTransformer2DModel",
        "2 7+4x6+0",
        heads(2, 4, patch_size=2, in_channels=4, out_channels=4, text_embed_dim=8)
        | {"time_embed_dim": 8, "condition_dim": 2, "pos_embed_max_size": 8, "sample_size": 8},
        IMAGE | SIZES | {"encoder_hidden_states": (B, 7, 8)},
    ),
    case(
        "CogView4Transformer2DModel",
        "2 7+4x6+0",
        heads(4, 4, patch_size=2, in_channels=4, out_channels=4, text_embed_dim=8)
        | {"time_embed_dim": 8, "condition_dim": 4},
        IMAGE | SIZES | {"encoder_hidden_states": (B, 7, 8)},
    ),
    case(
        "GlmImageTransformer2DModel",
        "1 7+4x6+0",
        heads(2, 8, 1, patch_size=2, in_channels=4, out_channels=4, text_embed_dim=32)
        | {"time_embed_dim": 16, "condition_dim": 8, "prior_vq_quantizer_codebook_size": 64},
        IMAGE
        | {
            "encoder_hidden_states": (B, 7, 32),
            "prior_token_id": integers(B, 24),
            "prior_token_drop": torch.zeros(B, dtype=torch.bool),
            "target_size": torch.tensor([[8.0, 12.0]] * B),
            "crop_coords": torch.zeros(B, 2),
        },
    ),
    case(
        "HunyuanDiT2DModel",
        "2 0+4x4+0, 3 cross-attention",
        heads(2, 8, 2, sample_size=8, patch_size=2, in_channels=4, cross_attention_dim=8)
        | {"cross_attention_dim_t5": 8, "pooled_projection_dim": 4, "hidden_size": 16}
        | {"text_len": 4, "text_len_t5": 4, "activation_fn": "gelu-approximate"},
        {
            "hidden_states": (B, 4, 8, 8),
            "timestep": STEP.float(),
            "encoder_hidden_states": (B, 4, 8),
            "text_embedding_mask": torch.ones(B, 4),
            "encoder_hidden_states_t5": (B, 4, 8),
            "text_embedding_mask_t5": torch.ones(B, 4),
            "image_meta_size": torch.tensor([[1024, 1024, 16, 16, 0, 0]] * B).float(),
            "style": torch.zeros(B, dtype=torch.long),
            "image_rotary_emb": [torch.ones(1, 8), torch.zeros(1, 8)],
        },
    ),
    case(
        "LuminaNextDiT2DModel",
        "2 0+8x8+0, 2 cross-attention",
        {"sample_size": 16, "in_channels": 4, "hidden_size": 24, "num_layers": 2}
        | {"num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 16, "norm_eps": 1e-5}
        | {"learn_sigma": False, "qk_norm": True, "cross_attention_dim": 32},
        {
            "hidden_states": (B, 4, 16, 16),
            "encoder_hidden_states": (B, 7, 32),
            "timestep": NOW,
            "encoder_mask": torch.ones(B, 7),
            "image_rotary_emb": torch.ones(384, 384, 4, dtype=torch.complex64),
            "cross_attention_kwargs": {},
        },
    ),
    case(
        "Lumina2Transformer2DModel",
        "1 grid-unknown, 1 0+4x6+0, 2 7+4x6+0",
        {"sample_size": 16, "in_channels": 4, "hidden_size": 24, "num_layers": 2}
        | {"num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "num_refiner_layers": 1}
        | {"axes_dim_rope": (4, 2, 2), "axes_lens": (128, 128, 128), "cap_feat_dim": 32},
        {
            "hidden_states": (B, 4, 8, 12),
            "encoder_hidden_states": (B, 7, 32),
            "timestep": NOW,
            "encoder_attention_mask": torch.ones(B, 7, dtype=torch.bool),
        },
    ),
    case(
        "SanaTransformer2DModel",
        "2 cross-attention",
        heads(2, 4, patch_size=1, in_channels=4, out_channels=4, num_cross_attention_heads=2)
        | {"cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8},
        IMAGE | {"encoder_hidden_states": (B, 7, 8)},
    ),
    case(
        "SanaVideoTransformer3DModel",
        "2 cross-attention",
        heads(2, 12, in_channels=4, out_channels=4, num_cross_attention_heads=2)
        | {"cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16}
        | {"sample_size": 8, "patch_size": (1, 2, 2), "qk_norm": "rms_norm_across_heads"}
        | {"rope_max_seq_len": 32},
        VIDEO | {"encoder_hidden_states": (B, 7, 16)},
    ),
    case(
        "QwenImageTransformer2DModel",
        "2 7+4x6+0",
        heads(2, 16, patch_size=2, in_channels=16, out_channels=4, joint_attention_dim=16)
        | {"guidance_embeds": False, "axes_dims_rope": (8, 4, 4)},
        {
            "hidden_states": (B, 24, 16),
            "encoder_hidden_states": (B, 7, 16),
            "encoder_hidden_states_mask": torch.ones(B, 7, dtype=torch.long),
            "timestep": NOW,
            "img_shapes": [(1, 4, 6)] * B,
        },
    ),
    case(
        "QwenImageTransformer2DModel no mask",
        "2 7+4x6+0",
        heads(2, 16, patch_size=2, in_channels=16, out_channels=4, joint_attention_dim=16)
        | {"guidance_embeds": False, "axes_dims_rope": (8, 4, 4)},
        {
            "hidden_states": (B, 24, 16),
            "encoder_hidden_states": (B, 7, 16),
            "timestep": NOW,
            "img_shapes": [(1, 4, 6)] * B,
        },
    ),
    case(
        "OmniGenTransformer2DModel",
        "2 masked",
        {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "num_layers": 2}
        | {"intermediate_size": 32, "pad_token_id": 0, "vocab_size": 100, "in_channels": 4}
        | {"time_step_dim": 4, "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]}},
        {
            "hidden_states": (1, 4, 8, 8),
            "timestep": torch.rand(1),
            "input_ids": integers(1, 24, below=10),
            "input_img_latents": [torch.randn(1, 4, 8, 8)],
            "input_image_sizes": {0: [[0, 16]]},
            "attention_mask": torch.ones(1, 41, 41),
            "position_ids": torch.arange(41)[None],
        },
    ),
    case(
        "HiDreamImageTransformer2DModel",
        "2 0+4x4+24",
        heads(4, 8, 1, patch_size=2, in_channels=4, out_channels=4, num_single_layers=1)
        | {"caption_channels": [8, 4], "text_emb_dim": 8, "num_routed_experts": 2}
        | {"num_activated_experts": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (32, 32)}
        | {"llama_layers": (0, 1), "force_inference_output": True},
        {
            "hidden_states": (B, 4, 8, 8),
            "encoder_hidden_states_t5": (B, 8, 8),
            "encoder_hidden_states_llama3": (2, B, 8, 4),
            "pooled_embeds": (B, 8),
            "timesteps": STEP,
        },
        cause="torch.export: .numpy() in the mixture of experts",
        fixed=True,
    ),
    case(
        "PRXTransformer2DModel",
        "2 cross-attention",
        {"in_channels": 4, "patch_size": 2, "context_in_dim": 32, "hidden_size": 32, "depth": 2}
        | {"mlp_ratio": 2.0, "num_heads": 2, "axes_dim": [8, 8], "theta": 10_000},
        IMAGE | {"timestep": NOW, "encoder_hidden_states": (B, 7, 32)},
    ),
    case(
        "ErnieImageTransformer2DModel",
        "2 0+4x6+7",
        {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 32}
        | {"in_channels": 4, "out_channels": 4, "patch_size": 2, "text_in_dim": 16}
        | {"rope_theta": 256, "rope_axes_dim": (8, 4, 4), "qk_layernorm": True},
        IMAGE | {"timestep": NOW, "text_bth": (B, 7, 16), "text_lens": torch.tensor([7] * B)},
    ),
    case(
        "ZImageTransformer2DModel",
        "1 0+8x8+0, 1 0+8x8+32, 1 grid-unknown",
        {"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32}
        | {"n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "qk_norm": True}
        | {"cap_feat_dim": 16, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32]},
        {
            "x": [torch.randn(4, 1, 16, 16)],
            "cap_feats": [torch.randn(16, 16)],
            "t": torch.tensor([0.5]),
        },
    ),
    case(
        "AllegroTransformer3DModel",
        "2 0+2x4x6+0, 2 cross-attention",
        heads(2, 8, in_channels=4, out_channels=4, cross_attention_dim=16, sample_width=8)
        | {"sample_height": 8, "sample_frames": 8, "caption_channels": 8},
        VIDEO | {"encoder_hidden_states": (B, 7, 8)},
    ),
    case(
        "CogVideoXTransformer3DModel",
        "2 8+2x4x6+0",
        heads(2, 8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8)
        | {"sample_width": 12, "sample_height": 8, "sample_frames": 5, "patch_size": 2}
        | {"temporal_compression_ratio": 4, "max_text_seq_length": 8},
        {"hidden_states": (B, 2, 4, 8, 12), "timestep": STEP, "encoder_hidden_states": (B, 8, 8)},
    ),
    case(
        "CogVideoXTransformer3DModel other size",
        "2 8+2x4x6+0",
        heads(2, 8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8)
        | {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "patch_size": 2}
        | {"temporal_compression_ratio": 4, "max_text_seq_length": 8},
        {"hidden_states": (B, 2, 4, 8, 12), "timestep": STEP, "encoder_hidden_states": (B, 8, 8)},
        cause="torch.export: position table rebuilt with .data in forward",
    ),
    case(
        "CogVideoXTransformer3DModel 1.5",
        "2 8+2x4x6+0",
        heads(2, 8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8)
        | {"sample_width": 12, "sample_height": 8, "sample_frames": 8, "patch_size": 2}
        | {"temporal_compression_ratio": 4, "max_text_seq_length": 8, "patch_size_t": 2}
        | {"use_rotary_positional_embeddings": True},
        {"hidden_states": (B, 4, 4, 8, 12), "timestep": STEP, "encoder_hidden_states": (B, 8, 8)},
    ),
    case(
        "ConsisIDTransformer3DModel",
        "1 8+2x4x6+0",
        heads(2, 8, 1, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8)
        | {"sample_width": 12, "sample_height": 8, "sample_frames": 5, "patch_size": 2}
        | {"temporal_compression_ratio": 4, "max_text_seq_length": 8},
        {"hidden_states": (B, 2, 4, 8, 12), "timestep": STEP, "encoder_hidden_states": (B, 8, 8)},
    ),
    case(
        "CosmosTransformer3DModel",
        "2 0+2x4x6+0, 2 cross-attention",
        heads(2, 12, in_channels=4, out_channels=4, mlp_ratio=2, text_embed_dim=16)
        | {"adaln_lora_dim": 4, "max_size": (4, 32, 32), "patch_size": (1, 2, 2)}
        | {"rope_scale": (2.0, 1.0, 1.0), "extra_pos_embed_type": "learnable"},
        VIDEO
        | {
            "encoder_hidden_states": (B, 7, 16),
            "attention_mask": torch.ones(B, 7, dtype=torch.bool),
            "fps": 30,
            "padding_mask": torch.zeros(1, 1, 8, 12),
        },
    ),
    case(
        "EasyAnimateTransformer3DModel",
        "2 7+2x4x6+0",
        heads(2, 16, in_channels=4, out_channels=4, mmdit_layers=2, patch_size=2)
        | {"sample_height": 60, "sample_width": 90, "text_embed_dim": 16, "time_embed_dim": 8},
        VIDEO | {"encoder_hidden_states": (B, 7, 16)},
    ),
    case(
        "HunyuanVideoTransformer3DModel",
        "2 0+2x4x6+7, 1 masked",
        heads(2, 10, 1, in_channels=4, out_channels=4, num_single_layers=1, patch_size=1)
        | {"num_refiner_layers": 1, "patch_size_t": 1, "guidance_embeds": True}
        | {"text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)},
        {
            "hidden_states": (B, 4, 2, 4, 6),
            "timestep": STEP,
            "encoder_hidden_states": (B, 7, 16),
            "pooled_projections": (B, 8),
            "encoder_attention_mask": torch.ones(B, 7),
            "guidance": STEP.float(),
        },
    ),
    case(
        "HunyuanVideo15Transformer3DModel",
        "3 masked",
        heads(2, 8, in_channels=4, out_channels=4, num_refiner_layers=1, mlp_ratio=2.0)
        | {"patch_size": 1, "patch_size_t": 1, "text_embed_dim": 16, "text_embed_2_dim": 8}
        | {"image_embed_dim": 12, "rope_axes_dim": (2, 2, 4), "target_size": 16}
        | {"task_type": "t2v"},
        {
            "hidden_states": (1, 4, 1, 4, 6),
            "timestep": torch.tensor([1.0]),
            "encoder_hidden_states": (1, 6, 16),
            "encoder_hidden_states_2": (1, 4, 8),
            "encoder_attention_mask": torch.ones(1, 6),
            "encoder_attention_mask_2": torch.ones(1, 4),
            "image_embeds": torch.zeros(1, 3, 12),
        },
    ),
    case(
        "LatteTransformer3DModel",
        "1 0+4x4+0, 1 cross-attention, 1 0+3+0",
        heads(2, 4, 1, sample_size=8, patch_size=2, caption_channels=8, in_channels=4)
        | {"cross_attention_dim": 8, "out_channels": 8, "attention_bias": True}
        | {"activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000}
        | {"norm_type": "ada_norm_single", "norm_elementwise_affine": False}
        | {"video_length": 3},
        {"hidden_states": (B, 4, 3, 8, 8), "timestep": STEP, "encoder_hidden_states": (B, 7, 8)},
    ),
    case(
        "LTXVideoTransformer3DModel",
        "2 0+2x4x6+0, 2 masked",
        heads(2, 8, in_channels=4, out_channels=4, cross_attention_dim=16, caption_channels=16)
        | {"qk_norm": "rms_norm_across_heads"},
        {
            "hidden_states": (B, 48, 4),
            "encoder_hidden_states": (B, 7, 16),
            "timestep": STEP,
            "encoder_attention_mask": torch.ones(B, 7, dtype=torch.bool),
            "num_frames": 2,
            "height": 4,
            "width": 6,
        },
    ),
    case(
        "LTX2VideoTransformer3DModel",
        "2 0+2x4x6+0, 6 cross-attention, 2 grid-unknown, 2 masked",
        heads(2, 8, in_channels=4, out_channels=4, patch_size=1, patch_size_t=1)
        | {"cross_attention_dim": 16, "audio_in_channels": 4, "audio_out_channels": 4}
        | {"audio_num_attention_heads": 2, "audio_attention_head_dim": 4}
        | {"audio_cross_attention_dim": 8, "qk_norm": "rms_norm_across_heads"}
        | {"caption_channels": 16, "rope_double_precision": False},
        {
            "hidden_states": (B, 48, 4),
            "audio_hidden_states": (B, 9, 4),
            "encoder_hidden_states": (B, 7, 16),
            "audio_encoder_hidden_states": (B, 7, 16),
            "timestep": NOW * 1000,
            "encoder_attention_mask": torch.ones(B, 7, dtype=torch.bool),
            "num_frames": 2,
            "height": 4,
            "width": 6,
            "audio_num_frames": 9,
            "fps": 25.0,
        },
    ),
    case(
        "WanTransformer3DModel",
        "2 0+2x4x6+0, 2 cross-attention",
        WAN,
        VIDEO | {"encoder_hidden_states": (B, 7, 16)},
    ),
    case(
        "WanTransformer3DModel i2v",
        "2 0+2x4x6+0, 4 cross-attention",
        WAN | {"image_dim": 16, "added_kv_proj_dim": 24},
        VIDEO | {"encoder_hidden_states": (B, 512, 16), "encoder_hidden_states_image": (B, 5, 16)},
    ),
    case(
        "WanVACETransformer3DModel",
        "3 0+2x4x6+0, 3 cross-attention",
        WAN | {"vace_layers": [0], "vace_in_channels": 12},
        VIDEO | {"encoder_hidden_states": (B, 7, 16), "control_hidden_states": (B, 12, 2, 8, 12)},
    ),
    case(
        "SkyReelsV2Transformer3DModel",
        "2 0+2x4x6+0, 2 cross-attention",
        WAN,
        VIDEO | {"encoder_hidden_states": (B, 7, 16)},
    ),
    case(
        "ChronoEditTransformer3DModel",
        "2 0+2x4x6+0, 2 cross-attention",
        WAN | {"rope_temporal_skip_len": 8},
        VIDEO | {"encoder_hidden_states": (B, 7, 16)},
    ),
    case(
        "AnyFlowTransformer3DModel",
        "2 0+2x4x6+0, 2 cross-attention",
        {k: v for k, v in WAN.items() if k != "qk_norm"}
        | {"gate_value": 0.25, "deltatime_type": "r"},
        {
            "hidden_states": (B, 2, 4, 8, 12),
            "timestep": torch.full((B, 2), 500.0),
            "r_timestep": torch.full((B, 2), 250.0),
            "encoder_hidden_states": (B, 7, 16),
        },
    ),
    case(
        "MochiTransformer3DModel",
        "1 cross-attention, 4 masked",
        heads(2, 8, patch_size=2, pooled_projection_dim=16, in_channels=4, text_embed_dim=16)
        | {"qk_norm": "rms_norm", "time_embed_dim": 4, "max_sequence_length": 16},
        VIDEO
        | {
            "encoder_hidden_states": (B, 7, 16),
            "encoder_attention_mask": torch.ones(B, 7, dtype=torch.bool),
        },
        fixed=True,  # one attention an item
    ),
    case(
        "MotifVideoTransformer3DModel",
        "2 0+2x4x6+7",
        heads(2, 12, 1, in_channels=4, out_channels=4, num_single_layers=1, patch_size=1)
        | {"num_decoder_layers": 0, "mlp_ratio": 4.0, "patch_size_t": 1, "text_embed_dim": 32}
        | {"qk_norm": "rms_norm", "norm_type": "layer_norm", "image_embed_dim": 4}
        | {"rope_axes_dim": (4, 4, 4), "enable_text_cross_attention_dual": False}
        | {"enable_text_cross_attention_single": False},
        {"hidden_states": (B, 4, 2, 4, 6), "timestep": STEP, "encoder_hidden_states": (B, 7, 32)},
    ),
    case(
        "Kandinsky5Transformer3DModel",
        "1 grid-unknown, 1 0+2x4x6+0, 1 cross-attention",
        {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8}
        | {"time_dim": 16, "patch_size": (1, 2, 2), "model_dim": 32, "ff_dim": 32}
        | {"num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 4, 8)},
        {
            "hidden_states": (1, 2, 8, 12, 4),
            "encoder_hidden_states": (1, 7, 16),
            "timestep": torch.tensor([1.0]),
            "pooled_projections": (1, 8),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(6)],
            "text_rope_pos": torch.arange(7),
        },
    ),
    case(
        "PriorTransformer",
        "2 grid-unknown",
        heads(2, 4, embedding_dim=8, num_embeddings=7, additional_embeddings=4),
        {
            "hidden_states": (B, 8),
            "timestep": 2,
            "proj_embedding": (B, 8),
            "encoder_hidden_states": (B, 7, 8),
        },
    ),
    case(
        "TransformerTemporalModel",
        "2 grid-unknown",
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1}
        | {"norm_num_groups": 1},
        {"hidden_states": (6, 4, 8, 12), "num_frames": 3},
    ),
    case(
        "StableAudioDiTModel",
        "2 1+8+0, 2 cross-attention",
        {"sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8}
        | {"num_attention_heads": 2, "num_key_value_attention_heads": 2, "out_channels": 4}
        | {"cross_attention_dim": 16, "time_proj_dim": 8, "global_states_input_dim": 16}
        | {"cross_attention_input_dim": 16},
        {
            "hidden_states": (B, 4, 8),
            "timestep": NOW,
            "encoder_hidden_states": (B, 7, 16),
            "global_hidden_states": (B, 1, 16),
            "rotary_embedding": [torch.randn(9, 4), torch.randn(9, 4)],
        },
    ),
    case(
        "AceStepTransformer1DModel",
        "1 0+4+0, 2 cross-attention, 1 masked",
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "in_channels": 24}
        | {"audio_acoustic_hidden_dim": 8, "patch_size": 2, "sliding_window": 16},
        {
            "hidden_states": (B, 8, 8),
            "timestep": NOW,
            "timestep_r": NOW,
            "encoder_hidden_states": (B, 10, 32),
            "context_latents": (B, 8, 16),
        },
    ),
    case(
        "UNet2DModel",
        "4 0+8x12+0",
        UNET
        | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 4}
        | {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        NOISE,
    ),
    case(
        "UNet2DConditionModel",
        "3 0+16x24+0, 1 0+8x12+0, 4 cross-attention",
        UNET | CROSS2D,
        NOISE | {"encoder_hidden_states": (B, 7, 8)},
    ),
    case(
        "UNet2DConditionModel XL",
        "8 0+8x12+0, 8 cross-attention",
        UNET
        | CROSS2D
        | {"transformer_layers_per_block": (1, 2), "use_linear_projection": True}
        | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
        | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
        NOISE | {"encoder_hidden_states": (B, 7, 8)},
    ),
    case(
        "UNet2DConditionModel added keys",
        "4 cross-attention",
        UNET
        | {"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D")}
        | {"up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D")}
        | {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "cross_attention_dim": 8}
        | {"attention_head_dim": 2},
        NOISE | {"encoder_hidden_states": (B, 7, 8)},
    ),
    case(
        "UNet3DConditionModel",
        "3 0+16x24+0, 10 0+3+0, 1 0+8x12+0, 4 cross-attention",
        UNET
        | {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D")}
        | {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "cross_attention_dim": 8}
        | {"attention_head_dim": 2},
        {
            "sample": (B, 4, 3, 16, 24),
            "timestep": torch.tensor([10]),
            "encoder_hidden_states": (B, 7, 8),
        },
    ),
    case(
        "UNetMotionModel",
        "3 0+16x24+0, 14 0+3+0, 1 0+8x12+0, 4 cross-attention",
        UNET
        | {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion")}
        | {"up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion")}
        | {"cross_attention_dim": 16, "num_attention_heads": 2, "norm_num_groups": 8}
        | {"motion_num_attention_heads": 2},
        {
            "sample": (B, 4, 3, 16, 24),
            "timestep": torch.tensor([10]),
            "encoder_hidden_states": (B * 3, 7, 16),
        },
        fixed=True,  # a prompt a frame
    ),
    case(
        "UNetSpatioTemporalConditionModel",
        "3 0+16x24+0, 4 0+3+0, 1 0+8x12+0, 8 cross-attention",
        {"block_out_channels": (32, 64), "cross_attention_dim": 32, "num_attention_heads": 2}
        | {"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")}
        | {"up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")}
        | {"out_channels": 4, "in_channels": 4, "layers_per_block": 1, "sample_size": 16}
        | {"projection_class_embeddings_input_dim": 96, "addition_time_embed_dim": 32},
        {
            "sample": (B, 3, 4, 16, 24),
            "timestep": torch.tensor([10]),
            "encoder_hidden_states": (B, 1, 32),
            "added_time_ids": torch.tensor([[6, 127, 0.02]] * B),
        },
    ),
    case(
        "StableCascadeUNet",
        "2 cross-attention",
        {"in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8}
        | {"conditioning_dim": 16, "block_out_channels": (16, 32), "clip_seq": 2}
        | {"num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1)}
        | {"up_num_layers_per_block": (1, 1), "down_blocks_repeat_mappers": (1, 1)}
        | {"up_blocks_repeat_mappers": (1, 1), "dropout": (0.1, 0.1), "kernel_size": 3}
        | {
            "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock"),)
            + (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),)
        }
        | {"clip_text_pooled_in_channels": 16, "switch_level": (False,)},
        {"sample": (B, 4, 8, 12), "timestep_ratio": NOW, "clip_text_pooled": (B, 1, 16)},
    ),
    case(
        "UVit2DModel",
        "2 0+8x8+0, 6 cross-attention",
        {"hidden_size": 32, "cond_embed_dim": 16, "micro_cond_encode_dim": 2}
        | {"micro_cond_embed_dim": 10, "encoder_hidden_size": 16, "vocab_size": 32}
        | {"codebook_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
        | {"in_channels": 32, "block_out_channels": 32, "num_res_blocks": 1}
        | {"block_num_heads": 2, "sample_size": 8},
        {
            "input_ids": integers(B, 8, 8),
            "encoder_hidden_states": (B, 7, 16),
            "pooled_text_emb": (B, 16),
            "micro_conds": torch.ones(B, 5),
        },
    ),
    case(
        "AutoencoderKL",
        "2 0+8x12+0",
        {"block_out_channels": (8, 16), "in_channels": 3, "out_channels": 3}
        | {"latent_channels": 4, "norm_num_groups": 4}
        | {"down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D")}
        | {"up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D")},
        {"sample": (B, 3, 16, 24)},
    ),
    case(
        "ControlNetModel",
        "1 0+16x24+0, 1 0+8x12+0, 2 cross-attention",
        {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
        | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 2}
        | {"cross_attention_dim": 8, "conditioning_embedding_out_channels": (4, 8)},
        NOISE | {"encoder_hidden_states": (B, 7, 8), "controlnet_cond": (B, 3, 32, 48)},
    ),
)
