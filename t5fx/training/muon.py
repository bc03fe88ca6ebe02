"""Muon for stacks of matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

#: Coefficients of the quintic Newton-Schulz iteration, as Keller Jordan published them.
_A, _B, _C = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, each matrix of a stack [..., n, m] for itself.

    As `torch.optim.Muon` (Jordan et al. 2024), which takes 2-D parameters only, does it for one
    matrix without weight decay; a node's [H, D, D] are H matrices.

    Args:
        params: of two or more axes.
        lr: root mean square of an update's elements, about, as of AdamW.
        momentum: Nesterov's.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.95, steps: int = 5
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "steps": steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"])
                scale = max(parameter.shape[-2:]) ** 0.5
                parameter.sub_(orthogonal(update, group["steps"]), alpha=group["lr"] * scale)


def orthogonal(x: Tensor, steps: int) -> Tensor:
    """Each matrix [..., n, m] with its singular values moved to about one."""
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-20)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x
