"""What timm, transformers, diffusers, peft and accelerate do, done to a linearized model."""

import copy

import dits
import pytest
import timm
import torch
from accelerate import cpu_offload
from diffusers import FluxTransformer2DModel, ModelMixin
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from transformers import SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

import t5fx
from t5fx.errors import RefusedCallError

ALL = t5fx.LinearizeConfig(min_tokens=0)


# --- timm ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    options = {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 48, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **options).eval()
    return model, t5fx.linearize(model, (torch.randn(1, 3, 48, 48),), config=ALL)


def test_timm_optimizers_put_the_old_parameters_into_the_same_groups(vit):
    def groups(model):
        names = {id(p): n for n, p in model.named_parameters()}
        made = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.7)
        return {
            names[id(p)]: (group["lr_scale"], group["weight_decay"])
            for group in made.param_groups
            for p in group["params"]
        }

    model, lin = vit
    before, after = groups(model), groups(lin)
    assert len(set(before.values())) > 4
    assert {name: after[name] for name in before} == before
    assert lin.no_weight_decay() == model.no_weight_decay()


def test_timm_features_at_other_sizes(vit):
    model, lin = vit[0], copy.deepcopy(vit[1])
    x = torch.randn(1, 3, 64, 32)
    with t5fx.softmax(lin):
        torch.testing.assert_close(lin.forward_features(x), model.forward_features(x))
    features = lin.forward_features(x)
    torch.testing.assert_close(lin.forward_head(features), lin(x))
    last, between = lin.forward_intermediates(x)
    torch.testing.assert_close(last, features)
    assert [t.shape for t in between] == [(1, 16, 4, 2)] * 2
    assert len(lin.get_intermediate_layers(x, n=2)) == 2
    for block in lin.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(lin.forward_features(x), features)
    lin.reset_classifier(7)
    assert lin(x).shape == (1, 7)


def test_timm_checkpoints_of_two_sizes_in_flight(vit):
    lin = copy.deepcopy(vit[1])
    a, b = torch.randn(1, 3, 32, 64), torch.randn(1, 3, 64, 32)
    gradients = []
    for on in (True, False):
        lin.set_grad_checkpointing(on)
        lin.zero_grad()
        first, second = lin.forward_features(a), lin.forward_features(b)
        (first.pow(2).sum() + second.pow(3).sum()).backward()
        gradients.append({n: p.grad for n, p in lin.named_parameters() if p.grad is not None})
    assert any(".t5." in name for name in gradients[0])
    torch.testing.assert_close(*gradients)


# --- transformers --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("kind", "way"), [("vit", "sdpa"), ("vit", "eager"), ("siglip", "sdpa")])
def test_transformers(kind, way):
    options = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    options |= {"image_size": 24, "patch_size": 8, "intermediate_size": 32}
    makes = {
        "vit": (ViTConfig, ViTModel),
        "siglip": (SiglipVisionConfig, SiglipVisionModel),
    }
    config, make = makes[kind]
    model = make(config(**options, attn_implementation=way)).eval()
    model.gradient_checkpointing_enable()
    x = torch.randn(2, 3, 24, 24)
    seen = []

    def watch(module, args, kwargs, out):
        seen.append((len(args), sorted(kwargs), type(out)))

    model.register_forward_hook(watch, with_kwargs=True)
    expected = model(pixel_values=x, output_hidden_states=True)
    lin = t5fx.linearize(model, (x,), config=ALL)
    out = lin(pixel_values=x)
    assert seen[-1] == (0, ["pixel_values"], type(expected)) and type(out) is type(expected)
    with t5fx.softmax(lin):
        again = lin(x, output_hidden_states=True)
        torch.testing.assert_close(again.hidden_states, expected.hidden_states)
    assert len(lin(x, output_hidden_states=True).hidden_states) == 3
    assert type(lin.get_input_embeddings()) is type(model.get_input_embeddings())
    lin.set_attn_implementation("eager" if way == "sdpa" else "sdpa")
    torch.testing.assert_close(lin(x).last_hidden_state, out.last_hidden_state)
    gradients = []
    lin.train()
    for switch in (lin.gradient_checkpointing_enable, lin.gradient_checkpointing_disable):
        lin.zero_grad()
        switch()
        lin(x).last_hidden_state.pow(3).sum().backward()
        gradients.append({n: p.grad for n, p in lin.named_parameters() if p.grad is not None})
    assert any(".t5." in name for name in gradients[0])
    torch.testing.assert_close(*gradients)


# --- diffusers and accelerate --------------------------------------------------------------------


def dit():
    torch.manual_seed(0)
    return dits.dit()


DIT = {
    "hidden_states": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.tensor([1, 2]),
    "class_labels": torch.tensor([3, 4]),
}


def test_a_pipeline_runs_saves_and_moves_with_a_converted_transformer(tmp_path):
    pipe = dits.pipeline(dit())

    def images(guidance=4.0):
        seed = torch.Generator().manual_seed(0)
        about = {"num_inference_steps": 2, "output_type": "np", "generator": seed}
        return torch.from_numpy(pipe([1], guidance_scale=guidance, **about).images)

    expected = images()
    call = t5fx.example_inputs(pipe.transformer, images)
    pipe.transformer = t5fx.linearize(pipe.transformer, *call, config=ALL)
    assert isinstance(pipe.transformer, ModelMixin)
    with t5fx.softmax(pipe.transformer):
        torch.testing.assert_close(images(), expected)
    linear = images()
    assert images(1.0).shape == linear.shape
    torch.testing.assert_close(images(), linear)
    pipe.to(torch.float32)
    pipe.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == pipe.transformer.state_dict().keys()


