"""Puts a TTT node in the place of each planned attention, and checks the graph it leaves."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from t5fx.analysis.policy import Plan
from t5fx.analysis.variant import variant_of
from t5fx.errors import GraphSpecError
from t5fx.graph.view import View, changed
from t5fx.kernels import TTT
from t5fx.patterns.base import Binding
from t5fx.rewrite.builder import STRIDED, Builder
from t5fx.rewrite.verify import interface_of, type_of, verify


def rewrite(
    view: View, plans: list[Plan], existing: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Rewrite the planned sites of `view.graph` in place.

    existing: TTT modules by key that are to be used again. Returns the module of every rewritten
    site by key (`<owner>.t5`), which is also the target of its `call_module` node; the caller puts
    them there. Raises `GraphSpecError` where the result breaks the graph's spec (a bug of t5fx;
    the caller's graph is a copy, so nothing is lost).
    """
    chosen = [entry for entry in plans if entry.site.status == "rewritten"]
    modules = nodes_for(view, chosen, existing)
    replace_sites(view, chosen)
    return modules


def nodes_for(
    view: View, chosen: list[Plan], existing: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """The module of each site by key: an existing one, or a fresh one."""
    modules: dict[str, nn.Module] = {}
    for entry in chosen:
        key = entry.match.key
        if key not in modules:
            modules[key] = existing.get(key) or _module(view, entry)
    return modules


def replace_sites(view: View, chosen: list[Plan]) -> None:
    """Put calls of the sites' modules in the place of the attentions, in `view.graph`.

    Raises `GraphSpecError` where the result breaks the graph's spec.
    """
    before = interface_of(view)
    replaced: dict[fx.Node, fx.Node] = {}
    for entry in chosen:
        try:
            _replace(view, entry, replaced)
        except Exception as error:
            raise GraphSpecError(
                f"site '{entry.match.owner}' could not be rewritten ({error}); leave it out with "
                f"exclude=({entry.match.owner!r},) and report this"
            ) from error
        _sweep(view, entry)
    owner, view.graph.owning_module = view.graph.owning_module, None  # it lacks the modules yet
    verify(view, chosen, before)
    view.graph.owning_module = owner


def _sweep(view: View, entry: Plan) -> None:
    """Remove a replaced attention, with what is computed from it in vain, and what only it read.

    Nothing else: of other nodes that nobody reads some have an effect, and which is not told by
    their names (in-place operators, random draws, functorch's and autocast's levels).
    """
    assert entry.match.binding is not None
    queue = [entry.match.binding.output, *reversed(entry.match.binding.nodes)]
    own = set(queue)
    erase_unread(view, readers_of(entry.match.binding))
    while queue:
        node = queue.pop(0)
        if getattr(node, "_erased", False):
            continue
        for user in list(node.users):
            if user.target is operator.getitem or "_assert_tensor_metadata" in str(user.target):
                if not user.users:
                    node.graph.erase_node(user)
        if not node.users and (node in own or not _impure(node)):
            queue += node.all_input_nodes
            node.graph.erase_node(node)


def readers_of(binding: Binding) -> set[fx.Node]:
    """What is computed from the scores and probabilities of an attention, but for its output."""
    own = {binding.output, *binding.nodes}
    found: set[fx.Node] = set()
    stack = [node for node in own if node is not binding.output]
    while stack:
        for user in stack.pop().users:
            if user not in own and user not in found:
                found.add(user)
                stack.append(user)
    return found


def erase_unread(view: View, nodes: set[fx.Node]) -> None:
    """Remove those of some nodes that nobody reads and that change nothing in place."""
    for node in reversed(view.graph.nodes) if nodes else ():
        if node in nodes and node.op != "output" and not node.users and not changed(node):
            view.graph.erase_node(node)


def _impure(node: fx.Node) -> bool:
    """Nodes that stay though nobody reads them: inputs and whatever may have an effect."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    in_place = getattr(node.target, "__name__", "").startswith(("setitem", "iadd", "imul", "isub"))
    return in_place or bool(node.kwargs.get("inplace")) or bool(node.is_impure())


def settings(view: View, entry: Plan) -> dict[str, Any]:
    """The arguments of a site's `TTT`, but for its name, dtype and device."""
    binding, config = entry.match.binding, entry.config
    assert binding is not None and entry.site.num_heads and entry.site.head_dim
    return {
        "num_heads": entry.site.num_heads,
        "head_dim": entry.site.head_dim,
        "value_dim": int(view.shape(binding.v.like)[binding.v.channel]),
        "grid_ndim": len(entry.grid) or 1,
        "scale": binding.scale,
        **variant_of(config, axes=len(entry.grid)).settings(),
        "impl": config.impl,
        "seed": config.seed,
    }


def _module(view: View, entry: Plan) -> TTT:
    assert entry.match.binding is not None
    value = view.val(entry.match.binding.v.like)
    assert value is not None
    dtype = parameter_dtype(view.root, entry.match.owner, value.dtype)
    name, chosen = entry.match.key, settings(view, entry)
    chosen["impl"] = entry.impl or chosen["impl"]
    return TTT(**chosen, name=name, device=value.device, dtype=dtype)


def parameter_dtype(root: nn.Module, owner: str, default: torch.dtype) -> torch.dtype:
    """The dtype of the owner's own parameters, so that a cast of the model fits both."""
    try:
        module = root.get_submodule(owner)
    except AttributeError:
        return default
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), default)


