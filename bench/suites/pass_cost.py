"""The suite "pass": what the pass itself costs, each stage, against nodes and cold compile.

On ViT graphs of growing depth (timm's ViT-Ti blocks, static capture, float32, batch 1) and on one
of Flux's size, 19 double and 38 single blocks of small width. What `torch.compile` takes to compile
the deepest ViT cold, its attention untouched, stands beside it.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import nn
from torch._inductor.utils import fresh_inductor_cache

from t5fx.analysis.layout import Axes
from t5fx.analysis.match import find
from t5fx.analysis.policy import plan
from t5fx.config import LinearizeConfig
from t5fx.errors import T5Error
from t5fx.frontend.capture import capture
from t5fx.graph.view import View
from t5fx.rewrite.sites import rewrite

from ..harness.results import Experiment, Row
from ..harness.timing import Spread

EVERY_SITE = LinearizeConfig(min_tokens=0)
DEPTHS = (6, 12, 24, 48)
REPEATS = 3


@dataclass
class Cost:
    """Seconds of each stage on one graph, one for each time that it was run.

    plan has match and layout in it, which are timed alone, too.
    """

    nodes: int
    seconds: dict[str, list[float]]

    @property
    def whole(self) -> list[float]:
        """Seconds of plan (match, layout, policy) and rewrite."""
        pairs = zip(self.seconds["plan"], self.seconds["rewrite"], strict=True)
        return [sum(pair) for pair in pairs]


def experiments(small: bool = False) -> list[Experiment]:
    depths = (2,) if small else DEPTHS
    found = [_vit(depth, compiled=depth == depths[-1]) for depth in depths]
    return found if small else [*found, Experiment("pass", "Flux, 57 attentions", _flux, 4 * 6 + 7)]


def _vit(depth: int, compiled: bool) -> Experiment:
    run = functools.partial(_vit_rows, depth, compiled)
    return Experiment("pass", f"ViT-Ti, {depth} blocks", run, tokens=4 * 4 + 1)


def _vit_rows(depth: int, compiled: bool, experiment: Experiment) -> Iterator[Row]:
    cost = measure(vit(depth), {"x": torch.randn(1, 3, 64, 64)}, EVERY_SITE, depth)
    yield from _rows(experiment, cost)
    if compiled:
        seconds = cold_compile(depth)
        yield experiment.row("Inductor", "cold compile", seconds, unit="s", better="lower")
        shares = Spread.of([one / seconds for one in cost.whole])
        share = {"unit": "share", "better": "lower", "rounds": REPEATS}
        yield experiment.row("plan and rewrite", "share of cold compile", shares, **share)


def _flux(experiment: Experiment) -> Iterator[Row]:
    """7 text tokens, then a grid of 4 x 6, which is given."""
    if importlib.util.find_spec("diffusers") is None:
        yield experiment.row("pass", "time", status="absent", detail="needs: pip install diffusers")
        return
    from diffusers import FluxTransformer2DModel

    from ..coverage.diffusers import CASES

    small, _, inputs = next(c for c in CASES if c.name == "FluxTransformer2DModel").build()
    settings = {k: v for k, v in small.config.items() if not k.startswith("_")}
    model = FluxTransformer2DModel(**settings | {"num_layers": 19, "num_single_layers": 38})
    tokens = inputs["hidden_states"].shape[1]
    text = inputs["encoder_hidden_states"].shape[1]
    config = replace(EVERY_SITE, grid=(4, tokens // 4), prefix=text)
    yield from _rows(experiment, measure(model.eval(), inputs, config, 57))


def _rows(experiment: Experiment, cost: Cost) -> Iterator[Row]:
    seconds = {"unit": "s", "better": "lower", "rounds": REPEATS}
    for stage, times in cost.seconds.items():
        yield experiment.row(stage, "time", Spread.of(times), **seconds)
    a_node = Spread.of([one / cost.nodes for one in cost.whole])
    yield experiment.row("plan and rewrite", "time per node", a_node, **seconds)
    yield experiment.row("plan and rewrite", "nodes", cost.nodes, unit="count")


def vit(depth: int) -> nn.Module:
    """A ViT of ViT-Ti's width with `depth` blocks and random weights, in eval mode."""
    return timm.create_model("vit_tiny_patch16_224", depth=depth, img_size=64).eval()


def measure(model: nn.Module, inputs: dict[str, Any], config: LinearizeConfig, sites: int) -> Cost:
    """Times the stages of the pass on one model; raises unless each of its sites is rewritten."""
    cost = Cost(0, {name: [] for name in ("capture", "match", "layout", "plan", "rewrite")})
    for _ in range(REPEATS):
        start = time.perf_counter()
        captured = capture(model, (), inputs, dynamic=False)
        cost.seconds["capture"].append(time.perf_counter() - start)
        cost.nodes = len(captured.graph.nodes)

        def view(captured=captured) -> View:
            return View(captured.graph, model, captured.constants)

        cost.seconds["match"].append(_seconds(lambda: find(view())))
        cost.seconds["layout"].append(_seconds(lambda: Axes(view())))
        cost.seconds["plan"].append(_seconds(lambda: plan(view(), config)))
        plans = plan(view(), config)
        cost.seconds["rewrite"].append(_seconds(lambda p=plans: rewrite(view(), p, {})))
        rewritten = sum(entry.site.status == "rewritten" for entry in plans)
        if rewritten != sites:
            raise T5Error(f"expected {sites} rewritten sites, got {rewritten}")
    return cost


def cold_compile(depth: int) -> float:
    """Seconds of Inductor's first call on the same softmax model, caches empty."""
    model, images = vit(depth), torch.randn(1, 3, 64, 64)
    torch._dynamo.reset()
    with torch.no_grad(), fresh_inductor_cache():
        return _seconds(lambda: torch.compile(model)(images))


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
