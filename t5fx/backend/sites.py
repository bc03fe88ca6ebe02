"""The nodes of a graph from Dynamo: kept beside the model, found again by anchors."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter, deque
from typing import Any

import torch
from torch import fx, nn

from t5fx.analysis.match import Match
from t5fx.analysis.policy import Plan
from t5fx.backend import adapters as adapters
from t5fx.backend.adapters import Adapter, Identity, Place
from t5fx.backend.options import Options
from t5fx.config import LinearizeConfig
from t5fx.errors import AdapterError, ConfigError
from t5fx.frontend.dynamo import (
    Region,
    Tensor,
    is_sharded,
)
from t5fx.frontend.positions import Positions
from t5fx.graph.sizes import expr, same
from t5fx.kernels import TTT
from t5fx.rewrite.sites import settings

#: What attention looks like whose tokens or products a graph break has taken away.
_CUT = ("cross-attention", "not-attention", "grid-unknown")


@dataclasses.dataclass
class Site:
    """A rewritten site of a graph: which input is its anchor, and what its node is.

    key: of the node in the graph; name: in the model. node: that of the model which is being
    compiled; dtype, device: of its parameters, as the graph was compiled. listed: the positions
    among the graph's inputs that tell its grid.
    """

    key: str
    name: str
    anchor: int
    identity: Identity
    node: weakref.ref[TTT]
    dtype: torch.dtype
    device: torch.device
    listed: Positions | None = None

    def present(self) -> TTT:
        """`node`, while the model is being compiled."""
        node = self.node()
        assert node is not None
        return node


def check_selection(config: LinearizeConfig, name: str, node: TTT) -> None:
    """A graph compiled for one module serves another: the options must mean the same for both."""
    owner = name.rpartition(".")[0]
    if not config.selects(owner) or not adapters.matches(node, config.at(owner)):
        raise ConfigError(
            f"'{name}' runs a graph that was compiled for another module with the same code, but "
            f"include, exclude or overrides treat the two differently; compile the whole model, or "
            f"give each module options without these"
        )


def anchor_of(value: Any, name: str) -> nn.Parameter:
    if not isinstance(value, nn.Parameter):
        raise AdapterError(
            f"'{name}': expected the model's own parameters, got a tensor in the place of one (as "
            f"torch.func.functional_call and nn.DataParallel do); new parameters are kept with the "
            f"model's: use t5fx.linearize, which puts them into the model"
        )
    return value


def blame_break(region: Region, entry: Plan) -> None:
    """Say of what a graph break has made unreadable that the break is why."""
    broken, site = region.begin or region.end, entry.site
    binding, view = entry.match.binding, region.view
    if site.reason == "cross-attention" and binding is not None:
        queries, keys = (view.shape(x.like)[x.token] for x in (binding.q, binding.k))
        if not same(expr(queries), expr(keys)):
            return  # it would be one without the break, too
    leaves = site.reason == "probabilities-used" and region.end is not None
    if broken is not None and site.status == "skipped" and (site.reason in _CUT or leaves):
        site.reason, site.detail = "graph-break", f"{broken} cuts it off: {site.detail}"


def objection_to(region: Region, entry: Plan, has_anchor: bool) -> str:
    """Why a site that could be rewritten has to be left in a graph that Dynamo captured, or ""."""
    if entry.match.binding is None:
        return ""
    value = region.view.val(entry.match.binding.q.like)
    while value is not None and torch._C._functorch.is_functorch_wrapped_tensor(value):
        if torch._C._functorch.is_batchedtensor(value):
            return "it runs inside of torch.func.vmap; t5fx.linearize the model"
        value = torch._C._functorch.get_unwrapped(value)
    if not has_anchor:
        return (
            "none of its inputs comes from a module's parameter, beside which new parameters could "
            "be kept; t5fx.linearize puts them into the model"
        )
    return ""


def _refuse_sharded(tensor: torch.Tensor, name: str) -> None:
    if is_sharded(tensor):
        raise AdapterError(
            f"'{name}': expected a model whose parameters are whole, got one that is split over "
            f"devices (FSDP, DTensor); new parameters beside it would not be split: linearize the "
            f"model first, then shard and compile it"
        )


def add_site(
    region: Region,
    key: str,
    entry: Plan,
    anchor: fx.Node,
    place: Place,
    options: Options,
    sites: list[Site],
    made: list[Site],
) -> None:
    """Add a site with its node to `sites`, and where it had to be made also to `made`."""
    adapter, tensor = options.adapter, region.tensors[anchor]
    values = tuple(settings(region.view, entry).items())
    identity = Identity(place, values, adapter.source if adapter else None)
    name = region.public(key)
    _refuse_sharded(tensor.value, name)
    owner = region.owner(entry.match.owner)
    node, new = adapters.obtain(tensor.value, identity, name, adapter, options.config, owner)
    like = next(node.parameters())
    if new and entry.impl is not None:
        node.impl = entry.impl  # for later graphs too
    listed = entry.listed.positions if entry.listed else None
    site = Site(key, name, tensor.position, identity, weakref.ref(node), *_like(like), listed)
    sites.append(site)
    if new:
        made.append(site)


def choose_anchor(region: Region, match: Match) -> tuple[fx.Node, Place] | None:
    """The parameter that a site's node is looked up by: of its owner, or else the nearest before q.

    One that no other module has, where there is one.
    """
    binding = match.binding
    assert binding is not None
    inside = f"{match.owner}." if match.owner else ""
    owned = [
        (_holders(region, tensor) > 1, str(node.target), node)
        for node, tensor in region.tensors.items()
        if str(node.target).startswith(inside) and isinstance(tensor.value, nn.Parameter)
    ]
    node = min(owned)[2] if owned else None
    queue, seen = deque([binding.q.node, binding.k.node, binding.v.node]), set()
    while node is None and queue:
        current = queue.popleft()
        if current in region.tensors and isinstance(region.tensors[current].value, nn.Parameter):
            node = current
        elif current not in seen:
            seen.add(current)
            queue.extend(current.all_input_nodes)
    return None if node is None else (node, Place.between(str(node.target), match.key))


def _holders(region: Region, tensor: Tensor) -> int:
    """Under how many names the model has this parameter."""
    model = region.models[tensor.root]
    if model is None:
        return 1
    holders = region.holders.setdefault(tensor.root, Counter())
    if not holders:
        named = model.named_parameters(remove_duplicate=False)
        holders.update(id(parameter) for _, parameter in named)
    return holders[id(tensor.value)]


def check_all_used(adapter: Adapter, sites: list[Site]) -> None:
    unused = sorted(set(adapter.sites) - {site.name for site in sites})
    if unused:
        raise AdapterError(
            f"adapter: {adapter.label} has parameters of {', '.join(map(repr, unused))}, which "
            f"were not rewritten; t5fx.explain says why"
        )


def _like(tensor: torch.Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device
