"""A converted model beside the original: how near its outputs are, and how much faster it is."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from t5fx.analysis.clock import interleave
from t5fx.analysis.measure import Spread
from t5fx.cli.models import Loaded
from t5fx.errors import T5Error
from t5fx.training.distill import cosine, relative
from t5fx.training.nodes import as_call

#: The rounds in which both are timed, and the largest relative difference of a compiled output.
ROUNDS, TOLERANCE = 9, 2e-2


class Agreement:
    """The mean cosine, in -1..1, of a model's outputs (their last axis) with the original's.

    Of the photographs that are held out; 1 is the original. The original's outputs are computed
    once, with the model as it was loaded.
    """

    def __init__(self, loaded: Loaded, batches: Iterable[Any]) -> None:
        self.calls = [_call(loaded, batch) for batch in batches]
        with torch.no_grad():
            self.wanted = [loaded.model(*args, **kwargs) for args, kwargs in self.calls]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        found = [
            1 - float(cosine(model(*args, **kwargs), wanted))
            for (args, kwargs), wanted in zip(self.calls, self.wanted, strict=True)
        ]
        return statistics.fmean(found)


@torch.no_grad()
def speed(loaded: Loaded, lin: nn.Module) -> Spread:
    """How many times faster a converted model is than the original at the example's sizes.

    The original is compiled with Inductor, the converted one with backend="t5"; the compiled
    outputs are compared with the eager ones first, then both are timed round by round.

    Raises `T5Error` where a compiled output is not the eager one.
    """
    calls: list[Callable[[], Any]] = []
    for model, backend in ((loaded.model, "inductor"), (lin, "t5")):
        fast = torch.compile(model, backend=backend, dynamic=False)
        call = partial(fast, *loaded.args, **loaded.kwargs)
        error = float(relative(call(), model(*loaded.args, **loaded.kwargs)).sqrt())
        if not error <= TOLERANCE:
            raise T5Error(
                f"--measure: expected the model compiled with {backend!r} to give the output of "
                f"the eager one, got a relative difference of {error:.3g}: a wrong result is not "
                f"timed"
            )
        calls.append(call)
    device = next(loaded.model.parameters()).device
    before, after = interleave(calls, ROUNDS, device)
    return Spread.of([old / new for old, new in zip(before, after, strict=True)])


@torch.no_grad()
def accuracy(loaded: Loaded, model: nn.Module, batches: Iterable[Any]) -> float:
    """The share of photographs whose class has the largest logit."""
    right = count = 0
    for batch in batches:
        args, kwargs = _call(loaded, batch)
        chosen = logits(model(*args, **kwargs)).argmax(-1)
        right += int((chosen == batch[1].to(chosen.device)).sum())
        count += len(chosen)
    return right / count


def logits(output: Any) -> Tensor:
    """The logits [B, classes] of what a classifier returned: a tensor, or what has them."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.dim() != 2:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(output).__name__
        raise T5Error(f"expected a classifier, whose output is logits [B, classes], got {got}")
    return found


def _call(loaded: Loaded, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return as_call(batch, next(loaded.model.parameters()).device, loaded.call)
