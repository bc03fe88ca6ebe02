"""Attention spelled by hand: softmax(s q k^T) v, in the orders people write it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from t5fx.graph.view import View
from t5fx.patterns.base import Binding, Pattern, Refusal
from t5fx.patterns.chains import axis_of, bound


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


class Spelled(Pattern):
    """A product of two tensors, a softmax over one of its token axes, a product with a third."""

    name = "spelled"
    anchor = "softmax"

    examples: ClassVar = {
        "product scaled": lambda q, k, v: ((q @ k.mT) * _scale(q)).softmax(-1) @ v,
        "product divided": lambda q, k, v: (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v,
        "queries scaled": lambda q, k, v: (q * _scale(q) @ k.mT).softmax(-1) @ v,
        "keys scaled": lambda q, k, v: (q @ (k * _scale(q)).mT).softmax(-1) @ v,
        "both by the root": lambda q, k, v: (
            ((q * _scale(q) ** 0.5) @ (k * _scale(q) ** 0.5).mT).softmax(-1) @ v
        ),
        "queries scaled in place": lambda q, k, v: (
            (q.clone().mul_(_scale(q)) @ k.mT).softmax(-1) @ v
        ),
        "product scaled in place": lambda q, k, v: (q @ k.mT).mul_(_scale(q)).softmax(-1) @ v,
        "product scaled in place, on its own": lambda q, k, v: (
            _scaled_in_place(q @ k.mT, _scale(q)).softmax(-1) @ v
        ),
        "keys scaled in place, on their own": lambda q, k, v: (
            (q @ _scaled_in_place(k.clone(), _scale(q)).mT).softmax(-1) @ v
        ),
        "a tensor's scale": lambda q, k, v: (
            (q @ k.mT / torch.sqrt(torch.tensor(float(q.shape[-1])))).softmax(-1) @ v
        ),
        "greatest score subtracted": lambda q, k, v: _without_maximum(q, k).softmax(-1) @ v,
        "a number a query added": lambda q, k, v: (
            (q @ k.mT * _scale(q) + q.sum(-1, keepdim=True)).softmax(-1) @ v
        ),
        "keys first": lambda q, k, v: (v.mT @ (k @ q.mT * _scale(q)).softmax(-2)).mT,
        "bmm": lambda q, k, v: torch.bmm(
            torch.bmm(_flat(q) * _scale(q), _flat(k).transpose(1, 2)).softmax(-1), _flat(v)
        ).view_as(v),
        "baddbmm": lambda q, k, v: torch.bmm(
            torch.baddbmm(
                q.new_empty(q.shape[0] * q.shape[1], q.shape[2], q.shape[2]),
                *(_flat(q), _flat(k).mT),
                beta=0,
                alpha=_scale(q),
            ).softmax(-1),
            _flat(v),
        ).view_as(v),
        "einsum": lambda q, k, v: torch.einsum(
            "bhnm,bhmd->bhnd", torch.einsum("bhnd,bhmd->bhnm", q, k).mul(_scale(q)).softmax(-1), v
        ),
        "einsum with an ellipsis": lambda q, k, v: torch.einsum(
            "...nm,...md->...nd",
            torch.einsum("...nd,...md->...nm", q * _scale(q), k).softmax(-1),
            v,
        ),
        "softmax in float32": lambda q, k, v: (
            F.softmax(q @ k.mT * _scale(q), dim=-1, dtype=torch.float32).type_as(q) @ v
        ),
        "no NaN": lambda q, k, v: (q @ k.mT * _scale(q)).softmax(-1).nan_to_num() @ v,
        "inactive dropout": lambda q, k, v: (
            F.dropout((q @ k.mT * _scale(q)).softmax(-1), 0.1, training=False) @ v
        ),
        "a mask of zeros": lambda q, k, v: (
            (q @ k.mT * _scale(q) + torch.zeros(q.shape[2], q.shape[2])).softmax(-1) @ v
        ),
        "log-softmax before": lambda q, k, v: (
            (q @ k.mT * _scale(q)).log_softmax(-1).softmax(-1) @ v
        ),
        "one key head, broadcast": lambda q, k, v: (
            (q @ k[:, :1].mT * _scale(q)).softmax(-1) @ v[:, :1]
        ),
    }
    rejects: ClassVar = {
        "soft cap": (
            "scores-changed",
            lambda q, k, v: ((q @ k.mT * _scale(q)).tanh() * 5).softmax(-1) @ v,
        ),
        "clamped": (
            "scores-changed",
            lambda q, k, v: (q @ k.mT * _scale(q)).clamp(-1, 1).softmax(-1) @ v,
        ),
        "a number a key added": (
            "masked",
            lambda q, k, v: (q @ k.mT * _scale(q) + k.sum(-1)[..., None, :]).softmax(-1) @ v,
        ),
        "the greatest of each key subtracted": (
            "masked",
            lambda q, k, v: (q @ k.mT - (q @ k.mT).amax(-2, keepdim=True)).softmax(-1) @ v,
        ),
        "scaled by its own maximum": (
            "scores-changed",
            lambda q, k, v: _by_maximum(q @ k.mT).softmax(-1) @ v,
        ),
        "softmax over the queries": (
            "not-attention",
            lambda q, k, v: (q @ k.mT * _scale(q)).softmax(-2) @ v,
        ),
        "greatest score returned": (
            "probabilities-used",
            lambda q, k, v: _and_maximum(q @ k.mT * _scale(q), v),
        ),
        "log-softmax over the queries": (
            "scores-changed",
            lambda q, k, v: (q @ k.mT * _scale(q)).log_softmax(-2).softmax(-1) @ v,
        ),
    }

    @staticmethod
    def shape(q: Any, k: Any, v: Any) -> Any:
        scores = torch.matmul(q, k)
        probabilities = torch.softmax(scores, -1)
        return torch.matmul(probabilities, v)

    def bind(self, view: View, found: dict[str, fx.Node]) -> Binding:
        softmax = found["softmax"]
        return bound(view, found["matmul"], softmax, found["matmul_1"], axis_of(view, softmax))

    def missed(
        self, view: View, anchor: fx.Node, before: list[fx.Node], after: list[fx.Node]
    ) -> Refusal | None:
        if after and not before:
            detail = f"the softmax '{anchor.name}' weighs values by something else than q k^T"
            return Refusal("not-attention", detail)
        factors = [n for product in before for n in view.inputs(product)]
        if before and not after and all(map(view.depends_on_input, factors)):
            detail = f"no product sums values by the probabilities '{anchor.name}'"
            return Refusal("probabilities-used", detail)
        return None


def _without_maximum(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.mT * _scale(q)
    return scores - scores.max(dim=-1, keepdim=True).values.detach()


def _scaled_in_place(x: Tensor, scale: float) -> Tensor:
    x.mul_(scale)
    return x


def _by_maximum(scores: Tensor) -> Tensor:
    return scores / scores.amax(-1, keepdim=True)


def _and_maximum(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v + scores.amax(-1, keepdim=True)
