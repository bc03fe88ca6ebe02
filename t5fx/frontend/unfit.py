"""What was done to a model, or is wrong with a call of it, that keeps it from being traced."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from t5fx.errors import CaptureError


def check_has_code(model: nn.Module) -> None:
    """Raise `CaptureError` where the model, or a part with parameters, is a TorchScript program."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            if not name or any(True for _ in module.parameters()):
                what = f"its module {name!r} is" if name else "it is"
                raise CaptureError(
                    f"expected a model with Python code, got {type(model).__name__}: {what} a "
                    f"TorchScript program, which torch.export cannot trace. Linearize the model "
                    f"as it was before torch.jit.script or torch.jit.trace"
                )


def causes(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], error: Exception
) -> Iterator[str]:
    """Why a trace of `model(*args, **kwargs)` may have failed, and what to do: a clause each."""
    if isinstance(error, TypeError) and "unhashable" in str(error) and "SymInt" in str(error):
        yield (
            f"{_place(error)} puts numbers into a set or a dictionary that a trace does not have: "
            f"sizes that are dynamic, or values that it reads (as `mask.sum(1).tolist()` does) and "
            f"that not the arguments alone decide. Leave `dynamic` as None, change that code, or "
            f"linearize the modules that it calls with these tokens, one by one, with `grid` "
            f"given; torch.compile(model, backend='t5') breaks the graph there"
        )
    for name, module in model.named_modules():
        if ".ao.nn.quantized" in type(module).__module__:
            yield (
                f"{name!r} was quantized by torch.ao.quantization, whose packed weights cannot be "
                f"traced: linearize the model before it is quantized, or quantize by torchao, "
                f"whose weights can be"
            )
            break
    held = [p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()]
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    devices = {p.device.type for p in held}
    elsewhere = {x.device.type for x in given} - devices
    if devices and elsewhere:
        yield (
            f"the parameters are on {_listed(devices)} and the arguments on {_listed(elsewhere)}: "
            f"put both on one device"
        )
    dtypes = {p.dtype for p in held}
    others = {x.dtype for x in given if x.is_floating_point()} - dtypes
    if dtypes and others:
        yield (
            f"the parameters are of {_listed(dtypes)} and the arguments of {_listed(others)}: "
            f"convert one of them"
        )


def _place(error: Exception) -> str:
    """The last line of code outside of torch that an error went through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    last = frames[-1]
    return f"'{last.line}' in {last.filename}:{last.lineno}"


def _listed(kinds: set[Any]) -> str:
    return " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
