"""Times of calls, taken in turn so that a busy machine is the same for all."""

from __future__ import annotations

import functools
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

#: Seconds that the rounds of one measurement may take, and how many there are.
BUDGET, ROUNDS = 1.0, (5, 30)

#: A call this many times as fast as the other in the first rounds needs no more of them.
CLEARLY = 3.0


def time_rounds(calls: list[Callable[[], Any]], device: torch.device) -> list[list[float]]:
    """Seconds of each call in each round, after two calls that warm up."""
    for call in calls:
        call()
    first = [clock(call, device) for call in calls]
    if max(first) > CLEARLY * min(first) and max(first) > BUDGET / 10:
        return [[seconds] for seconds in first]
    least, most = ROUNDS
    count = int(min(max(BUDGET / sum(first), least), most))
    # So many calls a time that the clock's own cost does not count.
    repeats = [max(1, math.ceil(1e-3 / seconds)) for seconds in first]
    return interleave(calls, count, device, repeats)


def clock(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Seconds of a call, the mean of several in a row; on CUDA those of the device."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def interleave(
    calls: Sequence[Callable[[], Any]],
    rounds: int,
    device: torch.device,
    repeats: Sequence[int] | None = None,
) -> list[list[float]]:
    """Seconds of each call in each round, the order of the calls turned every round."""
    seconds: list[list[float]] = [[] for _ in calls]
    for index in range(rounds):
        order = range(len(calls))
        for i in order if index % 2 else reversed(order):
            seconds[i].append(clock(calls[i], device, repeats[i] if repeats else 1))
    return seconds


@functools.cache
def device_name(device: torch.device) -> str:
    """What a user calls the device: the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
