"""Models of timm, transformers and diffusers, small and with random weights."""

import pytest
import timm
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from timm.layers import set_fused_attn
from transformers import Dinov2Backbone, Dinov2Config, Dinov2Model, ViTConfig, ViTModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

import t5fx
from t5fx.frontend.copies import duplicate
from t5fx.kernels import TTT
from t5fx.runtime.lookup import runtimes

ALL = t5fx.LinearizeConfig(min_tokens=0)


def timm_model(name, **options):
    torch.manual_seed(0)
    sizes = {"vit": {"embed_dim": 32, "num_heads": 2}}["vit"]
    return timm.create_model(name, depth=2, dynamic_img_size=True, **sizes, **options).eval()


@pytest.fixture
def fused_switch():
    yield set_fused_attn
    set_fused_attn(True)


@pytest.mark.parametrize(
    ("name", "prefix", "patch"),
    [
        ("vit_tiny_patch16_224", 1, 16),
        ("deit_tiny_distilled_patch16_224", 2, 16),
        ("vit_small_patch14_reg4_dinov2", 5, 14),
    ],
)
def test_timm(name, prefix, patch, fused_switch):
    images = torch.randn(1, 3, 3 * patch, 2 * patch)
    results = []
    for fused in (True, False):
        fused_switch(fused)
        model = timm_model(name, img_size=2 * patch)
        lin = t5fx.linearize(model, (images,), config=ALL)
        for site in t5fx.report(lin).sites:
            assert site.pattern == ("fused" if fused else "spelled")
            assert (site.prefix, site.grid, site.suffix) == (prefix, (3, 2), 0)
        assert [s.fqn for s in t5fx.report(lin).rewritten] == ["blocks.0.attn", "blocks.1.attn"]
        kinds = len(next(runtimes(lin)).kinds)
        results += [lin(images), lin(torch.ones(3, 3, 4 * patch, 5 * patch))]
        assert len(next(runtimes(lin)).kinds) == kinds, "other sizes were judged anew"
        assert lin.state_dict().keys() >= model.state_dict().keys()
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[1], results[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_transformers(kind):
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    options |= {"image_size": 32, "patch_size": 8}
    images = torch.randn(2, 3, 32, 32)
    results = []
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(0)
        if kind == "vit":
            config = ViTConfig(**options, intermediate_size=64, attn_implementation=implementation)
            model = ViTModel(config).eval()
        else:
            model = Dinov2Model(Dinov2Config(**options, attn_implementation=implementation)).eval()
        lin = t5fx.linearize(model, (images,), config=ALL)
        assert [(s.prefix, s.grid) for s in t5fx.report(lin).rewritten] == [(1, (4, 4))] * 2
        out = lin(pixel_values=images)
        assert type(out) is type(model(images)) is BaseModelOutputWithPooling
        assert lin.config is not None
        assert lin.config.hidden_size == 32
        results.append(out.last_hidden_state)
        as_tuple = lin(images, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert torch.equal(as_tuple[0], out.last_hidden_state)
        assert lin.get_input_embeddings() is not model.get_input_embeddings()
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def backbone(**options):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Dinov2Config(**sizes, image_size=8, patch_size=4, **options)
    return Dinov2Backbone(config).eval()


def test_a_model_that_reads_its_own_hidden_states():
    """With a batch of one there are two attempts, and both find all of the layers."""
    model, x = backbone(out_features=["stage2"]), torch.randn(2, 3, 8, 12)
    lin = t5fx.linearize(model, (x[:1],), config=ALL)
    wanted = ["encoder.layer.0.attention", "encoder.layer.1.attention"]
    assert [site.fqn for site in t5fx.report(lin).rewritten] == wanted
    one, two = (lin(images).feature_maps[0] for images in (x[:1], x))
    torch.testing.assert_close(one, two[:1])
    with t5fx.softmax(lin), torch.no_grad():
        torch.testing.assert_close(lin(x).feature_maps, model(x).feature_maps)


def test_a_copy_that_shares_tensors_collects_hidden_states_again():
    """Its hooks are gone, and with them the note that they are there."""
    model, x = backbone(out_features=["stage1", "stage2"]), torch.randn(1, 3, 8, 8)
    expected = model(x).feature_maps
    twin = duplicate(model, share=True)
    assert not any(layer._forward_hooks for layer in twin.encoder.layer)
    assert len(expected) == 2
    torch.testing.assert_close(twin(x).feature_maps, expected)


def test_dit():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([1, 2]),
        "class_labels": torch.tensor([3, 4]),
    }
    lin = t5fx.linearize(model, kwargs=inputs, config=ALL)
    assert [(s.prefix, s.grid, s.suffix) for s in t5fx.report(lin).rewritten] == [
        (0, (4, 4), 0)
    ] * 2
    assert isinstance(lin(**inputs), Transformer2DModelOutput)
    assert lin.config.num_attention_heads == 2
    lin(**inputs).sample.pow(2).sum().backward()
    assert all(p.grad is not None for n, p in lin.named_parameters() if ".t5." in n)


def test_sd3_joint_attention():
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        *(16, 2, 4, 2),
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    ).eval()

    def inputs(batch, height, width, text):
        return {
            "hidden_states": torch.randn(batch, 4, height, width),
            "encoder_hidden_states": torch.randn(batch, text, 32),
            "pooled_projections": torch.randn(batch, 16),
            "timestep": torch.arange(batch),
        }

    call = inputs(2, 8, 12, 5)
    lin = t5fx.linearize(model, kwargs=call, config=ALL)
    assert [(s.prefix, s.grid, s.suffix) for s in t5fx.report(lin).sites] == [(0, (4, 6), 5)] * 2
    out = lin(**call)
    assert isinstance(out, Transformer2DModelOutput)
    as_pipelines_call = lin(**call, return_dict=False, joint_attention_kwargs=None)
    assert torch.equal(as_pipelines_call[0], out.sample)
    assert sum(isinstance(m, TTT) for m in lin.modules()) == 2
    other = inputs(1, 16, 4, 9)
    assert lin(**other).sample.shape == model(**other).sample.shape
    for parameter in (p for n, p in lin.named_parameters() if ".t5." in n):
        assert parameter.requires_grad


