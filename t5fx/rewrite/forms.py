"""The rewritten form of one module for one kind of its calls: a Python function of the module.

The module's own graph (`t5fx.frontend.owners`) is matched again; which of its attentions are
rewritten, and with which heads, is what the graph of the whole model said.
"""

from __future__ import annotations

import itertools
import linecache
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from t5fx.analysis.match import Match, find
from t5fx.analysis.policy import Plan
from t5fx.config import LinearizeConfig
from t5fx.errors import CaptureError, RefusedCallError
from t5fx.frontend.calls import Guards
from t5fx.frontend.owners import OwnerGraph, described, trace
from t5fx.graph.view import View
from t5fx.graph.writes import drop_unread, settle
from t5fx.reports import Site
from t5fx.rewrite.sites import erase_unread, readers_of, replace_sites

_counter = itertools.count()


@dataclass(frozen=True)
class Judged:
    """What the graph of the whole model says about one attention of a module.

    child: name of its node in the module, "t5", "t5_1", ...; heads, merged: as in `Binding`; size:
    (heads, channels of a head); scale: that of the logits; axes: of the grid, 0 for none; masked:
    whether keys may be hidden; checked: whether the values of a mask have to be looked at.
    """

    child: str
    rewritten: bool
    heads: int | None = None
    merged: int = 1
    size: tuple[int | None, int | None] = (None, None)
    scale: float = 0.0
    axes: int = 0
    masked: bool = False
    checked: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the graph of the whole model says about a module: each attention, in its own order.

    inline: names of its descendants in which parts of these attentions run.
    """

    sites: tuple[Judged, ...]
    inline: frozenset[str] = frozenset()

    @property
    def masks(self) -> tuple[tuple[bool, bool], ...]:
        """Of each attention what is known of its masks."""
        return tuple((site.masked, site.checked) for site in self.sites)


@dataclass
class Form:
    """One compiled form.

    function: takes the module, what knows the layout of its tokens, and the arguments' leaves at
    `positions`; returns the leaves of the result. typed: it fixes dtypes or a device. proved: it
    holds for every call of its kind; otherwise only in calls of the whole model of which the same
    was proved of the attentions' masks, `masks`. own: it holds tensors of the module that it was
    made for.
    """

    function: Callable[..., list[Any]]
    structure: str
    constants: tuple[Any, ...]
    positions: tuple[int, ...]
    guards: Guards
    out_spec: Any
    typed: bool
    proved: bool
    flags: Any
    own: bool = False
    masks: tuple[tuple[bool, bool], ...] = ()

    def serves(self, structure: str, constants: tuple[Any, ...], leaves: list[Any]) -> bool:
        if self.structure != structure or not fits(self.constants, constants):
            return False
        given = [leaves[i] for i in self.positions]
        return self.guards.accept(given, typed=self.typed) is not None

    def __call__(self, module: nn.Module, site: Any, leaves: list[Any]) -> Any:
        outputs = self.function(module, site, *(leaves[i] for i in self.positions))
        return pytree.tree_unflatten(outputs, self.out_spec)


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any, list[Any]]:
    """(a name for the structure, the structure, the leaves) of a call's arguments."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if not args and not kwargs:
        return "()", spec, leaves
    simple = len(leaves) == len(args) + len(kwargs)
    return f"{len(args)},{','.join(kwargs)}" if simple else repr(spec), spec, leaves


def constants_of(leaves: list[Any]) -> tuple[Any, ...]:
    """Of each leaf what makes it another kind of call: tensors and floats are all alike.

    True, 1 and None are different calls. An object that is no plain value is known by itself.
    """
    return tuple(map(_constant, leaves))


def fits(wanted: tuple[Any, ...], got: tuple[Any, ...]) -> bool:
    """Whether a call has the constants that a kind of calls wants; a size may be any integer."""
    return len(wanted) == len(got) and all(
        a == b or (a == "size" and isinstance(b, tuple) and b[0] == "int")
        for a, b in zip(wanted, got, strict=True)
    )


