"""timm's models for the coverage suite, and what their attentions are."""

from __future__ import annotations

from typing import Any

import timm
import torch

from .cases import Call, Case


def case(
    name: str,
    expected: str,
    size: tuple[int, int] | int = 64,
    /,
    cause: str = "",
    **options: Any,
) -> Case:
    """A model for one image of `size` pixels; options go to its constructor."""
    height, width = size if isinstance(size, tuple) else (size, size)

    def build() -> Call:
        model = timm.create_model(name, pretrained=False, **options)
        return model, (torch.randn(1, 3, height, width),), {}

    return Case("timm", name, build, expected, cause)


TINY = {"embed_dim": 32, "num_heads": 2, "depth": 2}
WIDE = {"img_size": (64, 96), **TINY}

CASES = (
    case("vit_tiny_patch16_224", "2 1+4x6+0", (64, 96), **WIDE),
    case("deit3_small_patch16_224", "2 1+4x6+0", (64, 96), **WIDE),
    case("deit_tiny_distilled_patch16_224", "2 2+4x6+0", (64, 96), **WIDE),
    case("vit_small_patch14_dinov2", "2 1+4x6+0", (56, 84), **{**WIDE, "img_size": (56, 84)}),
    case("vit_small_patch14_reg4_dinov2", "2 5+4x6+0", (56, 84), **{**WIDE, "img_size": (56, 84)}),
    case("vit_base_patch16_clip_224", "2 1+4x6+0", (64, 96), **WIDE),
    case("vit_base_patch16_siglip_224", "2 0+4x6+0, 1 cross-attention", (64, 96), **WIDE),
    case("vit_so150m_patch16_reg4_map_256", "2 4+4x6+0, 1 cross-attention", (64, 96), **WIDE),
    case("vit_base_patch16_rope_reg1_gap_256", "2 1+4x6+0", (64, 96), **WIDE),
    case("vit_base_patch16_xp_224", "2 1+4x6+0", (64, 96), **WIDE),
    case("vit_base_patch16_rpn_224", "2 0+4x6+0", (64, 96), **WIDE),
    case("vit_medium_patch16_gap_256", "2 0+4x6+0", (64, 96), **WIDE),
    case("vit_small_patch16_36x1_224", "2 1+4x6+0", (64, 96), **WIDE),
    case("vit_small_patch16_18x2_224", "4 1+4x6+0", (64, 96), **WIDE),
    case("vit_base_patch16_plus_240", "2 1+4x6+0", (64, 96), **WIDE),
    case("vit_base_mci_224", "2 1+14x14+0", 224, depth=2),
    case("vit_relpos_small_patch16_224", "2 additive-bias", (64, 96), **WIDE),
    case("vit_srelpos_small_patch16_224", "2 additive-bias", (64, 96), **WIDE),
    case("vit_relpos_base_patch16_clsgap_224", "2 additive-bias", (64, 96), **WIDE),
    case("vit_small_r26_s32_224", "2 1+2x2+0", 64, **TINY, img_size=64),
    case("flexivit_small", "2 1+4x6+0", (64, 96), **WIDE),
    case("eva02_tiny_patch14_224", "2 1+4x6+0", (56, 84), **{**WIDE, "img_size": (56, 84)}),
    case("eva_giant_patch14_224", "2 1+4x6+0", (56, 84), **{**WIDE, "img_size": (56, 84)}),
    case("vit_small_patch16_dinov3", "2 5+4x6+0", (64, 96), **WIDE),
    case("vit_pe_core_tiny_patch16_384", "2 1+4x6+0, 1 cross-attention", (64, 96), **WIDE),
    case("vit_small_patch16_rope_224", "2 1+4x6+0", (64, 96), **WIDE),
    case("vit_small_patch16_rope_mixed_224", "2 1+4x6+0", (64, 96), **WIDE),
    case("beit_base_patch16_224", "2 additive-bias", (64, 96), **WIDE),
    case("beitv2_base_patch16_224", "2 additive-bias", (64, 96), **WIDE),
    case(
        "cait_xxs24_224",
        "2 cross-attention, 2 scores-changed",
        64,
        img_size=64,
        depth=2,
        embed_dim=32,
        num_heads=2,
    ),
    case(
        "xcit_nano_12_p16_224",
        "2 cross-attention, 2 not-attention",
        64,
        img_size=64,
        depth=2,
        embed_dim=32,
        num_heads=2,
    ),
    case("volo_d1_224", "14 0+14x14+0, 2 cross-attention, 4 not-attention", 224),
    case("convit_tiny", "2 1+4x4+0, 10 not-attention, 10 probabilities-used", 64, img_size=64),
    case("levit_128s", "11 additive-bias", 224),
    case("swin_tiny_patch4_window7_224", "12 additive-bias", 64, img_size=64, window_size=4),
    case("swinv2_tiny_window8_256", "12 additive-bias", 64, img_size=64, window_size=4),
    case("swinv2_cr_tiny_224", "12 additive-bias", 64, img_size=64, window_size=4),
    case("maxvit_tiny_rw_224", "22 additive-bias", 224),
    case("maxvit_tiny_tf_224", "22 additive-bias", 224),
    case("coatnet_0_rw_224", "9 additive-bias", 224),
    case("coatnet_rmlp_nano_rw_224", "9 additive-bias", 224),
    case("maxxvit_rmlp_nano_rw_256", "14 additive-bias", 256),
    case(
        "mvitv2_tiny",
        "10 additive-bias",
        64,
    ),
    case(
        "mvitv2_small_cls",
        "16 additive-bias",
        64,
    ),
    case(
        "hiera_tiny_224",
        "1 0+7x7+0, 3 cross-attention, 8 grid-unknown",
        224,
    ),
    case(
        "hieradet_small",
        "5 0+8x8+0, 1 0+4x4+0, 7 0+16x16+0, 3 cross-attention",
        128,
    ),
    case("pvt_v2_b0", "2 0+2x2+0, 6 cross-attention", 64),
    case("pvt_v2_b2_li", "16 cross-attention", 64),
    case("twins_pcpvt_small", "3 0+2x2+0, 13 cross-attention", 64, img_size=64),
    case(
        "twins_svt_small",
        "9 0+7x7+0, 2 0+2x2+0, 7 cross-attention",
        64,
        img_size=64,
    ),
    case(
        "twins_svt_base",
        "13 0+7x7+0, 11 cross-attention",
        224,
    ),
    case(
        "davit_tiny",
        "6 0+7x7+0, 6 not-attention",
        64,
    ),
    case(
        "davit_small",
        "12 0+7x7+0, 12 not-attention",
        224,
    ),
    case("efficientformer_l1", "1 additive-bias", 224),
    case("efficientformerv2_s0", "5 additive-bias", 224),
    case(
        "mobilevit_xxs",
        "2 0+8x8+0, 4 0+4x4+0, 3 0+2x2+0",
        128,
    ),
    case("mobilevitv2_050", "", 64),
    case("edgenext_xx_small", "3 not-attention", 64),
    case("samvit_base_patch16", "2 additive-bias", 128, **TINY, img_size=128),
    case("samvit_base_patch16_224", "2 additive-bias", 64, **TINY, img_size=64),
    case(
        "naflexvit_base_patch16_gap",
        "2 4+4x6+0",
        (64, 96),
        **TINY,
    ),
    case(
        "naflexvit_base_patch16_siglip",
        "2 0+4x6+0, 1 cross-attention",
        (64, 96),
        **TINY,
    ),
    case("tiny_vit_5m_224", "10 additive-bias", 224),
    case("fastvit_sa12", "2 0+2x2+0", 64),
    case("crossvit_tiny_240", "12 1+14x14+0, 3 1+20x20+0, 6 cross-attention", 240),
    case(
        "tnt_s_patch16_224",
        "2 0+4x4+0, 2 1+4x6+0",
        (64, 96),
        img_size=(64, 96),
        depth=2,
    ),
    case("visformer_tiny", "4 0+2x2+0, 4 0+4x4+0", 64, img_size=64),
    case("pit_ti_224", "4 1+2x2+0, 6 1+4x4+0, 2 1+7x7+0", 64, img_size=64),
    case("nest_tiny", "12 0+14x14+0", 224),
    case("gcvit_xxtiny", "12 additive-bias", 224),
    case("coat_tiny", "26 not-attention", 64, img_size=64),
    case("coat_lite_tiny", "8 not-attention", 64, img_size=64),
    case("efficientvit_b0", "", 64),
    case("efficientvit_m0", "24 additive-bias", 224),
    case("mobilenetv4_hybrid_medium", "4 0+2x2+0, 4 cross-attention", 64),
    case("mobilenetv5_base", "7 0+2x2+0, 6 0+4x4+0", 64),
    case("nextvit_small", "1 0+2x2+0, 3 cross-attention", 64),
    case("iformer_t", "2 0+2x2+0, 3 0+4x4+0", 64),
    case("poolformerv2_s12", "", 64),
    case("caformer_s18", "3 0+2x2+0, 9 0+4x4+0", 64),
    case("botnet26t_256", "3 additive-bias", 256),
    case("halonet26t", "3 additive-bias", 256),
    case("lambda_resnet26t", "3 not-attention", 64),
    case("sehalonet33ts", "4 additive-bias", 256),
    case("lamhalobotnet50ts_256", "4 additive-bias, 2 not-attention", 256),
    case("bat_resnext26ts", "", 256),
    case("shvit_s1", "5 0+2x2+0, 4 0+4x4+0", 128),
    case("swiftformer_xs", "", 64),
    case("vitamin_small_224", "14 0+4x4+0", 64, img_size=64),
    case("vitamin_base_224", "14 0+4x4+0", 64, img_size=64),
    case("focalnet_tiny_srf", "", 64),
    case("resnet50_clip", "1 1+2x2+0", 64),
    case("gcresnet33ts", "10 not-attention", 64),
    case("skresnet18", "", 64),
    case("mixer_s16_224", "", 64, img_size=64),
)
