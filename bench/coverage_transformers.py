"""Vision, video, audio and multimodal models of transformers for the coverage suite."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformers

from .cases import Call, Case, integers, tensors


def case(
    name: str,
    expected: str,
    options: dict[str, Any],
    inputs: dict[str, Any],
    cause: str = "",
    module: str = "",
) -> Case:
    """A class by name (what follows a space is a variant), its options, its inputs by name.

    module: name of the model's folder, for classes that the library does not export.
    """

    def build() -> Call:
        home: Any = transformers
        if module:
            home = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        cls = getattr(home, name.partition(" ")[0])
        return cls(cls.config_class(**options)), (), tensors(inputs)

    return Case("transformers", name, build, expected, cause)


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"intermediate_size": 64}
VIT = {**TINY, "image_size": [32, 48], "patch_size": 8}
SQUARE = {**TINY, "image_size": 32, "patch_size": 8}
IMAGE = {"pixel_values": (1, 3, 32, 48)}
SMALL = {"pixel_values": (1, 3, 32, 32)}
TEXT = {"vocab_size": 64, **TINY, "max_position_embeddings": 32, "projection_dim": 16}
WORDS = {"input_ids": integers(1, 7), "attention_mask": torch.ones(1, 7, dtype=torch.long)}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
SWIN |= {"window_size": 4}
AUDIO = {**TINY, "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4)}
AUDIO |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
AUDIO |= {"num_feat_extract_layers": 2}
WAVE = {"input_values": (1, 800)}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
DETR |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
DETR |= {"num_queries": 5}


def backbone() -> Any:
    """A small ResNet's configuration, for detectors."""
    return transformers.ResNetConfig(**RESNET, out_features=["stage2"])


