"""`no_grad`, autocast and checkpoint blocks of a model: their bodies as part of the whole graph."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from t5fx.graph.view import View

#: Key of a node's metadata: the checkpoint whose body it is part of.
INSIDE = "t5fx_checkpoint"

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_REUSED = torch.ops.higher_order.invoke_subgraph
_NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_blocks(owner: fx.GraphModule, telling: Collection[str]) -> None:
    """Put the bodies of `no_grad`, `enable_grad` and `autocast` blocks in the place of their calls.

    Attention inside such a block is then seen like any other. Whoever runs the graph restores the
    modes should an error leave it halfway.

    telling: the canonical operators that attention is known by.
    """
    for node in list(owner.graph.nodes):
        if node.op != "get_attr" or not node.users:
            continue
        if all(user.target in (_NO_GRAD, _AUTOCAST) for user in node.users):
            body = getattr(owner, str(node.target))
            inline_blocks(body, telling)
            if any(user.target is _AUTOCAST for user in node.users):
                if not _can_inline(body, telling):
                    continue
            for user in list(node.users):
                _inline(owner, user, body)
            owner.graph.erase_node(node)


def _can_inline(body: fx.GraphModule, telling: Collection[str]) -> bool:
    """Whether to inline an autocast block: where Dynamo cannot follow, only for its attention."""
    if hasattr(torch.amp.autocast_mode, "_UnmanagedAutocast"):  # not in torch 2.11
        return True
    view = View(body.graph, body)
    return any(view.op(node) in telling for node in body.graph.nodes)


def _inline(owner: fx.GraphModule, call: fx.Node, body: fx.GraphModule) -> None:
    """Replace one call of a block by the nodes of its body, with its mode set around them."""
    graph = owner.graph
    stack = _shared_stack(body)

    def switch(function: Callable[..., Any], *args: Any) -> fx.Node:
        node = graph.call_function(function, args)
        node.meta.update({"val": None, **({"nn_module_stack": stack} if stack else {})})
        return node

    with graph.inserting_before(call):
        if call.target is _NO_GRAD:
            enabled, _, *inputs = call.args
            switch(torch._C._set_grad_enabled, enabled)
        else:
            *setting, _ = call.args[:5]
            inputs = list(call.args[5:])
            mode = switch(torch.amp.autocast_mode._enter_autocast, *setting)
        results = splice(owner, call, body, inputs)
        if call.target is _NO_GRAD:
            switch(torch._C._set_grad_enabled, not enabled)
        else:
            switch(torch.amp.autocast_mode._exit_autocast, mode)
    replace_call(call, results)


def splice(owner: fx.GraphModule, call: fx.Node, body: fx.GraphModule, inputs: list[Any]) -> Any:
    """Copy the nodes of a body before its call; returns the nodes of its results."""
    values: dict[fx.Node, fx.Node] = {}
    results: Any = ()
    sources = iter(inputs)
    with owner.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(sources)
            elif node.op == "output":
                results = fx.map_arg(node.args[0], lambda n: values[n])
            else:
                values[node] = owner.graph.node_copy(node, lambda n: values[n])
                if node.op == "get_attr":  # a subgraph of the body's own
                    values[node].target = f"{call.name}_{node.target}"
                    setattr(owner, f"{call.name}_{node.target}", getattr(body, str(node.target)))
    return results


def replace_call(call: fx.Node, results: Any) -> None:
    """Read the results of a call that returns a tuple from other nodes, and remove it."""
    for item in list(call.users):
        item.replace_all_uses_with(results[item.args[1]])
        call.graph.erase_node(item)
    call.graph.erase_node(call)


def open_multi_head_attention(owner: fx.GraphModule) -> None:
    """Put its operators in the place of `F.multi_head_attention_forward`, which Dynamo keeps whole.

    It is what nn.MultiheadAttention and nn.TransformerEncoder call.
    """
    function = nn.functional.multi_head_attention_forward
    for call in owner.graph.find_nodes(op="call_function", target=function):
        inputs = list(call.all_input_nodes)
        values = [n.meta.get("example_value") for n in inputs]

        def body(*given: Any, call: fx.Node = call, inputs: list[fx.Node] = inputs) -> Any:
            known = dict(zip(inputs, given, strict=True))
            args, kwargs = fx.map_arg((call.args, call.kwargs), known.__getitem__)
            return function(*args, **kwargs)

        before = call.prev
        traced = make_fx(body, pre_dispatch=True)(*values)
        results = splice(owner, call, traced, inputs)
        node = before.next
        while node is not call:
            for key in ("nn_module_stack", "stack_trace", INSIDE):
                if key in call.meta:
                    node.meta[key] = call.meta[key]
            node = node.next
        for item in list(call.users):
            if item.users:
                item.replace_all_uses_with(results[item.args[1]])
            owner.graph.erase_node(item)
        owner.graph.erase_node(call)


@dataclass(eq=False)
class Checkpoint:
    """A call of `torch.utils.checkpoint` whose body was put in its place.

    around: the checkpoint whose body the call was part of.
    """

    name: str
    kwargs: dict[str, Any]
    body_meta: dict[str, Any]
    around: Checkpoint | None


def open_checkpoints(owner: fx.GraphModule) -> list[Checkpoint]:
    """Put the bodies of checkpointed (and of repeatedly used) regions in the place of their calls.

    Attention inside is then seen like any other. `close_checkpoints` undoes it for what is to be
    recomputed in the backward pass; a region that was compiled once for all its uses is not.
    """
    opened: list[Checkpoint] = []
    graph = owner.graph
    while calls := [n for n in graph.nodes if n.target is _CHECKPOINT or n.target is _REUSED]:
        for call in calls:
            function: Any = call.args[0]
            body = getattr(owner, str(function.target))
            before, around = call.prev, call.meta.get(INSIDE)
            if call.target is _CHECKPOINT:
                around = Checkpoint(call.name, dict(call.kwargs), body.meta, around)
                opened.append(around)
            inputs = call.args[1 if call.target is _CHECKPOINT else 2 :]
            results = splice(owner, call, body, list(inputs))
            node = before.next
            while node is not call:
                node.meta[INSIDE] = around
                node = node.next
            replace_call(call, results)
            if not function.users:
                graph.erase_node(function)
    return opened


def close_checkpoints(owner: fx.GraphModule, opened: list[Checkpoint]) -> None:
    """Make functions again of the nodes that checkpointed regions consist of now."""
    for checkpoint in reversed(opened):
        nodes = [n for n in owner.graph.nodes if n.meta.get(INSIDE) is checkpoint]
        if nodes:
            _close(owner, checkpoint, nodes)


def _close(owner: fx.GraphModule, checkpoint: Checkpoint, nodes: list[fx.Node]) -> None:
    inside = set(nodes)
    inputs = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    body = fx.GraphModule(owner, fx.Graph())
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = body.graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = body.graph.node_copy(node, lambda n: copies[n])
        if node.op == "get_attr":
            setattr(body, str(node.target), getattr(owner, str(node.target)))
    body.graph.output(tuple(copies[n] for n in outputs))
    body.meta.update(checkpoint.body_meta)
    body.recompile()
    name = f"{checkpoint.name}_body"
    setattr(owner, name, body)
    with owner.graph.inserting_before(nodes[-1].next):
        function = owner.graph.get_attr(name)
        arguments = (function, *inputs)
        call = owner.graph.call_function(_CHECKPOINT, arguments, checkpoint.kwargs)
        values = tuple(n.meta.get("example_value") for n in outputs)
        for new in (function, call):
            new.meta[INSIDE] = checkpoint.around
        call.meta["example_value"] = values
        for i, node in enumerate(outputs):
            item = owner.graph.call_function(operator.getitem, (call, i))
            item.meta = {**node.meta, INSIDE: checkpoint.around}
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        owner.graph.erase_node(node)


def _shared_stack(body: fx.GraphModule) -> dict[str, Any]:
    """The module calls around all of a block: where its mode is set and where it is left."""
    stacks = [n.meta["nn_module_stack"] for n in body.graph.nodes if n.meta.get("nn_module_stack")]
    levels = zip(*(stack.items() for stack in stacks), strict=False)
    return dict(
        level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)
    )
