"""A family of pipelines: tiny random components, a real scheduler, the real class."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

#: Heights and widths in pixels: a square, and one that is not, both ways round.
SIZES = ((32, 32), (32, 48), (48, 32))
#: Tokens of a prompt.
TEXT = 7


@dataclass
class Setup:
    """A pipeline that is ready to be called.

    pipe: without text encoders; call: what it is called with, embeddings of the prompt among it;
    guided, plain: the arguments that switch guidance on and off. sizes: (height, width) in pixels;
    without any the pipeline has one size. config: fields of `LinearizeConfig` that the family
    needs. part: the name of the component that is converted. sized: more arguments of a call of
    that size.
    """

    pipe: Any
    call: dict[str, Any]
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 5.0})
    plain: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    sizes: tuple[tuple[int, int], ...] = SIZES
    config: dict[str, Any] = field(default_factory=dict)
    part: str = "transformer"
    sized: Callable[[int, int], dict[str, Any]] = lambda height, width: {}

    @property
    def model(self) -> Any:
        """The component that is converted."""
        return getattr(self.pipe, self.part)

    @model.setter
    def model(self, value: Any) -> None:
        setattr(self.pipe, self.part, value)

    def run(self, size: tuple[int, int] | None = None, **more: Any) -> torch.Tensor:
        """The latents (or pixels) that one call gives, always from the same noise."""
        given = {"num_inference_steps": 2, "output_type": "latent", **self.guided, **self.call}
        size = size or (self.sizes[0] if self.sizes else None)
        if size is not None:
            given |= {"height": size[0], "width": size[1], **self.sized(*size)}
        given |= more
        with torch.no_grad():
            result = self.pipe(generator=torch.Generator().manual_seed(0), **given)
        found = result.images if hasattr(result, "images") else result.frames
        return torch.as_tensor(found).float()

    @property
    def two(self) -> dict[str, Any]:
        """The arguments of a call for two prompts."""
        about = {n: v for n, v in self.call.items() if "prompt" in n or n == "class_labels"}
        return {n: _twice(v) for n, v in about.items()}


def _twice(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.cat([value, 0.5 * value if value.is_floating_point() else value])
    return value * 2 if isinstance(value, list) else value


_FAMILIES: dict[str, Callable[[], Setup]] = {}


def families() -> dict[str, Callable[[], Setup]]:
    """Every family by its name, in the order of the table: what makes its pipeline."""
    for module in ("images", "packed", "videos"):
        importlib.import_module(f"{__package__}.{module}")
    return _FAMILIES


def family(name: str) -> Callable[[Callable[[], Setup]], Callable[[], Setup]]:
    """Adds a function that makes a family's pipeline to the table."""

    def add(make: Callable[[], Setup]) -> Callable[[], Setup]:
        _FAMILIES[name] = make
        return make

    return add


def ready(kind: Any, *missing: str, **parts: Any) -> Any:
    """A pipeline of a class with these components, in eval mode, those that are missing None."""
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe = kind(**parts, **dict.fromkeys(missing))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encoders(count: int) -> list[str]:
    """The names of so many text encoders and tokenizers in a pipeline."""
    numbers = ("", "_2", "_3")[:count]
    return [f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in numbers]


def prompt(width: int, *, tokens: int = TEXT, **masks: str) -> dict[str, torch.Tensor]:
    """Embeddings of a prompt and of what is guided away from; masks: their names, all true."""
    text = torch.randn(1, tokens, width)
    found = {"prompt_embeds": text, "negative_prompt_embeds": -text}
    return found | {name: torch.ones(1, tokens) for name in masks.values()}
