"""The model that MODEL names, and calls of it."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import t5fx
from t5fx.cli.arguments import device_of
from t5fx.cli.images import Folder, Photographs, photographs
from t5fx.cli.running import UsageError, doing, no_bars
from t5fx.cli.sources import Asked, owner, source
from t5fx.errors import T5Error


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, and the arguments of one call of it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        try:
            inspect.signature(self.model.forward).bind(*self.args, **self.kwargs)
        except TypeError as error:
            name = type(self.model).__name__
            raise T5Error(f"expected the arguments of a call of {name}: {error}") from error

    @property
    def image(self) -> Tensor | None:
        """The photographs [B, 3, H, W] among the arguments, or None."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return next(filter(_is_image, leaves), None)

    def call(self, batch: Any) -> Any:
        """What a batch of `t5fx.cli.images` is called with: `inputs` of the fine-tune hooks."""
        old, images = self.image, batch[0]
        assert old is not None
        new = images.to(old.device, old.dtype)
        args, kwargs = pytree.tree_map(
            lambda leaf: new if leaf is old else leaf, (self.args, self.kwargs)
        )
        if not args or not kwargs:
            return args or kwargs
        signature = inspect.signature(self.model.forward)
        named: dict[str, Any] = {}
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            others = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            named |= value if others else {name: value}
        return named

    def photographs(self, options: argparse.Namespace, folder: Folder) -> Photographs:
        """The folder of --data, as this model wants its photographs."""
        image = self.image
        if image is None or image.shape[1] != 3:
            raise T5Error(
                f"--data: expected a {type(self.model).__name__} that is called with images "
                f"[B, 3, H, W], found no such tensor among its arguments"
            )
        try:
            kind = owner(self.model)
        except T5Error as error:
            raise T5Error(
                f"--data: expected a model that says how its photographs are normalised, got a "
                f"{type(self.model).__name__}: give it an attribute pretrained_cfg as timm's "
                f"models have it, such as {{'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}}"
            ) from error
        size = (image.shape[-2], image.shape[-1])
        return photographs(options, folder, kind.preprocessing(self.model, size), size)


def load(options: argparse.Namespace) -> Loaded:
    """The model of the options, built or loaded, with random or given inputs."""
    for name in ("size", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}: expected 1 or more, got {value}")
    device = device_of(options)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    torch.manual_seed(options.seed or 0)
    asked = Asked(options.pretrained, options.size, options.batch)
    with doing(f"loading {options.model}"), no_bars():
        found = source(options.model.source).load(options.model.name, asked)
        model, *call = found if isinstance(found, tuple) else (found,)
        model = model.eval().to(device, dtype)
        if not call:
            return Loaded(model, *owner(model).example(model, asked))

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        args, kwargs = call[0], call[1] if len(call) > 1 else {}
        return Loaded(model, *pytree.tree_map_only(Tensor, move, (args, kwargs)))


def linearized(
    loaded: Loaded, options: argparse.Namespace, config: t5fx.LinearizeConfig
) -> nn.Module:
    """The model converted, or as it is in --checkpoint; what was loaded is left as it is."""
    checkpoint = getattr(options, "checkpoint", None)
    if checkpoint is None:
        with doing("converting"):
            return t5fx.linearize(loaded.model, loaded.args, loaded.kwargs, config=config)
    with doing(f"loading {checkpoint}"), torch.no_grad():
        lin = t5fx.from_pretrained(checkpoint, loaded.model).eval()
        lin(*loaded.args, **loaded.kwargs)  # which judges it, for the report
    return lin


def _is_image(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.is_floating_point()
