"""What a second call has the time for: very many tokens, and offsets that need 64 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...harness.results import Experiment, Row
from ...suites import kernels
from . import exactness
from .machine import _none
from .worker import Context


def offsets(context: Context, name: str, heads: int, tokens: int, dim: int) -> Iterator[Row]:
    """The last head of a packed projection of more than 2**31 numbers gives the bits of a small
    one's.
    """
    experiment = Experiment("lease", name, _none, tokens, 1, "bfloat16", "training")
    tensors, settings = kernels.arguments(1, 1, tokens, dim, context.device.type)
    grad_out = torch.randn_like(tensors[2])
    small = kernels.kernels(tensors, settings, grad_out)
    packed = torch.empty(1, tokens, heads, dim, dtype=kernels.DTYPE, device=context.device)
    for i in range(3):
        packed[:, :, heads - 3 + i] = tensors[i][:, 0]
        tensors[i] = packed[:, :, heads - 3 + i, None].transpose(1, 2)
    large = kernels.kernels(tensors, settings, grad_out)
    if all(torch.equal(a, b) for a, b in zip(small, large, strict=True)):
        yield experiment.row("t5fx", "equal bits", 1.0)
    else:
        detail = "other bits than where all offsets are small"
        yield experiment.row("t5fx", "equal bits", status="refused", detail=detail)


def million(context: Context, name: str) -> Iterator[Row]:
    """A grid of 1,024 x 1,024 against float64."""
    case = {"dtype": "bfloat16", "grid": (1024, 1024), "batch": 1, "heads": 1}
    found = exactness.compared(context, case)
    yield from exactness.rows(exactness.experiment(name, case), found, 1)
