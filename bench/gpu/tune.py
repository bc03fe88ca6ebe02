"""Finds faster settings for the Triton kernels on the GPU at hand: python -m t5fx.bench.gpu.tune

For each kernel, from the settings in use, one of them is doubled or halved at a time and kept where
the whole forward and backward are faster and right. It prints rows for `MEASURED` in
kernels/triton/configs.py, and writes them to docs/bench/configs.json with what they were found on.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from t5fx.analysis.clock import device_name
from t5fx.errors import T5Error
from t5fx.kernels.triton_kernels import configs
from t5fx.kernels.triton_kernels.configs import Config
from t5fx.kernels.triton_kernels.launch import architecture

from ..suites import kernels
from . import assembler

FILE = Path("docs/bench/configs.json")
#: (batch, heads, tokens, dim) that are tuned for.
SHAPES = ((1, 12, 16384, 64), (1, 12, 16384, 128))
#: A change must gain this share of the time, or it is noise.
GAIN = 0.02


@functools.cache
def most_stages() -> int:
    """Stages of a software pipeline that may be tried with the compiler in use.

    One, which is no pipeline, with Triton 3.6 or older or an assembler of CUDA 12.8 or older: there
    are reports of wrong results of matrix instructions with them (triton-lang/triton #11781, #9433,
    #10573, #10821; fla-org/flash-linear-attention #826, #1262).
    """
    if tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 6):
        return 1
    used = assembler.used()
    return 1 if used is not None and used.version[:2] <= (12, 8) else 4


def neighbours(config: Config) -> Iterator[Config]:
    """Settings with one of them twice or half as large, within what kernels take, or turned."""
    limits = {"block_n": (4, 256), "block_m": (16, 256), "warps": (4, 16),
              "stages": (1, most_stages()), "programs": (1, 8), "parts": (1, 4)}  # fmt: skip
    for field, (least, most) in limits.items():
        value = getattr(config, field)
        for other in (2 * value, value // 2):
            if value and least <= other <= most:
                yield config._replace(**{field: other})
    if config.block_m:  # kernels that multiply convolve in a loop over columns, or without
        yield config._replace(unroll=not config.unroll)
        yield from (config._replace(ahead=a) for a in range(3) if a != config.ahead)


def start(kernel: str, gpu: str, width: int) -> Config:
    """The settings in use for products of 16 bits."""
    return configs.config(kernel, gpu, width, False)


def fits(kernel: str, config: Config, width: int) -> bool:
    """Whether they are other settings than those with fewer blocks or parts would be."""
    if config.block_m > width:
        return False  # the same kernel as with one block of all hidden units
    if config.ahead and kernel != "query_output":
        return False  # it loads nothing ahead
    most = max(1, config.block_m // 16) if kernel == "second_order_gradient" else 1
    return config.parts <= most


def candidates(kernel: str, gpu: str, width: int) -> list[Config]:
    """The neighbours of the settings in use that fit."""
    return [c for c in neighbours(start(kernel, gpu, width)) if fits(kernel, c, width)]


def differ(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether one of several results is another than that of the settings in use."""
    pairs = zip(found, wanted, strict=True)
    return not all(
        (got.float() - want.float()).norm() <= 0.02 * want.float().norm() for got, want in pairs
    )


def descend(start: Config, seconds: Callable[[Config], float | None]) -> tuple[Config, float]:
    """(the best settings found, its time over that of the start) going from best to best.

    ``seconds`` gives None where settings do not work.
    """
    seconds(start)  # until the clocks have settled
    first = seconds(start)
    if first is None:
        raise T5Error(f"{start}: expected the settings in use to work")
    best, fastest, tried = start, first, {start}
    moved = True
    while moved:
        moved = False
        for other in neighbours(best):
            if other in tried:
                continue
            tried.add(other)
            time = seconds(other)
            if time is not None and time < (1 - GAIN) * fastest:
                best, fastest, moved = other, time, True
                break
    return best, fastest / first


def tune(shape: tuple[int, int, int, int]) -> Iterator[dict[str, object]]:
    """A row for each kernel whose settings can be bettered; they are in force from then on."""
    tensors, settings = kernels.arguments(*shape)
    call = partial(kernels.kernels, tensors, settings, torch.ones_like(tensors[2]))
    wanted = call()
    gpu = architecture(tensors[0].device)
    for kernel in configs.HALF:
        key = gpu, kernel, shape[3], False

        def seconds(config: Config, key: tuple[str, str, int, bool] = key) -> float | None:
            if not fits(key[1], config, key[2]):
                return None
            configs.MEASURED[key] = config
            try:
                found = call()
                time = kernels.replayed(call).median
            except Exception as error:  # Triton has no common class for what does not fit
                print(f"  {key[1]} {tuple(config)}: {type(error).__name__}")
                return None
            if differ(found, wanted):
                print(f"  {key[1]} {tuple(config)}: other results")
                return None
            return time

        used = start(kernel, gpu, shape[3])
        best, share = descend(used, seconds)
        configs.MEASURED[key] = best
        print(f"{key}: {best},  # {1 / share:.2f}x of {shape}", flush=True)
        if best != used:
            yield {"key": key, "config": best, "speed-up of all": 1 / share, "shape": shape}


def main() -> None:
    if not torch.cuda.is_available():
        raise T5Error("expected a CUDA GPU, got none; the settings are of GPUs")
    found: list[dict[str, object]] = []
    machine = {
        "gpu": device_name(torch.device("cuda")),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    FILE.parent.mkdir(parents=True, exist_ok=True)
    for row in itertools.chain.from_iterable(map(tune, SHAPES)):
        found.append(row)
        FILE.write_text(json.dumps({**machine, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
