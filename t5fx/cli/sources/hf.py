"""Models of transformers, by the id on the hub or the folder: `hf:facebook/dinov2-small`."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from t5fx.cli.sources import Asked, Call, failed, of_library
from t5fx.errors import T5Error

if TYPE_CHECKING:
    from t5fx.cli.images import Preprocessing

#: Tokens of a text, where the model takes as many or more.
TOKENS = 512


def load(name: str, asked: Asked) -> nn.Module:
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        # The class that the checkpoint is of, with its head; the bare model where it names none.
        named = (config.architectures or ["AutoModel"])[0]
        chosen: Any = getattr(transformers, named, transformers.AutoModel)
        if asked.pretrained is not False:
            return chosen.from_pretrained(name)
        bare = chosen is transformers.AutoModel
        return chosen.from_config(config) if bare else chosen(config)
    except Exception as error:  # of the hub, of the network, of the model
        raise failed(f"hf:{name} could not be loaded", error) from error


def owns(model: nn.Module) -> bool:
    return of_library(model, "transformers")


def example(model: nn.Module, asked: Asked) -> Call:
    """A batch of random images, of random words, or of both for a model of both."""
    config: Any = model.config
    takes = inspect.signature(model.forward).parameters
    vision = getattr(config, "vision_config", None)
    names = [model.main_input_name, *(["pixel_values"] if vision is not None else [])]
    if not set(names) <= {"pixel_values", "input_ids"}:
        raise T5Error(
            f"expected a model of images or words, got a {type(model).__name__}, whose input is "
            f"{model.main_input_name}: give it as file.py:function, with a function that returns "
            f"(model, args, kwargs)"
        )
    kwargs: dict[str, Any] = {}
    if "pixel_values" in names:
        about = vision or config
        side = getattr(about, "image_size", None) or 224
        height, width = (side, side) if isinstance(side, int) else tuple(side)
        if asked.size is not None and (asked.size, asked.size) != (height, width):
            height = width = asked.size
            if "interpolate_pos_encoding" in takes:
                kwargs["interpolate_pos_encoding"] = True
        shape = (asked.batch, getattr(about, "num_channels", 3), height, width)
        parameter = next(model.parameters())
        kwargs["pixel_values"] = torch.randn(shape, device=parameter.device, dtype=parameter.dtype)
    if "input_ids" in names:
        text = getattr(config, "text_config", config)
        longest = getattr(text, "max_position_embeddings", TOKENS)
        # With an image, the text is beside the point.
        length = min(TOKENS, longest) if asked.size is None or vision else asked.size
        device = next(model.parameters()).device
        kwargs["input_ids"] = torch.randint(text.vocab_size, (asked.batch, length), device=device)
    return (), kwargs


def preprocessing(model: nn.Module, size: tuple[int, int]) -> Preprocessing:
    from transformers import AutoImageProcessor

    from t5fx.cli.images import Preprocessing

    name: Any = model.name_or_path or getattr(model.config, "_name_or_path", "")
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except Exception as error:
        what = f"expected the image processor of the {type(model).__name__} in {name!r}"
        raise failed(what, error) from error
    height, width = size
    whole = {"height": height, "width": width}
    resized: dict[str, Any] = {"size": whole}
    if getattr(processor, "do_center_crop", False):
        before = processor.size["shortest_edge"] / min(dict(processor.crop_size).values())
        resized = {"size": {"shortest_edge": round(before * min(size))}, "crop_size": whole}

    def evaluate(image: Any) -> Any:
        return processor(image, return_tensors="pt", **resized)["pixel_values"][0]

    normalised = getattr(processor, "do_normalize", True)
    return Preprocessing(
        mean=tuple(processor.image_mean) if normalised else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if normalised else (1.0, 1.0, 1.0),
        evaluate=evaluate,
    )
