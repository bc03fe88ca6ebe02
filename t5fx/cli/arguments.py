"""The arguments that several commands share, and the values that they stand for."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from t5fx.cli.flags import add_flags, given
from t5fx.cli.running import UsageError
from t5fx.cli.sources import sources
from t5fx.config import LinearizeConfig
from t5fx.errors import ConfigError, T5Error

MODEL = """timm:NAME, hf:ID, diffusers:ID_OR_PATH (a component's folder, or PATH:transformer),
or file.py:function (which returns a model, or a tuple of a model, args and kwargs)"""
DTYPES = ("float32", "bfloat16", "float16")


def add_output(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument(
        "--json", action="store_true", help="print JSON, alone on the standard output"
    )


def add_model(parser: argparse.ArgumentParser, *, batch: int, checkpoint: bool = False) -> None:
    """MODEL and how it is built; `batch` is the default of --batch."""
    parser.usage = "%(prog)s MODEL [OPTION ...]"  # of which there are many
    parser.add_argument("model", metavar="MODEL", type=_reference, help=MODEL)
    group = parser.add_argument_group("the model")
    if checkpoint:
        group.add_argument(
            "--checkpoint",
            type=Path,
            metavar="DIR",
            help="a folder that t5fx.save_pretrained or t5fx convert wrote from this MODEL: begin "
            "with the model that is in it",
        )
    group.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="load the weights of the model, or build it with random ones (default: load them)",
    )
    group.add_argument(
        "--size",
        type=int,
        help="side of the images in pixels, or tokens of a text (default: the model's own)",
    )
    group.add_argument(
        "--batch", type=int, default=batch, help="images in a batch (default: %(default)s)"
    )
    group.add_argument("--dtype", choices=DTYPES, help="of the parameters (default: the model's)")
    group.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where there is one)")
    group.add_argument(
        "--seed", type=int, help="of random weights, inputs and the new parameters (default: 0)"
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """--config, and an option for each field of `LinearizeConfig`, which wins over it."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="JSON of a LinearizeConfig, as search writes it"
    )
    add_flags(parser, LinearizeConfig, supplied=("seed",))


def config_of(options: argparse.Namespace) -> LinearizeConfig:
    """The `LinearizeConfig` that the options name. Raises `UsageError`.

    Beside --checkpoint, which has one of its own, there must be no such options.
    """
    changes = given(options, LinearizeConfig)
    if getattr(options, "checkpoint", None) is not None and (changes or options.config):
        flags = [f"--{name.replace('_', '-')}" for name in (*changes, "config")]
        raise UsageError(
            f"{flags[0]}: expected no such option beside --checkpoint, whose saved options are used"
        )
    if options.seed is not None:
        changes["seed"] = options.seed
    try:
        config = LinearizeConfig()
        if options.config is not None:
            config = LinearizeConfig.from_json(options.config.read_text(encoding="utf-8"))
        return dataclasses.replace(config, **changes)
    except OSError as error:
        raise UsageError(f"--config: expected a file, got {options.config}: {error}") from error
    except ConfigError as error:
        raise UsageError(str(error)) from error


def made(source: Any, values: dict[str, Any], **others: Any) -> Any:
    """`source` made of what stands on the command line; what it refuses is wrong usage."""
    try:
        return source(**values, **others)
    except T5Error as error:
        raise UsageError(str(error)) from error


def device_of(options: argparse.Namespace) -> torch.device:
    """The device that was asked for. Raises `UsageError` for one that is not there."""
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"--device: expected a device of this machine, got {name!r}: {first}"
        ) from error
    return device


def check_out(out: Path) -> None:
    """Raise where a folder cannot be written, before anything is computed for it."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out: expected a folder, got the file {out}")
    check_writable(out)


def check_writable(path: Path) -> None:
    """Raise where nothing can be written at a path, which need not exist yet."""
    there = next(
        folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists()
    )
    if not os.access(there, os.W_OK):
        raise UsageError(f"--out: expected a place that can be written, got {path} in {there}")


@dataclasses.dataclass(frozen=True)
class Reference:
    """What MODEL names: a source and the name of the model there."""

    source: str
    name: str

    def __str__(self) -> str:
        return self.name if self.source == "file" else f"{self.source}:{self.name}"


def _reference(text: str) -> Reference:
    prefix, colon, name = text.partition(":")
    if colon and name and prefix in sources() and prefix != "file":
        return Reference(prefix, name)
    path, colon, function = text.rpartition(":")
    if colon and path.endswith(".py") and function.isidentifier():
        return Reference("file", text)
    raise argparse.ArgumentTypeError(f"expected {' '.join(MODEL.split())}, got {text!r}")
