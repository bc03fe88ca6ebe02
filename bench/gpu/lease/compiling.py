"""Compiles kernels into Triton's cache through the launches themselves, in a process without a GPU.

A launch asks the driver for the current device and its target alone, if it is only to compile. What
a process with the GPU launches later has the same key in the cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from t5fx.kernels.triton_kernels import configs

from ...harness.results import Experiment, Row
from .. import offline
from .machine import _none
from .worker import Context

#: A launch's sizes, which change nothing that is compiled.
SIZES = {"grid": (13, 17), "heads": 3}


class Target:
    """What a launch asks the driver of a GPU."""

    def __init__(self, architecture: str) -> None:
        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def case(
    context: Context,
    name: str,
    products: str,
    dim: int,
    architecture: str,
    kernel: str | None = None,
    settings: list[Any] | None = None,
) -> Iterator[Row]:
    """Every kernel of a forward and a backward; with other settings, that one alone."""
    triton.runtime.driver.set_active(Target(architecture))
    dtype = torch.float32 if products in ("float32", "tf32") else getattr(torch, products)
    key = architecture, kernel or "", dim, False
    measured = {key: configs.Config(*settings)} if settings else {}
    compile_only = triton.JITFunction.run
    seconds: dict[str, float] = {}
    errors: dict[str, str] = {}

    def run(one: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> None:
        if kernel not in (None, one.__name__):
            return
        start = time.perf_counter()
        try:
            compile_only(one, *args, grid=grid, warmup=True, **more)
        except Exception as error:  # Triton has no common class; the other kernels go on
            errors[one.__name__] = f"{type(error).__name__}: {error}".partition("\n")[0]
        taken = time.perf_counter() - start
        seconds[one.__name__] = seconds.get(one.__name__, 0.0) + taken

    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if products == "tf32" else "ieee"
    try:
        with mock.patch.dict(configs.MEASURED, measured):
            offline.each_launch(run, architecture, dtype, dim, **SIZES)
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    experiment = Experiment("lease", name, _none, dtype=products)
    for failed, detail in errors.items():
        # Candidates may not fit; what is in use must.
        status = "absent" if settings else "failed"
        yield experiment.row(failed, "compile", status=status, detail=detail)
    told = ", ".join(f"{one} {taken:.1f}" for one, taken in seconds.items())
    total = sum(seconds.values())
    yield experiment.row("Triton", "compile", total, unit="s", detail=f"seconds: {told}")
