"""Several processes that train the same model, by torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from t5fx.errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator


def process_count() -> int:
    """How many processes there are; one where none was initialised."""
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def process_index() -> int:
    """Which of them this is, from 0."""
    return 0 if process_count() == 1 else distributed.get_rank()


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return process_index() == 0


def barrier() -> None:
    """Wait for all processes."""
    if process_count() > 1:
        distributed.barrier()


def gathered(value: Any) -> list[Any]:
    """What each process has, in their order; plain data and CPU tensors."""
    values = [value] * process_count()
    if process_count() > 1:
        distributed.all_gather_object(values, value)
    return values


def averaged(values: Tensor) -> Tensor:
    """The mean over all processes."""
    if process_count() > 1:
        values = values.clone()
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


def accelerator_on(device: torch.device, given: Accelerator | None = None) -> Accelerator:
    """An accelerator for training on a device: the given one, or one of the same processes.

    Raises:
        TrainingError: accelerate is not installed, or does not see the processes that there are.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise TrainingError(
            "expected the package accelerate, found none: pip install t5fx[train]"
        ) from error
    accelerator = given or Accelerator(cpu=device.type == "cpu")
    check_processes(accelerator)
    return accelerator


def check_processes(accelerator: Accelerator) -> None:
    """Refuse an accelerator that does not see all processes, each of which would train alone.

    Where torch.distributed is not initialised, WORLD_SIZE says how many a launcher has started.
    """
    ready = distributed.is_available() and distributed.is_initialized()
    started = process_count() if ready else int(os.environ.get("WORLD_SIZE", "1"))
    if started not in (1, accelerator.num_processes):
        raise TrainingError(
            f"expected accelerate to see the {started} processes that were started, got an "
            f"Accelerator of {accelerator.num_processes}: start them with torchrun or accelerate "
            f"launch, which set RANK, LOCAL_RANK and WORLD_SIZE, make the Accelerator after "
            f"torch.distributed is initialised, and say cpu=True on CPUs (--cpu, of the recipes)"
        )
