"""The students of `Align`: copies of nodes that learn while the original runs in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from t5fx.errors import TrainingError
from t5fx.frontend.copies import duplicate
from t5fx.kernels import TTT
from t5fx.training.sharding import gather, like, whole
from t5fx.wrappers import is_split


class Student:
    """The float32 copy of a node that is trained in its place, but for what is frozen of it."""

    def __init__(self, key: str, node: TTT) -> None:
        self.key = key
        self.original = node
        split = any(map(is_split, node.parameters()))
        twin: Any = duplicate(node, share=True) if split else copy.deepcopy(node)
        self.node: TTT = twin
        gather(self.node)
        self.node.float()
        self.attend = attention(node)
        self.projection = ""
        self.weight: Tensor | None = None
        self.merged: Tensor | None = None
        self.losses: list[Tensor] = []
        self.passes_on = False
        self.learns = False

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The node's parameters that are trained, by name."""
        return {name: p for name, p in self.node.named_parameters() if p.requires_grad}

    def softmax(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *_: Any,
        key_mask: Tensor | None = None,
        **__: Any,
    ) -> Tensor:
        """What the original does here, and kept to find out who reads it."""
        out = self.attend(q, k, v, key_mask=key_mask)
        self.merged = merge_heads(out)
        return out

    def learn(self, q: Tensor, k: Tensor, v: Tensor, *layout: Any, **named: Any) -> Tensor:
        """The softmax attention's output, or the student's own, and the loss of the one on it.

        The gradients of the loss are added to the student's where it `learns`. Tokens that do not
        count as keys do not count in the loss.
        """
        key_mask = named.get("key_mask")
        out = self.attend(q, k, v, key_mask=key_mask)
        wanted = merge_heads(out).float()
        learning = torch.set_grad_enabled(self.learns)
        with learning, torch.autocast(q.device.type, enabled=False):
            got = self.node(q.float(), k.float(), v.float(), *layout, **named)
            error = merge_heads(got) - wanted
            if self.weight is not None:
                error, wanted = error @ self.weight.mT, wanted @ self.weight.mT
            if key_mask is not None:
                error, wanted = (torch.where(key_mask[..., None], x, 0) for x in (error, wanted))
            tiny = torch.finfo(torch.float32).tiny
            loss = error.square().sum() / wanted.square().sum().clamp_min(tiny)
            if self.learns:
                loss.backward()
        self.losses.append(loss.detach())
        return got.detach().to(out.dtype) if self.passes_on else out

    def take_loss(self) -> Tensor:
        if not self.losses:
            raise TrainingError(
                f"'{self.key}' did not run: expected batches for which every rewritten attention "
                f"runs, as in the call that the model was linearized for"
            )
        losses, self.losses = self.losses, []
        return torch.stack(losses).mean()

    @torch.no_grad()
    def give_back(self) -> None:
        """The trained values to the node itself, in its dtype."""
        trained = dict(self.node.named_parameters())
        for name, parameter in self.original.named_parameters():
            parameter.copy_(like(trained[name].to(parameter.dtype), parameter))


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, N, Dv] to [B, N, H*Dv]."""
    return x.transpose(1, 2).flatten(2)


def attention(node: TTT) -> Callable[..., Tensor]:
    """The softmax attention that a node replaced, as its forward."""

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *_: Any,
        key_mask: Tensor | None = None,
        **__: Any,
    ) -> Tensor:
        mask = None
        if key_mask is not None:  # of an item none of whose keys counts all do
            mask = (key_mask | ~key_mask.any(1, keepdim=True))[:, None, None]
        return functional.scaled_dot_product_attention(q, k, v, mask, scale=node.scale)

    return forward


@contextmanager
def instead(
    nodes: Mapping[str, TTT], forward: Mapping[str, Callable[..., Tensor]]
) -> Iterator[None]:
    """The nodes compute something else meanwhile."""
    try:
        for key, node in nodes.items():
            node.forward = forward[key]  # type: ignore[method-assign]
        yield
    finally:
        for node in nodes.values():
            vars(node).pop("forward", None)


@contextmanager
def taught(students: Mapping[str, Student], module: nn.Module) -> Iterator[None]:
    """Each site of `module` teaches its student meanwhile; the module is the original but where
    students pass on what they make."""
    nodes = {key: s.original for key, s in students.items()}
    with torch.no_grad(), instead(nodes, {key: s.learn for key, s in students.items()}):
        yield


@torch.no_grad()
def find_projections(
    module: nn.Module, students: Mapping[str, Student], args: Any, kwargs: Any
) -> list[str]:
    """Find the linear layer that reads each attention's output and nothing else, by running it.

    It is a module inside the attention's owner with a weight [C, H*Dv] whose input is that very
    output, heads merged. Returns the sites' keys in the order in which they run.
    """
    handles = []
    order: list[str] = []

    def ran(key: str, student: Student) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            order.append(key)
            return student.softmax(*args, **kwargs)

        return forward

    for key, student in students.items():
        owner = key.rpartition(".")[0]
        width = student.node.num_heads * student.node.value_dim
        inside = module.get_submodule(owner) if owner else module
        for name, candidate in inside.named_modules():
            weight = candidate._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and weight.shape[1] == width:
                handles.append(
                    candidate.register_forward_pre_hook(
                        _Compare(student, f"{owner}.{name}".strip("."), weight)
                    )
                )
    nodes = {key: s.original for key, s in students.items()}
    try:
        with instead(nodes, {key: ran(key, s) for key, s in students.items()}):
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for student in students.values():
            student.merged = None
    return list(dict.fromkeys(order))


class _Compare:
    """A forward pre-hook: is what this layer reads the attention's output?"""

    def __init__(self, student: Student, name: str, weight: Tensor) -> None:
        self.student, self.name, self.weight = student, name, weight

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        merged = self.student.merged
        read = next((a for a in args if isinstance(a, Tensor)), None)
        if merged is None or read is None or read.numel() != merged.numel():
            return
        if torch.equal(read.reshape(merged.shape), merged.to(read.dtype)):
            self.student.projection = self.name
            self.student.weight = whole(self.weight.detach()).float()
            self.student.merged = None
