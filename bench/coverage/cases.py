"""What the coverage suite runs: a model, one call of it, and what must be found in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from t5fx.reports import REASONS, Report

#: A model in eval mode with the arguments of one call.
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A model of a library and what its attentions are, checked by hand in its source.

    build: makes the model (random weights) and the call, without network access.
    expected: how many sites of each kind (`outcome_of`), as in `"2 1+4x6+0, 1 causal"`: two that
        are rewritten, with one prefix token, a grid of 4 x 6 and no suffix, and a causal one.
    cause: why the tool is known not to give that, in a few words, where it does not.
    batch: items in the call; fixed: what is expected holds for no other number.
    """

    library: str
    name: str
    build: Callable[[], Call] = field(compare=False)
    expected: str
    cause: str = ""
    batch: int = 1
    fixed: bool = False

    def call(self, batch: int | None = None) -> Call:
        """The model, and its call for one item or two; None: for as many as the case has."""
        model, args, kwargs = self.build()
        if batch not in (None, self.batch) and not self.fixed:
            args, kwargs = _resized((args, kwargs), self.batch, batch)
        return model, args, kwargs


def _resized(value: Any, before: int, after: int) -> Any:
    """Arguments with the first items of a batch, or with the batch so often that it is as large."""
    if isinstance(value, dict):
        return {key: _resized(inner, before, after) for key, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(_resized(inner, before, after) for inner in value)
    if isinstance(value, list) and len(value) == before and isinstance(value[0], tuple):
        return (value * after)[:after]
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == before:
        return torch.cat([value] * after)[:after]
    return value


def parse(text: str) -> Counter[str]:
    """`"2 1+4x6+0, 1 causal"` to a counter; raises ValueError for an unknown reason."""
    counts: Counter[str] = Counter()
    for part in filter(None, map(str.strip, text.split(","))):
        number, _, kind = part.partition(" ")
        if kind not in REASONS and kind.count("+") != 2:
            raise ValueError(f"expected a reason or prefix+grid+suffix, got {kind!r}")
        counts[kind] += int(number)
    return counts


def show(counts: Counter[str]) -> str:
    """The inverse of `parse`, in a fixed order: layouts first."""
    order = sorted(counts, key=lambda kind: (kind in REASONS, kind))
    return ", ".join(f"{counts[kind]} {kind}" for kind in order)


def outcome_of(report: Report) -> Counter[str]:
    """How many sites of each kind: `prefix+grid+suffix` of rewritten ones, reasons of others."""
    return Counter(
        site.reason or f"{site.prefix}+{'x'.join(map(str, site.grid or ()))}+{site.suffix}"
        for site in report.sites
    )


def tensors(sizes: dict[str, Any]) -> dict[str, Any]:
    """Inputs by name: of a tuple of sizes normal random numbers, anything else as it is."""
    return {
        name: torch.randn(size) if isinstance(size, tuple) and size else size
        for name, size in sizes.items()
    }


def integers(*size: int, below: int = 16) -> Tensor:
    """Random integers from 1 to `below`, excluded."""
    return torch.randint(1, below, size)
