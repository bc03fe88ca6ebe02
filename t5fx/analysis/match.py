"""Finds every attention of a graph: subgraph isomorphism around each anchor, then meaning.

For each pattern of `t5fx.patterns` and each of its anchors (a softmax, a fused call), the
structural operators around the anchor become a small `networkx` graph whose edges run through
everything harmless; where the pattern's own graph is isomorphic to a part of it, the pattern binds
the nodes to q, k, v and the scale, or refuses them with a reason.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import networkx as nx
from networkx.algorithms.isomorphism import DiGraphMatcher
from torch import fx, nn

from t5fx.graph.modules import module_stack
from t5fx.graph.view import View
from t5fx.patterns import patterns
from t5fx.patterns.base import Binding, Pattern, Refusal, Unlike
from t5fx.patterns.chains import PRODUCTS, climb, descend
from t5fx.reports import Tried


@dataclass
class Match:
    """One anchor: bound to an attention, or refused.

    owner: name of the innermost module with parameters in which all of it runs, "" for the root;
    key: name of the module that takes the new parameters, `<owner>.t5`, `.t5_1`, ...; inline: names
    (seen from the owner) of the modules inside the owner in which parts of it run.
    """

    anchor: fx.Node
    pattern: Pattern
    binding: Binding | None
    refusal: Refusal | None
    owner: str
    key: str
    inline: frozenset[str] = frozenset()


#: The module that has a name in a graph, or None where it is not at hand.
Modules = Callable[[str], nn.Module | None]


def find(
    view: View, tried: dict[str, Tried] | None = None, modules: Modules | None = None
) -> list[Match]:
    """Every attention of the graph, and everything that looks like one, in graph order.

    tried: is told what each pattern did, by its name. modules: without it the modules are those
    under the graph's root.
    """
    modules = modules or _under(view.root)
    found: list[tuple[fx.Node, Pattern, Binding | Refusal, tuple[fx.Node, ...]]] = []
    for pattern in patterns():
        start, count = time.perf_counter(), Tried()
        for anchor in [n for n in view.graph.nodes if view.op(n) == pattern.anchor]:
            if view.meta(anchor) is not None and anchor in view.live:
                count.anchors += 1
                candidate = _candidate(view, pattern, anchor)
                if candidate is not None:
                    found.append((anchor, pattern, *candidate))
                    count.bound += not isinstance(candidate[0], Refusal)
                    count.refused += isinstance(candidate[0], Refusal)
        count.seconds = time.perf_counter() - start
        if tried is not None:
            tried[pattern.name] = count
    found.sort(key=lambda entry: view.order[entry[0]])
    matches = []
    ordinals: Counter[tuple[str, ...]] = Counter()
    for anchor, pattern, result, nodes in found:
        region = nodes if isinstance(result, Refusal) else _region(result, nodes)
        owner, call, inline = owner_of(region, modules)
        ordinal = ordinals[call]
        ordinals[call] += 1
        key = f"{owner}." if owner else ""
        key += f"t5_{ordinal}" if ordinal else "t5"
        binding, refusal = (None, result) if isinstance(result, Refusal) else (result, None)
        matches.append(Match(anchor, pattern, binding, refusal, owner, key, inline))
    return matches


def _candidate(
    view: View, pattern: Pattern, anchor: fx.Node
) -> tuple[Binding | Refusal, tuple[fx.Node, ...]] | None:
    surroundings = _surroundings(view, pattern, anchor)
    refused: tuple[Refusal, tuple[fx.Node, ...]] | None = None
    for nodes in _isomorphisms(pattern, surroundings, anchor):
        try:
            return pattern.bind(view, nodes), tuple(nodes.values())
        except Unlike:
            continue
        except Refusal as refusal:
            refused = refused or (refusal, tuple(nodes.values()))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            unread = Refusal("not-attention", f"'{anchor.name}' could not be read: {error!r}")
            refused = refused or (unread, tuple(nodes.values()))
    if refused is not None:
        return refused
    around = surroundings.predecessors(anchor), surroundings.successors(anchor)
    missed = pattern.missed(view, anchor, *map(list, around))
    return None if missed is None else (missed, (anchor,))


def _surroundings(view: View, pattern: Pattern, anchor: fx.Node) -> nx.DiGraph:
    """The anchor and the products next to it; an edge looks through what is harmless."""
    graph = nx.DiGraph()
    graph.add_node(anchor, op=view.op(anchor))
    if len(_pattern_graph(pattern.shape)) > 1:
        for product, between in climb(view, anchor):
            graph.add_node(product, op=view.op(product), distance=len(between))
            graph.add_edge(product, anchor)
        for product, between in descend(view, anchor):
            graph.add_node(product, op=view.op(product), distance=len(between))
            graph.add_edge(anchor, product)
    return graph


def _isomorphisms(
    pattern: Pattern, graph: nx.DiGraph, anchor: fx.Node
) -> Iterator[dict[str, fx.Node]]:
    """The pattern's nodes by name, nearest to the anchor first: an order that runs agree on.

    The matcher of networkx goes through sets of nodes, whose order is that of their addresses.
    """
    wanted = _pattern_graph(pattern.shape)
    matcher = DiGraphMatcher(graph, wanted, node_match=_same_operator)
    found = [m for m in matcher.subgraph_monomorphisms_iter() if anchor in m]
    position = {node: i for i, node in enumerate(graph)}

    def nearness(mapping: dict[fx.Node, str]) -> tuple[int, list[int]]:
        distance = sum(graph.nodes[node].get("distance", 0) for node in mapping)
        names = sorted(mapping, key=mapping.__getitem__)
        return distance, [position[node] for node in names]

    for mapping in sorted(found, key=nearness):
        yield {name: node for node, name in mapping.items()}


def _same_operator(found: dict[str, str], wanted: dict[str, str]) -> bool:
    return found["op"] == wanted["op"] or (found["op"] in PRODUCTS and wanted["op"] in PRODUCTS)


@cache
def _pattern_graph(shape: Callable[..., Any]) -> nx.DiGraph:
    """The graph of a pattern's plain PyTorch code, without its arguments and its output."""
    traced = fx.symbolic_trace(shape)
    view = View(traced.graph, traced)
    graph = nx.DiGraph()
    operators = [n for n in traced.graph.nodes if n.op not in ("placeholder", "output")]
    for node in operators:
        graph.add_node(node.name, op=view.op(node))
        for source in node.all_input_nodes:
            if source in operators:
                graph.add_edge(source.name, node.name)
    return graph


