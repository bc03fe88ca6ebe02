"""`no_grad` and autocast blocks of a model: their bodies put back into the graph around them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

_NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_blocks(owner: fx.GraphModule) -> None:
    """Put the bodies of `no_grad`, `enable_grad` and `autocast` blocks in the place of their calls.

    Attention inside such a block is then seen like any other. Whoever runs the graph restores the
    modes should an error leave it halfway.
    """
    for node in list(owner.graph.nodes):
        if node.op != "get_attr" or not node.users:
            continue
        if all(user.target in (_NO_GRAD, _AUTOCAST) for user in node.users):
            body = getattr(owner, str(node.target))
            inline_blocks(body)
            if any(user.target is _AUTOCAST for user in node.users) and not _can_inline(body):
                continue
            for user in list(node.users):
                _inline(owner, user, body)
            owner.graph.erase_node(node)


def _can_inline(body: fx.GraphModule) -> bool:
    """Whether to inline an autocast block: where Dynamo cannot follow, only for its attention."""
    if hasattr(torch.amp.autocast_mode, "_UnmanagedAutocast"):  # not in torch 2.11
        return True
    names = (str(node.target) for node in body.graph.nodes)
    return any("softmax" in name or "scaled_dot_product" in name for name in names)


def _inline(owner: fx.GraphModule, call: fx.Node, body: fx.GraphModule) -> None:
    """Replace one call of a block by the nodes of its body, with its mode set around them."""
    graph = owner.graph
    stack = _shared_stack(body)

    def switch(function: Callable[..., Any], *args: Any) -> fx.Node:
        node = graph.call_function(function, args)
        node.meta.update({"val": None, **({"nn_module_stack": stack} if stack else {})})
        return node

    with graph.inserting_before(call):
        values: dict[fx.Node, fx.Node] = {}
        results: Any = ()
        if call.target is _NO_GRAD:
            enabled, _, *inputs = call.args
            switch(torch._C._set_grad_enabled, enabled)
        else:
            *setting, _ = call.args[:5]
            inputs = list(call.args[5:])
            mode = switch(torch.amp.autocast_mode._enter_autocast, *setting)
        sources = iter(inputs)
        for node in body.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(sources)  # type: ignore[assignment]
            elif node.op == "output":
                results = fx.map_arg(node.args[0], lambda n: values[n])
            else:
                values[node] = graph.node_copy(node, lambda n: values[n])
                if node.op == "get_attr":  # a subgraph of the body's own
                    values[node].target = f"{call.name}_{node.target}"
                    setattr(owner, f"{call.name}_{node.target}", getattr(body, str(node.target)))
        if call.target is _NO_GRAD:
            switch(torch._C._set_grad_enabled, not enabled)
        else:
            switch(torch.amp.autocast_mode._exit_autocast, mode)
    for item in list(call.users):
        item.replace_all_uses_with(results[item.args[1]])
        graph.erase_node(item)
    graph.erase_node(call)


def _shared_stack(body: fx.GraphModule) -> dict[str, Any]:
    """The module calls around all of a block: where its mode is set and where it is left."""
    stacks = [n.meta["nn_module_stack"] for n in body.graph.nodes if n.meta.get("nn_module_stack")]
    levels = zip(*(stack.items() for stack in stacks), strict=False)
    return dict(
        level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)
    )


class AutocastState:
    """The autocast modes at some point, to come back to after an error inside a captured block.

    depth: how many autocast blocks are open; torch drops its cast weights when the last one ends.
    """

    def __init__(self, devices: tuple[str, ...]) -> None:
        self.depth = torch.autocast_increment_nesting() - 1
        torch.autocast_decrement_nesting()
        self.cache = torch.is_autocast_cache_enabled()
        self.modes = [
            (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices
        ]

    @staticmethod
    def devices(graph: fx.Graph) -> tuple[str, ...]:
        """The devices whose autocast mode a captured graph sets."""
        enter = torch.amp.autocast_mode._enter_autocast
        return tuple(dict.fromkeys(str(n.args[0]) for n in graph.nodes if n.target is enter))

    def restore(self) -> None:
        open_blocks = torch.autocast_increment_nesting() - self.depth
        for _ in range(open_blocks):
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(self.cache)
        for device, enabled, dtype in self.modes:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
