"""What a step of a diffusion transformer costs with softmax and with TTT nodes, counted."""

from __future__ import annotations

import math
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

    The cost model decides what is rewritten; a site below break-even stays softmax.
    """
    with torch.device("meta"):
        model, inputs = case.build(1)
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
    config = t5fx.LinearizeConfig(dynamic=False, **case.options)
    report = t5fx.explain(model, (), inputs, config=config)
    counted = [site for site in report.sites if site.flops_before is not None]
    return Count(
        case.model,
        case.size,
        tokens=max(site.num_tokens or 0 for site in report.sites),
        sites=len(report.sites),
        rewritten=len(report.rewritten),
        softmax=counter.get_total_flops(),
        attention=sum(site.flops_before or 0 for site in counted),
        rewritable=sum(site.flops_before or 0 for site in report.rewritten),
        nodes=sum(site.flops_after or 0 for site in report.rewritten),
        parameters=sum(p.numel() for p in model.parameters()),
        new=sum(new_parameters(site, config) for site in report.rewritten),
        reasons=", ".join(f"{n} x {reason}" for reason, n in report.counts().items()),
    )


def new_parameters(site: Site, config: t5fx.LinearizeConfig) -> int:
    """How many parameters the node of a site has."""
    assert site.num_heads is not None and site.head_dim is not None and site.grid is not None
    settings = variant_of(config, axes=len(site.grid)).settings()
    sizes = (site.num_heads, site.head_dim, site.head_dim, len(site.grid))
    node = TTT(*sizes, **settings, scale=1 / math.sqrt(site.head_dim), device="meta")
    return sum(parameter.numel() for parameter in node.parameters())
