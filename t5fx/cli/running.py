"""Runs a command: its result printed for people or as JSON, its errors as one line."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from t5fx.errors import T5Error

#: Packages that a command may need and `pip install t5fx` does not bring, and how to get them.
PACKAGES = {
    **{name: name for name in ("timm", "transformers", "diffusers", "torchvision", "matplotlib")},
    **{"accelerate": "'t5fx[train]'", "PIL": "pillow", "numpy": "numpy"},
    **dict.fromkeys(("onnx", "pandas", "skimage", "sklearn", "tomesd"), "'t5fx[bench]'"),
}


class UsageError(T5Error):
    """Options that do not go together, or a value that an option does not take."""


@dataclass(frozen=True)
class Result:
    """What a command found.

    data: plain data for `--json`; shown: what people read, printed in turn: strings, or what rich
    can print. code: the exit code.
    """

    data: dict[str, Any]
    shown: tuple[Any, ...]
    code: int = 0


def run(
    command: Callable[[argparse.Namespace], Result | int],
    options: argparse.Namespace,
    parser: argparse.ArgumentParser,
) -> int:
    """The exit code: the command's own, 1 for an error that is one line, 2 for wrong usage."""
    as_json = getattr(options, "json", False)
    # What libraries print while they work is not what the command found.
    quiet = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with quiet, _short_warnings():
            result = command(options)
    except UsageError as error:
        parser.error(_line(error))
    except T5Error as error:
        return _failed(parser, _line(error))
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in PACKAGES:
            raise
        return _failed(
            parser, f"expected the package {name}, found none: pip install {PACKAGES[name]}"
        )
    except OSError as error:  # a full disk, a folder that may not be written
        return _failed(parser, _line(error))
    except KeyboardInterrupt:
        _failed(parser, "interrupted")
        return 130
    if isinstance(result, int):
        return result
    if as_json:
        print(json.dumps(result.data, indent=2))
        return result.code
    console = Console()
    for one in result.shown:
        # Of a width of its own where nobody has a terminal that says one.
        text = str(one) if not console.is_terminal else one
        console.print(text, soft_wrap=isinstance(text, str), markup=False, highlight=False)
    return result.code


def _failed(parser: argparse.ArgumentParser, line: str) -> int:
    print(f"{parser.prog}: {line}", file=sys.stderr)
    return 1


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def doing(text: str) -> Iterator[None]:
    """Says on a terminal what is being done, and nothing elsewhere."""
    with Console(stderr=True).status(text):
        yield


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line each, without the line of code that they came from."""
    before = warnings.formatwarning

    def short(message: Any, *where: Any, **more: Any) -> str:
        return f"t5fx: warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = short
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Hugging Face's libraries, if they are first imported here, draw bars on a terminal only."""
    name = "HF_HUB_DISABLE_PROGRESS_BARS"
    if sys.stderr.isatty() or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