def _constant(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return "tensor"
    if isinstance(leaf, float | torch.SymFloat):
        return "float"
    if isinstance(leaf, torch.SymInt):
        return "size"
    if leaf is None or isinstance(leaf, bool | int | str | torch.dtype | torch.device):
        return (type(leaf).__name__, leaf)
    return (type(leaf).__name__, id(leaf))


def build(
    module: nn.Module,
    structure: str,
    leaves: list[Any],
    spec: Any,
    verdict: Verdict,
    config: LinearizeConfig,
    name: str,
    flags: Any,
    *,
    trusted: bool,
    inside: bool = False,
    traced: bool,
    ones: bool = False,
) -> Form:
    """Trace, match and rewrite one kind of call of a module.

    traced: the leaves are those of a trace. ones: sizes of one are constants. trusted: masks need
    no proof here, the graph of the whole model had it. inside: it is for a judged call of the whole
    model, in which nobody reads the probabilities that the module may return. Raises
    `RefusedCallError` where the attentions in this call are not those of the verdict.
    """
    about = [described(leaf, traced=traced, ones=ones) for leaf in leaves]
    result = trace(module, about, spec, verdict.inline)
    view = View(result.graph, module, result.constants)
    settle(view)
    proved = True
    found = _matches(view, verdict)
    refused = _refused(found, verdict)
    if refused and (trusted or inside):
        proved = False
        view.trusted = trusted
        found = _matches(view, verdict)
        refused = _refused(found, verdict)
        if refused:
            _drop_probabilities(view, verdict)
            found = _matches(view, verdict)
            refused = _refused(found, verdict)
    if refused:
        match, _ = refused[0]
        assert match.refusal is not None
        raise RefusedCallError(
            f"this call asks of '{name}', which was rewritten, what its TTT node cannot do: "
            f"{match.refusal.reason} ({match.refusal.detail}); call the model as when it was "
            f"linearized, or linearize again with this call as the example"
        )
    if trusted and not _without_doubt(found, verdict, view.trusted):
        proved, view.trusted = False, True
    plans = []
    site = result.graph.placeholder("t5_site")
    first = next(iter(result.graph.nodes))
    if first is not site:
        first.prepend(site)
    for index, (match, judged) in enumerate(zip(found, verdict.sites, strict=True)):
        if judged.rewritten:
            plans.append(_planned(view, match, judged, index, config, name, site))
    vars(view).pop("order", None)
    replace_sites(view, plans)
    drop_unread(view)
    _refuse_batched(view, result, name)
    typed = _is_typed(result.graph)
    reads = {str(n.target) for n in result.graph.nodes if n.op == "get_attr"}
    own = bool(reads & set(result.constants))
    return Form(
        compiled(result, name),
        structure,
        constants_of(leaves),
        result.positions,
        result.guards,
        result.out_spec,
        typed,
        proved,
        flags,
        own,
        verdict.masks,
    )


def _matches(view: View, verdict: Verdict) -> list[Match]:
    found = find(view)
    if len(found) != len(verdict.sites):
        raise RefusedCallError(
            f"expected {len(verdict.sites)} attentions in this call of a module, as when it was "
            f"linearized, found {len(found)}; linearize again with this call as the example"
        )
    return found


def _refused(found: list[Match], verdict: Verdict) -> list[tuple[Match, Judged]]:
    pairs = zip(found, verdict.sites, strict=True)
    return [(m, j) for m, j in pairs if j.rewritten and m.binding is None]


def _without_doubt(found: list[Match], verdict: Verdict, trusted: bool) -> bool:
    """Leave out of the masks what the whole model was proved not to need; whether that is none.

    trusted: nothing was proved of the masks themselves.
    """
    certain = True
    for match, judged in zip(found, verdict.sites, strict=True):
        binding = match.binding
        if binding is None or not judged.rewritten:
            continue
        kept = binding.masks if judged.masked else ()
        kept = tuple(
            replace(m, checked=judged.checked and (m.checked or (trusted and m.kind == "added")))
            for m in kept
        )
        certain &= kept == binding.masks
        binding.masks = kept
    return certain


def _drop_probabilities(view: View, verdict: Verdict) -> None:
    """Return None for what is computed from scores and probabilities, which nobody reads in the
    model, and compute it no more.

    Which results these are is not known: as few as will do, of several choices the last ones.
    """
    output = next(n for n in view.graph.nodes if n.op == "output")
    results: Any = output.args[0]
    view.unread = set(output.all_input_nodes)
    for result in list(output.all_input_nodes):
        view.unread.discard(result)
        if _refused(_matches(view, verdict), verdict):
            view.unread.add(result)
    hidden: set[fx.Node] = set()
    for match, judged in zip(_matches(view, verdict), verdict.sites, strict=True):
        if judged.rewritten and match.binding is not None:
            hidden |= {*match.binding.nodes, *readers_of(match.binding)} - {match.binding.output}
    output.args = ([None if r in hidden else r for r in results],)
    erase_unread(view, hidden)
    view.unread = None
    for cached in ("order", "live", "_mutations"):
        vars(view).pop(cached, None)


def _planned(
    view: View,
    match: Match,
    judged: Judged,
    index: int,
    config: LinearizeConfig,
    name: str,
    site: fx.Node,
) -> Plan:
    binding = match.binding
    assert binding is not None
    if not math.isclose(binding.scale, judged.scale, rel_tol=1e-6):
        raise RefusedCallError(
            f"this call needs '{name}' with scale {binding.scale}, and its TTT node was made for "
            f"scale {judged.scale}"
        )
    binding.heads, binding.merged = judged.heads, judged.merged
    entry = Plan(match, Site(fqn=name, status="rewritten", pattern=match.pattern.name), config)
    match.key = judged.child
    if judged.axes:
        graph = view.graph
        with graph.inserting_before(binding.output):
            tokens = graph.call_function(
                torch.ops.aten.sym_size.int, (binding.q.like, binding.q.token)
            )
            value = view.val(binding.q.like)
            assert value is not None
            tokens.meta["val"] = value.shape[binding.q.token]
            layout = graph.call_function(layout_at, (site, index, tokens))
            parts = [
                graph.call_function(operator.getitem, (layout, i)) for i in range(judged.axes + 1)
            ]
        for node in (layout, *parts):
            node.meta["val"] = None
        entry.prefix, entry.grid = (parts[0],), tuple(parts[1:])
    return entry


def layout_at(site: Any, index: int, tokens: int) -> tuple[int, ...]:
    """(prefix, *grid) of the tokens of a module's attention in the call that is running."""
    result: tuple[int, ...] = site.layout(index, tokens)
    return result


def _refuse_batched(view: View, traced: OwnerGraph, name: str) -> None:
    """Raise where what stays in a graph reads values of `torch.vmap`: they end with the trace."""
    for node in view.graph.find_nodes(op="get_attr"):
        value = traced.constants.get(str(node.target))
        if isinstance(value, torch.Tensor) and torch._C._functorch.is_batchedtensor(value):
            raise CaptureError(
                f"'{name}': expected code without torch.vmap beside the attentions that are "
                f"rewritten, got some (a mask of torch's flex attention that stays is computed "
                f"so); leave the module out with exclude=({name!r},)"
            )


def _is_typed(graph: fx.Graph) -> bool:
    """Whether a graph fixes a dtype or a device that its arguments had when it was traced."""
    found = False

    def look(value: Any) -> Any:
        nonlocal found
        found |= isinstance(value, torch.dtype | torch.device)
        return value

    for node in graph.nodes:
        fx.node.map_aggregate((node.args, node.kwargs), look)
    return found


def compiled(traced: OwnerGraph, title: str) -> Callable[..., Any]:
    """The Python function of a module's graph, with source lines for tracebacks."""
    graph = traced.graph
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in traced.constants:
            node.op, node.target = "call_function", _held(traced.constants[str(node.target)])
            node.args = ()
        elif node.target is torch.ops.aten.sym_size.int:
            node.target = size_of
    code = graph.python_code("self")
    filename = f"<t5fx {title or 'root'} {next(_counter)}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
    scope = dict(code.globals)
    exec(compile(code.src, filename, "exec"), scope)
    function = scope["forward"]
    assert callable(function)
    return function


def size_of(tensor: torch.Tensor, axis: int) -> int:
    """A size of a tensor; torch.jit.trace makes tensors of those that `shape` has."""
    if torch.jit.is_tracing():
        return int(torch.ops.aten.sym_size.int(tensor, axis))
    return tensor.shape[axis]


def _held(value: Any) -> Callable[[], Any]:
    def constant() -> Any:
        return value

    return constant
