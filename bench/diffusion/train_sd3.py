"""Stable Diffusion 3.5 with TTT nodes, fine-tuned on pictures and on its own softmax.

    accelerate launch --mixed_precision bf16 -m t5fx.bench.diffusion.train_sd3 \
        --data pictures --cache latents --out sd35-t5

The first run encodes the pictures and their captions into the folder of `--cache`: a picture's
caption is the text file beside it, else the name of its folder. Training is rectified flow with
logit-normal times (arXiv 2403.03206), which sees the data, plus distillation from the untouched
model, which is the teacher; captions are dropped now and then. The same command again goes on from
the newest state.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

import t5fx

from .train_dit import pixels_of
from .training import accelerator_for, add_options, config_of, train

#: The share of captions that are left out, for guidance; and what stands for none.
DROPPED, NO_CAPTION = 0.1, ""
INDEX = "index.json"


def main(arguments: Sequence[str] | None = None) -> nn.Module:
    options = parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    accelerator = accelerator_for(options)
    set_seed(options.seed)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
        accelerator.mixed_precision, torch.float32
    )

    with accelerator.main_process_first():
        if not (options.cache / INDEX).exists():
            write_cache(options, accelerator.device, dtype)
    data = Cache(options.cache)

    none = {n: v.to(accelerator.device) for n, v in data.caption(NO_CAPTION).items()}
    latents = data[0][0].to(accelerator.device)

    teacher = SD3Transformer2DModel.from_pretrained(options.model, subfolder="transformer")
    teacher.to(accelerator.device)
    example = {
        "hidden_states": torch.stack([latents] * 2),
        "timestep": torch.zeros(2, device=accelerator.device),
        **{name: torch.cat([value] * 2) for name, value in none.items()},
    }
    linear = t5fx.linearize(teacher, (), example, config=config_of(options.config))
    linear.enable_gradient_checkpointing()
    teacher.to(dtype).requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        options.model, subfolder="scheduler"
    )

    # Without its encoders: what they say is in the cache.
    absent = {
        f"{kind}{n}": None for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")
    }
    pipe = StableDiffusion3Pipeline.from_pretrained(options.model, transformer=linear, **absent)
    pipe.vae.to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    captions = [name for name in data.captions if name != NO_CAPTION][: options.pictures]

    def draw() -> Tensor:
        """A picture of each of the first captions."""
        found = []
        height, width = (side * pipe.vae_scale_factor for side in latents.shape[1:])
        for name in captions:
            said = {n: v.to(accelerator.device) for n, v in data.caption(name).items()}
            found.append(
                pipe(
                    prompt_embeds=said["encoder_hidden_states"],
                    pooled_prompt_embeds=said["pooled_projections"],
                    negative_prompt_embeds=none["encoder_hidden_states"],
                    negative_pooled_prompt_embeds=none["pooled_projections"],
                    height=height,
                    width=width,
                    num_inference_steps=options.sampling_steps,
                    generator=torch.Generator().manual_seed(options.seed),
                    output_type="pt",
                ).images
            )
        return torch.cat(found).float()

    def loss(model: nn.Module, batch: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        clean, said = batch
        sigma = logit_normal(len(clean), scheduler.config.shift, clean.device)
        dropped = torch.rand(len(clean), device=clean.device) < DROPPED
        noise = torch.randn_like(clean)
        inputs = {"hidden_states": torch.lerp(clean, noise, along(sigma, clean))}
        inputs |= {n: none[n].where(along(dropped, v), v) for n, v in said.items()}
        times = sigma * scheduler.config.num_train_timesteps
        flow = model(timestep=times, **inputs).sample.float()
        with torch.no_grad():
            half = {name: value.to(dtype) for name, value in inputs.items()}
            wanted = teacher(timestep=times, **half).sample.float()
        return F.mse_loss(flow, noise - clean) + options.distill * F.mse_loss(flow, wanted)

    groups = t5fx.param_groups(linear, options.lr, lr_ratio=options.lr_ratio)
    train(accelerator, linear, groups, data, loss, draw, options)
    if accelerator.is_main_process:
        t5fx.save_pretrained(linear, options.out / "transformer")
    return linear


def along(values: Tensor, items: Tensor) -> Tensor:
    """A value [B] for each of the items [B, ..], in a shape that broadcasts with them."""
    return values.view(-1, *[1] * (items.dim() - 1))


def logit_normal(count: int, shift: float, device: torch.device) -> Tensor:
    """Shares of noise [count] in 0..1, the sigmoids of normal numbers, shifted towards noise.

    The shift, that of the model's scheduler, is for the number of its latents.
    """
    sigma = torch.randn(count, device=device).sigmoid()
    return shift * sigma / (1 + (shift - 1) * sigma)


class Cache(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Latents [C, H, W] and what the text encoders say of their captions, as `write_cache` left
    them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.examples: list[tuple[str, str]] = index["examples"]
        self.captions: dict[str, str] = index["captions"]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        file, caption = self.examples[index]
        latents = load_file(self.folder / file)["latents"].float()
        return latents, {name: value[0] for name, value in self.caption(caption).items()}

    def caption(self, text: str) -> dict[str, Tensor]:
        """The model's arguments that stand for a caption, each [1, ..]."""
        return {n: v.float() for n, v in load_file(self.folder / self.captions[text]).items()}


