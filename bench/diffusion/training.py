"""The loop that the recipes have in common: accelerate, a moving average, pictures, states."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import save_image

import t5fx


def add_options(parser: argparse.ArgumentParser, steps: int, batch: int, save: int) -> None:
    """The options that `train` reads."""
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--steps", type=int, default=steps, help="of the optimizer")
    parser.add_argument("--batch", type=int, default=batch, help="of one process and backward pass")
    parser.add_argument("--accumulate", type=int, default=1, help="backward passes for a step")
    parser.add_argument("--ema", type=float, default=0.9999, help="decay of the moving average")
    parser.add_argument("--max-grad-norm", type=float, help="clip gradients; not done by default")
    parser.add_argument("--workers", type=int, default=0, help="processes that load the data")
    parser.add_argument("--save-every", type=int, default=save, metavar="STEPS")
    parser.add_argument("--sample-every", type=int, default=save, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")


def config_of(path: Path | None, **defaults: Any) -> t5fx.LinearizeConfig:
    """The configuration in a JSON file, or one of the defaults."""
    if path is None:
        return t5fx.LinearizeConfig(**defaults)
    return t5fx.LinearizeConfig.from_json(path.read_text(encoding="utf-8"))


def accelerator_for(options: argparse.Namespace) -> Accelerator:
    """One whose batches come in an order that the seed and the epoch decide."""
    return Accelerator(
        cpu=options.cpu,
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=options.seed
        ),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=options.accumulate, sync_with_dataloader=False
        ),
    )


class Progress:
    """How many batches a process has taken."""

    def __init__(self) -> None:
        self.batches = 0

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]


def train(
    accelerator: Accelerator,
    model: nn.Module,
    groups: list[dict[str, Any]],
    data: Dataset[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    draw: Callable[[], Tensor],
    options: argparse.Namespace,
) -> None:
    """Train a model in place, from the newest state in the folder; it ends as the moving average.

    Everything random in a step follows from the seed and the step's number, so that a run that was
    stopped goes on as if it had not been.

    Args:
        groups: parameters and their constant rates, for AdamW without weight decay.
        data: examples, of which `loss` gets batches, with the model in train mode.
        draw: pictures [B, C, H, W] in 0..1 by the model, which has the averaged weights then.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    loader = DataLoader(
        data, options.batch, shuffle=True, drop_last=True, num_workers=options.workers
    )
    model.train().to(accelerator.device)
    ema = EMAModel(model.parameters(), options.ema, foreach=True)
    progress = Progress()
    trained, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(ema, progress)
    if newest := newest_state(options.out):
        accelerator.load_state(str(newest))
        ema.to(accelerator.device)
    batches = endless(accelerator, loader, progress.batches)
    for number in range(progress.batches, options.steps * options.accumulate):
        batch = next(batches)  # the one after it is read ahead, with whatever that draws
        set_seed(options.seed + number * accelerator.num_processes + accelerator.process_index)
        with accelerator.accumulate(trained):
            value = loss(trained, batch)
            accelerator.backward(value)
            if accelerator.sync_gradients and options.max_grad_norm is not None:
                accelerator.clip_grad_norm_(trained.parameters(), options.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        progress.batches += 1
        if not accelerator.sync_gradients:
            continue
        ema.step(model.parameters())
        step = progress.batches // options.accumulate
        due = [step % every == 0 or step == options.steps for every in _every(options)]
        if due[0] and accelerator.is_main_process:
            with averaged(ema, model):
                save_image(draw(), options.out / f"step-{step:07d}.png")
            print(f"step {step}: loss {value.item():.4f}", flush=True)
        if due[1]:
            save_state(accelerator, options.out, step)
    ema.copy_to(model.parameters())
    accelerator.unwrap_model(trained, keep_fp32_wrapper=False)
    model.eval()


def _every(options: argparse.Namespace) -> tuple[int, int]:
    return options.sample_every, options.save_every


def endless(accelerator: Accelerator, loader: Any, taken: int) -> Iterator[Any]:
    """The batches of a prepared loader, epoch after epoch, without the first so many."""
    if not len(loader):
        raise t5fx.TrainingError(
            f"data: expected a whole batch at least, got {len(loader.dataset)} examples"
        )
    epoch, skipped = divmod(taken, len(loader))
    while True:
        loader.set_epoch(epoch)
        yield from accelerator.skip_first_batches(loader, skipped)
        epoch, skipped = epoch + 1, 0


@contextmanager
def averaged(ema: EMAModel, model: nn.Module) -> Iterator[None]:
    """The model in eval mode with the averaged weights, for a while."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        model.eval()
        yield
    finally:
        model.train()
        ema.restore(model.parameters())


def newest_state(out: Path) -> Path | None:
    """The folder of the newest whole state, if there is one."""
    return max(out.glob("state-*"), default=None)


def save_state(accelerator: Accelerator, out: Path, step: int) -> None:
    """Write a state, which gets its name when it is whole; the one before then goes."""
    unfinished = out / "unfinished"
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        before = list(out.glob("state-*"))
        unfinished.rename(out / f"state-{step:07d}")
        for old in before:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
