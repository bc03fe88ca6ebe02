"""timm's models for the coverage suite, and what their attentions are."""

from __future__ import annotations

import timm
import torch

from .cases import Call, Case


def case(name: str, expected: str, size: tuple[int, int] | int = 64, /, cause: str = "", **options):
    """A model for one image of `size` pixels; options go to its constructor."""
    height, width = size if isinstance(size, tuple) else (size, size)

    def build() -> Call:
        model = timm.create_model(name, pretrained=False, **options)
        return model, (torch.randn(1, 3, height, width),), {}

    return Case("timm", name, build, expected, cause)


TINY = {"embed_dim": 32, "num_heads": 2, "depth": 2}
WIDE = {"img_size": (64, 96), **TINY}

CASES = (
    case("vit_tiny_patch16_224", "", (64, 96), **WIDE),
    case("deit3_small_patch16_224", "", (64, 96), **WIDE),
    case("deit_tiny_distilled_patch16_224", "", (64, 96), **WIDE),
    case("vit_small_patch14_dinov2", "", (56, 84), **{**WIDE, "img_size": (56, 84)}),
    case("vit_small_patch14_reg4_dinov2", "", (56, 84), **{**WIDE, "img_size": (56, 84)}),
    case("vit_base_patch16_clip_224", "", (64, 96), **WIDE),
    case("vit_base_patch16_siglip_224", "", (64, 96), **WIDE),
    case("vit_so150m_patch16_reg4_map_256", "", (64, 96), **WIDE),
    case("vit_base_patch16_rope_reg1_gap_256", "", (64, 96), **WIDE),
    case("vit_base_patch16_xp_224", "", (64, 96), **WIDE),
    case("vit_base_patch16_rpn_224", "", (64, 96), **WIDE),
    case("vit_medium_patch16_gap_256", "", (64, 96), **WIDE),
    case("vit_small_patch16_36x1_224", "", (64, 96), **WIDE),
    case("vit_small_patch16_18x2_224", "", (64, 96), **WIDE),
    case("vit_base_patch16_plus_240", "", (64, 96), **WIDE),
    case("vit_base_mci_224", "", 224, depth=2),
    case("vit_relpos_small_patch16_224", "", (64, 96), **WIDE),
    case("vit_srelpos_small_patch16_224", "", (64, 96), **WIDE),
    case("vit_relpos_base_patch16_clsgap_224", "", (64, 96), **WIDE),
    case("vit_small_r26_s32_224", "", 64, **TINY, img_size=64),
    case("flexivit_small", "", (64, 96), **WIDE),
    case("eva02_tiny_patch14_224", "", (56, 84), **{**WIDE, "img_size": (56, 84)}),
    case("eva_giant_patch14_224", "", (56, 84), **{**WIDE, "img_size": (56, 84)}),
    case("vit_small_patch16_dinov3", "", (64, 96), **WIDE),
    case("vit_pe_core_tiny_patch16_384", "", (64, 96), **WIDE),
    case("vit_small_patch16_rope_224", "", (64, 96), **WIDE),
    case("vit_small_patch16_rope_mixed_224", "", (64, 96), **WIDE),
    case("beit_base_patch16_224", "", (64, 96), **WIDE),
    case("beitv2_base_patch16_224", "", (64, 96), **WIDE),
    case("cait_xxs24_224", "", 64, img_size=64, depth=2, embed_dim=32, num_heads=2),
    case("xcit_nano_12_p16_224", "", 64, img_size=64, depth=2, embed_dim=32, num_heads=2),
    case("volo_d1_224", "", 224),
    case("convit_tiny", "", 64, img_size=64),
    case("levit_128s", "", 224),
    case("swin_tiny_patch4_window7_224", "", 64, img_size=64, window_size=4),
    case("swinv2_tiny_window8_256", "", 64, img_size=64, window_size=4),
    case("swinv2_cr_tiny_224", "", 64, img_size=64, window_size=4),
    case("maxvit_tiny_rw_224", "", 224),
    case("maxvit_tiny_tf_224", "", 224),
    case("coatnet_0_rw_224", "", 224),
    case("coatnet_rmlp_nano_rw_224", "", 224),
    case("maxxvit_rmlp_nano_rw_256", "", 256),
    case("mvitv2_tiny", "", 64),
    case("mvitv2_small_cls", "", 64),
    case("hiera_tiny_224", "", 224),
    case("hieradet_small", "", 128),
    case("pvt_v2_b0", "", 64),
    case("pvt_v2_b2_li", "", 64),
    case("twins_pcpvt_small", "", 64, img_size=64),
    case("twins_svt_small", "", 64, img_size=64),
    case("twins_svt_base", "", 224),
    case("davit_tiny", "", 64),
    case("davit_small", "", 224),
    case("efficientformer_l1", "", 224),
    case("efficientformerv2_s0", "", 224),
    case("mobilevit_xxs", "", 128),
    case("mobilevitv2_050", "", 64),
    case("edgenext_xx_small", "", 64),
    case("samvit_base_patch16", "", 128, **TINY, img_size=128),
    case("samvit_base_patch16_224", "", 64, **TINY, img_size=64),
    case("naflexvit_base_patch16_gap", "", (64, 96), **TINY),
    case("naflexvit_base_patch16_siglip", "", (64, 96), **TINY),
    case("tiny_vit_5m_224", "", 224),
    case("fastvit_sa12", "", 64),
    case("crossvit_tiny_240", "", 240),
    case("tnt_s_patch16_224", "", (64, 96), img_size=(64, 96), depth=2),
    case("visformer_tiny", "", 64, img_size=64),
    case("pit_ti_224", "", 64, img_size=64),
    case("nest_tiny", "", 224),
    case("gcvit_xxtiny", "", 224),
    case("coat_tiny", "", 64, img_size=64),
    case("coat_lite_tiny", "", 64, img_size=64),
    case("efficientvit_b0", "", 64),
    case("efficientvit_m0", "", 224),
    case("mobilenetv4_hybrid_medium", "", 64),
    case("mobilenetv5_base", "", 64),
    case("nextvit_small", "", 64),
    case("iformer_t", "", 64),
    case("poolformerv2_s12", "", 64),
    case("caformer_s18", "", 64),
    case("botnet26t_256", "", 256),
    case("halonet26t", "", 256),
    case("lambda_resnet26t", "", 64),
    case("sehalonet33ts", "", 256),
    case("lamhalobotnet50ts_256", "", 256),
    case("bat_resnext26ts", "", 256),
    case("shvit_s1", "", 128),
    case("swiftformer_xs", "", 64),
    case("vitamin_small_224", "", 64, img_size=64),
    case("vitamin_base_224", "", 64, img_size=64),
    case("focalnet_tiny_srf", "", 64),
    case("resnet50_clip", "", 64),
    case("gcresnet33ts", "", 64),
    case("skresnet18", "", 64),
    case("mixer_s16_224", "", 64, img_size=64),
)