def test_flux_with_a_grid_of_its_positions_and_a_cache():
    torch.manual_seed(0)
    options = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
    options |= {"patch_size": 1, "in_channels": 4, "num_single_layers": 1}
    options |= {"joint_attention_dim": 32, "pooled_projection_dim": 32}
    model = FluxTransformer2DModel(**options, axes_dims_rope=[4, 4, 8]).eval()

    def call(height, width, batch=1):
        places = (torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
        return {
            "hidden_states": torch.randn(batch, height * width, 4),
            "encoder_hidden_states": torch.randn(batch, 7, 32),
            "img_ids": torch.cartesian_prod(*places),
            "txt_ids": torch.zeros(7, 3),
            "timestep": torch.full((batch,), 0.5),
            "pooled_projections": torch.randn(batch, 32),
        }

    def grid(img_ids, **_):
        return tuple(int(n) + 1 for n in img_ids[:, 1:].amax(0))

    config = t5fx.LinearizeConfig(min_tokens=0, grid=grid, prefix=7)
    given = call(4, 6)
    with torch.no_grad():
        lin = t5fx.linearize(model, kwargs=given, config=config)
        assert [s.grid for s in t5fx.report(lin).rewritten] == [(4, 6)] * 2
        out = lin(**given).sample
        assert lin(**call(6, 4, 2)).sample.shape == (2, 24, 4)
        torch.testing.assert_close(lin(**given).sample, out)
        lin.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        with lin.cache_context("cond"):
            torch.testing.assert_close(lin(**given, return_dict=False)[0], out)
        lin.disable_cache()
        lin.fuse_qkv_projections()
        torch.testing.assert_close(lin(**given).sample, out)


def test_another_processor_is_captured_anew():
    lin = t5fx.linearize(dit(), kwargs=DIT, config=ALL)
    out = lin(**DIT).sample
    for block in lin.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    torch.testing.assert_close(lin(**DIT).sample, out)


def test_layerwise_cast_and_offloaded_models_are_converted():
    plain = dit()
    cast = copy.deepcopy(plain)
    half, full = torch.bfloat16, torch.float32
    cast.enable_layerwise_casting(storage_dtype=half, compute_dtype=full)
    offloaded = cpu_offload(copy.deepcopy(plain), execution_device=torch.device("cpu"))
    for model in (cast, offloaded):
        with torch.no_grad():
            expected = model(**DIT).sample
            lin = t5fx.linearize(model, kwargs=DIT, config=ALL)
            assert len(t5fx.report(lin).rewritten) == 2
            assert not torch.equal(lin(**DIT).sample, expected)
            with t5fx.softmax(lin):
                torch.testing.assert_close(lin(**DIT).sample, expected)


def test_a_converted_model_is_offloaded_as_it_is():
    """The node's convolutions are brought, too, though nothing convolves with them as modules."""
    lin = t5fx.linearize(dit(), kwargs=DIT, config=ALL)
    with torch.no_grad():
        expected = lin(**DIT).sample
        cpu_offload(lin, execution_device=torch.device("cpu"))
        assert next(lin.parameters()).is_meta
        assert torch.equal(lin(**DIT).sample, expected)


# --- peft ----------------------------------------------------------------------------------------


def test_lora_after_conversion(vit):
    peft = pytest.importorskip("peft")
    lin, x = copy.deepcopy(vit[1]), torch.randn(1, 3, 48, 32)
    out = lin(x)
    config = peft.LoraConfig(r=2, target_modules=["qkv", "proj", "fc1", "fc2"])
    config.exclude_modules = ["patch_embed.proj"]
    wrapped = peft.get_peft_model(lin, config)
    torch.testing.assert_close(wrapped(x), out)
    wrapped(x).sum().backward()
    trained = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 4 and all(g is not None for g in trained.values())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    changed = wrapped(x)
    assert not torch.allclose(changed, out)
    torch.testing.assert_close(wrapped.merge_and_unload()(x), changed, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # those of torchao on import
def test_quantized_weights_after_and_before_conversion(vit):
    torchao = pytest.importorskip("torchao.quantization")
    plain, lin = copy.deepcopy(vit)
    x = torch.randn(1, 3, 48, 32)
    with torch.no_grad():
        out = lin(x)
        torchao.quantize_(lin, torchao.Int8WeightOnlyConfig())
        assert type(lin.blocks[0].attn.qkv.weight).__module__.startswith("torchao.")
        quantized = lin(x)
        assert not torch.equal(quantized, out)
        torch.testing.assert_close(quantized, out, rtol=0.05, atol=0.1)
        torchao.quantize_(plain, torchao.Int8WeightOnlyConfig())
        again = t5fx.linearize(plain, (x,), config=ALL)
        again.load_state_dict(t5fx.adapter(lin).state_dict(), strict=False)
        torch.testing.assert_close(again(x), quantized)


def test_probabilities_of_rewritten_attention_are_refused():
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 24, "patch_size": 8, "intermediate_size": 32}
    config = SiglipVisionConfig(**options, **sizes, attn_implementation="eager")
    x = torch.randn(1, 3, 24, 24)
    lin = t5fx.linearize(SiglipVisionModel(config).eval(), (x,), config=ALL)
    with pytest.raises(RefusedCallError, match="probabilities-used"):
        lin(x, output_attentions=True)
