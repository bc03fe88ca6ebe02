"""What the node computes in: the widest of its arguments' dtypes and float32, whatever autocast."""

import contextlib
import functools

import torch
from torch import Tensor


def widest(*tensors: Tensor) -> torch.dtype:
    """The widest of the tensors' dtypes and float32."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Switches autocast off where the device has one ("meta" has none)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
