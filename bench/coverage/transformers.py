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
    case("ViTModel", "2 1+4x6+0", VIT, IMAGE),
    case("ViTModel eager", "2 1+4x6+0", {**VIT, "attn_implementation": "eager"}, IMAGE),
    case(
        "ViTModel attentions",
        "2 probabilities-used",
        {**VIT, "attn_implementation": "eager"},
        IMAGE | {"output_attentions": True},
    ),
    case("DeiTModel", "2 2+4x6+0", VIT, IMAGE),
    case("Dinov2Model", "2 1+4x4+0", SQUARE, SMALL),
    case("Dinov2WithRegistersModel", "2 5+4x4+0", {**SQUARE, "num_register_tokens": 4}, SMALL),
    case("DINOv3ViTModel", "2 5+4x6+0", {**SQUARE, "num_register_tokens": 4}, IMAGE),
    case("IJepaModel", "2 0+4x6+0", VIT, IMAGE),
    case("ViTMSNModel", "2 1+4x6+0", VIT, IMAGE),
    case("ViTMAEModel", "2 grid-unknown", SQUARE | {"decoder_num_hidden_layers": 1}, SMALL),
    case(
        "ViTMAEForPreTraining",
        "3 grid-unknown",
        SQUARE
        | {"decoder_num_hidden_layers": 1, "decoder_hidden_size": 32}
        | {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 32},
        SMALL,
    ),
    case("CLIPVisionModel", "2 1+4x4+0", SQUARE, SMALL),
    case("CLIPTextModel", "2 causal", TEXT, WORDS),
    case(
        "CLIPModel",
        "2 1+4x4+0, 2 causal",
        {"text_config": TEXT, "vision_config": SQUARE, "projection_dim": 16},
        SMALL | WORDS,
    ),
    case(
        "SiglipVisionModel",
        "2 0+4x4+0, 1 cross-attention",
        SQUARE,
        SMALL,
    ),
    case(
        "Siglip2VisionModel",
        "2 grid-unknown, 1 masked",
        {**TINY, "num_patches": 16, "patch_size": 8},
        {
            "pixel_values": (1, 16, 192),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]]),
        },
    ),
    case("SiglipTextModel", "2 grid-unknown", TEXT, WORDS),
    case(
        "BeitModel",
        "2 additive-bias",
        {**VIT, "use_relative_position_bias": True},
        IMAGE,
    ),
    case(
        "BeitModel absolute",
        "2 1+4x4+0",
        {**SQUARE, "use_absolute_position_embeddings": True},
        SMALL,
    ),
    case(
        "Data2VecVisionModel",
        "2 additive-bias",
        SQUARE | {"use_relative_position_bias": True},
        SMALL,
    ),
    case("SwinModel", "4 additive-bias", SWIN, SMALL),
    case("Swinv2Model", "4 additive-bias", SWIN, SMALL),
    case("DonutSwinModel", "4 additive-bias", SWIN, SMALL),
    case("MaskFormerSwinModel", "4 additive-bias", SWIN, SMALL),
    case(
        "HieraModel",
        "3 cross-attention, 1 grid-unknown",
        {"image_size": [64, 64], "depths": [1, 1, 1, 1]},
        {"pixel_values": (1, 3, 64, 64)},
    ),
    case(
        "SamVisionModel",
        "2 additive-bias",
        TINY
        | {"image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1]}
        | {"output_channels": 16, "mlp_dim": 32},
        {"pixel_values": (1, 3, 64, 64)},
    ),
    case(
        "SamVisionModel no bias",
        "1 0+8x8+0, 1 0+4x4+0",
        TINY
        | {"image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1]}
        | {"output_channels": 16, "mlp_dim": 32, "use_rel_pos": False},
        {"pixel_values": (1, 3, 64, 64)},
    ),
    case(
        "Sam2VisionModel",
        "1 0+8x8+0, 1 0+4x4+0, 3 0+14x14+0, 1 0+7x7+0, 3 0+16x16+0, 3 cross-attention",
        {},
        {"pixel_values": (1, 3, 256, 256)},
    ),
    case(
        "VitDetModel",
        "1 0+8x8+0, 1 0+4x4+0",
        TINY
        | {"image_size": 64, "patch_size": 8, "window_size": 4, "window_block_indices": [0]}
        | {"pretrain_image_size": 64},
        {"pixel_values": (1, 3, 64, 64)},
    ),
    case("YolosModel", "2 1+4x6+5", {**VIT, "num_detection_tokens": 5}, IMAGE),
    case(
        "VideoMAEModel",
        "2 0+2x4x4+0",
        {**SQUARE, "num_frames": 4},
        {"pixel_values": (1, 4, 3, 32, 32)},
    ),
    case(
        "VivitModel",
        "2 1+2x4x4+0",
        {**SQUARE, "num_frames": 4, "tubelet_size": [2, 8, 8]},
        {"pixel_values": (1, 4, 3, 32, 32)},
    ),
    case(
        "TimesformerModel",
        "2 1+4x4+0, 2 0+3+0",
        {**SQUARE, "num_frames": 3},
        {"pixel_values": (1, 3, 3, 32, 32)},
    ),
    case(
        "VJEPA2Model",
        "2 0+2x4x4+0",
        TINY
        | {"crop_size": 32, "patch_size": 8, "frames_per_clip": 4, "pred_hidden_size": 32}
        | {"pred_num_attention_heads": 2, "pred_num_hidden_layers": 1},
        {"pixel_values_videos": (1, 4, 3, 32, 32), "skip_predictor": True},
    ),
    case(
        "WhisperModel",
        "1 0+20+0, 1 causal, 1 cross-attention",
        DETR
        | {"vocab_size": 64, "num_mel_bins": 8, "max_source_positions": 20}
        | {"max_target_positions": 16, "pad_token_id": 0, "decoder_start_token_id": 1}
        | {"bos_token_id": 1, "eos_token_id": 2},
        {"input_features": (1, 8, 40), "decoder_input_ids": integers(1, 5)},
    ),
    case(
        "WhisperModel no cache",
        "1 0+20+0, 1 causal, 1 cross-attention",
        DETR
        | {"vocab_size": 64, "num_mel_bins": 8, "max_source_positions": 20}
        | {"max_target_positions": 16, "pad_token_id": 0, "decoder_start_token_id": 1}
        | {"bos_token_id": 1, "eos_token_id": 2, "use_cache": False},
        {"input_features": (1, 8, 40), "decoder_input_ids": integers(1, 5)},
    ),
    case("Wav2Vec2Model", "2 0+49+0", AUDIO, WAVE),
    case(
        "Wav2Vec2Model masked",
        "2 0+49+0",
        AUDIO | {"feat_extract_norm": "layer"},
        WAVE | {"attention_mask": torch.ones(1, 800, dtype=torch.long)},
    ),
    case("HubertModel", "2 0+49+0", AUDIO, WAVE),
    case("WavLMModel", "2 additive-bias", AUDIO, WAVE),
    case("UniSpeechSatModel", "2 0+49+0", AUDIO, WAVE),
    case("Data2VecAudioModel", "2 0+49+0", AUDIO | {"conv_pos_kernel_size": 3}, WAVE),
    case(
        "SEWModel",
        "2 0+24+0",
        AUDIO | {"squeeze_factor": 2},
        WAVE,
    ),
    case(
        "Wav2Vec2ConformerModel",
        "2 0+49+0",
        AUDIO | {"position_embeddings_type": "rotary"},
        WAVE,
    ),
    case(
        "Wav2Vec2BertModel",
        "2 additive-bias",
        TINY | {"feature_projection_input_dim": 16},
        {"input_features": (1, 12, 16)},
    ),
    case(
        "ASTModel",
        "2 2+4x6+0",
        TINY
        | {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 24}
        | {"num_mel_bins": 16},
        {"input_values": (1, 24, 16)},
    ),
    case(
        "ClapAudioModel",
        "4 additive-bias",
        {"num_mel_bins": 16, "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4]}
        | {"patch_embeds_hidden_size": 16, "depths": [2, 2], "num_attention_heads": [2, 4]}
        | {"window_size": 4, "hidden_size": 32},
        {"input_features": (1, 1, 256, 16)},
    ),
    case(
        "PerceiverModel",
        "1 cross-attention, 2 grid-unknown",
        {"num_latents": 6, "d_latents": 32, "d_model": 16, "num_blocks": 1}
        | {"num_self_attends_per_block": 2, "num_self_attention_heads": 2}
        | {"num_cross_attention_heads": 2},
        {"inputs": (1, 10, 16)},
    ),
    case(
        "SegformerModel",
        "1 0+2x3+0, 3 cross-attention",
        {
            "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 2, 4],
            "depths": [1, 1, 1, 1],
        },
        {"pixel_values": (1, 3, 64, 96)},
    ),
    case(
        "PvtModel",
        "1 1+2x2+0, 3 cross-attention",
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
        "1 0+2x2+0, 3 cross-attention",
        {
            "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 2, 4],
            "depths": [1, 1, 1, 1],
        },
        {"pixel_values": (1, 3, 64, 64)},
    ),
    case(
        "GLPNModel",
        "1 0+2x2+0, 3 cross-attention",
        {
            "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 2, 4],
            "depths": [1, 1, 1, 1],
        },
        {"pixel_values": (1, 3, 64, 64)},
    ),
    case("DPTModel", "2 1+4x4+0", SQUARE, SMALL),
    case(
        "DPTForDepthEstimation",
        "4 1+4x4+0",
        SQUARE
        | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "fusion_hidden_size": 16}
        | {"neck_hidden_sizes": [8, 8, 16, 16]},
        SMALL,
    ),
    case(
        "CvtModel",
        "6 cross-attention",
        {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
        {"pixel_values": (1, 3, 64, 64)},
    ),
    case(
        "LevitModel",
        "5 additive-bias",
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
        "2 0+8x12+0, 4 0+4x6+0, 3 0+2x3+0",
        {"image_size": 64, "hidden_sizes": [32, 32, 32]},
        {"pixel_values": (1, 3, 128, 192)},
    ),
    case("MobileViTV2Model", "", {"image_size": 64}, {"pixel_values": (1, 3, 64, 96)}),
    case(
        "DetrModel",
        "6 0+2x3+0, 6 grid-unknown, 6 cross-attention",
        {},
        {"pixel_values": (1, 3, 64, 96)},
    ),
    case(
        "ConditionalDetrModel",
        "6 0+2x3+0, 6 grid-unknown, 6 cross-attention",
        {},
        {"pixel_values": (1, 3, 64, 96)},
    ),
    case("DeformableDetrModel", "6 grid-unknown", {}, {"pixel_values": (1, 3, 64, 96)}),
    case("OwlViTVisionModel", "2 1+4x4+0", SQUARE, SMALL),
    case(
        "GroupViTVisionModel",
        "1 0+4x4+8, 2 cross-attention, 2 grid-unknown, 2 probabilities-used",
        SQUARE
        | {"depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0]},
        SMALL,
    ),
    case("CLIPSegVisionModel", "2 1+4x4+0", SQUARE, SMALL),
    case("BlipVisionModel", "2 1+4x4+0", SQUARE, SMALL),
    case("Blip2VisionModel", "2 1+4x4+0", SQUARE, SMALL),
    case("InstructBlipVisionModel", "2 1+4x4+0", SQUARE, SMALL),
    case("AltCLIPVisionModel", "2 1+4x4+0", SQUARE, SMALL),
    case("Aimv2VisionModel", "2 0+4x4+0, 1 cross-attention", SQUARE, SMALL),
    case(
        "InternVLVisionModel",
        "2 1+4x4+0",
        {**SQUARE, "image_size": [32, 32], "patch_size": [8, 8]},
        SMALL,
    ),
    case("PixtralVisionModel", "2 masked", SQUARE, SMALL | {"image_sizes": [(32, 32)]}),
    case(
        "Idefics3VisionTransformer",
        "2 0+4x4+0",
        SQUARE,
        SMALL,
    ),
    case(
        "FlavaImageModel",
        "2 1+4x4+0",
        SQUARE,
        SMALL,
    ),
    case(
        "Qwen2VisionTransformerPretrainedModel",
        "2 masked",
        {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        {"hidden_states": (24, 96), "grid_thw": torch.tensor([[1, 4, 6]])},
        module="qwen2_vl",
        cause="torch.export: sequences split at sizes that depend on data",
    ),
    case(
        "Qwen2_5_VisionTransformerPretrainedModel",
        "3 masked",
        {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4}
        | {"intermediate_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
        {"hidden_states": (24, 96), "grid_thw": torch.tensor([[1, 4, 6]])},
        module="qwen2_5_vl",
        cause="torch.export: sequences split at sizes that depend on data",
    ),
    case(
        "Idefics2VisionTransformer",
        "2 0+4x4+0",
        SQUARE,
        SMALL,
        module="idefics2",
    ),
    case(
        "LlavaModel",
        "2 1+4x4+0, 2 causal",
        {"vision_config": transformers.CLIPVisionConfig(**SQUARE), "image_token_index": 3}
        | {"text_config": transformers.LlamaConfig(**TEXT, use_cache=False)}
        | {"vision_feature_layer": -1},
        {"input_ids": torch.tensor([[5, *[3] * 16, 6, 7]])} | SMALL | {"use_cache": False},
    ),
    case(
        "Mask2FormerModel",
        "4 additive-bias, 1 masked, 1 grid-unknown",
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
        "2 1+4x4+0, 2 causal",
        {"text_config": TEXT, "vision_config": SQUARE, "projection_dim": 16},
        SMALL | WORDS,
    ),
    case(
        "ViltModel",
        "2 masked",
        TEXT | SQUARE | {"max_position_embeddings": 16},
        WORDS | SMALL,
        cause="torch.export: a branch on data",
    ),
    case(
        "ImageGPTModel",
        "2 causal",
        {"vocab_size": 17, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2},
        {"input_ids": integers(1, 16)},
    ),
    case("BertModel", "2 grid-unknown", TEXT, WORDS),
    case("BertModel no mask", "2 grid-unknown", TEXT, {"input_ids": integers(1, 7)}),
    case(
        "T5EncoderModel",
        "2 additive-bias",
        {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2},
        WORDS,
    ),
    case(
        "LlamaModel",
        "2 causal",
        TEXT | {"num_key_value_heads": 1},
        WORDS,
    ),
    case(
        "LlamaModel no cache",
        "2 causal",
        TEXT | {"num_key_value_heads": 1, "use_cache": False},
        WORDS,
    ),
    case(
        "XCLIPVisionModel",
        "2 1+4x4+1, 2 grid-unknown",
        SQUARE | {"num_frames": 3, "mit_hidden_size": 32},
        {"pixel_values": (3, 3, 32, 32)},
    ),
    case(
        "RadioModel",
        "2 10+4x6+0",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.0}
        | {"patch_size": 8, "image_size": 32, "max_img_size": 64},
        IMAGE,
    ),
    case("TextNetModel", "", {}, {"pixel_values": (1, 3, 64, 64)}),
    case("MgpstrModel", "12 1+8x32+0", {}, {"pixel_values": (1, 3, 32, 128)}),
    case(
        "PatchTSTModel",
        "2 grid-unknown",
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
