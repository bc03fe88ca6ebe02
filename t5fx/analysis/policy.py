"""Which of the attentions found may, and should, become TTT nodes.

Legality is judged before the grid, the grid before cost; the first objection is the reason.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from t5fx.analysis.axis import Axis
from t5fx.analysis.layout import Axes
from t5fx.analysis.legality import (
    check_independent,
    check_masks,
    check_same_tokens,
    find_heads,
    find_layout,
    in_words,
    proved_layout,
)
from t5fx.analysis.masks import origin
from t5fx.analysis.match import Match, find
from t5fx.analysis.measure import Cost, Shape, cost
from t5fx.analysis.packed import Listed
from t5fx.analysis.tokens import Layout
from t5fx.analysis.variant import variant_of
from t5fx.config import LinearizeConfig
from t5fx.errors import GraphSpecError, MeasureError, SlowNodeWarning
from t5fx.frontend.positions import Positions
from t5fx.graph.sizes import expr, hint
from t5fx.graph.view import View
from t5fx.kernels import choice as choices
from t5fx.kernels.choice import Call, Choice, choose, settings_of
from t5fx.kernels.variant import Variant
from t5fx.patterns.base import Binding, Operand, Refusal
from t5fx.reports import Site, Tried

#: Reasons that may be owed to sizes that could not be compared.
UNPROVED_SIZES = ("grid-unknown", "cross-attention", "head-dim", "not-attention")


@dataclass
class Plan:
    """One attention and what is to become of it.

    prefix, grid, suffix: token layout where it is rewritten: axes of the graph, or numbers. impl:
    what a measurement put in the place of the configuration's "auto", or None. listed: where the
    grid is what a list of positions among the arguments says, these.
    """

    match: Match
    site: Site
    config: LinearizeConfig
    prefix: tuple[Axis | fx.Node | int, ...] = ()
    grid: tuple[Axis | fx.Node | int, ...] = ()
    suffix: tuple[Axis | fx.Node | int, ...] = ()
    impl: str | None = None
    listed: Listed | None = None


def _undecided(match: Match) -> bool | None:
    return None


def _same_name(name: str) -> str:
    return name


def _no_objection(owner: str, grid: tuple[int, ...]) -> str | None:
    return None


def plan(
    view: View,
    config: LinearizeConfig,
    decided: Callable[[Match], bool | None] = _undecided,
    public: Callable[[str], str] = _same_name,
    tried: dict[str, Tried] | None = None,
    owner: Callable[[str], nn.Module | None] | None = None,
    objection: Callable[[str, tuple[int, ...]], str | None] = _no_objection,
    lists: Mapping[fx.Node, Positions | str] | None = None,
    fixed: bool = False,
) -> list[Plan]:
    """Judge every attention of a graph.

    tried: is told what each pattern did, by its name. owner: the module that has a name in the
    graph; without it the one under the graph's root. public: the name that a module of the graph
    has for the user.

    decided: what an earlier graph of the same model decided about a site: True, it is rewritten
    (and judged again for legality and layout, but not for selection and cost); False, it is left;
    None, nothing yet.

    objection: says of a grid that is given for an owner why it is not that of the call, or None.

    lists: what inputs that list positions say in this call; fixed: grids that they tell are to be
    constants of the graph, as those that are given.
    """
    matches = find(view, tried, owner)
    axes = Axes(view, lists) if matches else None
    plans = []
    for match in matches:
        name = public(match.owner)
        chosen = config.at(name)
        site = Site(fqn=name, status="skipped", pattern=match.pattern.name)
        entry = Plan(match, site, chosen)
        plans.append(entry)
        assert axes is not None
        try:
            _judge(view, axes, entry, decided(match), owner, objection, fixed)
            site.status = "rewritten"
        except Refusal as refusal:
            site.reason, site.detail = refusal.reason, refusal.detail
        except MeasureError:
            raise
        except Exception as error:
            if config.selects(name):
                raise GraphSpecError(
                    f"site '{name}' could not be judged ({type(error).__name__}: {error}); "
                    f"leave it out with exclude=({name!r},) and report this"
                ) from error
            site.reason, site.detail = "excluded", "left out by `include` or `exclude`"
    _agree(plans)
    return plans


def _agree(plans: list[Plan]) -> None:
    """A module that is called more than once has one node: its calls are rewritten all or none."""
    by_key: dict[str, list[Plan]] = {}
    for entry in plans:
        by_key.setdefault(entry.match.key, []).append(entry)
    for calls in by_key.values():
        first = calls[0]
        for other in calls[1:]:
            if (objection := _objection(first, other)) is None:
                continue
            for entry in calls:
                if entry.site.status == "rewritten":
                    entry.site.status = "skipped"
                    entry.site.reason, entry.site.detail = objection
            break


def _objection(first: Plan, other: Plan) -> tuple[str, str] | None:
    for entry in (first, other):
        if entry.site.status != "rewritten":
            detail = f"another call of this module cannot be rewritten: {entry.site.detail}"
            return entry.site.reason or "not-attention", detail
    one, two = first.match.binding, other.match.binding
    assert one is not None and two is not None
    if not math.isclose(one.scale, two.scale, rel_tol=1e-6):
        return "scores-changed", f"calls of this module scale by {one.scale} and by {two.scale}"
    sizes = [(e.site.num_heads, e.site.head_dim, len(e.grid)) for e in (first, other)]
    if sizes[0] != sizes[1]:
        detail = f"calls of this module differ in (heads, head size, axes of the grid): {sizes}"
        return "grid-unknown", detail
    return None


def _judge(
    view: View,
    axes: Axes,
    entry: Plan,
    decided: bool | None,
    owner: Callable[[str], nn.Module | None] | None,
    objection: Callable[[str, tuple[int, ...]], str | None],
    fixed: bool,
) -> None:
    match, site, config = entry.match, entry.site, entry.config
    if match.binding is None:
        value = view.val(match.anchor)
        if value is not None and value.dim() >= 2:
            site.num_tokens = hint(value.shape[-2 if match.pattern.whole else -1])
        assert match.refusal is not None
        raise match.refusal
    binding = match.binding
    find_heads(view, axes, binding)
    _measure(view, site, binding, config)
    check_same_tokens(view, axes, binding)
    check_independent(view, binding)
    check_masks(view, axes, binding)
    if decided is None and not config.selects(site.fqn):
        raise Refusal("excluded", "left out by `include` or `exclude`")
    if decided is False:
        raise Refusal("excluded", "not one of the sites that were rewritten before")
    found = proved_layout(axes, binding)
    entry.prefix, entry.grid, entry.suffix = find_layout(
        found, site, config, partial(objection, site.fqn)
    )
    if config.grid is None and isinstance(found, Listed):
        entry.listed = found
    if config.grid is not None or (entry.listed and fixed):
        _fix_sizes(view, (binding.q.like, binding.q.token), found)
    for axis in (*entry.prefix, *entry.grid):
        if isinstance(axis, Axis) and axis.at is None and not isinstance(axis.size, int):
            if axis.size not in view.sizes:
                raise Refusal(
                    "grid-unknown",
                    f"nothing in the graph has the size {axis.size} of {in_words(axis)}",
                )
    if entry.grid:
        q, v = (_sizes(view, operand, binding) for operand in (binding.q, binding.v))
        _count(site, variant_of(config, axes=len(entry.grid)), q.batch * q.heads, v.channels)
    asked = decided is None and config.min_tokens is None  # the cost model
    if decided is None:
        _enough(site, config)
    if asked and config.policy == "flops":
        _pays(site, 1.0)  # before a check of kernels, which takes its time
    if binding.masks:
        names = dict.fromkeys(origin(view, mask.node).name for mask in binding.masks)
        values = ", by its values in each call" if any(m.checked for m in binding.masks) else ""
        shown = " and ".join(f"'{name}'" for name in names)
        site.detail = f"tokens that a mask from {shown} hides do not count as keys{values}"
    trained = _is_trained(view, match, owner)
    call = _call(view, entry, trained)
    choice = choose(config.impl, call)
    site.impl, site.impl_reason = choice
    if asked and config.policy == "flops":
        _pays(site, rate(call, choice))
    if decided is None and config.policy == "measure":
        _is_faster(view, entry, trained)


def _fix_sizes(view: View, at: tuple[fx.Node, int], found: Layout | str) -> None:
    """Make constants of the sizes that numbers which are the grid are those of.

    Where they are symbolic, that is a guard: other sizes are another graph.
    """
    sides = () if isinstance(found, str) else found.grid
    axes = [side for side in sides if isinstance(side, Axis)]
    axes += [found.rows, found.run] if isinstance(found, Listed) else []
    for node, axis in (at, *(one.at for one in axes if one.at is not None)):
        value = view.val(node)
        assert value is not None
        int(value.shape[axis])


def _is_trained(view: View, match: Match, owner: Callable[[str], nn.Module | None] | None) -> bool:
    """Whether a backward pass will follow: the site's module is in training mode."""
    try:
        module = (owner or view.root.get_submodule)(match.owner)
    except AttributeError:  # the graph has its operators, and its root is all there is
        module = view.root
    return torch.is_grad_enabled() and module is not None and module.training


