"""The recipes train tiny components, and a run that stopped goes on to the same values."""

import argparse
import copy
import csv
import json
import os
import subprocess
import sys

import diffusers
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from dits import dit, pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder

import t5fx
from t5fx.bench.diffusion import train_dit, train_sd3, training
from t5fx.errors import TrainingError
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
        torch.manual_seed(steps)  # of which nothing may depend
        return recipe.main(options_of(tmp_path, out, steps, *more))

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def options_of(tmp_path, out, steps, *more):
    options = ["--model", tmp_path / "pipe", "--config", tmp_path / "config.json", *LOOP]
    return [str(one) for one in (*options, "--out", out, "--steps", steps, *more)]


def losses(folder):
    with (folder / training.LOSSES).open() as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


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
    with (tmp_path / "parts" / training.LOSSES).open("a") as file:
        file.write("3,0.5\n4")
    with pytest.raises(TrainingError, match=r"expected . examples a step .* as before, got 1;"):
        run(recipe, tmp_path / "parts", 4, *more, "--batch", 1, "--accumulate", 1)
    again = run(recipe, tmp_path / "parts", 4, *more).state_dict()
    assert whole.keys() == again.keys() and all(whole[n].equal(again[n]) for n in whole)
    names = {p.name for p in (tmp_path / "parts").iterdir()}
    grids = {"step-0000002.png", "step-0000004.png"}
    assert names == {"state-0000004", "transformer", training.LOSSES} | grids
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert [step for step, _ in losses(tmp_path / "whole")] == [1, 2, 3, 4]
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


def of_pixels(tmp_path):
    model = dit(1)
    pipe = pipeline(model)
    config = {**model.config, "in_channels": 3, "out_channels": 3}
    pipe.register_modules(transformer=type(model).from_config(config))
    pipe.save_pretrained(tmp_path / "pipe")


@pytest.mark.parametrize("space", [pytest.param("latents", marks=pytest.mark.slow), "pixels"])
def test_dit(run, space, tmp_path):
    if space == "pixels":
        of_pixels(tmp_path)
    else:
        pipeline(dit(1)).save_pretrained(tmp_path / "pipe")
    data = ["--data", pictures(tmp_path / "data"), "--lr", 1e-2]
    latents = ["--align", 2, "--accumulate", 2, "--max-grad-norm", 1]
    more = ["--align", 0, "--pixels"] if space == "pixels" else latents
    resumed_equals_uninterrupted(run, train_dit, tmp_path, *data, *more)


