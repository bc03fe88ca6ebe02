"""A class-conditional DiT with TTT nodes, fine-tuned with the numbers of the method's authors.

    accelerate launch -m t5fx.bench.diffusion.train_dit --data imagenet/train --out dit-t5

AdamW at constant rates, 1e-4 for what DiT brings along and 2e-4 for what is new, batch 256, no
weight decay, a moving average of 0.9999, labels dropped as in DiT's own training (arXiv 2605.02772,
arXiv 2212.09748). The same command again goes on from the newest state. `--pixels` trains a DiT of
pixels, which has no autoencoder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from torch import Tensor, nn
from torchvision import transforms

import t5fx

from .training import (
    accelerator_for,
    add_options,
    check_enough,
    check_model,
    config_of,
    count,
    newest_state,
    pictures_in,
    positive,
    train,
)

#: Labels of the pictures, of 1,000; guidance and steps of sampling them.
PICTURES, GUIDANCE, SAMPLING_STEPS = 16, 4.0, 50


def main(arguments: Sequence[str] | None = None) -> nn.Module:
    options = parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    accelerator = accelerator_for(options)
    set_seed(options.seed)

    check_model(DiTTransformer2DModel, options.model)
    model = DiTTransformer2DModel.from_pretrained(options.model, subfolder="transformer")
    model.to(accelerator.device)
    scheduler = DDPMScheduler.from_pretrained(options.model, subfolder="scheduler")
    codec = Codec(None if options.pixels else options.model, accelerator.device)
    channels, side = model.config.in_channels, model.config.sample_size
    data = pictures_in(options.data, pixels_of(side * codec.factor, 3 if codec.vae else channels))
    check_enough(accelerator, data, options)
    known = model.config.num_embeds_ada_norm
    if len(data.classes) > known:
        raise t5fx.TrainingError(
            f"--data: expected a folder for each class, of which the model knows {known}, got "
            f"{len(data.classes)} in {options.data}"
        )

    # The 256 tokens of 256 px do not pay; the method's authors convert them all the same.
    config = config_of(options.config, min_tokens=0)
    linear = t5fx.linearize(model, (), example(model), config=config)
    classes = torch.arange(PICTURES, device=accelerator.device) % known
    del model

    def run(labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(len(labels), channels, side, side, generator=generator)
        return sample(linear, scheduler, noise.to(labels.device), labels, options.sampling_steps)

    def draw() -> Tensor:
        return codec.decode(run(classes, torch.Generator().manual_seed(options.seed)))

    if options.align and not newest_state(options.out):

        def of_any_class() -> Tensor:
            labels = torch.randint(len(data.classes), (options.batch,), device=accelerator.device)
            return run(labels)

        align = t5fx.Align(t5fx.trajectory_inputs(linear, of_any_class), steps=options.align)
        align(linear)
        accelerator.print(align.result)

    objective = DDPMLoss(scheduler, accelerator.device)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        return objective(model, codec.encode(images.flip(3).where(mirrored, images)), labels)

    groups = t5fx.param_groups(linear, options.lr, lr_ratio=options.lr_ratio)
    train(accelerator, linear, groups, data, loss, draw, options)
    if accelerator.is_main_process:
        t5fx.save_pretrained(linear, options.out / "transformer")
    accelerator.end_training()
    return linear


class Codec:
    """Images [B, C, H, W] in -1..1 to what the model is trained on, and back to 0..1.

    folder: of a pipeline with an autoencoder; None is pixels as they are.
    """

    def __init__(self, folder: str | None, device: torch.device) -> None:
        self.vae, self.factor = None, 1
        if folder is not None:
            self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").to(device)
            self.vae.eval().requires_grad_(False)
            self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        if self.vae is None:
            return images
        return self.vae.encode(images).latent_dist.sample() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        if self.vae is not None:
            latents = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return latents.mul(0.5).add(0.5).clamp(0, 1)


class DDPMLoss:
    """The squared error of the noise, and what trains the variance where the model predicts one.

    The variance, an interpolation between the smallest and the largest that make sense, is trained
    by the variational bound of one step, in bits a value, on means that get no gradient from it
    (arXiv 2102.09672). The first step has the second one's posterior variance: its own is zero.
    """

    def __init__(self, scheduler: DDPMScheduler, device: torch.device) -> None:
        self.scheduler = scheduler
        betas = scheduler.betas.double()
        total = torch.cumprod(1 - betas, 0)
        before = torch.cat([total.new_ones(1), total[:-1]])
        variance = betas * (1 - before) / (1 - total)
        variance[0] = variance[1]
        table = {
            "smallest": variance.log(),
            "largest": betas.log(),
            "of_noise": betas / ((1 - total) * (1 - betas)).sqrt(),
        }
        self.table = {name: values.float().to(device) for name, values in table.items()}

    def __call__(self, model: nn.Module, clean: Tensor, labels: Tensor) -> Tensor:
        count = self.scheduler.config.num_train_timesteps
        t = torch.randint(count, (len(clean),), device=clean.device)
        noise = torch.randn_like(clean)
        noisy = self.scheduler.add_noise(clean, noise, t)
        out = model(noisy, timestep=t, class_labels=labels).sample.float()
        predicted = out[:, : clean.shape[1]]
        loss = F.mse_loss(predicted, noise)
        if out.shape[1] > clean.shape[1]:
            loss = loss + self.bound(predicted, out[:, clean.shape[1] :], noise, t)
        return loss

    def bound(self, predicted: Tensor, fraction: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The divergence of the model's step from the true one, both normal, in bits."""
        smallest, largest, of_noise = (
            values[t].view(-1, 1, 1, 1) for values in self.table.values()
        )
        log_variance = torch.lerp(smallest.expand_as(fraction), largest, (fraction + 1) / 2)
        apart = (of_noise * (predicted.detach() - noise)).square()
        spread = smallest - log_variance
        nats = (spread.exp() + apart * (-log_variance).exp() - 1 - spread) / 2
        return nats.mean() / torch.log(torch.tensor(2.0))