def _measure(view: View, site: Site, binding: Binding, config: LinearizeConfig) -> None:
    """Fill in the sizes and the FLOPs of both forms."""
    q, k, v = (_sizes(view, o, binding) for o in (binding.q, binding.k, binding.v))
    site.num_tokens, site.num_heads, site.head_dim = q.tokens, q.heads, q.channels
    for name, operand in (("q", binding.q), ("k", binding.k), ("v", binding.v)):
        value = view.val(operand.like)
        assert value is not None
        if not isinstance(expr(value.shape[operand.channel]), int):
            raise Refusal("head-dim", f"the size of {name}'s heads is not static")
    site.flops_before = 2 * q.batch * q.heads * q.tokens * k.tokens * (q.channels + v.channels)
    _count(site, variant_of(config, axes=0), q.batch * q.heads, v.channels)


def _count(site: Site, variant: Variant, heads: int, value_dim: int) -> None:
    """The FLOPs of a site's node; `heads` of all items of the batch."""
    assert site.num_tokens is not None and site.head_dim is not None
    per_head = variant.flops(site.num_tokens, site.head_dim, value_dim, site.grid or ())
    site.flops_after = heads * per_head


@dataclass(frozen=True)
class _Sizes:
    batch: int
    heads: int
    tokens: int
    channels: int