def _region(binding: Binding, nodes: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """All nodes of an attention: products, what is between them, scales and layouts around them."""
    replayed = (n for o in (binding.q, binding.k, binding.v) for n in o.replay)
    return (*nodes, *binding.nodes, *binding.temperatures, *replayed, binding.output)


def owner_of(
    nodes: tuple[fx.Node, ...], modules: Modules
) -> tuple[str, tuple[str, ...], frozenset[str]]:
    """Name of the innermost module with parameters that all nodes run in, the identity of its call,
    and the names, seen from it, of the modules inside it that some of them run in.

    A core without parameters that several modules share is no owner: its callers are.
    """
    stacks = [stack for node in nodes if (stack := module_stack(node))]
    shared: list[tuple[str, str]] = []
    for entries in zip(*stacks, strict=False):
        if len(set(entries)) > 1:
            break
        shared.append(entries[0])
    while shared and shared[-1][1]:
        module = modules(shared[-1][1])
        if module is None or next(module.parameters(), None) is not None:
            break
        shared.pop()
    owner = shared[-1][1] if shared else ""
    deeper = {name for stack in stacks for _, name in stack[len(shared) :]}
    inside = _seen_from(owner, deeper, modules)
    return owner, tuple(key for key, _ in shared), frozenset(inside)


def _seen_from(owner: str, names: set[str], modules: Modules) -> frozenset[str]:
    """The names that an owner has for modules inside it, which may be those of others, too."""
    module = modules(owner)
    if module is None:
        stem = f"{owner}." if owner else ""
        return frozenset(n.removeprefix(stem) for n in names if n.startswith(stem) and n != owner)
    own = {id(inner): name for name, inner in module.named_modules() if name}
    found = (own.get(id(modules(name))) for name in names)
    return frozenset(name for name in found if name is not None)


def _under(root: nn.Module) -> Modules:
    def module(name: str) -> nn.Module | None:
        try:
            return root.get_submodule(name)
        except AttributeError:
            return None

    return module
