"""Invariants of a rewritten graph."""

from __future__ import annotations

from typing import Any

from torch import fx

from t5fx.analysis.policy import Plan
from t5fx.errors import GraphSpecError
from t5fx.graph.view import View


def interface_of(view: View) -> tuple[Any, ...]:
    """Types of the outputs and the inputs that are read."""
    output = next(n for n in view.graph.nodes if n.op == "output")
    inputs = [n for n in view.graph.nodes if n.op == "placeholder" and view.val(n) is not None]
    read = {n.name for n in inputs if n.users}
    return [type_of(view, node) for node in output.all_input_nodes], read


def type_of(view: View, node: fx.Node) -> tuple[Any, ...]:
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
    outputs, read = interface_of(view)
    if outputs != before[0]:
        problems.append(f"outputs were {before[0]}, are {outputs}")
    if before[1] - read and not view.trusted:  # where masks are left out, nobody reads them
        problems.append(f"the inputs {sorted(before[1] - read)} are no longer read")
    if problems:
        raise GraphSpecError(
            f"the rewritten graph breaks its spec: {'; '.join(problems)}. Exclude the sites "
            f"concerned (exclude=...) and report this"
        )
