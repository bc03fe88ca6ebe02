"""What a converted model's own `save_pretrained` writes, and a pipeline's, is loaded again."""

import json

import dits
import pytest
import torch
from diffusers import DiTPipeline
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

import t5fx
from t5fx.checkpoint.description import CONFIG_NAME
from t5fx.errors import CheckpointError

ALL = t5fx.LinearizeConfig(min_tokens=0)

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"image_size": 24, "patch_size": 8, "intermediate_size": 32}


def dit():
    return dits.dit(layers=1)


def pipeline():
    torch.manual_seed(0)
    return dits.pipeline(dit())


def images(pipe):
    seed = torch.Generator().manual_seed(0)
    return torch.from_numpy(
        pipe([1], num_inference_steps=2, output_type="np", generator=seed).images
    )


def changed(lin):
    with torch.no_grad():
        for parameter in lin.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return lin


def test_a_pipeline_is_saved_and_loaded_with_its_nodes(tmp_path):
    pipe = pipeline()
    call = t5fx.example_inputs(pipe.transformer, lambda: images(pipe))
    pipe.transformer = changed(t5fx.linearize(pipe.transformer, *call, config=ALL))
    wanted = images(pipe)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    again = DiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert not t5fx.runtime.lookup.nodes_in(again.transformer)  # the library knows no nodes
    again.transformer = t5fx.from_pretrained(tmp_path, again.transformer, subfolder="transformer")
    assert torch.equal(images(again), wanted)
    # And what was loaded is saved just so.
    again.save_pretrained(tmp_path / "again")
    state = pipe.transformer.state_dict()
    pipe.transformer = torch.compile(pipe.transformer, backend="t5")
    pipe.save_pretrained(tmp_path / "compiled")
    for folder in ("again", "compiled"):
        index = json.loads((tmp_path / folder / "model_index.json").read_text())
        assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
        third = t5fx.from_pretrained(tmp_path / folder / "transformer", dit())
        assert all(torch.equal(t, state[n]) for n, t in third.state_dict().items())


@pytest.mark.parametrize("kind", ["renamed", "plain"])
def test_transformers_saves_under_its_own_names(kind, tmp_path):
    """ViT is saved under the names of transformers' first version, DINOv2 under the model's."""
    make, config = {"renamed": (ViTModel, ViTConfig), "plain": (Dinov2Model, Dinov2Config)}[kind]
    x = torch.randn(1, 3, 24, 24)
    lin = changed(t5fx.linearize(make(config(**SIZES)).eval(), (x,), config=ALL))
    wanted = lin(x).last_hidden_state
    lin.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    for model in (make(config(**SIZES)), make.from_pretrained(tmp_path)):
        again = t5fx.from_pretrained(tmp_path, model.eval())
        assert torch.equal(again(x).last_hidden_state, wanted)
    lin.to(torch.bfloat16)
    for name, parameter in lin.named_parameters():
        if ".t5." in name:
            parameter.data = parameter.data.float()
    lin.save_pretrained(tmp_path)
    again = t5fx.from_pretrained(tmp_path, make(config(**SIZES)).eval())
    state = lin.state_dict()
    assert {n: t.dtype for n, t in again.state_dict().items()} == {
        n: t.dtype for n, t in state.items()
    }
    assert again.config._t5fx == lin.config._t5fx
    deeper = make(config(**SIZES | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"give the model that was saved"):
        t5fx.from_pretrained(tmp_path, deeper)
    lin.save_pretrained(tmp_path / "both")
    t5fx.save_pretrained(lin, tmp_path / "both")
    with pytest.raises(CheckpointError, match=f"expected one checkpoint, .*{CONFIG_NAME}"):
        t5fx.from_pretrained(tmp_path / "both", make(config(**SIZES)))


def test_weights_of_two_saves_in_one_folder_are_told(tmp_path):
    """Neither library removes one file when it writes several, and it would load the older one."""
    x = torch.randn(1, 3, 24, 24)
    lin = t5fx.linearize(Dinov2Model(Dinov2Config(**SIZES)).eval(), (x,), config=ALL)
    lin.save_pretrained(tmp_path)
    lin.save_pretrained(tmp_path, max_shard_size="10KB")
    with pytest.raises(CheckpointError, match=r"of one index, got .*; model.safetensors"):
        t5fx.from_pretrained(tmp_path, Dinov2Model(Dinov2Config(**SIZES)))


def test_a_librarys_folder_without_nodes_is_told(tmp_path):
    dit().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"or a linearized model's own save_pretrained"):
        t5fx.from_pretrained(tmp_path, dit())