def _sizes(view: View, operand: Operand, binding: Binding) -> _Sizes:
    value = view.val(operand.like)
    assert value is not None
    shape = [hint(n) for n in value.shape]
    outer = [shape[i] for i in operand.batch]
    heads = 1 if binding.heads is None else outer[binding.heads]
    if binding.merged > 1:
        heads = binding.merged
    batch = math.prod(outer) // max(heads, 1)
    return _Sizes(batch, heads, shape[operand.token], shape[operand.channel])


def _call(view: View, entry: Plan, trained: bool) -> Call:
    """The site as a call of its node."""
    site, binding = entry.site, entry.match.binding
    assert binding is not None and site.head_dim is not None
    q, k, v = (view.val(operand.like) for operand in (binding.q, binding.k, binding.v))
    assert q is not None and k is not None and v is not None
    widest = torch.float32
    for tensor in (q, k, v):
        widest = torch.promote_types(widest, tensor.dtype)
    return Call(
        device=q.device,
        dtype=q.dtype if q.dtype == k.dtype == v.dtype else None,
        widest=widest,
        head_dim=site.head_dim,
        value_dim=hint(view.shape(binding.v.like)[binding.v.channel]),
        axes=len(entry.grid),
        trained=trained,
        node=settings_of(_node(entry) | {"scale": binding.scale}),
        masked=bool(binding.masks),
    )


def _node(entry: Plan) -> dict[str, Any]:
    """The settings of a site's node."""
    variant = variant_of(entry.config, axes=len(entry.grid))
    return variant.settings() | {"impl": entry.config.impl}


