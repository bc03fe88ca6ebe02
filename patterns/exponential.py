"""Softmax written out: exponentials of the scores, divided by their sum over the keys."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional

from t5fx.graph.view import View
from t5fx.patterns.base import Binding, Pattern, Unlike
from t5fx.patterns.chains import SUMS, axis_of, bound, divides, spread

_SAME_VALUES = ("to", "identity")


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * q.shape[-1] ** -0.5


def _shares(scores: Tensor) -> Tensor:
    exponentials = scores.exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def _safe(scores: Tensor) -> Tensor:
    exponentials = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return exponentials / exponentials.sum(dim=-1)[..., None]


def _without_logsumexp(scores: Tensor) -> Tensor:
    return scores - torch.logsumexp(scores, -1, keepdim=True)


def _late(exponentials: Tensor, v: Tensor) -> Tensor:
    return (exponentials @ v) / exponentials.sum(-1, keepdim=True)


def _softened(exponentials: Tensor, v: Tensor) -> Tensor:
    return (exponentials / (exponentials.sum(-1, keepdim=True) + 1e-6)) @ v


def _over_queries(exponentials: Tensor, v: Tensor) -> Tensor:
    return (exponentials / exponentials.sum(-2, keepdim=True)) @ v


def _normalised_by_torch(exponentials: Tensor, v: Tensor) -> Tensor:
    return functional.normalize(exponentials, p=1, dim=-1) @ v


def _normalised_in_squares(exponentials: Tensor, v: Tensor) -> Tensor:
    return functional.normalize(exponentials, dim=-1) @ v


def _powers(scores: Tensor) -> Tensor:
    """exp(x) as 2^(x log2 e), the way of kernels."""
    scores = scores * math.log2(math.e)
    powers = torch.exp2(scores - scores.amax(dim=-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True)


def _and_sum(exponentials: Tensor, v: Tensor) -> Tensor:
    total = exponentials.sum(-1, keepdim=True)
    return (exponentials / total) @ v + total


class Exponential(Pattern):
    """A product, exp, a product with a third tensor, and a division before or after the latter."""

    name = "exponential"
    anchor = "exp"
    telling = False

    examples: ClassVar = {
        "divided": lambda q, k, v: _shares(_scores(q, k)) @ v,
        "greatest score subtracted": lambda q, k, v: _safe(_scores(q, k)) @ v,
        "divided at last": lambda q, k, v: _late(_scores(q, k).exp(), v),
        "log-sum-exp subtracted": lambda q, k, v: _without_logsumexp(_scores(q, k)).exp() @ v,
        "normalised by torch": lambda q, k, v: _normalised_by_torch(_scores(q, k).exp(), v),
        "log-softmax": lambda q, k, v: _scores(q, k).log_softmax(-1).exp() @ v,
    }
    rejects: ClassVar = {
        "never divided": (None, lambda q, k, v: _scores(q, k).exp() @ v),
        "a number added to the sum": (
            "probabilities-used",
            lambda q, k, v: _softened(_scores(q, k).exp(), v),
        ),
        "divided by the root of the squares": (
            "probabilities-used",
            lambda q, k, v: _normalised_in_squares(_scores(q, k).exp(), v),
        ),
        "sum over the queries": (
            "not-attention",
            lambda q, k, v: _over_queries(_scores(q, k).exp(), v),
        ),
        "sum returned": (
            "probabilities-used",
            lambda q, k, v: _and_sum(_scores(q, k).exp(), v),
        ),
        "exponentials of the features": (None, lambda q, k, v: q.exp() @ (k.exp().mT @ v)),
    }

    @staticmethod
    def shape(q: Any, k: Any, v: Any) -> Any:
        scores = torch.matmul(q, k)
        exponentials = torch.exp(scores)
        return torch.matmul(exponentials, v)

    def bind(self, view: View, found: dict[str, fx.Node]) -> Binding:
        return _bound(view, found["matmul"], found["exp"], found["matmul_1"])


class PowersOfTwo(Pattern):
    """Attention with powers of two instead of exponentials, 2^x = exp(x ln 2)."""

    name = "powers of two"
    anchor = "exp2"
    telling = False

    examples: ClassVar = {"powers": lambda q, k, v: _powers(_scores(q, k)) @ v}
    rejects: ClassVar = {
        "powers never divided": (None, lambda q, k, v: torch.exp2(_scores(q, k)) @ v),
        "sum of powers returned": (
            "probabilities-used",
            lambda q, k, v: _and_sum(torch.exp2(_scores(q, k)), v),
        ),
    }

    @staticmethod
    def shape(q: Any, k: Any, v: Any) -> Any:
        scores = torch.matmul(q, k)
        powers = torch.exp2(scores)
        return torch.matmul(powers, v)

    def bind(self, view: View, found: dict[str, fx.Node]) -> Binding:
        binding = _bound(view, found["matmul"], found["exp2"], found["matmul_1"])
        return replace(binding, scale=binding.scale * math.log(2))


def _bound(view: View, scores: fx.Node, exp: fx.Node, output: fx.Node) -> Binding:
    total = _sum(view, exp)
    if total is None:
        if (axis := _normalised(view, exp)) is None:
            raise Unlike
        return bound(view, scores, exp, output, axis)
    last = next(iter(output.users)) if len(output.users) == 1 else None
    axes = range(len(view.shape(output)))
    if last is None or not any(divides(view, last, output, total, axis) for axis in axes):
        last = None
    return bound(view, scores, exp, output, axis_of(view, total), total=total, last=last)


def _sum(view: View, exp: fx.Node) -> fx.Node | None:
    """The sum over an axis of the exponentials, or what divides them by it all at once.

    The sum of their absolute values is the same, as none of them is negative.
    """
    stack = [exp]
    while stack:
        for user in stack.pop().users:
            if view.op(user) in SUMS and axis_of(view, user) is not None:
                return user
            if view.op(user) in _SAME_VALUES:
                stack.append(user)
    return None


def _normalised(view: View, exp: fx.Node) -> int | None:
    """The axis over which what `exp` reads is log-softmax, written so or as x - logsumexp(x)."""
    node = view.inputs(exp)[0]
    while view.op(node) in _SAME_VALUES:
        node = view.inputs(node)[0]
    if view.op(node) == "log_softmax":
        return axis_of(view, node)
    if view.op(node) == "sub":
        first, other = view.arg(node, "input"), view.arg(node, "other")
        for axis in range(len(view.shape(node))):
            below = spread(view, other, node, axis)
            if below is not None and view.op(below) == "logsumexp":
                if view.inputs(below)[0] is first and axis_of(view, below) == axis:
                    return axis
    return None
