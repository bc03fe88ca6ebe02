"""The inputs that a sampler gives a model on its way from noise to a sample: data-free training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from t5fx.api import softmax
from t5fx.errors import TrainingError
from t5fx.frontend.calls import Signature
from t5fx.runtime.lookup import is_linearized
from t5fx.training.nodes import check_count, kept
from t5fx.wrappers import uncompiled


def trajectory_inputs(
    model: nn.Module, sample: Callable[[], object], *, runs: int = 1
) -> Iterable[dict[str, Any]]:
    """Batches for `Align` and `Distill` of a diffusion model, taken from its own sampling.

    What a sampler calls the model with, at every step from noise to the sample: noisy latents, time
    steps, embeddings and whatever else, as the pipeline, its scheduler (DDPM, DDIM, rectified flow)
    and its guidance make them. No data is needed. The latents are those that the model with softmax
    attention reaches::

        batches = t5fx.trajectory_inputs(pipe.transformer, lambda: pipe(next(prompts)))
        t5fx.Align(batches, steps=200)(pipe.transformer)

    Args:
        model: what `sample` calls: the transformer that the pipeline has, before or after it was
            linearized or compiled. It runs eagerly meanwhile, with softmax attention.
        sample: makes one batch of samples, such as a call of a pipeline. What it draws has to
            differ from call to call: a seed that is fixed in it gives the same trajectory again.
        runs: how many calls of `sample` are made before their steps are given out, shuffled
            together: as many trajectories are in memory at a time.

    Returns:
        An iterable. Each pass over it samples anew and gives, in random order (Python's `random`),
        the keyword arguments of every call of the model. `list(...)` of it is a fixed set, of which
        each pass is the same, such as for `held_out`.

    Raises:
        TrainingError: from the pass: `sample` did not call the model, or called it in a way that
            keyword arguments cannot say.
    """
    check_count(runs=runs)
    return _Trajectories(model, sample, runs)


@dataclass(frozen=True)
class _Trajectories:
    model: nn.Module
    sample: Callable[[], object]
    runs: int

    def __iter__(self) -> Iterator[dict[str, Any]]:
        calls = self._calls()
        random.shuffle(calls)
        yield from calls

    def _calls(self) -> list[dict[str, Any]]:
        inner = uncompiled(self.model)
        signature = Signature(inner.forward)
        calls: list[dict[str, Any]] = []

        def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
            rest, named = signature.bind(args, kwargs)
            if rest:
                raise TrainingError(
                    f"model: expected a forward whose arguments can all be given by name, got "
                    f"{type(inner).__name__}'s, which takes {len(rest)} by position only"
                )
            with torch.inference_mode(False):  # in which a copy could not be trained on
                calls.append(pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), named))

        with ExitStack() as stack:
            # A compiled model would compile its softmax, and the hook into it.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.no_grad())
            if is_linearized(inner):
                stack.enter_context(softmax(inner))
            stack.enter_context(kept(inner))
            inner.eval()
            handle = self.model.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
            for _ in range(self.runs):
                self.sample()
        if not calls:
            raise TrainingError(
                f"sample: expected a function that calls the {type(inner).__name__} (as "
                f"model(...), not as model.forward(...)), got one that ended without such a call"
            )
        return calls
