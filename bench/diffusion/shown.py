"""A diffusion transformer from softmax to TTT: `python -m t5fx.bench.diffusion.shown --out FOLDER`.

Trains a small class-conditional DiT of pixels on the images of `t5fx.bench.demos.classify`,
converts it, aligns it without data, fine-tunes it for at most 2 % of the steps that it was trained
for, and measures how far the samples of each are from the test images. Each stage leaves its model
in the folder; the same command again goes on where it was stopped. With `--shipped` the softmax
model is the trained one that comes with the package.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers import DiTTransformer2DModel
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import t5fx
from t5fx.atomic import replacing
from t5fx.errors import T5Error
from t5fx.runtime.lookup import is_linearized

from ..demos import mnist
from ..demos.vit import load_half, load_vit, save_half, shipped
from ..harness.console import step
from ..harness.files import read_rows, write_rows
from ..harness.tables import machine
from .distances import SOFTMAX, Distance, distances_table, draw_samples, features, frechet
from .train_dit import example
from .train_sd3 import along, logit_normal
from .training import accelerator_for, add_options, train

STAGES = ("base", "convert", "align", "finetune", "measure")
#: Pixels of a side, 28 of the image and a margin; 2 by 2 pixels are a token, 256 in all.
SIDE, PATCH = 32, 2
MARGIN = (SIDE - mnist.SIDE) // 2
#: The least share of noise that the loss divides by.
LEAST = 0.05
#: The 256 tokens do not pay, and are enough to show the quality. Without near attention the node is
#: the published one.
CONFIGS = {
    "near attention": t5fx.LinearizeConfig(min_tokens=0),
    "no near attention": t5fx.LinearizeConfig(min_tokens=0, neighborhood=0, coarse=0),
}
REAL, SETTINGS = "training images", "settings.json"
#: Where the trained softmax model of each data set is.
WEIGHTS = Path(__file__).parent / "weights"
KINDS = {"convert": "converted", "align": "aligned", "finetune": "fine-tuned"}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    data = mnist.load(options.data, options.root)
    device = accelerator_for(options).device
    if "base" in options.stages:
        with step(console, "the softmax model"):
            base(options, data)
    for attention in CONFIGS:
        for stage, made in (("convert", convert), ("align", align), ("finetune", finetune)):
            if stage in options.stages:
                with step(console, f"{KINDS[stage]}, {attention}"):
                    made(options, attention, data, device)
    if "measure" in options.stages:
        measure(options, data, device, console)


def base(options: argparse.Namespace, data: mnist.Data) -> None:
    """Train the softmax model from scratch, or take the one that comes with the package."""

    def make(folder: Path) -> nn.Module:
        set_seed(options.seed)
        model = new_dit(options.channels, options.blocks)
        groups = [{"params": list(model.parameters()), "lr": options.lr}]
        learn(options, folder, model, groups, data, options.steps)
        return model

    path = WEIGHTS / f"dit_{data.name}.safetensors"
    if options.shipped:
        model, settings = load_shipped(path)
        _finish(_folder(options.out), settings, lambda _: model)
        return
    names = ("seed", "steps", "batch", "lr", "channels", "blocks", "ema")
    settings = {"data": data.name, **_settings(options, *names)}
    _finish(_folder(options.out), settings, make)
    if options.ship:
        save_half(path, load(options.out), settings)


def load_shipped(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The softmax model that was trained on the data, in float32, and how it was trained.

    Raises:
        T5Error: there is none for these data.
    """
    if not path.exists():
        raise T5Error(f"--shipped: expected trained weights in {path}, got no such file")
    weights, settings = load_half(path)
    model = new_dit(settings["channels"], settings["blocks"])
    model.load_state_dict(weights)
    return model, settings