@torch.no_grad()
def write_cache(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Encode every picture, its middle, and every caption once; the index comes last."""
    pipe = StableDiffusion3Pipeline.from_pretrained(options.model, transformer=None)
    pipe.to(device, dtype)
    options.cache.mkdir(parents=True, exist_ok=True)
    data = ImageFolder(str(options.data), pixels_of(options.size, 3))
    examples, captions = [], {NO_CAPTION: "caption-0.safetensors"}
    for number, (image, _) in enumerate(data):
        path = Path(data.samples[number][0])
        text = path.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8").strip() if text.exists() else path.parent.name
        captions.setdefault(caption, f"caption-{len(captions)}.safetensors")
        found = pipe.vae.encode(image[None].to(device, dtype)).latent_dist.sample()[0]
        config = pipe.vae.config
        latents = (found - config.shift_factor) * config.scaling_factor
        file = f"latents-{number:08d}.safetensors"
        save_file({"latents": latents.contiguous()}, options.cache / file)
        examples.append((file, caption))
    for caption, file in captions.items():
        embeds, _, pooled, _ = pipe.encode_prompt(
            caption, caption, caption, do_classifier_free_guidance=False
        )
        said = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        save_file({n: v.contiguous() for n, v in said.items()}, options.cache / file)
    index = json.dumps({"examples": examples, "captions": captions})
    (options.cache / INDEX).write_text(index, encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m t5fx.bench.diffusion.train_sd3")
    made.add_argument("--data", type=Path, help="folders of pictures; not needed with a cache")
    made.add_argument("--cache", type=Path, required=True, help="the folder of encoded pictures")
    pipeline = "stabilityai/stable-diffusion-3.5-medium"
    made.add_argument("--model", default=pipeline, help=f"of diffusers; {pipeline} by default")
    made.add_argument("--size", type=int, default=1024, help="pixels of a picture's side")
    made.add_argument("--config", type=Path, help="a LinearizeConfig as JSON")
    made.add_argument("--distill", type=float, default=1.0, help="weight of the teacher's loss")
    made.add_argument("--lr", type=float, default=1e-4, help="of the new parameters")
    made.add_argument("--lr-ratio", type=float, default=10.0, help="to the rate of the old ones")
    made.add_argument("--pictures", type=int, default=4, help="captions to draw")
    made.add_argument("--sampling-steps", type=int, default=28)
    add_options(made, steps=20_000, batch=4, save=1000)
    return made


if __name__ == "__main__":
    main()
