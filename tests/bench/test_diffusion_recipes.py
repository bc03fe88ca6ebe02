"""The recipes train tiny components, and a run that stopped goes on to the same values."""

import copy
import json

import diffusers
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from dits import dit, pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

import t5fx
from t5fx.bench.diffusion import train_dit, train_sd3
from t5fx.runtime.lookup import nodes_in

pytestmark = pytest.mark.extras

CONFIG = t5fx.LinearizeConfig(min_tokens=0, neighborhood=0, coarse=0, impl="reference")
LOOP = [*("--seed", "3", "--sample-every", "4", "--save-every", "2", "--ema", "0.5", "--cpu")]
LOOP += [*("--batch", "2", "--sampling-steps", "2")]


@pytest.fixture
def run(tmp_path):
    """Runs a recipe as a process of its own would, with what every run has in common."""
    (tmp_path / "config.json").write_text(CONFIG.to_json())

    def run(recipe, out, steps, *more):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = ["--out", out, "--steps", steps, "--model", tmp_path / "pipe", *LOOP, *more]
        options += ["--config", tmp_path / "config.json"]
        torch.manual_seed(steps)  # of which nothing may depend
        return recipe.main([str(one) for one in options])

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def pictures(folder, texts=()):
    """Five pictures in two folders, and captions of some."""
    for number in range(5):
        path = folder / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (20, 18), torch.randint(256, (1080,)).byte().numpy()).save(path)
        if number < len(texts):
            path.with_suffix(".txt").write_text(texts[number])
    return folder


def resumed_equals_uninterrupted(run, recipe, tmp_path, *more):
    """And old parameters as well as new ones were trained."""
    folder = tmp_path / "pipe" / "transformer"
    before = load_file(folder / "diffusion_pytorch_model.safetensors")
    model = run(recipe, tmp_path / "whole", 4, *more)
    whole = model.state_dict()
    run(recipe, tmp_path / "parts", 2, *more)
    assert [p.name for p in (tmp_path / "parts").glob("state-*")] == ["state-0000002"]
    (tmp_path / "parts" / "unfinished").mkdir()  # as a run that was killed leaves it
    again = run(recipe, tmp_path / "parts", 4, *more).state_dict()
    assert whole.keys() == again.keys() and all(whole[n].equal(again[n]) for n in whole)
    names = {p.name for p in (tmp_path / "parts").iterdir()}
    assert names == {"state-0000004", "step-0000002.png", "step-0000004.png", "transformer"}
    unloaded = type(model).from_config(model.config)
    saved = t5fx.from_pretrained(tmp_path / "parts" / "transformer", unloaded).state_dict()
    assert all(whole[name].equal(value) for name, value in saved.items())
    assert {n for n in before if not whole[n].equal(before[n])} >= {
        name for name in before if name.endswith("to_v.weight")
    }
    for node in nodes_in(model).values():
        fresh = copy.deepcopy(node)
        fresh.reset_parameters()
        assert not any(fresh.get_parameter(n).equal(node.get_parameter(n)) for n in ("w1", "w3"))


@pytest.mark.parametrize("space", [pytest.param("latents", marks=pytest.mark.slow), "pixels"])
def test_dit(run, space, tmp_path):
    model = dit(1)
    pipe = pipeline(model)
    if space == "pixels":
        of_pixels = {**model.config, "in_channels": 3, "out_channels": 3}
        pipe.register_modules(transformer=type(model).from_config(of_pixels))
    pipe.save_pretrained(tmp_path / "pipe")
    data = ["--data", pictures(tmp_path / "data"), "--lr", 1e-2]
    latents = ["--align", 2, "--accumulate", 2, "--max-grad-norm", 1]
    more = ["--align", 0, "--pixels"] if space == "pixels" else latents
    resumed_equals_uninterrupted(run, train_dit, tmp_path, *data, *more)


def test_the_bound_is_that_of_the_two_steps():
    """Against the posterior of DDPM, whose mean follows from the clean image."""
    scheduler = diffusers.DDPMScheduler()
    loss = train_dit.DDPMLoss(scheduler, torch.device("cpu"))
    clean, noise, predicted = (torch.randn(4, 2, 3, 3, dtype=torch.float64) for _ in range(3))
    fraction = 2 * torch.rand(4, 2, 3, 3, dtype=torch.float64) - 1
    t = torch.tensor([1, 10, 500, 999])
    beta = scheduler.betas.double()
    total = torch.cumprod(1 - beta, 0)
    now, last, beta = (v.view(4, 1, 1, 1) for v in (total[t], total[t - 1], beta[t]))

    def step(noise_of_it):
        image = (noisy - (1 - now).sqrt() * noise_of_it) / now.sqrt()
        scaled = last.sqrt() * beta * image + (1 - beta).sqrt() * (1 - last) * noisy
        return scaled / (1 - now)

    noisy = now.sqrt() * clean + (1 - now).sqrt() * noise
    small = beta * (1 - last) / (1 - now)
    variance = small * (beta / small) ** ((fraction + 1) / 2)
    true, model = Normal(step(noise), small.sqrt()), Normal(step(predicted), variance.sqrt())
    wanted = kl_divergence(true, model).mean() / torch.log(torch.tensor(2.0))
    got = loss.bound(predicted.float(), fraction.float(), noise.float(), t)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=0, check_dtype=False)


