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
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import t5fx
from t5fx.atomic import replacing

from .train_dit import pixels_of
from .training import (
    accelerator_for,
    add_options,
    check_model,
    config_of,
    count,
    pictures_in,
    positive,
    train,
)

#: The share of captions that are left out, for guidance; and what stands for none.
DROPPED, NO_CAPTION = 0.1, ""
#: What is in a cache; and in one that is not whole.
INDEX, UNFINISHED = "index.json", "unfinished.json"


def main(arguments: Sequence[str] | None = None) -> nn.Module:
    options = parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    accelerator = accelerator_for(options)
    set_seed(options.seed)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
        accelerator.mixed_precision, torch.float32
    )

    check_model(SD3Transformer2DModel, options.model)
    if not (options.cache / INDEX).exists():
        write_cache(options, accelerator, dtype)
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
    captions = [name for name in data.captions if name != NO_CAPTION] or [NO_CAPTION]
    height, width = (side * pipe.vae_scale_factor for side in latents.shape[1:])
    if options.size != height:
        raise t5fx.TrainingError(
            f"--size: expected {height}, the pixels of a side in the cache {options.cache}, got "
            f"{options.size}; another size needs another folder for --cache"
        )

    def draw() -> Tensor:
        """A picture of each of the first captions."""
        found = []
        for name in captions[: options.pictures]:
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
    accelerator.end_training()
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
def write_cache(options: argparse.Namespace, accelerator: Accelerator, dtype: torch.dtype) -> None:
    """Encode every picture, its middle, and every caption once, each process its share.

    The index gets its name last. What a run that was stopped has written stays as it is.
    """
    if options.data is None:
        raise t5fx.TrainingError(
            f"--data: expected the folder of the pictures, since there is no {INDEX} in the cache "
            f"{options.cache}, got none"
        )
    data = pictures_in(options.data, pixels_of(options.size, 3))
    examples, captions = [], {NO_CAPTION: "caption-0.safetensors"}
    for number, (name, _) in enumerate(data.samples):
        path = Path(name)
        text = path.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8").strip() if text.exists() else path.parent.name
        captions.setdefault(caption, f"caption-{len(captions)}.safetensors")
        examples.append((f"latents-{number:08d}.safetensors", caption))
    index = {"examples": examples, "captions": captions}
    made_of = {"model": options.model, "size": options.size, "pictures": data.samples}
    check_unfinished(options.cache, json.dumps(made_of | index), accelerator)

    pipe = StableDiffusion3Pipeline.from_pretrained(options.model, transformer=None)
    pipe.to(accelerator.device, dtype)
    config = pipe.vae.config
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    for number in range(len(data))[mine]:
        path = options.cache / examples[number][0]
        if not path.exists():
            image = data[number][0][None].to(accelerator.device, dtype)
            drawn = torch.Generator().manual_seed(number)
            found = pipe.vae.encode(image).latent_dist.sample(drawn)[0]
            write(path, latents=(found - config.shift_factor) * config.scaling_factor)
    for caption, file in list(captions.items())[mine]:
        path = options.cache / file
        if not path.exists():
            embeds, _, pooled, _ = pipe.encode_prompt(
                caption, caption, caption, do_classifier_free_guidance=False
            )
            write(path, encoder_hidden_states=embeds, pooled_projections=pooled)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with replacing(options.cache / INDEX) as scratch:
            scratch.write_text(json.dumps(index), encoding="utf-8")
        (options.cache / UNFINISHED).unlink()
    accelerator.wait_for_everyone()


def check_unfinished(cache: Path, plan: str, accelerator: Accelerator) -> None:
    """Note what is going to be in a cache, and refuse to mix it with something else."""
    note = cache / UNFINISHED
    if accelerator.is_main_process:
        cache.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            with replacing(note) as scratch:
                scratch.write_text(plan, encoding="utf-8")
    accelerator.wait_for_everyone()
    if note.read_text(encoding="utf-8") != plan:
        raise t5fx.TrainingError(
            f"--cache: expected {cache} to be empty or begun with the same --data, --size and "
            f"--model, got one that was begun with others; delete it, or name another folder"
        )


def write(path: Path, **tensors: Tensor) -> None:
    """A file of tensors, whole or not at all."""
    with replacing(path) as scratch:
        save_file({name: value.contiguous() for name, value in tensors.items()}, scratch)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m t5fx.bench.diffusion.train_sd3")
    made.add_argument("--data", type=Path, help="folders of pictures; not needed with a cache")
    made.add_argument("--cache", type=Path, required=True, help="the folder of encoded pictures")
    pipeline = "stabilityai/stable-diffusion-3.5-medium"
    made.add_argument("--model", default=pipeline, help=f"of diffusers; {pipeline} by default")
    made.add_argument("--size", type=count, default=1024, help="pixels of a picture's side")
    made.add_argument("--config", type=Path, help="a LinearizeConfig as JSON")
    made.add_argument("--distill", type=float, default=1.0, help="weight of the teacher's loss")
    made.add_argument("--lr", type=positive, default=1e-4, help="of the new parameters")
    made.add_argument("--lr-ratio", type=positive, default=10.0, help="to the rate of the old ones")
    made.add_argument("--pictures", type=count, default=4, help="captions to draw")
    made.add_argument("--sampling-steps", type=count, default=28)
    add_options(made, steps=20_000, batch=4, save=1000)
    return made


if __name__ == "__main__":
    main()
