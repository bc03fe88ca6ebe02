"""What a step of a diffusion transformer costs with softmax and with TTT nodes, counted."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

import t5fx
from t5fx.analysis.variant import variant_of
from t5fx.kernels import TTT
from t5fx.reports import Site

from .sizes import Case


@dataclass(frozen=True)
class Count:
    """Of one forward pass at batch 1; a multiply-add is two FLOPs.

    tokens: of the longest attention. sites, rewritten: attentions, and those that become nodes.
    softmax: FLOPs of the model; attention: those of all its softmax attentions' products;
    rewritable: those of the ones that become nodes; nodes: of what they become. parameters: of the
    model; new: of the nodes.
    """

    model: str
    size: str
    tokens: int
    sites: int
    rewritten: int
    softmax: int
    attention: int
    rewritable: int
    nodes: int
    parameters: int
    new: int
    reasons: str = ""

    @property
    def t5(self) -> int:
        """FLOPs of the converted model."""
        return self.softmax - self.rewritable + self.nodes

    @property
    def share(self) -> float:
        """Of the model's FLOPs, those of softmax attention."""
        return self.attention / self.softmax

    @property
    def ratio(self) -> float:
        """FLOPs of the model over those of the converted one."""
        return self.softmax / self.t5

    @property
    def bound(self) -> float:
        """The same, if what is rewritten cost nothing."""
        return self.softmax / (self.softmax - self.rewritable)


@torch.no_grad()
def count(case: Case) -> Count:
    """Build the model on the meta device, where it takes no memory, and count.

    The cost model decides what is rewritten, in a model of one block of each kind, whose attentions
    stand for all of the same name; one below break-even stays softmax.
    """
    with torch.device("meta"):
        model, inputs = case.build(1, False)
        short, _ = case.build(1, True)
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
    config = t5fx.LinearizeConfig(dynamic=False, **case.options)
    report = t5fx.explain(short, (), inputs, config=config)
    every, some = (Counter(_kind(n) for n, _ in one.named_modules()) for one in (model, short))
    whole = [(s, every[_kind(s.fqn)] // some[_kind(s.fqn)]) for s in report.sites]
    nodes = [(site, times) for site, times in whole if site.status == "rewritten"]
    reasons: Counter[str] = Counter()
    for site, times in whole:
        reasons[site.reason or ""] += times
    return Count(
        case.model,
        case.size,
        tokens=max(site.num_tokens or 0 for site in report.sites),
        sites=sum(times for _, times in whole),
        rewritten=reasons.pop("", 0),
        softmax=counter.get_total_flops(),
        attention=sum(times * (site.flops_before or 0) for site, times in whole),
        rewritable=sum(times * (site.flops_before or 0) for site, times in nodes),
        nodes=sum(times * (site.flops_after or 0) for site, times in nodes),
        parameters=sum(p.numel() for p in model.parameters()),
        new=sum(times * new_parameters(site, config) for site, times in nodes),
        reasons=", ".join(f"{n} x {reason}" for reason, n in reasons.items()),
    )


def _kind(name: str) -> str:
    """The name of a module without the number of its block."""
    return re.sub(r"\.\d+\b", ".*", name)


def new_parameters(site: Site, config: t5fx.LinearizeConfig) -> int:
    """How many parameters the node of a site has."""
    assert site.num_heads is not None and site.head_dim is not None and site.grid is not None
    settings = variant_of(config, axes=len(site.grid)).settings()
    sizes = (site.num_heads, site.head_dim, site.head_dim, len(site.grid))
    node = TTT(*sizes, **settings, scale=1 / math.sqrt(site.head_dim), device="meta")
    return sum(parameter.numel() for parameter in node.parameters())