def _replace(view: View, entry: Plan, replaced: dict[fx.Node, fx.Node]) -> None:
    """Put the node in an attention's place. replaced: what earlier ones are now; is added to."""
    binding, graph = entry.match.binding, view.graph
    assert binding is not None
    old = binding.output
    with graph.inserting_before(old):
        build = Builder(view, old, replaced)
        q, k, v = (build.canonical(o, binding) for o in (binding.q, binding.k, binding.v))
        for node in binding.temperatures:
            q = build.temperature(node, q)
        if binding.groups > 1:
            k, v = (build.call("repeat_interleave", x, binding.groups, dim=1) for x in (k, v))
        k, v = (build.broadcast(x, view.shape(q)[1]) for x in (k, v))
        kwargs: dict[str, Any] = {}
        if binding.dropout:
            v = build.call("mul", v, build.dropped(build.ones(v), binding.dropout))
        if entry.grid:
            kwargs["grid"] = tuple(build.size(g) for g in entry.grid)
            kwargs["prefix"] = build.total(entry.prefix)
        if binding.masks:
            kwargs["key_mask"] = build.key_mask(binding.masks, binding, q)
        new = build.module(entry.match.key, (q, k, v), kwargs)
        new = build.restored(new, binding)
        value, node_dtype = view.val(old), view.val(binding.q.like)
        if value is not None and node_dtype is not None and value.dtype != node_dtype.dtype:
            new = build.call("to", new, value.dtype)
    if type_of(view, new) != type_of(view, old):
        raise TypeError(f"expected {type_of(view, old)} at '{old.name}', got {type_of(view, new)}")
    old.replace_all_uses_with(new)
    replaced[old] = new
    _free_views(view, new)


def _free_views(view: View, node: fx.Node) -> None:
    """Let every `view` that the strides of a new node reach be a `reshape`.

    A traced `view` relies on the strides that the attention's output had, which the node's need
    not have; where they fit, `reshape` is a view too.
    """
    stack, seen = list(node.users), set()
    while stack:
        user = stack.pop()
        if user in seen:
            continue
        seen.add(user)
        if user.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            user.target = torch.ops.aten.reshape.default
        elif user.op == "call_method" and user.target == "view":
            first = user.args[1:2]
            user.target = "view" if isinstance(first and first[0], torch.dtype) else "reshape"
        elif view.op(user) in STRIDED or view.pointwise(user):
            stack += user.users