def convert(options: argparse.Namespace, attention: str, *_: Any) -> None:
    """Softmax attention becomes nodes; nothing is trained."""

    def make(_: Path) -> nn.Module:
        model = load(options.out)
        call = {**example(model), "timestep": torch.zeros(2)}
        return t5fx.linearize(model, (), call, config=CONFIGS[attention])

    settings = {"config": CONFIGS[attention].to_json()}
    _finish(_folder(options.out, "convert", attention), settings, make)


def align(options: argparse.Namespace, attention: str, _: mnist.Data, device: torch.device) -> None:
    """Each node learns the softmax attention that it replaced, on the way of samples from noise."""

    def make(folder: Path) -> nn.Module:
        set_seed(options.seed)
        linear = load(options.out, "convert", attention).to(device)

        def from_noise() -> None:
            noise = torch.randn(options.batch, 1, SIDE, SIDE, device=device)
            labels = torch.randint(mnist.CLASSES, (options.batch,), device=device)
            sample(linear, noise, labels, options.sampling_steps)

        batches = t5fx.trajectory_inputs(linear, from_noise, runs=2)
        hook = t5fx.Align(batches, steps=options.align_steps, checkpoint=folder / "state.pt")
        hook(linear)
        print(hook.result, flush=True)
        return linear

    settings = _settings(options, "seed", "batch", "align_steps", "sampling_steps")
    _finish(_folder(options.out, "align", attention), settings, make)


