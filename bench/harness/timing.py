"""Times of compiled models against each other: outputs checked first, then rounds interleaved.

`torch.utils.benchmark` times one function after another; on a machine that is shared, or that
changes its clock, the ratio of two such times says little. Here each round times every model once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import t5fx
from t5fx.analysis.clock import interleave
from t5fx.analysis.measure import Spread
from t5fx.errors import T5Error

Named = Sequence[tuple[str, nn.Module]]

# Largest |compiled - eager| / |eager| (Euclidean, over the whole output) of a model that is timed.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Timing:
    """Times of several models on one image.

    Attributes:
        size: side of the image in pixels.
        num_tokens: tokens in each model's output, class token included.
        names: of the models; the first is the reference.
        seconds: for each model, one time a round.
        first_calls: for each model, seconds of the call that compiled it.
        error: the largest relative difference of a compiled output from its eager one.
    """

    size: int
    num_tokens: int
    names: tuple[str, ...]
    seconds: tuple[tuple[float, ...], ...]
    first_calls: tuple[float, ...]
    error: float

    def speedup(self, index: int) -> Spread:
        """The first model's time over that of model `index`, round by round: above 1 is faster."""
        pairs = zip(self.seconds[0], self.seconds[index], strict=True)
        return Spread.of([first / other for first, other in pairs])


@torch.no_grad()
def time_models(
    models: Named,
    image: Tensor,
    *,
    num_tokens: int | None = None,
    budget: float = 12.0,
    rounds: tuple[int, int] = (3, 40),
    say: Callable[[str], Any] = lambda text: None,
) -> Timing:
    """Compiles each model for one input, checks it, times all in turn.

    The first is compiled with stock Inductor, the others with backend="t5".

    Args:
        models: (name, module) pairs, images in and tokens [B, 1 + N, C] or other tensors out; the
            first is the reference.
        image: the input, [B, C, H, W].
        num_tokens: 1 + N, where the output does not tell.
        budget: seconds that all the rounds together may take, as far as `rounds` allows.
        rounds: the least and the most rounds.
        say: is told what is being done.

    Raises:
        T5Error: a compiled model's output is not its eager output.
    """
    torch._dynamo.reset()  # static code for each size, none of it recompiled as dynamic
    size = image.shape[-1]
    functions, first_calls, errors, once = [], [], [], 0.0
    for name, model in models:
        say(f"compiling {name} at {size} px")
        backend = "t5" if functions else "inductor"
        function = torch.compile(model, backend=backend, dynamic=False)
        compiled, first_call = _clock(function, image)
        eager, seconds = _clock(model, image)
        function(image)  # not timed: whatever else happens once
        errors.append(_check(f"{name} at {size} px", compiled, eager))
        functions.append(function)
        first_calls.append(first_call)
        once += seconds

    say(f"timing {' and '.join(name for name, _ in models)} at {size} px")
    count = int(min(max(budget / once, rounds[0]), rounds[1]))
    calls = [partial(function, image) for function in functions]
    return Timing(
        size=size,
        num_tokens=num_tokens or compiled.shape[1],
        names=tuple(name for name, _ in models),
        seconds=tuple(map(tuple, interleave(calls, count, image.device))),
        first_calls=tuple(first_calls),
        error=max(errors),
    )


def _clock(function: Callable[[Tensor], Tensor], image: Tensor) -> tuple[Tensor, float]:
    """The result of one call and the seconds that it took (on a CPU, where calls are blocking)."""
    start = time.perf_counter()
    result = function(image)
    return result, time.perf_counter() - start


def _check(what: str, compiled: Tensor, eager: Tensor) -> float:
    """The relative difference of two outputs, if it is within the tolerance."""
    error = ((compiled - eager).norm() / eager.norm()).item()
    if not error <= TOLERANCE:  # a NaN too
        raise T5Error(
            f"expected the compiled output of {what} within {TOLERANCE:g} of the eager output, "
            f"got a relative difference of {error:.3g}; what is wrong is not timed"
        )
    return error


def break_even(linear: nn.Module) -> float | None:
    """Tokens at which both attentions cost the same FLOPs, if all rewritten sites agree on it.

    Softmax costs b N^2 and TTT a N, so they meet at a / b, which is N after / before at any N.
    """
    meets = {
        round(site.num_tokens * site.flops_after / site.flops_before)
        for site in t5fx.report(linear).sites
        if site.status == "rewritten"
    }
    return meets.pop() if len(meets) == 1 else None
