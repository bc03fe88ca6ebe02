"""The first step: what the machine is, and the two ceilings of everything on it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...harness.results import Experiment, Row
from ...suites import kernels
from .worker import Context


def ceilings(context: Context, name: str) -> Iterator[Row]:
    """The GPU's facts, and what a large copy and a large product reach."""
    experiment = Experiment("lease", name, _none)
    if context.rehearse:
        yield experiment.row("machine", "multiprocessors", 1.0, detail="sm_90")
        bandwidth, rate = 1e9, 1e9
    else:
        about = torch.cuda.get_device_properties(0)
        architecture = f"sm_{about.major}{about.minor}"
        count = float(about.multi_processor_count)
        yield experiment.row("machine", "multiprocessors", count, detail=architecture)
        yield experiment.row("machine", "memory", float(about.total_memory), unit="bytes")
        bandwidth, rate = kernels.ceilings()
    yield experiment.row("machine", "copy bandwidth", bandwidth, unit="bytes/s", better="higher")
    yield experiment.row("machine", "matrix product", rate, unit="FLOP/s", better="higher")


def _none(experiment: Experiment) -> list[Row]:
    """An experiment of the lease only makes rows."""
    return []
