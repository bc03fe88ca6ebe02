"""MODEL from timm, transformers and diffusers, small ones with random weights, offline."""

import json

import diffusers
import pytest
import torch
import transformers

from t5fx_command import main


@pytest.fixture
def explain(capsys):
    def run(*arguments):
        code = main(["explain", *arguments, "--json"])
        out, err = capsys.readouterr()
        return (json.loads(out)["report"]["sites"] if code == 0 else code), err

    return run


def test_timm_by_name_at_its_own_size_and_another(explain):
    sites, _ = explain("timm:vit_tiny_patch16_224", "--no-pretrained")
    assert len(sites) == 12 and {site["num_tokens"] for site in sites} == {197}
    sites, _ = explain("timm:vit_tiny_patch16_224", "--no-pretrained", "--size", "64")
    assert {site["num_tokens"] for site in sites} == {17}


def test_timm_names_what_is_near_an_unknown_name(explain):
    code, err = explain("timm:vit_tiny_patch16_242", "--no-pretrained")
    assert code == 1 and "near it: vit_tiny_patch16_224" in err and len(err.splitlines()) == 1


@pytest.fixture
def dinov2(tmp_path):
    """A folder as the hub has it: configuration, weights and the image processor's settings."""
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil().save_pretrained(tmp_path)
    return f"hf:{tmp_path}"


def test_transformers_by_folder_at_its_own_size_and_another(explain, dinov2):
    sites, _ = explain(dinov2)
    assert [site["num_tokens"] for site in sites] == [17, 17]
    sites, _ = explain(dinov2, "--no-pretrained", "--size", "70", "--dtype", "bfloat16")
    assert [site["num_tokens"] for site in sites] == [26, 26]


def test_transformers_see_photographs_as_their_processor_makes_them(dinov2, tmp_path, capsys):
    from PIL import Image

    for index in range(3):
        Image.new("RGB", (80, 60), (40 * index, 90, 200)).save(tmp_path / f"{index}.png")
    given = ["--min-tokens", "0", "--batch", "1", "--align-steps", "1", "--json"]
    out = str(tmp_path / "out")
    assert main(["convert", dinov2, "--data", str(tmp_path), "--out", out, *given]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert stages["original"]["agreement"] == pytest.approx(1, abs=1e-5)


def test_texts_have_tokens_of_the_size_asked_for(explain, tmp_path):
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    sites, _ = explain(f"hf:{tmp_path}", "--size", "24")
    assert [site["num_tokens"] for site in sites] == [24]


@pytest.fixture
def pipeline(tmp_path):
    """A class-conditional pipeline of two components, in a folder."""
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=4, num_attention_heads=2,
        in_channels=4, out_channels=8, num_embeds_ada_norm=10, norm_type="ada_norm_zero",
        norm_elementwise_affine=False, activation_fn="gelu-approximate",
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8)
    scheduler = diffusers.DDIMScheduler()
    diffusers.DiTPipeline(transformer, vae, scheduler).save_pretrained(tmp_path)
    return tmp_path


def test_a_component_is_called_as_its_pipeline_calls_it(explain, pipeline):
    by_name, _ = explain(f"diffusers:{pipeline}:transformer")
    by_folder, _ = explain(f"diffusers:{pipeline / 'transformer'}", "--no-pretrained")
    for sites in (by_name, by_folder):
        assert [site["num_tokens"] for site in sites] == [16, 16]


def test_a_component_alone_or_unknown_is_refused_with_what_to_do(explain, pipeline, tmp_path):
    code, err = explain(f"diffusers:{pipeline}:unet")
    assert code == 1 and "expected one of" in err and "transformer" in err
    code, err = explain(f"diffusers:{pipeline}:scheduler")
    assert code == 1 and "expected a model, got a DDIMScheduler" in err
    alone = tmp_path / "elsewhere" / "alone"
    diffusers.DiTTransformer2DModel.from_pretrained(pipeline / "transformer").save_pretrained(alone)
    code, err = explain(f"diffusers:{alone}")
    assert code == 1 and "file.py:function" in err and "model_index.json" in err


def test_the_device_and_dtype_are_those_asked_for(dinov2):
    import argparse

    from t5fx.cli.arguments import Reference
    from t5fx.cli.models import load

    options = argparse.Namespace(
        model=Reference("hf", dinov2[3:]), size=None, batch=2, pretrained=None, seed=None,
        device="cpu", dtype="bfloat16",
    )  # fmt: skip
    loaded = load(options)
    assert next(loaded.model.parameters()).dtype is torch.bfloat16
    assert loaded.kwargs["pixel_values"].dtype is torch.bfloat16
    assert loaded.kwargs["pixel_values"].shape == (2, 3, 56, 56)
    assert not loaded.model.training
