"""Train a converted classifier on photographs in a subfolder for each class (t5fx.FineTune)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import t5fx
from t5fx.cli.compared import Agreement, accuracy, logits
from t5fx.cli.flags import add_flags
from t5fx.cli.images import Photographs
from t5fx.cli.models import Loaded
from t5fx.cli.running import Result
from t5fx.cli.training import add_road, hook_of, travel
from t5fx.errors import T5Error
from t5fx.training.nodes import as_call


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_road(parser, data=True, checkpoint=True)
    add_flags(parser, t5fx.FineTune)


def run(options: argparse.Namespace) -> Result:
    hook = hook_of(options, t5fx.FineTune, loss=functional.cross_entropy)  # `_needs` wraps it
    return travel(options, {"fine-tuned": hook}, _needs, _measures)


def _needs(loaded: Loaded, pictures: Photographs, agreement: Agreement) -> dict[str, Any]:
    device = next(loaded.model.parameters()).device

    def loss(model: nn.Module, batch: Any) -> Tensor:
        args, kwargs = as_call(batch, device, loaded.call)
        return functional.cross_entropy(logits(model(*args, **kwargs)), batch[1].to(device))

    return {
        "data": pictures.training,
        "loss": loss,
        "evaluate": lambda model: {"accuracy": accuracy(loaded, model, pictures.held_out)},
    }


def _measures(loaded: Loaded, pictures: Photographs) -> dict[str, Callable[[nn.Module], float]]:
    """The accuracy, of a classifier of as many classes as there are subfolders."""
    classes = len(pictures.classes)
    if not classes:
        raise T5Error(
            "--data: expected a subfolder of photographs for each class, got photographs without"
        )
    with torch.no_grad():
        found = logits(loaded.model(*loaded.args, **loaded.kwargs)).shape[-1]
    if found != classes:
        raise T5Error(
            f"--data: expected a subfolder for each of the model's {found} classes, got {classes}: "
            f"give a model with a head for these, such as file.py:function with "
            f"timm.create_model(..., num_classes={classes})"
        )
    return {"accuracy": lambda model: accuracy(loaded, model, pictures.held_out)}
