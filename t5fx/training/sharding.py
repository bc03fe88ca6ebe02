"""Models whose parameters FSDP2 (`torch.distributed.fsdp.fully_shard`) has split over processes.

While a block of such a model runs, whole parameters stand in the place of the split ones, and may
stay there until the next backward pass. What sets, reads or writes parameters therefore calls
`reshard` first, and finds them by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from t5fx.errors import TrainingError
from t5fx.wrappers import is_split


def shards(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules in it that `fully_shard` was called on, by name, a parent before its children."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return ((name, m) for name, m in module.named_modules() if isinstance(m, kind))


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has split a module, or a part of it."""
    return next(shards(module), None) is not None


def reshard(module: nn.Module) -> None:
    """Put the split parameters in their places, where whole ones were left there."""
    for _, one in shards(module):
        one.reshard()


def whole(values: Any) -> Any:
    """`values` with split tensors gathered to whole ones; every process has to call it."""
    return pytree.tree_map_only(Tensor, lambda t: t.full_tensor() if is_split(t) else t, values)


def like(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, the same in every process, split as `model` is, if that is."""
    if not is_split(model):
        return value
    from torch.distributed.tensor import distribute_tensor

    split: Any = model
    value = value.to(split.device)
    return distribute_tensor(value, split.device_mesh, split.placements, src_data_rank=None)


@torch.no_grad()
def gather(module: nn.Module, known: dict[int, nn.Parameter] | None = None) -> None:
    """Give a copy of a sharded module whole parameters in the place of its split ones.

    known: the whole ones that were made, by the id of the split one; tied ones stay tied.
    """
    known = {} if known is None else known
    for inner in module.modules():
        own: dict[str, Any] = inner._parameters
        for name, split in own.items():
            if is_split(split):
                if id(split) not in known:
                    known[id(split)] = nn.Parameter(split.full_tensor(), split.requires_grad)
                own[name] = known[id(split)]


def shard_alike(twin: nn.Module, module: nn.Module) -> None:
    """Shard a copy of a sharded module as that one is, a block at a time.

    twin: it has the split parameters of `module`, or copies of them, and no hooks of FSDP.
    """
    from torch.distributed.fsdp import fully_shard

    known: dict[int, nn.Parameter] = {}
    for name, one in reversed(list(shards(module))):
        mesh: Any = next(p for p in one.parameters() if is_split(p)).device_mesh  # type: ignore[attr-defined]
        part = twin.get_submodule(name)
        parts = [inner for _, inner in shards(part)]
        sharded = {id(p) for inner in parts for p in inner.parameters()}
        known |= {id(p): p for p in part.parameters() if id(p) in sharded}
        gather(part, known)
        fully_shard(part, mesh=mesh)


def check_sharding(module: nn.Module) -> None:
    """Raise for a parameter that is to be trained and that nobody averages the gradients of.

    Raises:
        TrainingError: some parameters are split over processes, and one that requires gradients is
            not.
    """
    if not is_sharded(module):
        return
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not is_split(parameter):
            raise TrainingError(
                f"expected every parameter that is trained to be sharded, got '{name}', which "
                f"would become another one in each process: call fully_shard on the model itself "
                f"after its blocks"
            )
