"""Several processes that train the same nodes, by torch.distributed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn


def process_count() -> int:
    """How many processes there are; one where none was initialised."""
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return process_count() == 1 or distributed.get_rank() == 0


def averaged(values: Tensor) -> Tensor:
    """The mean over all processes."""
    if process_count() > 1:
        distributed.all_reduce(values)
        values = values / process_count()
    return values


def average_gradients(modules: Iterable[nn.Module]) -> None:
    """Give every process the mean of all gradients."""
    if process_count() > 1:
        for module in modules:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad = averaged(parameter.grad)


@torch.no_grad()
def share_values(modules: Iterable[nn.Module]) -> None:
    """Give every process the parameters of the first."""
    if process_count() > 1:
        for module in modules:
            for parameter in module.parameters():
                distributed.broadcast(parameter, 0)
