"""`search`: which attentions are rewritten, and into which nodes, under a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t5fx.analysis.measure import Shape
from t5fx.analysis.measure import cost as measured_cost
from t5fx.api import check_call, linearize, report
from t5fx.config import LinearizeConfig
from t5fx.errors import NothingRewrittenError, TrainingError
from t5fx.kernels import TTT
from t5fx.reports import Site
from t5fx.training.align import Align
from t5fx.training.distill import cosine
from t5fx.training.nodes import (
    as_call,
    check_count,
    check_not_negative,
    check_positive,
    nodes_of,
    table,
)
from t5fx.training.students import attention, instead

#: What a site may become, when nothing else is said: fields of `LinearizeConfig`.
CANDIDATES: tuple[Mapping[str, Any], ...] = (
    {"neighborhood": 0, "coarse": 0},
    {"neighborhood": 3, "coarse": 0},
    {"neighborhood": 5, "coarse": 8},
    {"neighborhood": 7, "coarse": 8},
    {"neighborhood": 7, "coarse": 12},
)


@dataclass(frozen=True)
class Point:
    """One choice for all sites.

    config: it; cost: of all its attentions, in the unit of the search; loss: of the outputs, the
    mean over the inputs, measured with the whole model so converted; expected: the same, as the sum
    of what each site alone costs; rewritten: how many sites are.
    """

    config: LinearizeConfig
    cost: float
    loss: float
    expected: float
    rewritten: int


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    config: the choice that fits the budget; points: choices from the cheapest to all softmax;
    softmax: the cost of the attentions of the original; unit: of all costs, "FLOP" or "s".
    """

    config: LinearizeConfig
    points: tuple[Point, ...]
    softmax: float
    unit: str

    def __str__(self) -> str:
        rows = [
            [
                f"{p.rewritten} sites{' *' if p.config == self.config else ''}",
                f"{p.cost:.3g} {self.unit}",
                f"{self.softmax / p.cost:.2f}",
                f"{p.loss:.4f}",
                f"{p.expected:.4f}",
            ]
            for p in self.points
        ]
        columns = ["rewritten", "attention", "times faster", "loss", "expected"]
        return table(f"{len(rows)} choices, * the one that fits", columns, rows)

    def draw(self, path: str | Path) -> None:
        """A picture of the frontier: 1 - loss against how many times faster the attentions are."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        speed = [self.softmax / p.cost for p in self.points]
        axes.plot(speed, [1 - p.loss for p in self.points], "o-", label="measured")
        axes.plot(speed, [1 - p.expected for p in self.points], ":", label="sum over sites")
        for point, x in zip(self.points, speed, strict=True):
            chosen = point.config == self.config
            axes.annotate(
                f"{point.rewritten} sites{' (chosen)' if chosen else ''}",
                (x, 1 - point.loss),
                textcoords="offset points",
                xytext=(6, 6),
                fontsize=8,
            )
        axes.set(xlabel=f"attention, times faster ({self.unit})", ylabel="1 - loss")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(str(path), dpi=150)


@torch.inference_mode(False)
def search(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    data: Iterable[Any],
    budget: float | None = None,
    loss: float | None = None,
    inputs: Callable[[Any], Any] | None = None,
    candidates: Sequence[Mapping[str, Any]] = CANDIDATES,
    compare: Callable[[Any, Any], Tensor] = cosine,
    align: int = 0,
    cost: str = "flops",
    points: int = 8,
    config: LinearizeConfig | None = None,
) -> SearchResult:
    """Find for each attention the node that it should become, or that it should stay softmax.

    For each site and candidate, the search measures the loss of the model's output with only that
    site rewritten, and the cost of the node at the example's sizes. It minimises the sum of the
    losses under a bound on the sum of the costs (a multiple-choice knapsack, by its Lagrangian),
    and then builds and measures the choices on the frontier as whole models. The model itself is
    not changed.

    Args:
        model: as for `linearize`.
        args: arguments of an example call, at whose sizes the costs are counted or measured.
        kwargs: keyword arguments of that call.
        data: a list of batches, as for `Align`. A few are enough.
        budget: largest cost of all attentions, as a fraction above 0 of the cost of softmax. The
            search takes the choice with the least loss within the budget.
        loss: largest loss of the output, instead of a budget. The search takes the cheapest choice
            within it.
        inputs: function from a batch to the inputs of the model, as for `Align`.
        candidates: fields of `LinearizeConfig` that can be set per site, one mapping for each kind
            of node that a site may become.
        compare: loss of an output against the original's; by default 1 - cosine of the last axis.
        align: number of steps of `Align` on `data` by which the nodes of each candidate and of each
            choice on the frontier are trained before they are compared.
        cost: "flops" counts operations, "measure" times them on the device (see policy="measure").
        points: number of choices on the frontier that are built and measured.
        config: all other options. Its cost model is not used, since the search decides what pays.

    Returns:
        A `SearchResult`, whose `.config` goes to `linearize` and whose `.draw(path)` draws the
        frontier.

    Raises:
        TrainingError: neither or both of `budget` and `loss` are given, there is no data, or no
            choice stays within the budget or the loss.
        NothingRewrittenError: no site can be rewritten by any candidate.
    """
    if (budget is None) == (loss is None):
        raise TrainingError(
            "search: expected one of budget= (share of the softmax's cost) and loss= (of the "
            f"output), got {'neither' if budget is None else 'both'}"
        )
    check_count(points=points)
    check_not_negative(align=align)
    check_positive(**{"budget": budget} if loss is None else {"loss": loss})
    if cost not in ("flops", "measure"):
        raise TrainingError(f"cost: expected 'flops' or 'measure', got {cost!r}")
    arguments, keywords = check_call(model, args, kwargs)
    base = dataclasses.replace(config or LinearizeConfig(), min_tokens=0, policy="flops")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    calls = [as_call(batch, device, inputs) for batch in data]
    if not calls:
        raise TrainingError("data: expected batches to compare the outputs on, got none")
    was_training = model.training
    model.eval()
    try:
        hook = Align(data, inputs=inputs, steps=align) if align else None
        trial = _Trial(model, (arguments, keywords), calls, compare, cost, hook)
        tables = [trial.table(base, candidate) for candidate in candidates]
        options = _options(candidates, tables)
        if not options:
            raise NothingRewrittenError("search: no site can be rewritten by any candidate")
        found = [
            trial.point(base, candidates, options, choice) for choice in _frontier(options, points)
        ]
    finally:
        model.train(was_training)
    found.sort(key=lambda p: p.cost)
    softmax = sum(next(iter(site.values())).softmax for site in options.values())
    return SearchResult(
        _fitting(found, softmax, budget, loss).config,
        tuple(found),
        softmax,
        "FLOP" if cost == "flops" else "s",
    )


@dataclass(frozen=True)
class _Option:
    """One candidate at one site: what it costs, what softmax does, and the output's loss."""

    cost: float
    softmax: float
    loss: float


