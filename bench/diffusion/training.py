"""The loop that the recipes have in common: accelerate, a moving average, pictures, states."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, set_seed
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.utils import save_image

import t5fx
from t5fx.atomic import replacing
from t5fx.training.processes import check_processes

#: The loss of every step, the mean over its examples.
LOSSES = "losses.csv"


def count(text: str) -> int:
    """The whole number of at least 1 that an option says."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def positive(text: str) -> float:
    """The finite number above 0 that an option says."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def share(text: str) -> float:
    """The number from 0 to 1, without 1, that an option says."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 0 and less than 1, got {text}")
    return value


def add_options(parser: argparse.ArgumentParser, steps: int, batch: int, save: int) -> None:
    """The options that `train` reads."""
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--steps", type=count, default=steps, help="of the optimizer")
    parser.add_argument("--batch", type=count, default=batch, help="of one process, backward pass")
    parser.add_argument("--accumulate", type=count, default=1, help="backward passes for a step")
    parser.add_argument("--ema", type=share, default=0.9999, help="decay of the moving average")
    parser.add_argument("--max-grad-norm", type=positive, help="clip gradients; by default not")
    parser.add_argument("--workers", type=int, default=0, help="processes that load the data")
    parser.add_argument("--save-every", type=count, default=save, metavar="STEPS")
    parser.add_argument("--sample-every", type=count, default=save, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")


def config_of(path: Path | None, **defaults: Any) -> t5fx.LinearizeConfig:
    """The configuration in a JSON file, or one of the defaults."""
    if path is None:
        return t5fx.LinearizeConfig(**defaults)
    return t5fx.LinearizeConfig.from_json(path.read_text(encoding="utf-8"))


def check_model(kind: type[ModelMixin], folder: str) -> None:
    """Refuse a pipeline without a transformer of this class, before anything else is loaded."""
    part = f"a transformer/ of class {kind.__name__}"
    try:
        found = kind.load_config(folder, subfolder="transformer")["_class_name"]
    except (OSError, KeyError) as error:
        raise t5fx.TrainingError(
            f"--model: expected the folder or the Hub's name of a pipeline with {part}, got "
            f"{folder}: {error}"
        ) from error
    if found != kind.__name__:
        raise t5fx.TrainingError(f"--model: expected {part}, got {folder}, which has a {found}")


def pictures_in(folder: Path, transform: Callable[[Any], Tensor]) -> ImageFolder:
    """The pictures in the folders of a folder."""
    try:
        return ImageFolder(str(folder), transform)
    except OSError as error:
        raise t5fx.TrainingError(
            f"--data: expected a folder of folders, with pictures in each, got {folder}: {error}"
        ) from error


def check_enough(accelerator: Accelerator, data: Dataset[Any], options: argparse.Namespace) -> int:
    """The examples of a step, of which there have to be as many at least."""
    wanted = accelerator.num_processes * options.batch * options.accumulate
    if len(data) < wanted:  # type: ignore[arg-type]
        raise t5fx.TrainingError(
            f"--data: expected at least {wanted} examples for a step, {options.batch} x "
            f"{options.accumulate} in each of {accelerator.num_processes} processes, got "
            f"{len(data)}; give more, or lower --batch or --accumulate"  # type: ignore[arg-type]
        )
    return wanted


def accelerator_for(options: argparse.Namespace) -> Accelerator:
    """One whose batches come in an order that the seed and the epoch decide.

    Its processes wait an hour for each other, since the first one alone writes states and pictures.

    Raises:
        TrainingError: accelerate sees none of the other processes that were started.
    """
    accelerator = Accelerator(
        cpu=options.cpu,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=1))],
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=options.seed
        ),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=options.accumulate, sync_with_dataloader=False
        ),
    )
    check_processes(accelerator)
    return accelerator