def test_what_is_no_self_attention_over_a_grid_is_left(fused_switch):
    """Class attention, talking heads, channel attention, relative bias, shifted windows."""
    expected = {
        "cait_xxs24_224": {"embed_dim": 32, "num_heads": 2, "depth": 2, "depth_token_only": 1},
        "xcit_nano_12_p16_224": {"embed_dim": 32, "num_heads": 2, "depth": 2},
        "beit_base_patch16_224": {"embed_dim": 32, "num_heads": 2, "depth": 2},
    }
    reasons = {}
    for name, options in expected.items():
        model = timm.create_model(name, img_size=32, **options).eval()
        report = t5fx.explain(model, (torch.randn(1, 3, 32, 32),), config=ALL)
        assert report.rewritten == []
        reasons[name] = set(report.counts())
    assert reasons["cait_xxs24_224"] <= {"scores-changed", "probabilities-used", "cross-attention"}
    assert reasons["xcit_nano_12_p16_224"] <= {"not-attention", "cross-attention"}
    assert reasons["beit_base_patch16_224"] == {"additive-bias"}


@pytest.mark.parametrize("batch", [1, 2])
def test_one_image_as_the_example_is_served_at_once(batch):
    """Compiled as one graph, with no call before: timm's code compares the batch with one."""
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval()
    lin = t5fx.linearize(model, (torch.randn(1, 3, 64, 64),), config=ALL)
    fast = torch.compile(lin, backend="eager", fullgraph=True)
    images = torch.randn(batch, 3, 64, 64)
    torch.testing.assert_close(fast(images), lin(images))
