"""Gradients of new parameters under DDP."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from t5fx.backend import adapters as adapters
from t5fx.kernels import TTT


@dataclasses.dataclass
class Averaged:
    """The DDP module that a node's gradients are averaged for, and the hooks that do it."""

    ddp: weakref.ref[DistributedDataParallel]
    handles: list[Any]


def average_gradients(ddp: DistributedDataParallel, node: TTT) -> None:
    """Average a node's gradients over the ranks, as DDP does for the model's own parameters.

    Fresh parameters are equal on all ranks by construction.
    """
    known = _averaged.get(node)
    if known is not None and known.ddp() is ddp:
        return
    reference = weakref.ref(ddp)

    def average(parameter: torch.Tensor) -> None:
        module = reference()
        if module is not None and module.require_backward_grad_sync:
            assert parameter.grad is not None
            torch.distributed.all_reduce(parameter.grad, group=module.process_group)
            parameter.grad /= module.process_group.size()

    for handle in known.handles if known is not None else ():
        handle.remove()
    handles = [p.register_post_accumulate_grad_hook(average) for p in node.parameters()]
    _averaged[node] = Averaged(reference, handles)


_averaged: weakref.WeakKeyDictionary[TTT, Averaged] = weakref.WeakKeyDictionary()
