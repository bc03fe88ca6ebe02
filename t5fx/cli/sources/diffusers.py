"""Components of diffusers' pipelines: `diffusers:PIPELINE:transformer`, or their folders."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from torch import nn

from t5fx.api import example_inputs
from t5fx.cli.sources import Asked, failed, of_library
from t5fx.errors import T5Error

ADVICE = (
    "; or give the model as file.py:function, with a function that returns (model, args, kwargs), "
    "the two as t5fx.example_inputs finds them"
)


def load(name: str, asked: Asked) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The component and the arguments with which its pipeline calls it.

    The whole pipeline is loaded, since its other parts decide what the component gets.
    """
    import diffusers

    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
    pipeline, component = _split(name)
    where = f"diffusers:{name}"
    try:
        index = diffusers.DiffusionPipeline.load_config(pipeline)
    except Exception as error:
        raise failed(f"{where}: expected a pipeline in {pipeline!r}", error, ADVICE) from error
    if component not in index or not isinstance(index[component], list):
        parts = [n for n, kind in index.items() if isinstance(kind, list) and kind[0]]
        raise T5Error(f"{where}: expected one of {', '.join(parts)}, got {component!r}")
    try:
        instead = {}
        if asked.pretrained is False:
            chosen: Any = getattr(diffusers, index[component][1])
            config = chosen.load_config(pipeline, subfolder=component)
            instead = {component: chosen.from_config(config)}
        pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline, **instead)
    except Exception as error:
        raise failed(f"{where} could not be loaded", error) from error
    model = getattr(pipe, component)
    if not isinstance(model, nn.Module):
        raise T5Error(f"{where}: expected a model, got a {type(model).__name__}")
    try:
        return model, *example_inputs(model, lambda: pipe(**_call(pipe, asked)))
    except Exception as error:
        raise failed(f"{where}: its pipeline could not be called", error, ADVICE) from error


def owns(model: nn.Module) -> bool:
    return of_library(model, "diffusers")


def example(model: nn.Module, asked: Asked) -> Any:
    raise T5Error(f"expected the inputs of a {type(model).__name__}, got none{ADVICE}")


def preprocessing(model: nn.Module, size: tuple[int, int]) -> Any:
    raise T5Error(
        f"--data: expected a model of photographs, got a {type(model).__name__}, which takes "
        f"latents, time steps and texts: train it in Python, with batches of these"
    )


def _split(name: str) -> tuple[str, str]:
    """The pipeline and the name of the component in it."""
    folder = Path(name)
    if folder.is_dir():  # a folder of a pipeline that is on this machine, or of its component
        if (folder.parent / "model_index.json").exists():
            return str(folder.parent), folder.name
        if not (folder / "model_index.json").exists():
            raise T5Error(
                f"diffusers:{name}: expected a component in the folder of its pipeline, beside "
                f"model_index.json, whose other parts say what it is called with, got it alone"
                f"{ADVICE}"
            )
        return name, ""
    pipeline, colon, component = name.rpartition(":")
    return (pipeline, component) if colon else (name, "")


def _call(pipe: Any, asked: Asked) -> dict[str, Any]:
    """Arguments of a call of a pipeline, as far as it has them; it is left at the first step."""
    wanted: dict[str, Any] = {
        "num_inference_steps": 2,
        "num_images_per_prompt": asked.batch,
        **({} if asked.size is None else {"height": asked.size, "width": asked.size}),
    }
    takes = inspect.signature(pipe.__call__).parameters
    if "prompt" in takes:
        wanted["prompt"] = "a photograph"
    elif "class_labels" in takes:
        wanted["class_labels"] = [0] * asked.batch
    return {name: value for name, value in wanted.items() if name in takes}