CASES = (
    case("ViTModel", "", VIT, IMAGE),
    case("ViTModel eager", "", {**VIT, "attn_implementation": "eager"}, IMAGE),
    case(
        "ViTModel attentions",
        "",
        {**VIT, "attn_implementation": "eager"},
        IMAGE | {"output_attentions": True},
    ),
    case("DeiTModel", "", VIT, IMAGE),
    case("Dinov2Model", "", SQUARE, SMALL),
    case("Dinov2WithRegistersModel", "", {**SQUARE, "num_register_tokens": 4}, SMALL),
    case("DINOv3ViTModel", "", {**SQUARE, "num_register_tokens": 4}, IMAGE),
    case("IJepaModel", "", VIT, IMAGE),
    case("ViTMSNModel", "", VIT, IMAGE),
    case("ViTMAEModel", "", SQUARE | {"decoder_num_hidden_layers": 1}, SMALL),
    case(
        "ViTMAEForPreTraining",
        "",
        SQUARE
        | {"decoder_num_hidden_layers": 1, "decoder_hidden_size": 32}
        | {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 32},
        SMALL,
    ),
    case("CLIPVisionModel", "", SQUARE, SMALL),
    case("CLIPTextModel", "", TEXT, WORDS),
    case(
        "CLIPModel",
        "",
        {"text_config": TEXT, "vision_config": SQUARE, "projection_dim": 16},
        SMALL | WORDS,
    ),
    case("SiglipVisionModel", "", SQUARE, SMALL),
    case(
        "Siglip2VisionModel",
        "",
        {**TINY, "num_patches": 16, "patch_size": 8},
        {
            "pixel_values": (1, 16, 192),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]]),
        },
    ),
    case("SiglipTextModel", "", TEXT, WORDS),
    case(
        "BeitModel",
        "",
        {**VIT, "use_relative_position_bias": True},
        IMAGE,
    ),
    case("BeitModel absolute", "", {**SQUARE, "use_absolute_position_embeddings": True}, SMALL),
    case("Data2VecVisionModel", "", SQUARE | {"use_relative_position_bias": True}, SMALL),
    case("SwinModel", "", SWIN, SMALL),
    case("Swinv2Model", "", SWIN, SMALL),
    case("DonutSwinModel", "", SWIN, SMALL),
    case("MaskFormerSwinModel", "", SWIN, SMALL),
    case(
        "HieraModel",
        "",
        {"image_size": [64, 64], "depths": [1, 1, 1, 1]},
        {"pixel_values": (1, 3, 64, 64)},
    ),
    case(
        "SamVisionModel",
        "",
        TINY
        | {"image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1]}
        | {"output_channels": 16, "mlp_dim": 32},
        {"pixel_values": (1, 3, 64, 64)},
    ),
    case(
        "SamVisionModel no bias",
        "",
        TINY
        | {"image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1]}
        | {"output_channels": 16, "mlp_dim": 32, "use_rel_pos": False},
        {"pixel_values": (1, 3, 64, 64)},
    ),
    case(
        "Sam2VisionModel",
        "",
        {},
        {"pixel_values": (1, 3, 256, 256)},
    ),
    case(
        "VitDetModel",
        "",
        TINY
        | {"image_size": 64, "patch_size": 8, "window_size": 4, "window_block_indices": [0]}
        | {"pretrain_image_size": 64},
        {"pixel_values": (1, 3, 64, 64)},
    ),
    case("YolosModel", "", {**VIT, "num_detection_tokens": 5}, IMAGE),
    case("VideoMAEModel", "", {**SQUARE, "num_frames": 4}, {"pixel_values": (1, 4, 3, 32, 32)}),
    case(
        "VivitModel",
        "",
        {**SQUARE, "num_frames": 4, "tubelet_size": [2, 8, 8]},
        {"pixel_values": (1, 4, 3, 32, 32)},
    ),
    case(
        "TimesformerModel",
        "",
        {**SQUARE, "num_frames": 3},
        {"pixel_values": (1, 3, 3, 32, 32)},
    ),
    case(
        "VJEPA2Model",
        "",
        TINY
        | {"crop_size": 32, "patch_size": 8, "frames_per_clip": 4, "pred_hidden_size": 32}
        | {"pred_num_attention_heads": 2, "pred_num_hidden_layers": 1},
        {"pixel_values_videos": (1, 4, 3, 32, 32), "skip_predictor": True},
    ),
    case(
        "WhisperModel",
        "",
        DETR
        | {"vocab_size": 64, "num_mel_bins": 8, "max_source_positions": 20}
        | {"max_target_positions": 16, "pad_token_id": 0, "decoder_start_token_id": 1}
        | {"bos_token_id": 1, "eos_token_id": 2},
        {"input_features": (1, 8, 40), "decoder_input_ids": integers(1, 5)},
    ),
    case(
        "WhisperModel no cache",
        "",
        DETR
        | {"vocab_size": 64, "num_mel_bins": 8, "max_source_positions": 20}
        | {"max_target_positions": 16, "pad_token_id": 0, "decoder_start_token_id": 1}
        | {"bos_token_id": 1, "eos_token_id": 2, "use_cache": False},
        {"input_features": (1, 8, 40), "decoder_input_ids": integers(1, 5)},
    ),
    case("Wav2Vec2Model", "", AUDIO, WAVE),
    case(
        "Wav2Vec2Model masked",
        "",
        AUDIO | {"feat_extract_norm": "layer"},
        WAVE | {"attention_mask": torch.ones(1, 800, dtype=torch.long)},
    ),
    case("HubertModel", "", AUDIO, WAVE),
    case("WavLMModel", "", AUDIO, WAVE),
    case("UniSpeechSatModel", "", AUDIO, WAVE),
    case("Data2VecAudioModel", "", AUDIO | {"conv_pos_kernel_size": 3}, WAVE),
    case("SEWModel", "", AUDIO | {"squeeze_factor": 2}, WAVE),
    case(
        "Wav2Vec2ConformerModel",
        "",
        AUDIO | {"position_embeddings_type": "rotary"},
        WAVE,
    ),
    case(
        "Wav2Vec2BertModel",
        "",
        TINY | {"feature_projection_input_dim": 16},
        {"input_features": (1, 12, 16)},
    ),
    case(
        "ASTModel",
        "",
        TINY
        | {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 24}
        | {"num_mel_bins": 16},
        {"input_values": (1, 24, 16)},
    ),
    case(
        "ClapAudioModel",
        "",
        {"num_mel_bins": 16, "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4]}
        | {"patch_embeds_hidden_size": 16, "depths": [2, 2], "num_attention_heads": [2, 4]}
        | {"window_size": 4, "hidden_size": 32},
        {"input_features": (1, 1, 256, 16)},
    ),
    case(
        "PerceiverModel",
        "",
        {"num_latents": 6, "d_latents": 32, "d_model": 16, "num_blocks": 1}
        | {"num_self_attends_per_block": 2, "num_self_attention_heads": 2}
        | {"num_cross_attention_heads": 2},
        {"inputs": (1, 10, 16)},
    ),
    case(
        "SegformerModel",
        "",
        {
            "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 2, 4],
            "depths": [1, 1, 1, 1],
        },
        {"pixel_values": (1, 3, 64, 96)},
    ),
    case(
        "PvtModel",
        "",
        {
            "image_size": 64,
            "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 2, 4],
            "depths": [1, 1, 1, 1],
        },
        {"pixel_values": (1, 3, 64, 64)},
    ),
    case(
        "PvtV2Model",
        "",
        {
            "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 2, 4],
            "depths": [1, 1, 1, 1],
        },
        {"pixel_values": (1, 3, 64, 64)},
    ),
    case(
        "GLPNModel",
        "",
        {
            "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 2, 4],
            "depths": [1, 1, 1, 1],
        },
        {"pixel_values": (1, 3, 64, 64)},
    ),
    case("DPTModel", "", SQUARE, SMALL),
    case(
        "DPTForDepthEstimation",
        "",
        SQUARE
        | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "fusion_hidden_size": 16}
        | {"neck_hidden_sizes": [8, 8, 16, 16]},
        SMALL,
    ),
    case(
        "CvtModel",
        "",
        {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
        {"pixel_values": (1, 3, 64, 64)},
    ),
    case(
        "LevitModel",
        "",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        {"pixel_values": (1, 3, 64, 64)},
    ),
    case(
        "MobileViTModel",
        "",
        {"image_size": 64, "hidden_sizes": [32, 32, 32]},
        {"pixel_values": (1, 3, 128, 192)},
    ),
    case("MobileViTV2Model", "", {"image_size": 64}, {"pixel_values": (1, 3, 64, 96)}),
    case("DetrModel", "", {}, {"pixel_values": (1, 3, 64, 96)}),
    case("ConditionalDetrModel", "", {}, {"pixel_values": (1, 3, 64, 96)}),
    case("DeformableDetrModel", "", {}, {"pixel_values": (1, 3, 64, 96)}),
    case("OwlViTVisionModel", "", SQUARE, SMALL),
    case(
        "GroupViTVisionModel",
        "",
        SQUARE
        | {"depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0]},
        SMALL,
    ),
    case("CLIPSegVisionModel", "", SQUARE, SMALL),
    case("BlipVisionModel", "", SQUARE, SMALL),
    case("Blip2VisionModel", "", SQUARE, SMALL),
    case("InstructBlipVisionModel", "", SQUARE, SMALL),
    case("AltCLIPVisionModel", "", SQUARE, SMALL),
    case("Aimv2VisionModel", "", SQUARE, SMALL),
    case(
        "InternVLVisionModel", "", {**SQUARE, "image_size": [32, 32], "patch_size": [8, 8]}, SMALL
    ),
    case("PixtralVisionModel", "", SQUARE, SMALL | {"image_sizes": [(32, 32)]}),
    case("Idefics3VisionTransformer", "", SQUARE, SMALL),
    case(
        "FlavaImageModel",
        "",
        SQUARE,
        SMALL,
    ),
    case(
        "Qwen2VisionTransformerPretrainedModel",
        "",
        {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        {"hidden_states": (24, 96), "grid_thw": torch.tensor([[1, 4, 6]])},
        module="qwen2_vl",
    ),
    case(
        "Qwen2_5_VisionTransformerPretrainedModel",
        "",
        {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4}
        | {"intermediate_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
        {"hidden_states": (24, 96), "grid_thw": torch.tensor([[1, 4, 6]])},
        module="qwen2_5_vl",
    ),
    case("Idefics2VisionTransformer", "", SQUARE, SMALL, module="idefics2"),
    case(
        "LlavaModel",
        "",
        {"vision_config": transformers.CLIPVisionConfig(**SQUARE), "image_token_index": 3}
        | {"text_config": transformers.LlamaConfig(**TEXT, use_cache=False)}
        | {"vision_feature_layer": -1},
        {"input_ids": torch.tensor([[5, *[3] * 16, 6, 7]])} | SMALL | {"use_cache": False},
    ),
    case(
        "Mask2FormerModel",
        "",
        {
            "backbone_config": transformers.SwinConfig(
                **SWIN | {"depths": [1, 1, 1, 1]} | {"num_heads": [2, 2, 2, 2]},
                out_features=["stage1", "stage2", "stage3", "stage4"],
            )
        }
        | {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_layers": 1}
        | {
            "decoder_layers": 2,
            "num_attention_heads": 2,
            "num_queries": 5,
            "encoder_feedforward_dim": 32,
        }
        | {"dim_feedforward": 32},
        {"pixel_values": (1, 3, 128, 128)},
    ),
    case(
        "OwlViTModel",
        "",
        {"text_config": TEXT, "vision_config": SQUARE, "projection_dim": 16},
        SMALL | WORDS,
    ),
    case(
        "SamModel",
        "",
        {
            "vision_config": TINY
            | {"image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1]}
            | {"output_channels": 32, "mlp_dim": 32}
        }
        | {"prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 8}}
        | {"mask_decoder_config": {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2}},
        {"pixel_values": (1, 3, 64, 64), "input_points": torch.tensor([[[[8.0, 8.0]]]])},
    ),
    case("ViltModel", "", TEXT | SQUARE | {"max_position_embeddings": 16}, WORDS | SMALL),
    case(
        "ImageGPTModel",
        "",
        {"vocab_size": 17, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2},
        {"input_ids": integers(1, 16)},
    ),
    case("BertModel", "", TEXT, WORDS),
    case("BertModel no mask", "", TEXT, {"input_ids": integers(1, 7)}),
    case(
        "T5EncoderModel",
        "",
        {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2},
        WORDS,
    ),
    case("LlamaModel", "", TEXT | {"num_key_value_heads": 1}, WORDS),
    case("LlamaModel no cache", "", TEXT | {"num_key_value_heads": 1, "use_cache": False}, WORDS),
    case(
        "XCLIPVisionModel",
        "",
        SQUARE | {"num_frames": 3, "mit_hidden_size": 32},
        {"pixel_values": (3, 3, 32, 32)},
    ),
    case("RadioModel", "", {}, SMALL),
    case("TextNetModel", "", {}, {"pixel_values": (1, 3, 64, 64)}),
    case("MgpstrModel", "", {}, {"pixel_values": (1, 3, 32, 128)}),
    case(
        "PatchTSTModel",
        "",
        {
            "num_input_channels": 2,
            "context_length": 32,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 32,
        },
        {"past_values": (1, 32, 2)},
    ),
)
