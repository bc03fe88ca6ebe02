"""Bare copies of models, for tracing: their code and their tensors, without what runs around it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import nn

from t5fx.kernels import TTT
from t5fx.runtime.owned import disown, state_of
from t5fx.wrappers import inside, is_split

T = TypeVar("T")

#: One thread for all captures. It never ends, since torch 2.11 keeps pointers into the one that
#: first used fake tensors.
_thread = ThreadPoolExecutor(1, thread_name_prefix="t5fx-capture")


def clean_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread, where the caller's autocast and gradient modes do not apply."""
    import threading

    if threading.current_thread().name.startswith("t5fx-capture"):
        return work()
    return _thread.submit(work).result()


def bare(model: nn.Module) -> nn.Module:
    """Take from a copy of a model (`duplicate`, with `share`) what was rewritten and the wrappers
    around its modules, in place; tensors that are split over devices become whole. Names in it are
    plain ones (`t5fx.wrappers`). Returns the copy.
    """
    stand_ins: dict[int, Any] = {}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            module._modules[name] = child if child is None else inside(child)
    for module in list(model.modules()):
        if state_of(module) is not None:
            disown(module)
            for name, child in list(module._modules.items()):
                if isinstance(child, TTT):
                    del module._modules[name]
        _unwrap(module)
        tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for named in tensors:
            for name, tensor in named.items():
                named[name] = _whole(tensor, stand_ins)
    return model


def _unwrap(module: nn.Module) -> None:
    """Take off the wrappers that accelerate and diffusers put around a forward.

    Where these bring weights from elsewhere, or in another dtype, empty ones stand for them.
    """
    own = vars(module)
    device, dtype = None, None
    hook = own.pop("_hf_hook", None)
    if hook is not None and "_old_forward" in own:
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None) or device
        _restore(module, own.pop("_old_forward"))
    registry = own.pop("_diffusers_hook", None)
    if registry is not None and getattr(registry, "_fn_refs", None):
        for one in registry.hooks.values():
            dtype = getattr(one, "compute_dtype", None) or dtype
            group = getattr(one, "group", None)
            device = getattr(group, "onload_device", None) or device
        first = registry._fn_refs[0]
        _restore(module, first.original_forward or first.forward)
    if device is not None or dtype is not None:
        tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for named in tensors:
            for name, tensor in named.items():
                if tensor is not None:
                    named[name] = _elsewhere(tensor, device, dtype)


def _restore(module: nn.Module, forward: Any) -> None:
    """Give a module the forward that was wrapped: its class's, or one of its own."""
    vars(module).pop("forward", None)
    if getattr(forward, "__func__", None) is not type(module).forward:
        vars(module)["forward"] = forward


def _elsewhere(tensor: torch.Tensor, device: Any, dtype: torch.dtype | None) -> torch.Tensor:
    """An empty tensor of the size of one that is computed with on a device, in a dtype."""
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    place = tensor.device if device is None else torch.device(device)
    if (wanted, place) == (tensor.dtype, tensor.device):
        return tensor
    empty = torch.empty_like(tensor, dtype=wanted, device=place)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _whole(tensor: Any, stand_ins: dict[int, Any]) -> Any:
    """A tensor, or for one that FSDP has split an empty one of its full size, to trace with."""
    if not is_split(tensor):
        return tensor
    if id(tensor) not in stand_ins:
        empty = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        parameter = isinstance(tensor, nn.Parameter)
        stand_ins[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
    return stand_ins[id(tensor)]
