"""backend="t5" on models of timm, transformers and diffusers, small and with random weights."""

import pytest
import timm
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from torch._dynamo.backends.debugging import aot_eager
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

import t5fx
from t5fx.backend import compile as backend

ALL = {"min_tokens": 0}

pytestmark = pytest.mark.filterwarnings("ignore::t5fx.errors.UntrainedWarning")


def _deit():
    name, options = "deit_tiny_distilled_patch16_224", {"embed_dim": 32, "num_heads": 2}
    return timm.create_model(name, img_size=48, depth=2, **options), (torch.randn(2, 3, 48, 48),)


def _dinov3():
    options = {"embed_dim": 32, "num_heads": 2, "depth": 2, "img_size": 48}
    return timm.create_model("vit_small_patch16_dinov3", **options), (torch.randn(2, 3, 48, 48),)


def _hf(kind, implementation):
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    options |= {"image_size": 32, "patch_size": 8, "attn_implementation": implementation}
    if kind == "vit":
        return ViTModel(ViTConfig(**options, intermediate_size=64)), (torch.randn(2, 3, 32, 32),)
    return Dinov2Model(Dinov2Config(**options)), (torch.randn(2, 3, 32, 32),)


def _dit():
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8
    )
    return model, (torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 4]))


def _sd3():
    model = SD3Transformer2DModel(
        *(16, 2, 4, 2),
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    )
    call = (torch.randn(2, 4, 8, 12), torch.randn(2, 5, 32), torch.randn(2, 16), torch.arange(2))
    return model, call


MODELS = {
    "deit": _deit,
    "dinov3": _dinov3,
    "vit-eager": lambda: _hf("vit", "eager"),
    "dinov2-sdpa": lambda: _hf("dinov2", "sdpa"),
    "dit": _dit,
    "sd3": _sd3,
}


def _tensor(output):
    if isinstance(output, torch.Tensor):
        return output
    return output["sample"] if "sample" in output else output["last_hidden_state"]


def _results(call, arguments, parameters):
    arguments = (arguments[0].clone().requires_grad_(), *arguments[1:])
    output = _tensor(call(*arguments))
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    inputs = [arguments[0], *parameters]
    grads = torch.autograd.grad((output * weight).sum(), inputs, allow_unused=True)
    return [output.detach(), *grads]


@pytest.mark.parametrize("name", MODELS)
def test_compiled_and_linearized_are_one(name, monkeypatch):
    monkeypatch.setattr(backend, "_inductor", lambda options, more: aot_eager)
    torch.manual_seed(0)
    model, arguments = MODELS[name]()
    model.eval()
    lin = t5fx.linearize(model, arguments, config=t5fx.LinearizeConfig(**ALL))
    fast = torch.compile(model, backend="t5", options=ALL, fullgraph=True)
    assert type(fast(*arguments)) is type(model(*arguments))
    new = t5fx.adapter(model)
    assert new.nodes().keys() == t5fx.adapter(lin).nodes().keys()
    assert len(new.nodes()) == 2
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    lin.load_state_dict(new.state_dict(), strict=False)
    both = {**dict(model.named_parameters()), **dict(new.named_parameters())}
    theirs = dict(lin.named_parameters())
    assert both.keys() == theirs.keys()
    expected = _results(lin, arguments, theirs.values())
    found = _results(fast, arguments, [both[name] for name in theirs])
    for a, b in zip(found, expected, strict=True):
        a, b = (torch.zeros(1) if x is None else x for x in (a, b))  # an unused pooling head's
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp_min(1e-3)


def test_inductor_on_a_real_architecture():
    torch.manual_seed(0)
    options = {"embed_dim": 32, "num_heads": 2, "depth": 2, "dynamic_img_size": True}
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, **options).eval()
    images = torch.randn(1, 3, 56, 56)
    lin = t5fx.linearize(model, (images,), config=t5fx.LinearizeConfig(**ALL))
    fast = torch.compile(model, backend="t5", options=ALL, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), lin(images), atol=1e-4, rtol=1e-4)
