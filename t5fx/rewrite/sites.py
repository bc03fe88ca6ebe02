"""Puts a TTT node in the place of each planned attention, and checks the graph it leaves."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from t5fx.analysis.policy import Plan
from t5fx.analysis.tokens import Axis
from t5fx.errors import GraphSpecError
from t5fx.graph.blocks import INSIDE
from t5fx.graph.view import View
from t5fx.kernels import TTT
from t5fx.patterns.base import Binding, Operand

#: Overloads of the ATen operators that are added to ATen graphs, where not "default".
_OVERLOADS = {
    **{"to": "dtype", "mul": "Tensor", "div": "Tensor", "repeat_interleave": "self_int"},
    **{"flatten": "using_ints"},
}


#: Operators whose output's strides follow from their input's.
_STRIDED = {
    *("permute", "transpose", "t", "mT", "slice", "select", "getitem", "unbind", "chunk", "split"),
    *("expand", "movedim"),
}


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
    before = _interface(view)
    replaced: dict[fx.Node, fx.Node] = {}
    for entry in chosen:
        try:
            _replace(view, entry, replaced)
        except Exception as error:
            raise GraphSpecError(
                f"site '{entry.match.owner}' could not be rewritten ({error}); leave it out with "
                f"exclude=({entry.match.owner!r},) and report this"
            ) from error
        _sweep(entry)
    owner, view.graph.owning_module = view.graph.owning_module, None  # it lacks the modules yet
    verify(view, chosen, before)
    view.graph.owning_module = owner


def _sweep(entry: Plan) -> None:
    """Remove a replaced attention, with what only checked or unpacked it, and what only it read.

    Nothing else: of other nodes that nobody reads some have an effect, and which is not told by
    their names (in-place operators, random draws, functorch's and autocast's levels).
    """
    assert entry.match.binding is not None
    queue = [entry.match.binding.output, *reversed(entry.match.binding.nodes)]
    own = set(queue)
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
        "inner": config.inner,
        "inner_loss": config.inner_loss,
        "key_norm": config.key_norm,
        "key_norm_eps": config.key_norm_eps,
        "locality": config.locality if entry.grid else "none",
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
        build = _Builder(view, old, replaced)
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
        new = build.module(entry.match.key, (q, k, v), kwargs)
        new = build.restored(new, binding)
        value, node_dtype = view.val(old), view.val(binding.q.like)
        if value is not None and node_dtype is not None and value.dtype != node_dtype.dtype:
            new = build.call("to", new, value.dtype)
    if _type(view, new) != _type(view, old):
        raise TypeError(f"expected {_type(view, old)} at '{old.name}', got {_type(view, new)}")
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
        elif view.op(user) in _STRIDED or view.pointwise(user):
            stack += user.users


def _heads_last(count: int, heads: int | None) -> list[int]:
    """Outer axes in the order batch..., heads."""
    return sorted(range(count), key=lambda i: i == heads)


class _Builder:
    """Adds nodes to a graph in the dialect that the replaced node was written in."""

    def __init__(self, view: View, like: fx.Node, replaced: dict[fx.Node, fx.Node]) -> None:
        self.view, self.graph, self.replaced = view, view.graph, replaced
        self.aten = isinstance(like.target, torch._ops.OpOverload)
        keys = ("nn_module_stack", "stack_trace", "source_fn_stack", INSIDE)
        self.key = "example_value" if "example_value" in like.meta else "val"
        self.meta = {k: like.meta[k] for k in keys if k in like.meta}

    def call(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """An operator: as an ATen overload in ATen graphs, as a method in torch-level ones."""
        if not self.aten:
            return self._stamp(self.graph.call_method(name, args, kwargs))
        packet = getattr(torch.ops.aten, name)
        target = getattr(packet, _OVERLOADS.get(name, "default"))
        return self._stamp(self.graph.call_function(target, args, kwargs))

    def module(self, target: str, args: tuple[fx.Node, ...], kwargs: dict[str, Any]) -> fx.Node:
        """The node itself: [B, H, N, D] twice and [B, H, N, Dv] -> [B, H, N, Dv]."""
        node = self.graph.create_node("call_module", target, args, kwargs)
        q, _, v = (self.view.val(n) for n in args)
        assert q is not None and v is not None
        return self._stamp(node, q.new_empty((*q.shape[:-1], v.shape[-1])))

    def again(self, node: fx.Node, instead: dict[fx.Node, fx.Node]) -> fx.Node:
        """A copy of a node that reads other nodes instead of some of its inputs."""
        return self._stamp(self.graph.node_copy(node, lambda n: instead.get(n, n)))

    def _stamp(self, node: fx.Node, value: Any = None) -> fx.Node:
        """Give a new node what tracing would have: where it is from, and its (fake) value."""
        node.meta.update(self.meta)
        if value is None:
            args, kwargs = fx.map_arg((node.args, node.kwargs), View.meta)
            if node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            elif node.op == "call_module":  # a dropout
                value = args[0]
            else:
                value = node.target(*args, **kwargs)
        node.meta[self.key] = value
        return node

    def canonical(self, operand: Operand, binding: Binding) -> fx.Node:
        """The operand as [B, H, N, D]."""
        node = self.replaced.get(operand.node, operand.node)
        for layout in operand.replay:
            source = self.view.inputs(layout)[0]
            node = self.again(layout, {source: node})
        if operand.factor != 1.0:
            node = self.call("mul", node, 1.0 / operand.factor)
        outer = [operand.batch[i] for i in _heads_last(len(operand.batch), binding.heads)]
        order = [*outer, operand.token, operand.channel]
        if order != list(range(len(order))):
            node = self.call("permute", node, order)
        if binding.merged > 1:
            tokens = self.size_of(operand.like, operand.token)
            channels = self.view.shape(operand.like)[operand.channel]
            return self.call("reshape", node, [-1, binding.merged, tokens, channels])
        batch = len(outer) - (binding.heads is not None)
        if batch > 1:
            node = self.call("flatten", node, 0, batch - 1)
        if batch == 0:
            node = self.call("unsqueeze", node, 0)
        return node if binding.heads is not None else self.call("unsqueeze", node, 1)

    def broadcast(self, node: fx.Node, heads: Any) -> fx.Node:
        """Keys or values [B, 1, N, D] of one head for all heads of the queries."""
        one = self.view.shape(node)[1] == 1 != heads
        return self.call("expand", node, [-1, heads, -1, -1]) if one else node

    def restored(self, node: fx.Node, binding: Binding) -> fx.Node:
        """[B, H, N, Dv] in the axes and the shape of the tensor that it replaces."""
        q, width = binding.q, self.view.shape(node)[3]
        order = _heads_last(len(q.batch), binding.heads)
        tokens = self.size_of(q.like, q.token)
        if len(order) != 2 or binding.heads is None or binding.merged > 1:
            sizes = [self.size_of(q.like, q.batch[i]) for i in order]
            node = self.call("reshape", node, [*sizes, tokens, width])
        back = [order.index(i) for i in range(len(order))]  # outer axes as the query has them
        axes = binding.output_axes
        outer = [i for i, kind in enumerate(axes) if kind == "b"]
        if len(outer) != len(order):  # batch and heads were one axis, seen apart further up
            if back != sorted(back):
                node = self.call("permute", node, [*back, len(back), len(back) + 1])
            node = self.call("reshape", node, [-1, tokens, width])
            back = [0]
        places = dict(zip(outer, back, strict=True))
        places |= {axes.index("t"): len(back), axes.index("c"): len(back) + 1}
        final = [places[i] for i in range(len(axes))]
        return node if final == sorted(final) else self.call("permute", node, final)

    def temperature(self, node: fx.Node, q: fx.Node) -> fx.Node:
        other = next(a for a in node.args if isinstance(a, fx.Node) and self._learned(a))
        return self.call(self.view.op(node), q, other)

    def _learned(self, node: fx.Node) -> bool:
        return not self.view.depends_on_input(node)

    def dropped(self, ones: fx.Node, dropout: Any) -> fx.Node:
        """Dropout of the probabilities as one draw per batch item, head and token, [B, H, N, 1].

        In the inner loss, each token loses its value with the same probability, and the others
        grow by 1 / (1 - p). The expected W' is unchanged: its gradient is linear in v.
        """
        if isinstance(dropout, fx.Node):  # a dropout module, which knows whether it trains
            return self.again(dropout, {self.view.inputs(dropout)[0]: ones})
        target = torch.ops.aten.dropout.default if self.aten else functional.dropout
        return self._stamp(self.graph.call_function(target, (ones, float(dropout), True)))

    def ones(self, v: fx.Node) -> fx.Node:
        """[B, H, N, 1]: one for each token of v."""
        first = self.call("narrow", v, -1, 0, 1)
        return self.call("new_ones", first, self._stamp(self.graph.call_method("size", (first,))))

    def size_of(self, node: fx.Node, axis: int) -> Any:
        """A size of an existing node: a number, or a node that reads it."""
        node = self.replaced.get(node, node)
        size = self.view.shape(node)[axis]
        if isinstance(size, int):
            return size
        if not self.aten:
            return self._stamp(self.graph.call_method("size", (node, axis)))
        return self._stamp(self.graph.call_function(torch.ops.aten.sym_size.int, (node, axis)))

    def size(self, axis: Axis | fx.Node | int) -> Any:
        if isinstance(axis, int | fx.Node):
            return axis
        if axis.kind == "unit" or isinstance(axis.size, int):
            return int(axis.size)
        return self.size_of(*axis.at) if axis.at else self.view.sizes[axis.size]

    def total(self, axes: tuple[Axis | fx.Node | int, ...]) -> Any:
        result: Any = 0
        for size in map(self.size, axes):
            if isinstance(result, int) and (isinstance(size, int) or result == 0):
                result = result + size if isinstance(size, int) else size
            else:
                result = self._stamp(self.graph.call_function(operator.add, (result, size)))
        return result


def _interface(view: View) -> tuple[Any, ...]:
    """Types of the outputs and the inputs that are read."""
    output = next(n for n in view.graph.nodes if n.op == "output")
    inputs = [n for n in view.graph.nodes if n.op == "placeholder" and view.val(n) is not None]
    read = {n.name for n in inputs if n.users}
    return [_type(view, node) for node in output.all_input_nodes], read


def _type(view: View, node: fx.Node) -> tuple[Any, ...]:
    value = view.val(node)
    return () if value is None else (value.dtype, *view.shape(node))


def verify(view: View, chosen: list[Plan], before: tuple[Any, ...]) -> None:
    """The spec of a rewritten graph.

    It is well formed; its outputs have the shapes and dtypes they had; every rewritten site's
    node is there; none of the rewritten softmaxes is left; every input that was read still is.
    """
    graph = view.graph
    graph.lint()
    problems = []
    left = set(graph.nodes)
    targets = {n.target for n in left if n.op == "call_module"}
    for entry in chosen:
        if entry.match.anchor in left:
            problems.append(f"the softmax '{entry.match.anchor.name}' is still read")
        if entry.match.key not in targets:
            problems.append(f"no node calls '{entry.match.key}'")
    outputs, read = _interface(view)
    if outputs != before[0]:
        problems.append(f"outputs were {before[0]}, are {outputs}")
    if before[1] - read and not view.trusted:  # where masks are left out, nobody reads them
        problems.append(f"the inputs {sorted(before[1] - read)} are read no more")
    if problems:
        raise GraphSpecError(
            f"the rewritten graph breaks its spec: {'; '.join(problems)}. Exclude the sites "
            f"concerned (exclude=...) and report this"
        )