def test_logit_normal_times_are_shifted():
    torch.manual_seed(0)
    sigma = train_sd3.logit_normal(20_000, 3.0, torch.device("cpu"))
    assert sigma.median().item() == pytest.approx(0.75, abs=0.01)
    normal = (sigma / (3 - 2 * sigma)).logit()
    assert normal.mean().item() == pytest.approx(0, abs=0.03)
    assert normal.std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.slow
def test_sd3(run, tmp_path):
    sd3().save_pretrained(tmp_path / "pipe")
    folder = pictures(tmp_path / "data", ["a b", "b"])
    more = ["--data", folder, "--cache", tmp_path / "cache", "--size", 16, "--pictures", 2]
    resumed_equals_uninterrupted(run, train_sd3, tmp_path, *more, "--lr", 1e-2)

    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert [caption for _, caption in index["examples"]] == [
        "a b",
        *["class 0"] * 2,
        "b",
        "class 1",
    ]
    assert list(index["captions"]) == ["", "a b", "class 0", "b", "class 1"]
    latents = load_file(tmp_path / "cache" / index["examples"][0][0])["latents"]
    assert latents.shape == (4, 8, 8)


def test_sd3_learns_the_flow_and_the_teachers_answer(run, tmp_path, monkeypatch):
    """The loss of one batch, worked out from the cache and the two models."""
    sd3().save_pretrained(tmp_path / "pipe")
    cache = tmp_path / "cache"
    cache.mkdir()
    said = {
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 16),
    }
    save_file(said, cache / "caption.safetensors")
    save_file({"latents": torch.randn(4, 8, 8)}, cache / "latents.safetensors")
    index = {"examples": [["latents.safetensors", ""]] * 2, "captions": {"": "caption.safetensors"}}
    (cache / "index.json").write_text(json.dumps(index))
    seen = {}

    def train(accelerator, model, groups, data, loss, draw, options):
        torch.manual_seed(0)
        latents = torch.stack([data[0][0], data[1][0]])
        captions = {n: v.expand(2, *v.shape[1:]) for n, v in said.items()}
        torch.manual_seed(1)
        seen["loss"] = loss(model, (latents, captions)).item()
        torch.manual_seed(1)
        sigma = train_sd3.logit_normal(2, 3.0, latents.device)
        torch.rand(2)  # which captions are left out: all of them say nothing
        noise = torch.randn(2, 4, 8, 8)
        share = sigma.view(2, 1, 1, 1)
        call = {"hidden_states": (1 - share) * latents + share * noise, "timestep": 1000 * sigma}
        flow = model(**call, **captions).sample
        with t5fx.softmax(model):
            wanted = model(**call, **captions).sample
        seen["wanted"] = F.mse_loss(flow, noise - latents) + 2 * F.mse_loss(flow, wanted)
        seen["apart"] = F.mse_loss(flow, wanted).item()

    monkeypatch.setattr(train_sd3, "train", train)
    run(train_sd3, tmp_path / "out", 1, "--cache", cache, "--distill", 2)
    assert seen["apart"] > 1e-6 and seen["loss"] == pytest.approx(seen["wanted"].item(), rel=1e-4)


def sd3():
    """A pipeline whose three text encoders know the letters a and b."""
    import transformers

    letters = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={letter: n for n, letter in enumerate(letters)}, merges=[], model_max_length=8
    )
    config = transformers.CLIPTextConfig(
        vocab_size=6,
        hidden_size=8,
        intermediate_size=8,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    encoders = [transformers.CLIPTextModelWithProjection(config).eval() for _ in range(2)]
    pieces = [(piece, -1.0) for piece in ("<pad>", "</s>", "<unk>", "▁", "a", "b")]
    t5 = transformers.T5Config(vocab_size=6, d_model=32, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    transformer = diffusers.SD3Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=16,
        pooled_projection_dim=16,
        qk_norm="rms_norm",
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=transformers.T5EncoderModel(t5).eval(),
        tokenizer_3=transformers.T5TokenizerFast(vocab=pieces, extra_ids=0),
    )
