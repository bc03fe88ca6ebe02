"""Compiles what several sites of a graph do alike only once.

Every TTT node decomposes into some forty operators; twelve sites make twelve times as many to
trace and schedule. Sites that are equal but for their tensors become calls of one subgraph, for
which AOTAutograd and Inductor do that once.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols

from t5fx.graph.view import View

_TTT = (torch.ops.t5fx.ttt, torch.ops.t5fx.ttt.default)


def share_nodes(gm: fx.GraphModule) -> None:
    """Turn equal TTT nodes of a graph into calls of one subgraph, in place.

    Only for inference: the partitioner of torch 2.15 lets a differentiated subgraph return its own
    inputs, as activations for the backward pass, and Inductor, which does not know that they are
    the same memory, writes over them.
    """
    if torch.is_grad_enabled():
        return
    groups: dict[Any, list[fx.Node]] = {}
    symbols: dict[Any, fx.Node] = {}
    for node in gm.graph.nodes:
        value = View.meta(node)
        if node.op == "placeholder" and isinstance(value, torch.SymInt):
            symbols.setdefault(value.node.expr, node)
        if node.target in _TTT:
            signature = fx.map_arg((node.args, node.kwargs), _signature)
            groups.setdefault(repr(signature), []).append(node)
    number = 0
    for nodes in groups.values():
        # A subgraph is also given the sizes that its inputs' sizes are computed from.
        values = [View.meta(n) for n in nodes[0].all_input_nodes]
        free = set().union(*(free_symbols(v) for v in values))
        if len(nodes) > 1 and free <= set(symbols):
            name = f"ttt_node_{number}"
            number += 1
            sizes = [symbols[s] for s in sorted(free, key=str)]
            setattr(gm, name, _body(nodes[0], sizes))
            for node in nodes:
                _call(node, name, sizes)


class _Described(str):
    __repr__ = str.__str__


def _signature(node: fx.Node) -> Any:
    """What a subgraph may depend on of one of its inputs."""
    value = View.meta(node)
    if not isinstance(value, torch.Tensor):
        return _Described(node.name)  # a size: the same node in all calls
    facts = (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
    return _Described(str(facts))


def _inputs(node: fx.Node, sizes: list[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys([*sizes, *node.all_input_nodes]))


def _body(node: fx.Node, sizes: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    inputs: dict[fx.Node, fx.Node] = {}
    for source in _inputs(node, sizes):
        inputs[source] = graph.placeholder(source.name)
        inputs[source].meta = dict(source.meta)
    graph.output((graph.node_copy(node, lambda n: inputs[n]),))
    return fx.GraphModule({}, graph)


def _call(node: fx.Node, name: str, sizes: list[fx.Node]) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        body = graph.get_attr(name)
        arguments = (body, name, *_inputs(node, sizes))
        call = graph.call_function(torch.ops.higher_order.invoke_subgraph, arguments)
        call.meta = {**node.meta, "example_value": (View.meta(node),)}
        item = graph.call_function(operator.getitem, (call, 0))
        item.meta = node.meta
    node.replace_all_uses_with(item)
    graph.erase_node(node)
