"""Models that a function in a Python file returns: `file.py:function`."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from t5fx.cli.sources import Asked
from t5fx.errors import T5Error


def load(name: str, asked: Asked) -> Any:
    """What the function returns: a model, or (model, args) or (model, args, kwargs).

    The options --pretrained, --size and --batch go to the function where it has arguments of these
    names.
    """
    text, _, function = name.rpartition(":")
    path = Path(text)
    if not path.is_file():
        raise T5Error(f"{name}: expected a Python file, found none at {path}")
    found = getattr(_imported(path), function, None)
    if not callable(found):
        raise T5Error(f"{name}: expected a function {function!r} in {path}, found none")
    takes = inspect.signature(found).parameters
    for option in ("pretrained", "size"):
        if getattr(asked, option) is not None and option not in takes:
            raise T5Error(
                f"--{option}: expected a function with an argument {option!r}, got {name}"
            )
    values = {n: v for n, v in asdict(asked).items() if n in takes and v is not None}
    try:
        result = found(**values)
    except Exception as error:
        raise _told(path, error) from error
    if not _fits(result):
        got = type(result).__name__
        raise T5Error(
            f"{name}: expected a model, (model, args) or (model, args, kwargs) with args a tuple "
            f"and kwargs a dict, got {got}"
        )
    return result


def _fits(result: Any) -> bool:
    kinds = (nn.Module, tuple, dict)
    if isinstance(result, nn.Module):
        return True
    return (
        isinstance(result, tuple)
        and 2 <= len(result) <= 3
        and all(isinstance(one, kind) for one, kind in zip(result, kinds, strict=False))
    )


def _imported(path: Path) -> ModuleType:
    # Under a name that nothing else has; dataclasses and pickle look a module up by its name.
    name = f"t5fx_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent.resolve()))  # its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _told(path, error) from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def _told(path: Path, error: Exception) -> T5Error:
    """An error of the user's file, with the line in it."""
    whole = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in whole if frame.filename == str(path.resolve())]
    line = f":{frames[-1].lineno}" if frames else ""
    reason = " ".join(str(error).split())
    return T5Error(f"{path}{line}: {type(error).__name__}: {reason}")