class Progress:
    """How many steps were made, each of as many examples as all processes together take."""

    def __init__(self, examples: int) -> None:
        self.steps = 0
        self.examples = examples

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps, "examples": self.examples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["examples"] != self.examples:
            raise t5fx.TrainingError(
                f"--batch and --accumulate: expected {state['examples']} examples a step over all "
                f"processes, as before, got {self.examples}; change them, or name another --out"
            )
        self.steps = state["steps"]


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
    stopped goes on as if it had not been. Several processes do what one process does that
    accumulates the gradients of as many batches.

    Args:
        groups: parameters and their constant rates, for AdamW without weight decay.
        data: examples, of which `loss` gets batches, with the model in train mode.
        draw: pictures [B, C, H, W] in 0..1 by the model, which has the averaged weights then.

    Raises:
        TrainingError: there are fewer examples than a step takes, the state is that of a run with
            another number of them, or the loss or its gradient is not finite.
    """
    examples = check_enough(accelerator, data, options)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    loader = DataLoader(
        data, options.batch, shuffle=True, drop_last=True, num_workers=options.workers
    )
    model.train().to(accelerator.device)
    ema = EMAModel(model.parameters(), options.ema, foreach=True)
    processes = accelerator.num_processes
    progress = Progress(examples)
    trained, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(ema, progress)
    if newest := newest_state(options.out):
        accelerator.load_state(str(newest))
        # The options of this run count: those that may have changed are in the state too.
        accelerator.step, ema.decay = 0, options.ema
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        ema.to(accelerator.device)
    accelerator.print(
        f"steps {progress.steps + 1} to {options.steps}; examples a step: {examples} = processes "
        f"{processes} x --batch {options.batch} x --accumulate {options.accumulate}",
        flush=True,
    )
    losses = options.out / LOSSES
    if accelerator.is_main_process:
        cut(losses, progress.steps)
    batches = endless(accelerator, loader, progress.steps, options.accumulate)
    while progress.steps < options.steps:
        mean = torch.zeros((), device=accelerator.device)
        for part in range(options.accumulate):
            batch = next(batches)  # the one after it is read ahead, with whatever that draws
            number = progress.steps * options.accumulate + part
            set_seed(options.seed + number * processes + accelerator.process_index)
            with accelerator.accumulate(trained):
                value = loss(trained, batch)
                accelerator.backward(value)
                mean += value.detach() / options.accumulate
                if accelerator.sync_gradients:
                    limit = options.max_grad_norm or math.inf
                    norm = accelerator.clip_grad_norm_(trained.parameters(), limit)
                    found = accelerator.reduce(mean, "mean").item()
                    check_finite(accelerator, progress.steps + 1, found, float(norm), options.out)
                optimizer.step()
                optimizer.zero_grad()
        ema.step(model.parameters())
        progress.steps += 1
        step = progress.steps
        if accelerator.is_main_process:
            with losses.open("a", encoding="utf-8") as file:
                file.write(f"{step},{found:.9g}\n")
        if step % options.save_every == 0 or step == options.steps:
            save_state(accelerator, options.out, step)
        if accelerator.is_main_process and (
            step % options.sample_every == 0 or step == options.steps
        ):
            with averaged(ema, model):
                save_image(draw(), options.out / f"step-{step:07d}.png")
            print(f"step {step}: loss {found:.4f}", flush=True)
    ema.copy_to(model.parameters())
    accelerator.unwrap_model(trained, keep_fp32_wrapper=False)
    model.eval()


def check_finite(accelerator: Accelerator, step: int, loss: float, norm: float, out: Path) -> None:
    """Before anything that is not finite gets into the model and its state."""
    scaled = accelerator.scaler is not None  # which leaves out steps whose gradients overflow
    if math.isfinite(loss) and (scaled or math.isfinite(norm)):
        return
    newest = newest_state(out)
    raise t5fx.TrainingError(
        f"step {step}: expected a finite loss and gradient, got a loss of {loss} and a gradient "
        f"norm of {norm}; {newest.name if newest else 'no state'} in {out} is from before: start "
        f"again with a lower --lr or with --max-grad-norm"
    )


def cut(losses: Path, steps: int) -> None:
    """Keep the lines of the first so many steps, those after which the state was written."""
    lines = losses.read_text(encoding="utf-8").splitlines()[1:] if losses.exists() else []
    kept = [line for line in lines if "," in line and int(line.split(",")[0]) <= steps]
    with replacing(losses) as scratch:
        scratch.write_text("\n".join(["step,loss", *kept]) + "\n", encoding="utf-8")


def endless(accelerator: Accelerator, loader: Any, steps: int, accumulate: int) -> Iterator[Any]:
    """The batches of a prepared loader, epoch after epoch, without those of the steps made.

    An epoch ends with its last whole step.
    """
    whole = len(loader) // accumulate
    epoch, made = divmod(steps, whole)
    while True:
        loader.set_epoch(epoch)
        rest = accelerator.skip_first_batches(loader, made * accumulate)
        yield from islice(rest, (whole - made) * accumulate)
        epoch, made = epoch + 1, 0


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
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)  # as a run that was stopped may leave it
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        before = list(out.glob("state-*"))
        unfinished.rename(out / f"state-{step:07d}")
        for old in before:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
