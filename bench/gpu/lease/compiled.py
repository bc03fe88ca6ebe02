"""Through Inductor, as CUDA graphs, and one whole model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend

import t5fx
from t5fx.frontend.copies import duplicate

from ...harness.results import Experiment, Row
from ...suites import kernels, models, zoo
from ...suites.attentions import Shape, Softmax
from ...suites.models import Contender
from . import exactness
from .machine import _none
from .worker import Context


def inductor(context: Context, name: str, case: dict[str, Any], compiled: str) -> Iterator[Row]:
    """Inference, then forward and backward, against float64; in a rehearsal not compiled."""
    how = None if context.rehearse else compiled
    for mode, training in (("inference", False), ("training", True)):
        found = exactness.compared(context, case, compiled=how, training=training)
        about = exactness.experiment(f"{name}, {mode}", case)
        yield from exactness.rows(about, found, 1)


def graph(context: Context, name: str, shape: list[int]) -> Iterator[Row]:
    """A captured forward and backward gives the same bits, twice."""
    experiment = Experiment("lease", name, _none, shape[2], shape[0], "bfloat16", "training")
    batch, heads, tokens, dim = shape
    tensors, settings = kernels.arguments(batch, heads, tokens, dim, context.device.type)
    call = partial(kernels.kernels, tensors, settings, torch.randn_like(tensors[2]))
    wanted = [t.clone() for t in call()]
    if context.rehearse:
        results, replay = call(), call
    else:
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            results = call()
        replay = captured.replay
    for _ in range(2):
        if not context.rehearse:
            for result in results:
                result.fill_(torch.nan)
        replay()
        if not all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True)):
            detail = "other bits than without a graph"
            yield experiment.row("t5fx", "equal bits", status="refused", detail=detail)
            return
    yield experiment.row("t5fx", "equal bits", 1.0)


def model(context: Context, name: str) -> Iterator[Row]:
    """Rows of the suite "models": compiled softmax by its best backend, and t5 by the kernels."""
    if context.rehearse:
        sizes = {"depth": 1, "embed_dim": 32, "num_heads": 4}
        entry = zoo.timm("timm/tiny, rehearsal", 56, **sizes)
    else:
        entry = zoo.timm("timm/DINOv2-L/14", 1036, **zoo.LARGE)
    dtype = torch.float32 if context.rehearse else torch.bfloat16
    about = str(dtype).removeprefix("torch."), "inference"
    experiment = Experiment("models", entry.name, _none, 0, 1, *about)
    two = Two(entry, experiment, not context.rehearse, dtype)
    two.stubbed = context.tiny
    yield from two.rows()


class Two(models.Bench):
    """The two that matter of the suite's contenders, softmax's time told as soon as it is known.

    stubbed: nothing is compiled.
    """

    stubbed = False

    def rows(self) -> Iterator[Row]:
        """Raises `T5Error` where a compiled model does not give what the eager one does."""
        self.model, self.inputs = self._build()
        with self._surroundings():
            config = t5fx.LinearizeConfig(
                min_tokens=0, dynamic=False, impl="reference", **self.entry.options
            )
            linear = t5fx.linearize(
                duplicate(self.model, share=True), (), self.inputs, config=config, inplace=True
            ).eval()
            self.report = t5fx.report(linear)
            self._make_attention_matter(linear)
            softmax = self._softmax()
            self._time([softmax])
            row = self._rower(softmax)
            yield self._sized(row("latency", models.Spread.of(softmax.seconds), unit="s"))
            softmax.seconds.clear()
            options = {**self.entry.options, "min_tokens": 0}
            options["impl"] = "triton" if self.gpu else "reference"
            function = linear if self.stubbed else self._t5(options)
            t5 = self._compiled(Contender(models.EVERY, self._run(function)), self._run(linear)())
            self._time([softmax, t5])
            yield from (self._sized(row) for row in self._report([softmax, t5]))

    def _softmax(self) -> Contender:
        """Compiled, with the backend that is fastest at the model's longest attention."""
        backend = self._best() if self.gpu else SDPBackend.FLASH_ATTENTION
        function = self.model if self.stubbed else self._inductor(self.model)
        said = f"softmax, {backend.name.removesuffix('_ATTENTION')}"
        contender = Contender(said, self._run(function))
        contender.inside = partial(models._only, backend)
        return self._compiled(contender, self._run(self.model)())

    def _best(self) -> SDPBackend:
        site = max(self.report.sites, key=lambda site: site.num_tokens or 0)
        side = round((site.num_tokens or 1) ** 0.5)
        sizes = (1, site.num_heads or 1, side, site.head_dim or 64)
        return Softmax(Shape(*sizes, self.dtype, "cuda", False)).backend
