"""Models of timm, by name: `timm:vit_small_patch16_224`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from t5fx.cli.sources import Asked, Call, failed
from t5fx.errors import T5Error

if TYPE_CHECKING:
    from t5fx.cli.images import Preprocessing


def load(name: str, asked: Asked) -> nn.Module:
    import timm

    if ":" not in name and not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        advice = f"; near it: {', '.join(near)}" if near else ""
        raise T5Error(f"timm:{name}: expected the name of a model of timm, got {name!r}{advice}")
    size: dict[str, Any] = {} if asked.size is None else {"img_size": asked.size}
    try:
        return timm.create_model(name, pretrained=asked.pretrained is not False, **size)
    except Exception as error:  # of the hub, of the network, of the model
        advice = "" if asked.pretrained is False else "; --no-pretrained builds random weights"
        raise failed(f"timm:{name} could not be built", error, advice) from error


def owns(model: nn.Module) -> bool:
    """Whether it says how it was trained as timm's models say it."""
    return hasattr(model, "pretrained_cfg")


def example(model: nn.Module, asked: Asked) -> Call:
    parameter = next(model.parameters())
    shape = (asked.batch, *_settings(model, asked.size)["input_size"])
    return (torch.randn(shape, device=parameter.device, dtype=parameter.dtype),), {}


def preprocessing(model: nn.Module, size: tuple[int, int]) -> Preprocessing:
    from timm.data import create_transform

    from t5fx.cli.images import Preprocessing

    settings = _settings(model, None) | {"input_size": (3, *size)}
    return Preprocessing(
        mean=settings["mean"],
        std=settings["std"],
        evaluate=create_transform(**settings, is_training=False),
    )


def _settings(model: nn.Module, size: int | None) -> dict[str, Any]:
    """timm's settings of the inputs, at the size for which the model was built."""
    from timm.data import resolve_data_config

    cfg: Any = model.pretrained_cfg
    settings: dict[str, Any] = resolve_data_config(
        pretrained_cfg=cfg if isinstance(cfg, Mapping) else cfg.to_dict()
    )
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        built = (size, size)
    if built is not None:
        settings["input_size"] = (settings["input_size"][0], *built)
    return settings