def finetune(
    options: argparse.Namespace, attention: str, data: mnist.Data, device: torch.device
) -> None:
    """The loss and the data of `base`, for a fiftieth of its steps."""
    steps = max(1, _made_with(_folder(options.out))["steps"] // 50)

    def make(folder: Path) -> nn.Module:
        linear = load(options.out, "align", attention).to(device)
        groups = t5fx.param_groups(linear, options.tune_lr, lr_ratio=2.0)
        learn(options, folder, linear, groups, data, steps)
        return linear

    settings = _settings(options, "seed", "batch", "tune_lr", "ema")
    _finish(_folder(options.out, "finetune", attention), {"steps": steps, **settings}, make)


def learn(
    options: argparse.Namespace,
    out: Path,
    model: nn.Module,
    groups: list[dict[str, Any]],
    data: mnist.Data,
    steps: int,
) -> None:
    """Train in place, with states and pictures in a folder; the model ends as the average."""
    accelerator = accelerator_for(options)
    images = TensorDataset(padded(data.train.images), data.train.labels)
    noise, labels = noise_and_labels(mnist.CLASSES, options.seed)
    noise, labels = noise.to(accelerator.device), labels.to(accelerator.device)

    def draw() -> Tensor:
        return unpadded(sample(model, noise, labels, options.sampling_steps))

    own = argparse.Namespace(**{**vars(options), "out": out, "steps": steps})
    train(accelerator, model, groups, images, loss, draw, own)


def new_dit(channels: int, blocks: int) -> DiTTransformer2DModel:
    """An untrained DiT of grey images [B, 1, 32, 32], heads of 32 channels.

    Its blocks begin as the identity and its output as zero, as in DiT (arXiv 2212.09748).
    """
    model = DiTTransformer2DModel(
        num_attention_heads=channels // 32,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=blocks,
        sample_size=SIDE,
        patch_size=PATCH,
        num_embeds_ada_norm=mnist.CLASSES,
    )
    for layer in (*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of rectified flow, where the model tells the clean image (arXiv 2511.13720)."""
    clean, labels = batch
    share = logit_normal(len(clean), 1.0, clean.device)
    noisy = torch.lerp(clean, torch.randn_like(clean), along(share, clean))
    wrong = model(noisy, timestep=1000 * share, class_labels=labels).sample - clean
    return (wrong / along(share.clamp(min=LEAST), clean)).square().mean()


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Euler's method in equal steps from noise [B, 1, 32, 32] to images, without guidance."""
    x = noise
    for number in range(steps, 0, -1):
        share = torch.full((len(x),), number / steps, device=x.device)
        clean = model(x, timestep=1000 * share, class_labels=labels).sample
        x = torch.lerp(clean, x, (number - 1) / number)
    return x


def padded(images: Tensor) -> Tensor:
    """Images [B, 1, 28, 28] in 0..1 as [B, 1, 32, 32] in -1..1, black around them."""
    return F.pad(images, [MARGIN] * 4) * 2 - 1


def unpadded(images: Tensor) -> Tensor:
    """The inverse of `padded`."""
    return F.pad(images, [-MARGIN] * 4).add(1).div(2).clamp(0, 1)


def noise_and_labels(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same on every device, and as many of each class as can be."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, SIDE, SIDE, generator=generator)
    return noise, torch.arange(count) % mnist.CLASSES


def measure(
    options: argparse.Namespace, data: mnist.Data, device: torch.device, console: Console
) -> None:
    """Distances that the folder does not have yet, the table, and samples of the first noise."""
    if (trained_on := _made_with(_folder(options.out))["data"]) != data.name:
        raise T5Error(f"expected the data of the model, {trained_on!r}, got {data.name!r}")
    path = options.out / "distances.csv"
    rows = read_rows(path, Distance) if path.exists() else []
    classifier = load_vit(shipped(data.name))[0].to(device)
    wanted = features(classifier, data.test.images.to(device))
    shown: dict[str, Tensor] = {}
    chosen: list[Distance] = []

    def add(model: str, attention: str, images: Callable[[int], Tensor]) -> None:
        for seed in range(options.seeds):
            key = (model, attention, seed, options.samples, options.sampling_steps)
            row = next((row for row in rows if row.key == key), None)
            if row is None:
                row = Distance(*key, frechet(features(classifier, images(seed)), wanted))
                rows.append(row)
                write_rows(path, rows, Distance)
            chosen.append(row)

    def real(seed: int) -> Tensor:
        order = torch.randperm(
            len(data.train.labels), generator=torch.Generator().manual_seed(seed)
        )
        return data.train.images[order[: options.samples]].to(device)

    add(REAL, "", real)
    for stage, attention in _models():
        name = KINDS.get(stage, SOFTMAX)
        model = load(options.out, stage, attention).to(device).eval()

        def drawn(seed: int, count: int = options.samples, model: nn.Module = model) -> Tensor:
            every = zip(*(v.split(100) for v in noise_and_labels(count, seed)), strict=True)
            some = [
                sample(model, noise.to(device), labels.to(device), options.sampling_steps)
                for noise, labels in every
            ]
            return unpadded(torch.cat(some))

        with step(console, f"samples of {name} {attention}".rstrip()):
            add(name, attention, drawn)
            shown[f"{name}\n{attention}".rstrip()] = drawn(0, mnist.CLASSES)

    write_rows(options.table.with_suffix(".csv"), chosen, Distance)
    table = distances_table(chosen, _note(options, data))
    table.print(console)
    picture = options.table.with_suffix(".png")
    options.table.write_text(_PAGE.format(picture=picture.name) + table.markdown(), "utf-8")
    draw_samples(picture, shown)


_PAGE = """# Samples of a small DiT

A small DiT was trained on images of digits, converted, aligned without data, and fine-tuned for
2 % of the steps that it was trained for. Each column has one noise and one class, each row a model:

![Rows of digits that the models draw from the same noise]({picture})

`python -m t5fx.bench.diffusion.shown --shipped --out FOLDER` makes the picture and the table from
the softmax model that comes with the package. `--help` lists what else can be chosen.

"""


def _note(options: argparse.Namespace, data: mnist.Data) -> str:
    some = next(iter(CONFIGS))
    base, aligned, tuned = (
        _made_with(_folder(options.out, *stage))
        for stage in (("base",), ("align", some), ("finetune", some))
    )
    return (
        f"{data.source}. A DiT of {base['blocks']} blocks of {base['channels']} channels and "
        f"{(SIDE // PATCH) ** 2} tokens, trained for {base['steps']:,} steps of {base['batch']} "
        f"images from scratch. Aligned: {aligned['align_steps']} steps, without data. Fine-tuned: "
        f"{tuned['steps']} steps of {tuned['batch']} images after it. Distance: of the features "
        f"before the last layer of the classifier that the package ships, {options.samples:,} "
        f"samples against {len(data.test.labels):,} test images, mean and standard deviation of "
        f"{options.seeds} seeds; noise and labels are the same for all models, in "
        f"{options.sampling_steps} steps without guidance. Few samples make every distance larger, "
        f"that of as many training images too. On {machine(torch.get_num_threads())}."
    )


def load(out: Path, stage: str = "base", attention: str = "") -> nn.Module:
    """The model that a stage left in the folder.

    Raises:
        T5Error: the stage has not been run to its end.
    """
    folder = _folder(out, stage, attention) / "model"
    if not folder.exists():
        raise T5Error(f"expected the model of the stage {stage!r} in {folder}, got no such folder")
    model = DiTTransformer2DModel.from_pretrained(_folder(out) / "model")
    return model if stage == "base" else t5fx.from_pretrained(folder, model)


def _models() -> Iterator[tuple[str, str]]:
    """Stages that leave a model, with the attention of its nodes."""
    yield "base", ""
    yield from ((stage, attention) for attention in CONFIGS for stage in KINDS)


def _folder(out: Path, stage: str = "base", attention: str = "") -> Path:
    return out / f"{stage} {attention}".rstrip().replace(" ", "-")


def _settings(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


def _made_with(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    if not path.exists():
        raise T5Error(f"expected {path} from the stage {folder.name!r}, got no such file")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _finish(folder: Path, settings: dict[str, Any], make: Callable[[Path], nn.Module]) -> None:
    """Make a model and save it in the folder, unless it is there, or go on with it.

    Raises:
        T5Error: what is in the folder was made with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / SETTINGS).exists():
        with replacing(folder / SETTINGS) as scratch:
            scratch.write_text(json.dumps(settings, sort_keys=True), encoding="utf-8")
    elif _made_with(folder) != settings:
        raise T5Error(
            f"expected the settings that what is in {folder} was made with, {_made_with(folder)}, "
            f"got {settings}; give these, or another --out"
        )
    if (folder / "model").exists():
        return
    model = make(folder)
    unfinished = folder / "unfinished-model"
    shutil.rmtree(unfinished, ignore_errors=True)
    save = t5fx.save_pretrained if is_linearized(model) else type(model).save_pretrained
    save(model, unfinished)
    unfinished.rename(folder / "model")


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m t5fx.bench.diffusion.shown", description=__doc__)
    made.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    made.add_argument("--data", choices=("fashion", "digits"), help="the first found by default")
    made.add_argument("--root", type=Path, default=mnist.ROOT, help="torchvision's data folder")
    which = made.add_mutually_exclusive_group()
    which.add_argument("--shipped", action="store_true", help="train no softmax model")
    which.add_argument("--ship", action="store_true", help="put the softmax model in the package")
    made.add_argument("--channels", type=int, default=64, help="a multiple of 32")
    made.add_argument("--blocks", type=int, default=6)
    made.add_argument("--lr", type=float, default=1e-3, help="of training from scratch")
    made.add_argument("--align-steps", type=int, default=300)
    made.add_argument("--tune-lr", type=float, default=2e-4, help="of new parameters; old: half")
    made.add_argument("--sampling-steps", type=int, default=10)
    made.add_argument("--samples", type=int, default=1000, help="of each model and seed")
    made.add_argument("--seeds", type=int, default=3, help="how many, of the noise")
    table = Path("docs") / "diffusion-shown.md"
    made.add_argument("--table", type=Path, default=table, help="with a .csv and a .png beside it")
    add_options(made, steps=5_000, batch=16, save=500)
    made.set_defaults(ema=0.999)
    return made


if __name__ == "__main__":
    main()
