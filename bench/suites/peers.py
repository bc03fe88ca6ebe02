"""The suite "peers": what someone would pick instead of a TTT node, one attention at a time.

The attentions are those of `attentions`. Each is checked before anything is timed; then all are
timed in turn, the order turned every round, and speed-ups are taken round by round.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from t5fx.analysis.clock import clock, interleave
from t5fx.analysis.measure import Spread
from t5fx.errors import T5Error

from ..harness.results import Experiment, Row
from .attentions import PEERS, Call, Node, Peer, Shape

#: Seconds that the rounds of one case may take, as far as their least and most number allow.
BUDGET, ROUNDS = 8.0, (10, 40)
#: Largest relative error (Euclidean) of an output or a gradient; that of 8 bits.
TOLERANCES, ROUGH = {torch.float32: 1e-3, torch.bfloat16: 5e-2}, 0.15
#: Attentions on a larger grid are checked on one of this side: all pairs of tokens in float64 are
#: many. It has blocks that a window leaves out.
CHECKED = 32


def experiments(small: bool = False) -> list[Experiment]:
    """Every size forward, and with the backward pass; on a CPU that of the least tokens only."""
    gpu = torch.cuda.is_available()
    heads, sides = (16, (32, 64, 128)) if gpu else (6, (32, 64))
    if small:
        heads, sides = 2, (32,)
    cases = [(side, False) for side in sides] + [(side, True) for side in sides[: 3 if gpu else 1]]
    kind = (64, torch.bfloat16, "cuda") if gpu else (64, torch.float32, "cpu")
    shapes = [Shape(1, heads, side, *kind, trained) for side, trained in cases]
    return [
        Experiment(
            "peers",
            str(shape),
            functools.partial(measure, shape),
            tokens=shape.tokens,
            batch=shape.batch,
            dtype=str(shape.dtype).removeprefix("torch."),
            mode="training" if shape.trained else "inference",
        )
        for shape in shapes
    ]


def measure(shape: Shape, experiment: Experiment) -> Iterator[Row]:
    """Rows of every attention; raises T5Error where one of them is wrong."""
    torch._dynamo.reset()  # or too many shapes would end in eager mode
    ready: list[tuple[Peer, Call]] = []
    for kind in PEERS:
        no_row = functools.partial(experiment.row, kind.name, "latency", unit="s", better="lower")
        try:
            reason = kind.absent(shape)
            if not reason:
                ready.append(prepare(kind, shape))
                continue
            status = "absent"
        except T5Error:
            raise
        except Exception as error:  # of a package that does not fit this torch or GPU
            if not ready:  # without the reference there is nothing to say
                raise
            status, reason = "failed", f"{type(error).__name__}: {error}".partition("\n")[0]
        yield no_row(status=status, detail=reason)
    yield from rows(ready, in_turn(ready), experiment)


def prepare(kind: type[Peer], shape: Shape) -> tuple[Peer, Call]:
    """An attention that was checked, and its call at the shape."""
    small = replace(shape, side=min(shape.side, CHECKED))
    peer = kind(small)
    call = Call(peer)
    error = check(peer, call)
    if small != shape:
        peer = kind(shape)
        call = Call(peer)
    peer.detail = ", ".join(filter(None, (peer.detail, f"relative error {error:.0e}")))
    return peer, call


def check(peer: Peer, call: Call) -> float:
    """The largest relative error of what a call gives; raises T5Error above the tolerance."""
    limit = ROUGH if peer.rough else TOLERANCES[peer.shape.dtype]
    errors = [
        ((result.double() - want).norm() / want.norm()).item()
        for result, want in zip(call(), call.in_float64(peer.exact), strict=True)
    ]
    if not all(error <= limit for error in errors):  # a NaN too
        shown = ", ".join(f"{error:.2g}" for error in errors)
        raise T5Error(
            f"{peer.name}, {peer.shape}: expected its output and gradients within {limit:g} of "
            f"their definition, got relative errors {shown}; what is wrong is not timed"
        )
    return max(errors)


def in_turn(ready: list[tuple[Peer, Call]]) -> list[list[float]]:
    """Seconds of each attention in each round."""
    device = torch.device(ready[0][0].shape.device)
    calls = [call for _, call in ready]
    for call in calls:
        call()
    first = [min(clock(call, device) for _ in range(3)) for call in calls]
    # So many calls a time that the clock's own cost does not count.
    repeats = [max(1, math.ceil(1e-3 / seconds)) for seconds in first]
    spent = sum(count * seconds for count, seconds in zip(repeats, first, strict=True))
    rounds = int(min(max(BUDGET / spent, ROUNDS[0]), ROUNDS[1]))
    return interleave(calls, rounds, device, repeats)


def rows(
    ready: list[tuple[Peer, Call]], seconds: list[list[float]], experiment: Experiment
) -> Iterator[Row]:
    """Rows of the attentions, speed-ups over the first."""
    rounds = len(seconds[0])
    for (peer, call), own in zip(ready, seconds, strict=True):
        row = functools.partial(experiment.row, peer.name, detail=peer.detail)
        ratios = [one / other for one, other in zip(seconds[0], own, strict=True)]
        yield row("latency", Spread.of(own), unit="s", better="lower", rounds=rounds)
        better = "higher" if isinstance(peer, Node) else ""  # the others are not ours to hold
        yield row("speed-up", Spread.of(ratios), unit="x", better=better, rounds=rounds)
        if peer.shape.device == "cuda":
            yield row("peak memory", _peak(call), unit="bytes", better="lower")


def _peak(call: Call) -> int:
    """Bytes on the GPU that a call needs beyond its inputs and all that is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
