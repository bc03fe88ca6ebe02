"""Times: the node against softmax, and each kernel alone over a few settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

from t5fx.analysis.measure import Spread
from t5fx.kernels.triton_kernels import configs, first_order, launch

from ...harness.results import Experiment, Row
from ...suites import kernels
from .. import tune
from .machine import _none
from .worker import Context, is_lost

#: Milliseconds that a contender, and a candidate, is timed for.
TIMED, CANDIDATE = 100, 40
IN_USE = "in use"


def attention(context: Context, name: str, shape: list[int], work: str) -> Iterator[Row]:
    """Rows of the suite "kernels": t5 and softmax by each backend, at one shape."""
    batch, heads, tokens, dim = shape
    with_backward = work != "forward"
    mode = "training" if with_backward else "inference"
    experiment = Experiment("kernels", name, _none, tokens, batch, "bfloat16", mode)
    device = context.device.type
    tensors, settings = kernels.arguments(batch, heads, tokens, dim, device)
    times: dict[str, Spread] = {}
    for contender, call in rivals(kernels.contenders(tensors, settings, with_backward)):
        if isinstance(call, str):
            yield experiment.row(contender, "latency", status="absent", detail=call)
            continue
        try:
            if contender == "t5fx":
                kernels.check(tensors, settings)
            times[contender] = clock(context, call, TIMED)
        except Exception as error:  # the others have their times
            yield experiment.raised(contender, error)
            torch.cuda.empty_cache()
            continue
        how = "stubbed" if context.rehearse else f"replays of a CUDA graph for {TIMED} ms"
        yield kernels.latency(experiment, contender, times[contender], how)
    if context.rehearse:
        with mock.patch.object(kernels, "ceilings", return_value=(1e9, 1e9)):
            yield from kernels.shares(experiment, (batch, heads, tokens, dim), with_backward, times)
    else:
        yield from kernels.shares(experiment, (batch, heads, tokens, dim), with_backward, times)


def rivals(contenders: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """t5 and softmax, without the reference, which is long to compile, and other libraries."""
    wanted = ["t5fx", *(backend.name for backend in kernels.BACKENDS)]
    for name, call in contenders:
        if name in wanted:
            wanted.remove(name)
            yield name, call
        if not wanted:
            return


def clock(context: Context, call: Callable[[], object], milliseconds: int) -> Spread:
    """Seconds of a call as a CUDA graph; in a rehearsal, of one call."""
    if not context.rehearse:
        return kernels.replayed(call, milliseconds)
    start = time.perf_counter()
    call()
    return Spread.of([time.perf_counter() - start])


def alone(context: Context, name: str, kernel: str, shape: list[int], most: int) -> Iterator[Row]:
    """One kernel's launches in a forward and a backward, with the settings in use and others.

    most: how many others.
    """
    batch, heads, tokens, dim = shape
    experiment = Experiment("lease", name, _none, tokens, batch, "bfloat16", "training")
    tensors, settings = kernels.arguments(batch, heads, tokens, dim, context.device.type)
    grad_out = torch.randn_like(tensors[2])
    call = partial(kernels.kernels, tensors, settings, grad_out)
    gpu = launch.architecture(tensors[0].device)
    used = tune.start(kernel, gpu, dim)
    others = tune.candidates(kernel, gpu, dim)
    key = gpu, kernel, dim, False
    wanted: list[torch.Tensor] = []
    for config in [used, *others[:most]]:
        contender = difference(used, config)
        row = partial(experiment.row, contender, "latency", unit="s", better="lower")
        try:
            with mock.patch.dict(configs.MEASURED, {key: config}), recorded(kernel) as launches:
                found = call()
                if wanted and tune.differ(found, wanted):
                    yield row(status="refused", detail="other results than with those in use")
                    continue
            # Copies: to launch a kernel again that works in place changes what it gave.
            wanted = wanted or [t.clone() for t in found]
            yield row(clock(context, partial(_all, launches), CANDIDATE))
        except Exception as error:
            if config == used or is_lost(str(error)):
                raise
            detail = f"{type(error).__name__}: {error}".partition("\n")[0]
            yield row(status="absent", detail=detail)  # it does not fit the GPU


def difference(used: configs.Config, config: configs.Config) -> str:
    """What tells settings from those in use."""
    pairs = zip(config._fields, used, config, strict=True)
    return ", ".join(f"{n} {b}" for n, a, b in pairs if a != b) or IN_USE


def _all(launches: list[Callable[[], object]]) -> None:
    for one in launches:
        one()


@contextmanager
def recorded(kernel: str) -> Iterator[list[Callable[[], object]]]:
    """The launches of a kernel, to be done again with the same arguments."""
    found: list[Callable[[], object]] = []
    kind: Any = type(first_order.inner_gradient)  # of JITFunction, or the interpreter's
    run = kind.run

    def record(one: Any, *args: Any, **settings: Any) -> Any:
        if one.__name__ == kernel:
            found.append(partial(run, one, *args, **settings))
        return run(one, *args, **settings)

    with mock.patch.object(kind, "run", record):
        yield found
    if not found:
        raise LookupError(f"expected launches of {kernel} in a forward and a backward, got none")
