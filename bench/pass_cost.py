"""What the pass itself costs: seconds of match and rewrite against nodes and cold compile.

`python -m t5fx.bench.pass_cost [--depths 6,12,24,48] [--flux] [--compile]` times the passes on ViT
graphs of growing depth (timm's ViT-Ti blocks, static capture, float32, batch 1); with `--flux` also
on one of Flux's size, 19 double and 38 single blocks of small width; with `--compile` also what
`torch.compile` takes to compile the deepest softmax model cold.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._inductor.utils import fresh_inductor_cache

from t5fx.canon import View
from t5fx.capture import capture
from t5fx.config import LinearizeConfig
from t5fx.layout import Axes
from t5fx.match import find
from t5fx.policy import plan
from t5fx.rewrite import rewrite

EVERY_SITE = LinearizeConfig(min_tokens=0)


@dataclass
class Cost:
    """Seconds of each stage on one graph, the best of several runs."""

    depth: int
    nodes: int
    capture: float
    match: float
    layout: float
    plan: float
    rewrite: float

    @property
    def per_node(self) -> float:
        """Seconds of plan (match, layout, policy) and rewrite for each node."""
        return (self.plan + self.rewrite) / self.nodes


def vit(depth: int) -> nn.Module:
    """A ViT of ViT-Ti's width with `depth` blocks and random weights, in eval mode."""
    return timm.create_model("vit_tiny_patch16_224", depth=depth, img_size=64).eval()


def measure(depth: int) -> Cost:
    """Time the stages of the pass on one ViT."""
    return _measure(vit(depth), {"x": torch.randn(1, 3, 64, 64)}, EVERY_SITE, depth)


def measure_flux() -> Cost:
    """Time them on a graph of Flux's 57 attentions: 7 text tokens, then a given grid of 4 x 6."""
    from diffusers import FluxTransformer2DModel

    from .coverage_diffusers import CASES

    small, _, inputs = next(c for c in CASES if c.name == "FluxTransformer2DModel").build()
    settings = {k: v for k, v in small.config.items() if not k.startswith("_")}
    model = FluxTransformer2DModel(**settings | {"num_layers": 19, "num_single_layers": 38})
    tokens = inputs["hidden_states"].shape[1]
    text = inputs["encoder_hidden_states"].shape[1]
    config = replace(EVERY_SITE, grid=(4, tokens // 4), prefix=text)
    return _measure(model.eval(), inputs, config, 57)


def _measure(
    model: nn.Module, inputs: dict[str, Any], config: LinearizeConfig, depth: int, repeats: int = 3
) -> Cost:
    """The best of several runs; each of the `depth` sites must be rewritten."""
    best = {"match": 1e9, "layout": 1e9, "plan": 1e9, "rewrite": 1e9}
    for _ in range(repeats):
        start = time.perf_counter()
        captured = capture(model, (), inputs, seconds=0.0)
        captured_in = time.perf_counter() - start
        nodes = len(captured.graph.nodes)

        def view(captured=captured) -> View:
            return View(captured.graph, model, captured.constants)

        times = {
            "match": _seconds(lambda: find(view())),
            "layout": _seconds(lambda: Axes(view())),
            "plan": _seconds(lambda: plan(view(), config)),
        }
        plans = plan(view(), config)
        times["rewrite"] = _seconds(lambda plans=plans: rewrite(view(), plans, {}))
        rewritten = sum(entry.site.status == "rewritten" for entry in plans)
        if rewritten != depth:
            raise AssertionError(f"expected {depth} rewritten sites, got {rewritten}")
        best = {name: min(best[name], value) for name, value in times.items()}
    return Cost(depth, nodes, captured_in, **best)


def cold_compile(depth: int) -> float:
    """Seconds of Inductor's first call on the same softmax model, caches empty."""
    model, images = vit(depth), torch.randn(1, 3, 64, 64)
    torch._dynamo.reset()
    with torch.no_grad(), fresh_inductor_cache():
        return _seconds(lambda: torch.compile(model)(images))


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def table(costs: list[Cost], compiled: float | None, more: Sequence[Cost] = ()) -> Table:
    """The costs, and the share of the deepest model's cold compile."""
    last = costs[-1]
    share = ""
    if compiled:
        part = 100 * (last.plan + last.rewrite) / compiled
        share = f"; cold compile of depth {last.depth}: {compiled:.1f} s, pass {part:.2f} % of it"
    result = Table(title=f"ms by stage (plan = match + layout + policy){share}")
    for name in ("blocks", "nodes", "capture", "match", "layout", "plan", "rewrite", "us a node"):
        result.add_column(name, justify="right")
    for c in (*costs, *more):
        stages = (c.capture, c.match, c.layout, c.plan, c.rewrite)
        shown = [f"{1e3 * s:.1f}" for s in stages]
        result.add_row(str(c.depth), str(c.nodes), *shown, f"{1e6 * c.per_node:.0f}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", default="6,12,24,48")
    parser.add_argument("--flux", action="store_true", help="also a graph of Flux's size")
    parser.add_argument("--compile", action="store_true", help="also time a cold torch.compile")
    options = parser.parse_args()
    depths = [int(d) for d in options.depths.split(",")]
    costs = [measure(depth) for depth in depths]
    flux = [measure_flux()] if options.flux else []
    compiled = cold_compile(depths[-1]) if options.compile else None
    Console().print(table(costs, compiled, flux))


if __name__ == "__main__":
    main()
