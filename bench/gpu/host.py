"""What a call of the Triton kernels costs on the host, in Python: python -m t5fx.bench.gpu.host

The tensors are small and on a CPU, and Triton's launcher does nothing, so that any machine can say.
What torch's dispatcher and autograd, Triton's launcher and the driver take comes on top.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled

from t5fx.kernels.triton_kernels import backward, forward, launch

#: (heads, tokens along an axis of the grid, D).
SHAPE = (12, 8, 64)
REPEATS = 500


def calls() -> dict[str, Callable[[], object]]:
    """A forward and a backward of a packed projection in bfloat16."""
    heads, side, dim = SHAPE
    sizes = {"dtype": torch.bfloat16, "device": "cpu"}
    packed = torch.empty(1, side * side, 3, heads, dim, **sizes)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    weights = [torch.empty(heads, dim, dim, **sizes) for _ in range(3)]
    taps, bias = torch.empty(heads * dim, 1, 3, 3, **sizes), torch.empty(heads * dim, **sizes)
    conv = [taps, bias, taps, bias]
    settings = {
        "scale": dim**-0.5, "grid": (side, side), "prefix": 0, "key_norm_eps": 1.0,
        "locality": "dwc_qk",
    }  # fmt: skip
    out, saved = forward(q, k, v, weights, conv, **settings)
    grad = torch.empty_like(out)
    return {
        "forward": lambda: forward(q, k, v, weights, conv, **settings),
        "backward": lambda: backward(grad, q, k, v, weights, conv, saved, **settings),
    }


def microseconds(call: Callable[[], object]) -> float:
    """Of the fastest call: others were interrupted."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e6 * min(times)


def measure() -> dict[str, float]:
    """Microseconds of a forward and of a backward."""

    def run(kernel: object, *args: Tensor, **settings: object) -> None:
        """Instead of a launch."""

    # So an operator's body runs where nothing is traced.
    with (
        mock.patch.object(triton.JITFunction, "run", run),
        mock.patch.object(launch, "check_device"),
        set_wrap_triton_enabled(False),
    ):
        return {name: microseconds(call) for name, call in calls().items()}


if __name__ == "__main__":
    for name, took in measure().items():
        print(f"{name}: {took:.0f} us")
