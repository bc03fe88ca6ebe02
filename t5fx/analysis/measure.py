"""What softmax attention and a TTT node cost on a device, measured: `policy="measure"`.

Both are compiled by Inductor at the sizes of a site, on random numbers, and timed in turn. The
costs are kept in memory and in a folder, a file for each device, code and shape.
"""

from __future__ import annotations

import contextvars
import dataclasses
import itertools
import json
import logging
import math
import statistics
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from t5fx import cache
from t5fx.analysis.clock import device_name, time_rounds
from t5fx.digest import code_digest
from t5fx.errors import MeasureError
from t5fx.kernels import TTT

log = logging.getLogger(__name__)

#: Above this many FLOPs of softmax, fewer items and heads are measured: they cost alike.
MOST_FLOPS = {"cpu": 2e12, "cuda": 2e14}


class Spread(NamedTuple):
    """First quartile, median and third quartile."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Shape:
    """One attention: what its cost depends on.

    trained: whether a backward pass follows.
    """

    batch: int
    heads: int
    tokens: int
    head_dim: int
    value_dim: int
    prefix: int
    grid: tuple[int, ...]
    dtype: str
    trained: bool
    masked: bool = False  # whether there is a key mask

    def key_mask(self, batch: int) -> Tensor | None:
        """One that hides the last token."""
        return (
            torch.arange(self.tokens).expand(batch, -1) < self.tokens - 1 if self.masked else None
        )


@dataclass(frozen=True)
class Cost:
    """Median seconds of both, and the quartiles of softmax's time over the node's.

    difference: of the Triton kernels' results from the reference's, relative, the largest of output
    and gradients of q, k and v; 0 of another implementation. allowed: how large it may be.
    """

    softmax: float
    ttt: float
    ratio: Spread
    difference: float = 0.0
    allowed: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether the kernels compute what the reference does."""
        return self.difference <= self.allowed

    @property
    def pays(self) -> bool:
        """Whether the node was faster in three rounds of four."""
        return self.ratio.low > 1

    def __str__(self) -> str:
        return f"softmax {1e3 * self.softmax:.3g} ms, TTT {1e3 * self.ttt:.3g} ms"


def cost(shape: Shape, settings: dict[str, Any], device: torch.device) -> Cost:
    """The cost of an attention, from memory, from the folder, or measured now.

    settings: of the node, `t5fx.kernels.TTT`'s keywords.

    Raises:
        MeasureError: the device has no memory of its own (meta); several ranks, which could decide
            differently, would measure; or the measurement itself failed.
    """
    # What the node starts from, and its scale, change no time.
    settings = {n: v for n, v in settings.items() if n not in ("seed", "scale", "key_norm_eps")}
    about = {
        **dataclasses.asdict(shape),
        **settings,
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "torch": torch.__version__,
        "code": code_digest(),
        **_switches(),
    }
    key = json.dumps(about, sort_keys=True)
    found = _known.get(key) or _load(key)
    if found is None:
        _refuse(device)
        log.info("measuring %s", key)
        found = _elsewhere(lambda: _measure(shape, settings, device), shape, device)
        _save(key, found)
    _known[key] = found
    return found


_known: dict[str, Cost] = {}

#: Two measurements at once would time each other.
_one_at_a_time = threading.Lock()


def _switches() -> dict[str, Any]:
    """Settings of torch, for the whole process, that change what either form costs."""
    backends = torch.backends.cuda
    return {
        "float32": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "flash": backends.flash_sdp_enabled(),
        "efficient": backends.mem_efficient_sdp_enabled(),
        "cudnn": backends.cudnn_sdp_enabled(),
    }


def _refuse(device: torch.device) -> None:
    if device.type == "meta":
        raise MeasureError(
            "policy='measure': expected a model on the device that it will run on, got tensors on "
            "the meta device; give it values first, or use policy='flops'"
        )
    if device.type not in MOST_FLOPS:
        raise MeasureError(
            f"policy='measure': expected a model on {' or '.join(MOST_FLOPS)}, got one on "
            f"{device.type}; use policy='flops'"
        )
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and torch.distributed.get_world_size() > 1:
        raise MeasureError(
            "policy='measure': ranks that measure could convert different sites; expected costs "
            f"in {cache.folder()}, which a run of one process with the same sizes leaves there, or "
            "policy='flops'"
        )


def _load(key: str) -> Cost | None:
    """A cost that is not there, or cannot be read, is measured again."""
    data = cache.load("cost", key)
    try:
        if data is None:
            return None
        ratio = Spread(*map(float, data["ratio"]))
        names = ("softmax", "ttt", "difference", "allowed")
        found = Cost(**{name: float(data[name]) for name in names}, ratio=ratio)
        return found if len(found.ratio) == 3 else None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is measured again: %s", cache.file_of("cost", key), error)
        return None


def _save(key: str, found: Cost) -> None:
    cache.save("cost", key, dataclasses.asdict(found), "measured costs")


# --- measuring ----------------------------------------------------------------------------------


