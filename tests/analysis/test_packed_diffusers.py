"""Transformers of diffusers whose tokens come packed: each call has the grid of its own image."""

import diffusers
import pytest
import torch
from packed import trained
from torch._dynamo.backends.debugging import aot_eager

import t5fx
from t5fx.backend import compile as backend

CONFIG = t5fx.LinearizeConfig(min_tokens=0)
HEADS = {"num_attention_heads": 2, "num_layers": 1}
FLUX = HEADS | {"patch_size": 1, "in_channels": 4, "joint_attention_dim": 32}
FLUX |= {"num_single_layers": 1, "attention_head_dim": 16}


def flux():
    return diffusers.FluxTransformer2DModel(
        **FLUX, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8]
    )


def flux2():
    return diffusers.Flux2Transformer2DModel(
        **FLUX, timestep_guidance_channels=256, axes_dims_rope=[4, 4, 4, 4]
    )


def qwen():
    return diffusers.QwenImageTransformer2DModel(
        **HEADS,
        **{"attention_head_dim": 16, "patch_size": 2, "in_channels": 16, "out_channels": 4},
        **{"joint_attention_dim": 16, "guidance_embeds": False, "axes_dims_rope": (8, 4, 4)},
    )


def ltx():
    return diffusers.LTXVideoTransformer3DModel(
        **HEADS,
        **{"attention_head_dim": 8, "in_channels": 4, "out_channels": 4},
        **{"cross_attention_dim": 16, "caption_channels": 16, "qk_norm": "rms_norm_across_heads"},
    )


def tokens(count, channels):
    return torch.randn(2, count, channels, generator=torch.Generator().manual_seed(count))


def ids(rows, columns, images=1, last=()):
    sides = (torch.arange(n) for n in (images, rows, columns, *last))
    return torch.cartesian_prod(*sides).float()


def flux_call(rows, columns, images=1):
    return {
        "hidden_states": tokens(images * rows * columns, 4),
        "encoder_hidden_states": tokens(7, 32),
        "pooled_projections": torch.ones(2, 32),
        "timestep": torch.full((2,), 0.5),
        "img_ids": ids(rows, columns, images),
        "txt_ids": torch.zeros(7, 3),
        "return_dict": False,
    }


def kontext_call(rows, columns):
    return flux_call(rows, columns, images=2)


def flux2_call(rows, columns):
    call = flux_call(rows, columns)
    del call["pooled_projections"]
    text = torch.cartesian_prod(*map(torch.arange, (1, 1, 1, 7))).float()
    lists = {"img_ids": ids(rows, columns, last=(1,)), "txt_ids": text}
    lists = {name: one.expand(2, -1, -1) for name, one in lists.items()}
    return call | lists | {"guidance": torch.ones(2)}


def qwen_call(rows, columns):
    return {
        "hidden_states": tokens(rows * columns, 16),
        "encoder_hidden_states": tokens(7, 16),
        "timestep": torch.full((2,), 0.5),
        "img_shapes": [(1, rows, columns)] * 2,
        "return_dict": False,
    }


def ltx_call(rows, columns):
    return {
        "hidden_states": tokens(2 * rows * columns, 4),
        "encoder_hidden_states": tokens(7, 16),
        "timestep": torch.full((2,), 7),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.bool),
        **{"num_frames": 2, "height": rows, "width": columns, "return_dict": False},
    }


MODELS = [
    pytest.param(flux, flux_call, (7, (4, 6), 0), 1, id="Flux"),
    pytest.param(flux, kontext_call, (7, (2, 4, 6), 0), 1, id="Kontext", marks=pytest.mark.slow),
    pytest.param(flux2, flux2_call, (7, (4, 6), 0), 1, id="Flux2", marks=pytest.mark.slow),
    pytest.param(qwen, qwen_call, (7, (4, 6), 0), 3, id="QwenImage", marks=pytest.mark.slow),
    pytest.param(ltx, ltx_call, (0, (2, 4, 6), 0), 3, id="LTX", marks=pytest.mark.slow),
]
SIZES = ((4, 6), (6, 4), (3, 5))


@pytest.mark.filterwarnings("ignore::t5fx.errors.UntrainedWarning")
@pytest.mark.parametrize(("make", "call", "layout", "captures"), MODELS)
def test_every_aspect_ratio_has_its_grid(make, call, layout, captures, monkeypatch):
    torch.manual_seed(0)
    model = make().eval()
    report = t5fx.explain(model, (), call(4, 6), config=CONFIG)
    rewritten = [s for s in report.sites if s.reason != "masked"]
    assert {(s.prefix, s.grid, s.suffix) for s in rewritten} == {layout}
    lin = trained(t5fx.linearize(model, (), call(4, 6), config=CONFIG))
    monkeypatch.setattr(backend, "_inductor", lambda options, more: aot_eager)
    with torch.no_grad():
        fresh = {
            size: trained(t5fx.linearize(model, (), call(*size), config=CONFIG))(**call(*size))[0]
            for size in SIZES[1:]
        }
        converted = {size: lin(**call(*size))[0] for size in SIZES}
        for size, wanted in fresh.items():
            torch.testing.assert_close(converted[size], wanted)
        (runtime,) = t5fx.runtime.lookup.runtimes(lin)
        assert len(runtime.kinds) == captures
        model.compile(backend="t5", options={"min_tokens": 0})
        model(**call(4, 6))
        known = dict(lin.named_parameters())
        for name, parameter in t5fx.adapter(model).named_parameters():
            parameter.copy_(known[name])
        for size, wanted in converted.items():
            torch.testing.assert_close(model(**call(*size))[0], wanted, rtol=1e-4, atol=1e-5)