@torch.no_grad()
def sample(
    model: nn.Module, scheduler: DDPMScheduler, noise: Tensor, labels: Tensor, steps: int
) -> Tensor:
    """Deterministic sampling (DDIM) with classifier-free guidance, from noise [B, C, S, S]."""
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(steps, device=noise.device)
    # The label after the last one is that of no class.
    both = torch.cat([labels, torch.full_like(labels, model.config.num_embeds_ada_norm)])
    x = noise
    for t in ddim.timesteps:
        out = model(x.repeat(2, 1, 1, 1), timestep=t.expand(len(both)), class_labels=both).sample
        of_class, of_none = out[:, : x.shape[1]].chunk(2)
        x = ddim.step(of_none + GUIDANCE * (of_class - of_none), t, x).prev_sample
    return x


def example(model: DiTTransformer2DModel) -> dict[str, Tensor]:
    """A call of the model, two items of noise."""
    shape, device = (2, model.config.in_channels, *2 * [model.config.sample_size]), model.device
    step = torch.zeros(2, dtype=torch.long, device=device)
    return {
        "hidden_states": torch.zeros(shape, device=device),
        "timestep": step,
        "class_labels": step,
    }


def pixels_of(side: int, channels: int) -> Callable[[Any], Tensor]:
    """The middle of an image, [C, side, side] in -1..1."""
    return transforms.Compose(
        [
            transforms.Resize(side),
            transforms.CenterCrop(side),
            *([transforms.Grayscale()] if channels == 1 else []),
            transforms.ToTensor(),
            transforms.Normalize(0.5, 0.5),
        ]
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m t5fx.bench.diffusion.train_dit")
    made.add_argument("--data", type=Path, required=True, help="a folder of images for each class")
    pipeline = "facebook/DiT-XL-2-256"
    made.add_argument("--model", default=pipeline, help=f"of diffusers; {pipeline} by default")
    made.add_argument("--pixels", action="store_true", help="the model has no autoencoder")
    made.add_argument("--config", type=Path, help="a LinearizeConfig as JSON")
    made.add_argument("--align", type=int, default=200, help="steps without data before; 0: none")
    made.add_argument("--lr", type=positive, default=2e-4, help="of the new parameters")
    made.add_argument("--lr-ratio", type=positive, default=2.0, help="to the rate of the old ones")
    made.add_argument("--sampling-steps", type=count, default=SAMPLING_STEPS)
    add_options(made, steps=400_000, batch=256, save=10_000)
    return made


if __name__ == "__main__":
    main()
