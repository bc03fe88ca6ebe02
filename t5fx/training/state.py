"""What a training that is interrupted goes on with, and the moving average of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from t5fx.checkpoint.files import differences
from t5fx.errors import TrainingError
from t5fx.training.batches import Batches
from t5fx.training.nodes import nodes_of, table
from t5fx.training.processes import is_first
from t5fx.training.resume import check_settings, newest, readable, save_folder
from t5fx.training.sharding import like, reshard, whole

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class FineTuneResult:
    """What a fine-tuning did.

    history: one record an interval, with the numbers of optimizer steps and of samples so far,
    the mean loss and gradient norm over the interval and all processes, the learning rate of the
    new parameters, seconds so far, and what `evaluate` returned, if it was called then.
    """

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def __str__(self) -> str:
        columns = list(dict.fromkeys(name for record in self.history for name in record))
        rows = [[f"{r[c]:.4g}" if c in r else "" for c in columns] for r in self.history]
        title = f"fine-tuned in {self.steps} steps, {self.samples} samples, {self.seconds:.1f} s"
        return table(title, columns, rows)


class Average:
    """The moving average of parameters; as a context, they have its values at its end."""

    def __init__(self, parameters: list[Tensor], decay: float | None) -> None:
        self.parameters, self.values = parameters, list[Tensor]()
        if decay is not None:
            self.values = [p.detach().clone() for p in parameters]
            self.step = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        if self.values:
            self.step(self.values, [p.detach() for p in self.parameters], None)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The parameters have the average's values meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for i, value in enumerate(self.values):
            kept = self.parameters[i].detach().clone()
            self.parameters[i].copy_(value)
            self.values[i] = kept


@dataclass(eq=False)
class TrainingState:
    """All that changes while a model is trained, as accelerate's `register_for_checkpointing`
    wants it; the states of the devices' random number generators are accelerate's to keep.

    What is saved is whole, whether the model is on one process, under DDP or sharded by FSDP2: any
    of them, and any number of processes, can go on from it.
    """

    folder: str | Path | None
    settings: Mapping[str, Any]
    module: nn.Module
    optimizer: Any
    schedule: Any
    average: Average
    batches: Batches
    result: FineTuneResult
    interval: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        reshard(self.module)
        state = whole(
            {
                "settings": dict(self.settings),
                "parameters": {name: p.detach() for name, p in self._parameters().items()},
                "buffers": dict(self.module.named_buffers()),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "average": self.average.values,
                "batches": self.batches.state_dict(),
                "result": dict(vars(self.result)),
                "interval": self.interval,
            }
        )
        if not is_first():
            return {}
        moved: dict[str, Any] = pytree.tree_map_only(Tensor, lambda t: t.cpu(), state)
        return moved

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_settings(self.folder, state["settings"], self.settings)
        reshard(self.module)
        parameters, buffers = self._parameters(), dict(self.module.named_buffers())
        for own, found in ((parameters, state["parameters"]), (buffers, state["buffers"])):
            if own.keys() != found.keys():
                raise TrainingError(
                    f"checkpoint: expected the state of a training of the same parameters, "
                    f"{differences(own, found)}: delete the checkpoint to start anew"
                )
            for name, tensor in own.items():
                tensor.copy_(like(found[name], tensor))
        trained = list(parameters.values())
        for index, values in state["optimizer"]["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == trained[index].shape:
                    values[name] = like(value, trained[index])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for value, found in zip(self.average.values, state["average"], strict=True):
            value.copy_(like(found, value))
        vars(self.result).update(state["result"])
        self.interval[:] = state["interval"]
        self.batches.load_state_dict(state["batches"])

    def _parameters(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name, in the optimizer's order."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        for key, node in nodes_of(self.module).items():  # which may be beside the module
            names |= {id(p): f"{key}.{name}" for name, p in node.named_parameters()}
        groups = self.optimizer.param_groups
        return {names[id(p)]: p for group in groups for p in group["params"]}


@contextmanager
def registered(accelerator: Accelerator, state: TrainingState) -> Iterator[None]:
    """accelerate saves and loads it meanwhile, and nothing else of the training.

    What it prepared is released: it would be saved twice, and under DDP with other names.
    """
    accelerator.free_memory()
    accelerator.register_for_checkpointing(state)
    try:
        yield
    finally:
        accelerator._custom_objects.remove(state)


def save(accelerator: Accelerator, folder: Path, state: TrainingState) -> None:
    """Keep the state after a step in a folder, all of it or what was there before."""
    save_folder(folder, state.result.steps, lambda path: accelerator.save_state(str(path)))


def resume(accelerator: Accelerator, folder: Path) -> None:
    """Go on from the state that `save` left in a folder, if there is one.

    Raises:
        TrainingError: it is damaged, or of a training with other settings or parameters.
    """
    path = newest(folder)
    if path is not None:
        with readable(path):
            accelerator.load_state(str(path))