class _Trial:
    """The original's outputs, and how far a converted model is from them."""

    def __init__(
        self,
        model: nn.Module,
        example: tuple[tuple[Any, ...], dict[str, Any]],
        calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
        compare: Callable[[Any, Any], Tensor],
        cost: str,
        hook: Align | None,
    ) -> None:
        self.model, self.example, self.calls, self.hook = model, example, calls, hook
        self.compare, self.unit = compare, cost
        with torch.no_grad():
            self.wanted = [model(*args, **kwargs) for args, kwargs in calls]

    @torch.no_grad()
    def loss(self, module: nn.Module) -> float:
        pairs = zip(self.calls, self.wanted, strict=True)
        losses = [self.compare(module(*a, **k), wanted) for (a, k), wanted in pairs]
        return float(torch.stack(losses).mean())

    def table(self, base: LinearizeConfig, candidate: Mapping[str, Any]) -> dict[str, _Option]:
        """What a candidate is at each site, by the name of the module that owns it."""
        chosen = dataclasses.replace(base, **candidate)
        try:
            lin = linearize(self.model, *self.example, config=chosen, finetune=self.hook)
        except NothingRewrittenError:
            return {}
        nodes = nodes_of(lin.eval())
        softmax = {key: attention(node) for key, node in nodes.items()}
        found = {}
        for owner in dict.fromkeys(key.rpartition(".")[0] for key in nodes):
            own = [node for key, node in nodes.items() if key.rpartition(".")[0] == owner]
            others = {k: n for k, n in nodes.items() if k.rpartition(".")[0] != owner}
            sites = [site for site in report(lin).rewritten if site.fqn == owner]
            costs = [self.costs(own[0], site) for site in sites]
            with instead(others, {k: softmax[k] for k in others}):
                loss = self.loss(lin)
            found[owner] = _Option(sum(c[0] for c in costs), sum(c[1] for c in costs), loss)
        return found

    def costs(self, node: TTT, site: Site) -> tuple[float, float]:
        """Of a site's node and of its softmax, at the example's sizes."""
        if self.unit == "flops":
            return float(site.flops_after or 0), float(site.flops_before or 0)
        assert site.num_tokens is not None and site.flops_before is not None
        parameter = node.tensors()[0][0]
        pairs = site.num_tokens**2 * node.num_heads * 2 * (node.head_dim + node.value_dim)
        shape = Shape(
            batch=max(1, site.flops_before // pairs),
            heads=node.num_heads,
            tokens=site.num_tokens,
            head_dim=node.head_dim,
            value_dim=node.value_dim,
            prefix=site.prefix or 0,
            grid=tuple(site.grid or ()),
            dtype=str(parameter.dtype).removeprefix("torch."),
            trained=False,
        )
        measured = measured_cost(shape, node.settings(), parameter.device)
        return measured.ttt, measured.softmax

    def point(
        self,
        base: LinearizeConfig,
        candidates: Sequence[Mapping[str, Any]],
        options: Mapping[str, Mapping[int, _Option]],
        choice: Mapping[str, int | None],
    ) -> Point:
        """A choice for all sites, built and measured."""
        overrides: dict[str, Mapping[str, Any]] = dict(base.overrides)
        excluded = list(base.exclude)
        total, expected = 0.0, 0.0
        for owner, index in choice.items():
            if index is None:
                excluded.append(owner)
                total += next(iter(options[owner].values())).softmax
            else:
                overrides[owner] = {**overrides.get(owner, {}), **candidates[index]}
                total += options[owner][index].cost
                expected += options[owner][index].loss
        config = dataclasses.replace(base, overrides=overrides, exclude=tuple(excluded))
        rewritten = sum(index is not None for index in choice.values())
        if not rewritten:
            return Point(config, total, 0.0, 0.0, 0)
        lin = linearize(self.model, *self.example, config=config, finetune=self.hook).eval()
        return Point(config, total, self.loss(lin), expected, rewritten)


def _options(
    candidates: Sequence[Mapping[str, Any]], tables: Sequence[Mapping[str, _Option]]
) -> dict[str, dict[int, _Option]]:
    """By site what can become of it, by the candidate's number."""
    found: dict[str, dict[int, _Option]] = {}
    for index in range(len(candidates)):
        for key, option in tables[index].items():
            found.setdefault(key, {})[index] = option
    return found


def _frontier(
    options: Mapping[str, Mapping[int, _Option]], points: int
) -> list[dict[str, int | None]]:
    """Choices with the least sum of losses for what they cost, evenly over the range of costs.

    Each minimises loss + price * cost at some price: at every site for itself.
    """
    by_cost: dict[float, dict[str, int | None]] = {}
    whole = sum(next(iter(site.values())).softmax for site in options.values())
    for price in [0.0, *(10 ** (e / 8) for e in range(-200, 41)), math.inf]:
        choice: dict[str, int | None] = {}
        total = 0.0
        for key, site in options.items():
            softmax = next(iter(site.values())).softmax
            ways = [(0.0, softmax, None), *((o.loss, o.cost, i) for i, o in site.items())]
            if price == math.inf:
                best = min(ways, key=lambda w: (w[1], w[0]))
            else:
                best = min(ways, key=lambda w: (w[0] + price / whole * w[1], w[1]))
            choice[key] = best[2]
            total += best[1]
        by_cost.setdefault(total, choice)
    costs = sorted(by_cost)
    if len(costs) > points:
        first, last = costs[0], costs[-1]
        wanted = [first + (last - first) * i / max(1, points - 1) for i in range(points)]
        costs = sorted({min(costs, key=lambda c: abs(c - w)) for w in wanted})
    return [by_cost[c] for c in costs]


def _fitting(
    points: Sequence[Point], softmax: float, budget: float | None, loss: float | None
) -> Point:
    if budget is not None:
        fitting = [p for p in points if p.cost <= budget * softmax]
        if fitting:
            return min(fitting, key=lambda p: p.loss)
        least = points[0].cost / softmax
        raise TrainingError(
            f"budget: expected a share that at least one choice stays within, got {budget:g}; the "
            f"cheapest choice costs {least:.3g} of the softmax's at these sizes"
        )
    assert loss is not None
    fitting = [p for p in points if p.loss <= loss]
    if not fitting:
        least = min(p.loss for p in points)
        raise TrainingError(f"loss: no choice has at most {loss:g}; the least is {least:.3g}")
    return min(fitting, key=lambda p: p.cost)