#: What a FLOP of the node takes over one of softmax attention on the same GPU in 16 bits, by the
#: node's implementation; 1 where nothing is said. Estimates, not measurements: softmax multiplies
#: 16 bits in tensor cores, the reference float32 outside of them and with its intermediate results
#: in memory.
GPU_RATES = {"reference": 12.0, "written-out": 12.0}


def rate(call: Call, choice: Choice) -> float:
    """The node's time for a FLOP over softmax's, where a call runs as chosen."""
    if choices.is_gpu(call.device) and call.dtype in (torch.float16, torch.bfloat16):
        return GPU_RATES.get(choice.impl, 1.0)
    return 1.0


def _enough(site: Site, config: LinearizeConfig) -> None:
    assert site.num_tokens is not None
    if config.min_tokens is not None and site.num_tokens < config.min_tokens:
        detail = f"{site.num_tokens} tokens, fewer than min_tokens={config.min_tokens}"
        raise Refusal("below-break-even", detail)


def _pays(site: Site, rate: float) -> None:
    """Raises `Refusal` where softmax takes less: FLOPs, each of the node's at that rate."""
    assert site.num_tokens is not None
    before, after = site.flops_before or 0, site.flops_after or 0
    if after * rate < before:
        return
    even = math.ceil(site.num_tokens * after * rate / before) if before else 0
    why = "the node needs fewer FLOPs than softmax"
    if rate != 1.0:
        why = (
            f"a FLOP of the node by impl {site.impl!r} ({site.impl_reason}) is estimated to take "
            f"{rate:g} times as long as one of softmax, and the node needs less time than softmax"
        )
    raise Refusal(
        "below-break-even",
        f"{site.num_tokens} tokens; {why} from {even} on (min_tokens=0 rewrites anyway)",
    )


def _is_faster(view: View, entry: Plan, trained: bool) -> None:
    """Measure both forms at the site's sizes; raises `Refusal` where the node is not the faster.

    Where "auto" may be the Triton kernels the reference is measured too, and the faster one taken.
    """
    site, binding = entry.site, entry.match.binding
    assert binding is not None
    value, node = view.val(binding.q.like), _node(entry)
    sizes, values = _sizes(view, binding.q, binding), _sizes(view, binding.v, binding)
    assert value is not None
    shape = Shape(
        *(sizes.batch, sizes.heads, sizes.tokens, sizes.channels, values.channels),
        *(site.prefix or 0, site.grid or (), str(value.dtype).removeprefix("torch."), trained),
        masked=bool(binding.masks),
    )
    if entry.config.impl == "auto" and site.impl == "triton":
        costs = {i: cost(shape, node | {"impl": i}, value.device) for i in ("triton", "reference")}
        _choose(entry, costs["triton"], costs["reference"])
        found = costs[site.impl]
    else:
        found = cost(shape, node, value.device)
    site.seconds_before, site.seconds_after = found.softmax, found.ttt
    measured = f"measured{', with the backward pass' if trained else ''}: {found}"
    site.detail = "; ".join(filter(None, (site.detail, measured)))
    if not found.pays:
        raise Refusal("below-break-even", f"{site.num_tokens} tokens; {site.detail}")


def _choose(entry: Plan, kernels: Cost, reference: Cost) -> None:
    """The faster of two implementations, the kernels only if they computed the same."""
    site = entry.site
    times = f"Triton {1e3 * kernels.ttt:.3g} ms, reference {1e3 * reference.ttt:.3g} ms"
    if not kernels.agrees:
        entry.impl = site.impl = "reference"
        site.impl_reason = (
            f"the Triton kernels' results differ from the reference's by "
            f"{100 * kernels.difference:.2g} % at these sizes; please report this"
        )
        warnings.warn(f"'{site.fqn}': {site.impl_reason}", SlowNodeWarning, stacklevel=2)
    elif reference.ttt < kernels.ttt:
        entry.impl = site.impl = "reference"
        site.impl_reason = f"measured: {times}"
    else:
        site.impl_reason = f"{site.impl_reason}; measured: {times}"