@pytest.mark.slow
def test_two_processes_of_accelerate_launch_do_what_one_does(run, tmp_path):
    """Five pictures are two steps of an epoch. One process goes on where the two were stopped."""
    of_pixels(tmp_path)
    more = ["--data", pictures(tmp_path / "data"), "--align", 0, "--pixels", "--lr", 1e-2]
    more += ["--batch", 1, "--sample-every", 2]
    whole = run(train_dit, tmp_path / "whole", 4, *more, "--accumulate", 2)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--main_process_port", "0", "-m"]
    out = tmp_path / "two"
    done = subprocess.run(
        [*launch, train_dit.__name__, *options_of(tmp_path, out, 3, *more)],
        **{"capture_output": True, "text": True},
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    said = "steps 1 to 3; examples a step: 2 = processes 2 x --batch 1 x --accumulate 1"
    assert done.stdout.count(said) == 1
    files = {"state-0000003", "step-0000002.png", "step-0000003.png", "transformer"}
    assert {path.name for path in out.iterdir()} == {*files, training.LOSSES}
    again = run(train_dit, out, 4, *more, "--accumulate", 2)
    (steps, ours), (_, wanted) = (zip(*losses(o), strict=True) for o in (out, tmp_path / "whole"))
    assert steps == (1, 2, 3, 4) and ours == pytest.approx(wanted, rel=1e-4)
    values = again.state_dict()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(values[name], value, rtol=1e-3, atol=1e-4)


def trained(out, steps, loss, **groups):
    """A small layer, trained; a batch of two of six examples is a step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    parser = argparse.ArgumentParser()
    training.add_options(parser, steps=steps, batch=2, save=1)
    options = parser.parse_args(["--out", str(out), "--cpu", "--ema", "0"])
    out.mkdir(exist_ok=True)
    torch.manual_seed(0)
    layer = nn.Linear(2, 1)
    data, picture = TensorDataset(torch.randn(6, 2)), torch.zeros(1, 3, 4, 4)
    accelerator = training.accelerator_for(options)
    groups = [{"params": list(layer.parameters()), **groups}]
    training.train(accelerator, layer, groups, data, loss, lambda: picture, options)
    return [p.detach().clone() for p in layer.parameters()]


def square(layer, batch):
    return (layer(batch[0]) - 1).square().mean()


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_ends_a_run_and_not_its_state(bad, tmp_path):
    wanted = trained(tmp_path / "whole", 3, square, lr=0.1)
    calls = []

    def broken(layer, batch):
        calls.append(batch)
        value = square(layer, batch)
        if len(calls) == 3:
            value = value * torch.nan if bad == "loss" else value + (value - value.item()).sqrt()
        return value

    message = "step 3: expected a finite loss and gradient, .*state-0000002 in .* is from before"
    with pytest.raises(TrainingError, match=message):
        trained(tmp_path / "broken", 3, broken, lr=0.1)
    got = trained(tmp_path / "broken", 3, square, lr=0.1)
    assert all(map(torch.equal, got, wanted))


def test_a_run_that_goes_on_has_the_rate_of_its_own_options(tmp_path):
    before = trained(tmp_path, 2, square, lr=0.1)
    assert all(map(torch.equal, trained(tmp_path, 3, square, lr=0.0), before))
    assert not any(map(torch.equal, trained(tmp_path, 4, square, lr=0.1), before))


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (train_dit, ["--model", "data"], r"--model: .* DiTTransformer2DModel, got data: "),
        (train_sd3, ["--cache", "cache"], r"--model: .* class SD3.*, which has a DiTTransformer2D"),
        (train_dit, ["--data", "nowhere"], "--data: expected a folder of folders, .* got nowhere:"),
        (train_dit, ["--batch", 6], "--data: expected at least 6 examples .* 6 x 1 in .* got 5;"),
    ],
)
def test_what_is_missing_is_said(run, recipe, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_pixels(tmp_path)
    more = ["--data", pictures(tmp_path / "data")]
    more += ["--align", 0, "--pixels"] if recipe is train_dit else []
    with pytest.raises(TrainingError, match=message):
        run(recipe, tmp_path / "out", 1, *more, *options)


def test_processes_that_do_not_see_each_other_write_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(training, "Accelerator", lambda **_: argparse.Namespace(num_processes=1))
    with pytest.raises(TrainingError, match=r"expected .* the 2 processes .* Accelerator of 1: "):
        run(train_dit, tmp_path / "out", 1, "--data", tmp_path)
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "option", ["--steps=0", "--lr=nan", "--ema=1", "--save-every=-1", "--sampling-steps=0"]
)
def test_options_that_make_no_sense_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        train_dit.main(["--data", "data", "--out", "out", option])
    assert f"argument {option.split('=')[0]}: expected" in capsys.readouterr().err


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
    cached = cached_in(tmp_path / "cache")
    latents = load_file(tmp_path / "cache" / index["examples"][0][0])["latents"]
    assert latents.shape == (4, 8, 8)
    # A run that was stopped while it encoded, and the other process's share.
    plan = {"model": str(tmp_path / "pipe"), "size": 16}
    plan["pictures"] = ImageFolder(folder).samples
    for name in ("index.json", index["examples"][3][0], index["captions"]["b"]):
        (tmp_path / "cache" / name).unlink()
    (tmp_path / "cache" / "unfinished.json").write_text(json.dumps(plan | index))
    with pytest.raises(TrainingError, match="begun with the same --data, --size and --model"):
        run(train_sd3, tmp_path / "more", 1, *more, "--size", 32)
    run(train_sd3, tmp_path / "more", 1, *more)
    torch.testing.assert_close(cached_in(tmp_path / "cache"), cached)
    assert json.loads((tmp_path / "cache" / "index.json").read_text()) == index
    assert not (tmp_path / "cache" / "unfinished.json").exists()
    with pytest.raises(TrainingError, match=r"--size: expected 16, .* got 32"):
        run(train_sd3, tmp_path / "more", 1, *more, "--size", 32)


def cached_in(folder):
    return {path.name: load_file(path) for path in folder.glob("*.safetensors")}


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
    run(train_sd3, tmp_path / "out", 1, "--cache", cache, "--distill", 2, "--size", 16)
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
