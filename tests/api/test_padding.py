"""Models that pad: converted, an item with padding is what it is without it."""

import diffusers
import pytest
import timm
import torch
from transformers import Siglip2VisionConfig, Siglip2VisionModel

import t5fx
from t5fx.kernels import TTT

close = torch.testing.assert_close
#: Nodes that know of no grid: of images of other sizes in one batch there is none in common.
PLAIN = {"min_tokens": 0, "locality": "none", "neighborhood": 0, "coarse": 0}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def drawn(model):
    """The same model with values that matter everywhere."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval().requires_grad_(False)


def naflex():
    sizes = {"embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 5}
    # Otherwise the table is resized by Python numbers that are read from tensors.
    sizes["pos_embed_use_grid_sample"] = True
    model = timm.create_model("naflexvit_base_patch16_gap", **sizes)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    coord = torch.stack([rows, columns], dim=-1).flatten(0, 1).expand(2, -1, -1).clone()
    coord[1, 8:] = 0  # as timm pads
    valid = torch.arange(16) < torch.tensor([[16], [8]])
    whole = {"x": torch.randn(2, 16, 768), "patch_coord": coord, "patch_valid": valid}
    alone = {name: value[1:, :8] for name, value in whole.items()}
    return model, whole, alone, lambda out: out


def siglip2():
    about = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    about |= {"num_hidden_layers": 2, "num_patches": 16, "patch_size": 8}
    model = Siglip2VisionModel(Siglip2VisionConfig(**about, vision_use_head=False))
    mask = (torch.arange(16) < torch.tensor([[16], [8]])).long()
    shapes = torch.tensor([[4, 4], [2, 4]])
    whole = {"pixel_values": torch.randn(2, 16, 192), "pixel_attention_mask": mask}
    alone = {name: value[1:, :8] for name, value in whole.items()}
    whole["spatial_shapes"], alone["spatial_shapes"] = shapes, shapes[1:]
    return model, whole, alone, lambda out: out.last_hidden_state[:, :8]


def hunyuan_video():
    model = diffusers.HunyuanVideoTransformer3DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1, "patch_size": 1},
        **{"in_channels": 4, "out_channels": 4, "num_single_layers": 1, "num_refiner_layers": 1},
        **{"patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": 16},
        **{"pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)},
    )
    whole = {
        "hidden_states": torch.randn(2, 4, 2, 4, 6),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "pooled_projections": torch.randn(2, 8),
        "encoder_attention_mask": torch.arange(7) < torch.tensor([[7], [4]]),
        "guidance": torch.tensor([1.0, 2.0]),
    }
    alone = {name: value[1:] for name, value in whole.items()}
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        alone[name] = alone[name][:, :4]
    return model, whole, alone, lambda out: out.sample


def chroma():
    model = diffusers.ChromaTransformer2DModel(
        **{"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1},
        **{"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32},
        **{"axes_dims_rope": [4, 4, 8], "approximator_num_channels": 8},
        **{"approximator_hidden_dim": 16, "approximator_layers": 1},
    )
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    whole = {
        "hidden_states": torch.randn(2, 24, 16),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "timestep": torch.tensor([0.5, 0.7]),
        "attention_mask": torch.arange(31) != torch.tensor([[99], [0]]),
    }
    whole["attention_mask"][1, 4:7] = False
    kept = whole["attention_mask"][1, :7]
    alone = {name: value[1:] for name, value in whole.items()}
    alone["encoder_hidden_states"] = alone["encoder_hidden_states"][:, kept]
    alone["attention_mask"] = torch.ones(1, 27, dtype=torch.bool)
    for call in (whole, alone):
        call |= {"img_ids": ids, "txt_ids": torch.zeros(call["encoder_hidden_states"].shape[1], 3)}
    return model, whole, alone, lambda out: out.sample


MODELS = {
    "NaFlex": (naflex, PLAIN, 2),
    "SigLIP2": (siglip2, PLAIN, 2),
    "HunyuanVideo": (hunyuan_video, {"min_tokens": 0, "dynamic": False}, 2),
    "Chroma": (chroma, {"min_tokens": 0, "grid": (4, 6)}, 2),
}


# Chroma's own constructor uses what diffusers has deprecated.
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_an_item_with_padding_is_the_item_without_it(name):
    make, options, sites = MODELS[name]
    model, whole, alone, kept = make()
    model = drawn(model)
    config = t5fx.LinearizeConfig(**options)
    lin = t5fx.linearize(model, (), whole, config=config)
    for node in lin.modules():
        if isinstance(node, TTT):
            drawn(node)
    report = t5fx.report(lin)
    assert len(report.rewritten) == sites and all("hides" in s.detail for s in report.rewritten)
    with torch.no_grad():
        out, short = kept(lin(**whole)), kept(lin(**alone))
        close(out[1:], short, **CLOSE)
        # It is not what the softmax does, and the padding of other items matters to nobody.
        with t5fx.softmax(lin):
            close(kept(lin(**whole)), kept(model(**whole)), **CLOSE)
            close(kept(lin(**whole))[1:], kept(lin(**alone)), **CLOSE)
            assert not torch.allclose(kept(lin(**whole)), out, **CLOSE)
        assert out.isfinite().all()