def _elsewhere(work: Callable[[], Cost], shape: Shape, device: torch.device) -> Cost:
    """Run `work` in a thread of its own, and leave the random number generators as they are.

    The caller may be a Dynamo backend or run under autocast or a mode: all of that is a thread's.
    What is a context's, such as settings of the compiler, goes along.
    """
    results: list[Cost] = []
    errors: list[BaseException] = []
    threads = torch.get_num_threads()

    def run() -> None:
        torch.set_num_threads(threads)  # OpenMP's count, too, is a thread's
        gpus = [device] if device.type == "cuda" else []
        try:
            with _one_at_a_time, torch.random.fork_rng(gpus), _current(device):
                results.append(work())
        except BaseException as error:
            errors.append(error)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(run,), name="t5fx-measure")
    thread.start()
    thread.join()
    if errors:
        raise MeasureError(
            f"policy='measure': {shape} could not be measured on {device}: "
            f"{type(errors[0]).__name__}: {errors[0]}; policy='flops' decides without measuring"
        ) from errors[0]
    return results[0]


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """The device that events and streams are of."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Softmax(nn.Module):
    """Softmax attention between projections, [B, N, H, D] thrice to [B, N, H * Dv]."""

    def __init__(self, scale: float, key_mask: Tensor | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.key_mask = None if key_mask is None else key_mask[:, None, None]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, self.key_mask, scale=self.scale)
        return out.transpose(1, 2).flatten(2)


class _Node(nn.Module):
    """The node in its place. Its parameters are inputs, as in a compiled model."""

    def __init__(
        self, node: TTT, grid: tuple[int, ...], prefix: int, key_mask: Tensor | None = None
    ) -> None:
        super().__init__()
        self.counts = tuple(map(len, node.tensors()))
        place = {"grid": list(grid), "prefix": prefix, "key_mask": key_mask}
        self.settings = node.settings() | place

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        left = iter(tensors)
        lists = [list(itertools.islice(left, count)) for count in self.counts]
        out = torch.ops.t5fx.ttt(q, k, v, *lists, **self.settings)
        return out.transpose(1, 2).flatten(2)


def _measure(shape: Shape, settings: dict[str, Any], device: torch.device) -> Cost:
    batch, heads = _affordable(shape, MOST_FLOPS[device.type])
    dtype = getattr(torch, shape.dtype)
    sizes = (shape.head_dim, shape.head_dim, shape.value_dim)
    scale = shape.head_dim**-0.5
    with torch.device(device), torch.set_grad_enabled(shape.trained):
        node = TTT(
            *(heads, shape.head_dim, shape.value_dim, max(len(shape.grid), 1)),
            **settings,
            scale=scale,
            dtype=dtype,
        )
        inputs = [
            torch.randn(batch, shape.tokens, heads, size, dtype=dtype).requires_grad_(shape.trained)
            for size in sizes
        ]
        tensors = [tensor for some in node.tensors() for tensor in some]
        parameters = [t.detach().requires_grad_(shape.trained) for t in tensors]
        place, mask = (shape.grid, shape.prefix), shape.key_mask(batch)
        calls = [
            _call(_Softmax(scale, mask), inputs, shape.trained),
            _call(_Node(node, *place, mask), [*inputs, *parameters], shape.trained),
        ]
        difference, allowed = 0.0, 0.0
        if node.impl == "triton":
            node.impl = "reference"
            plain = _Node(node, *place, mask)
            exact = _call(plain, [*inputs, *parameters], shape.trained)
            difference, allowed = _difference(calls[1](), exact()), _ROUNDINGS * _rounding(dtype)
        rounds = time_rounds(calls, device)
    softmax, ttt = (statistics.median(times) for times in rounds)
    scaled = shape.batch * shape.heads / (batch * heads)
    ratio = Spread.of([s / t for s, t in zip(*rounds, strict=True)])
    return Cost(scaled * softmax, scaled * ttt, ratio, difference, allowed)


#: How far the kernels may be from the reference, in roundings of their dtype.
_ROUNDINGS = 12


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _difference(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative difference of the output and the gradients of q, k and v; NaN is inf."""
    pairs = list(zip(results, exact, strict=True))[:4]
    shares = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]
    return max(math.inf if math.isnan(share) else share for share in shares)


def _affordable(shape: Shape, flops: float) -> tuple[int, int]:
    """Items and heads to measure: all, unless softmax would need more FLOPs than these."""
    per_head = 2 * shape.tokens**2 * (shape.head_dim + shape.value_dim) * (1 + 2 * shape.trained)
    most = max(1, int(flops / max(per_head, 1)))
    batch = min(shape.batch, max(1, most // shape.heads))
    return batch, shape.heads if batch * shape.heads <= most else min(shape.heads, most)


def _call(module: nn.Module, inputs: list[Tensor], trained: bool) -> Callable[[], Any]:
    """The module compiled for these inputs, as one graph with its backward pass if there is one.

    Without autograd's lazy compilation of the backward, whose lock Dynamo holds where a backend
    asks.
    """
    from torch._inductor.compile_fx import compile_fx  # slow to import

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        out = module(*given)
        if not trained:
            return (out,)
        return out, *torch.autograd.grad(out, given, torch.ones_like(out))

    graph = make_fx(step)(*inputs)
    plain = [t.detach() for t in inputs]
    with torch.no_grad():
        compiled: Any = compile_fx(graph, plain)  # type: ignore[arg-type]

    def call() -> Any:
        with torch.no_grad():
            return compiled(*plain)

    return call
