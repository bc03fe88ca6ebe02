"""What torch puts around modules and makes of tensors: wrappers, names with them, split tensors."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

#: The names under which wrappers keep the module that they are around: those of activation
#: checkpointing (torch.distributed's `checkpoint_wrapper`), torch.compile and FSDP.
_INSIDE = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile's, DDP's and the other wrappers, or the model itself."""
    while True:
        model = inside(model)
        if not isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            return model
        model = model.module


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside of torch.compile's wrapper, or the module itself."""
    return getattr(model, "_orig_mod", model)


def inside(module: nn.Module) -> nn.Module:
    """The module that a wrapper, which may be part of a model, is around, or the module itself."""
    while True:
        found = next((module._modules[name] for name in _INSIDE if name in module._modules), None)
        if found is None:
            return module
        module = found


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The module of a plain name. Raises AttributeError where there is none."""
    for part in filter(None, name.split(".")):
        model = inside(model.get_submodule(part))
    return model


def plain_name(name: str) -> str:
    """The name of a module or tensor as it is without wrappers around modules of the model.

    >>> plain_name("blocks.0._checkpoint_wrapped_module.attn.qkv.weight")
    'blocks.0.attn.qkv.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _INSIDE)


def is_split(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: this process has a part of it."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    return isinstance(tensor, kind)
