"""What one call of a model is: which attentions may be rewritten, and where its layout shows.

The graph of the whole model judges: match, legality, layout, cost. It is not run. What it finds
about each module with a rewritten attention (its verdict) is carried out in that module alone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from t5fx.analysis.opaque import opaque_operators
from t5fx.analysis.policy import Plan, plan
from t5fx.analysis.tokens import Axis
from t5fx.config import LinearizeConfig
from t5fx.errors import CaptureError, ConfigError, RefusedCallError
from t5fx.frontend.calls import Signature, formula, printed
from t5fx.frontend.capture import Capture, capture, first_line
from t5fx.frontend.copies import duplicate
from t5fx.frontend.owners import hint
from t5fx.graph.modules import module_stack
from t5fx.graph.view import View, expr, same
from t5fx.kernels import TTT
from t5fx.reports import Tried
from t5fx.rewrite.forms import Form, Judged, Verdict, build, constants_of, flatten
from t5fx.rewrite.sites import nodes_for, settings
from t5fx.runtime.lookup import nodes_in
from t5fx.runtime.owned import call_of, flags_of, own, state_of, watched
from t5fx.runtime.state import After, Before, Entry, Kind, Layout, Origin, Runtime, Source, Term
from t5fx.runtime.templates import bare, clean_thread

#: What the graph of a call says of a node, apart from the options.
_OF_THE_CALL = ("num_heads", "head_dim", "value_dim", "scale", "locality", "grid_ndim")

#: Tracing is for one call at a time.
_JUDGING = threading.RLock()

#: Reasons that may be owed to sizes that could not be compared.
_SIZES = ("grid-unknown", "cross-attention", "head-dim", "not-attention")


@dataclass
class Outcome:
    """What judging a call came to.

    nodes: of the rewritten sites by key; origins: by module, which (leaf, axis) of its output
    shows a side of the grid; constants: what the code reads beside the model's tensors; opaque:
    operators that may be attention, where none was found.
    """

    kind: Kind
    plans: list[Plan]
    nodes: dict[str, nn.Module]
    origins: dict[str, tuple[tuple[int, int], ...]]
    note: str
    tried: dict[str, Tried]
    constants: list[Any]
    opaque: list[str]


@dataclass
class _Recorded:
    """The calls of each module in a trace: (args, kwargs) and outputs, as the trace had them."""

    calls: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)
    outputs: dict[str, list[Any]] = field(default_factory=dict)

    def watch(self, template: nn.Module) -> list[Any]:
        handles = []
        for name, module in template.named_modules():

            def before(_m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self.calls.setdefault(name, []).append((args, kwargs))

            def after(_m: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                self.outputs.setdefault(name, []).append(output)

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        return handles

    def clear(self) -> None:
        self.calls.clear()
        self.outputs.clear()


def runtime_for(model: nn.Module, config: LinearizeConfig) -> Runtime:
    """What the modules of a model that is being linearized are going to share."""
    return Runtime(
        *(config, Signature(model.forward), type(model).__name__),
        judge=judge_again,
        extend=extend,
    )


def judge(
    runtime: Runtime,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    nodes: Mapping[str, TTT] | None = None,
) -> Outcome:
    """Capture and judge a call, in which the nodes that the model has must be possible.

    nodes: those that it is going to have.

    Raises `RefusedCallError` where the call needs attention that was rewritten to do what a TTT
    node cannot, such as to mask keys; `CaptureError` where it cannot be traced.
    """
    existing = nodes_in(model) | dict(nodes or {})
    return clean_thread(lambda: _judge(runtime, model, args, kwargs, existing))


@torch.inference_mode(False)
def _judge(
    runtime: Runtime,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    existing: Mapping[str, TTT],
) -> Outcome:
    template = bare(duplicate(model, share=True))
    args, kwargs = runtime.signature.bind(args, kwargs)
    given = runtime.given(args, kwargs)
    config = runtime.config.called(lambda f: f(*args, **kwargs))
    dynamic = False if config.gives_layout else config.dynamic
    looked = _look(template, args, kwargs, config, existing, dynamic, bool(runtime.kinds))
    if looked.captured.dynamic and dynamic is None and _lacks_proofs(looked.plans):
        again = _look(template, args, kwargs, config, existing, False, bool(runtime.kinds))
        if not _lacks_proofs(again.plans):
            looked = again
            looked.captured.note = "static sizes (with dynamic ones nothing could be proved)"
    refuse_calls(looked.view, looked.plans, existing)
    _refuse_more(runtime, looked.plans)
    chosen = [entry for entry in looked.plans if entry.site.status == "rewritten"]
    nodes = nodes_for(looked.view, chosen, existing)
    recorded = {
        hook.name: hook.axes
        for module in model.modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, Origin) and hook.runtime is runtime
    }
    places = _Places(looked, recorded)
    verdicts, layouts = _verdicts(looked, places)
    structure, _, leaves = flatten(args, kwargs)
    kind = Kind(
        structure=structure,
        constants=constants_of(leaves),
        training=model.training,
        given=given,
        guards=looked.captured.guards,
        layouts=layouts,
        verdicts=verdicts,
        calls={n: _calls(looked.recorded, n, template.get_submodule(n)) for n in verdicts},
        arguments=tuple(places.arguments),
    )
    _forms(runtime, template, looked.recorded, kind)
    origins = {name: tuple(axes) for name, axes in places.origins.items()}
    captured = looked.captured
    constants = list(captured.constants.values())
    opaque = [] if looked.plans else opaque_operators(looked.view)
    return Outcome(
        kind, looked.plans, nodes, origins, captured.note, looked.tried, constants, opaque
    )


@dataclass
class _Looked:
    captured: Capture
    view: View
    plans: list[Plan]
    tried: dict[str, Tried]
    recorded: _Recorded


def _look(
    template: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: LinearizeConfig,
    existing: Mapping[str, TTT],
    dynamic: bool | None,
    known: bool,
) -> _Looked:
    recorded = _Recorded()
    handles = recorded.watch(template)
    try:
        captured = capture(template, args, kwargs, dynamic, restart=recorded.clear)
    except CaptureError as error:
        cause = error.__cause__
        if not known or cause is None:
            raise
        raise CaptureError(
            f"expected a call of {type(template).__name__} that torch.export can trace, as the "
            f"first one was, got {type(cause).__name__}: {first_line(cause)}; t5fx.softmax(model) "
            f"brings the original attention back for such calls"
        ) from cause
    finally:
        for handle in handles:
            handle.remove()
    view = View(captured.graph, template, captured.constants)
    tried: dict[str, Tried] = {}
    plans = plan(view, config, lambda m: m.key in existing if existing else None, tried=tried)
    return _Looked(captured, view, plans, tried, recorded)


def _lacks_proofs(plans: list[Plan]) -> bool:
    """Whether nothing is rewritten, and something perhaps for sizes that could not be compared."""
    rewritten = any(entry.site.status == "rewritten" for entry in plans)
    return not rewritten and any(entry.site.reason in _SIZES for entry in plans)


def refuse_calls(view: View, plans: list[Plan], existing: Mapping[str, TTT]) -> None:
    """Raise where a site that has a node cannot be rewritten to that node in this call."""
    for entry in plans:
        site, node = entry.site, existing.get(entry.match.key)
        if node is None:
            continue
        if site.status != "rewritten":
            raise RefusedCallError(
                f"this call needs '{site.fqn}', which was rewritten, to do what its TTT node "
                f"cannot: {site.reason} ({site.detail}); call it as when it was linearized, or "
                f"linearize again with this call as the example"
            )
        for name, wanted in settings(view, entry).items():
            got = getattr(node, name)
            close = isinstance(got, float) and math.isclose(got, wanted, rel_tol=1e-6)
            if name in _OF_THE_CALL and got != wanted and not close:
                raise RefusedCallError(
                    f"this call needs '{site.fqn}' with {name} {wanted}, and its TTT node was made "
                    f"for {name} {got}"
                )


def _refuse_more(runtime: Runtime, plans: list[Plan]) -> None:
    """Raise where a module has more attentions than its nodes were made for.

    They would be left as they are, which no call of the model has shown to mean anything beside
    those that are not.
    """
    known: dict[str, int] = {}
    for kind in runtime.kinds:
        for owner, verdict in kind.verdicts.items():
            known[owner] = max(known.get(owner, 0), len(verdict.sites))
    for owner, before in known.items():
        here = [entry for entry in plans if entry.match.owner == owner]
        for entry in here[before:]:
            if entry.site.reason == "excluded" and runtime.config.selects(owner):
                raise RefusedCallError(
                    f"this call needs {len(here)} attentions in '{owner}', and its TTT nodes were "
                    f"made for {before}: is there one for each item of a batch? Call it as when "
                    f"it was linearized, or linearize again with this call as the example"
                )


# --- what each owner is told ----------------------------------------------------------------------


def _verdicts(
    looked: _Looked, places: _Places
) -> tuple[dict[str, Verdict], dict[str, tuple[Layout | None, ...]]]:
    """By owner with a rewritten attention: the verdict, and the layout of each attention."""
    by_owner: dict[str, list[Plan]] = {}
    calls: dict[str, Any] = {}
    for entry in looked.plans:
        owner = entry.match.owner
        stack = [key for key, name in module_stack(entry.match.anchor) if name == owner]
        call = stack[-1] if stack else ""
        if calls.setdefault(owner, call) == call:  # of several calls of a module, the first
            by_owner.setdefault(owner, []).append(entry)
    verdicts, layouts = {}, {}
    for owner, entries in by_owner.items():
        if not any(entry.site.status == "rewritten" for entry in entries):
            continue
        inline = frozenset().union(*(entry.match.inline for entry in entries))
        verdicts[owner] = Verdict(tuple(map(_judged, entries)), inline)
        layouts[owner] = tuple(
            places.layout(entry) if entry.site.status == "rewritten" and entry.grid else None
            for entry in entries
        )
    return verdicts, layouts


def _judged(entry: Plan) -> Judged:
    child = entry.match.key.rpartition(".")[2]
    binding = entry.match.binding
    if entry.site.status != "rewritten" or binding is None:
        return Judged(child, rewritten=False)
    size = (entry.site.num_heads, entry.site.head_dim)
    return Judged(
        *(child, True, binding.heads, binding.merged, size, binding.scale, len(entry.grid))
    )


class _Places:
    """Finds where the sizes of a layout can be read in any call of the kind.

    origins: by module, which (leaf, axis) of its output is recorded; starts with what earlier kinds
    have recorded.
    """

    def __init__(
        self, looked: _Looked, recorded: Mapping[str, tuple[tuple[int, int], ...]]
    ) -> None:
        self.looked = looked
        self.origins = {name: list(axes) for name, axes in recorded.items()}
        self.arguments: list[Any] = []
        self._formulas: dict[str, int] = {}

    def layout(self, entry: Plan) -> Layout:
        grid = tuple(self._term(axis) for axis in entry.grid)
        prefix: Term | None = self._total(entry.prefix)
        suffix = self._total(entry.suffix)
        if prefix is None and suffix is None:
            size: Any = 0
            for axis in entry.prefix:
                size = size + (axis.size if isinstance(axis, Axis) else axis)
            prefix = self._argument(size)
        return Layout(prefix, grid, suffix)

    def _total(self, axes: tuple[Any, ...]) -> int | None:
        """The number of tokens of some runs, where it is always the same."""
        sizes = [axis.size if isinstance(axis, Axis) else axis for axis in axes]
        return sum(sizes) if all(isinstance(n, int) for n in sizes) else None

    def _term(self, axis: Any) -> Term:
        if isinstance(axis, int):
            return axis
        assert isinstance(axis, Axis)
        if isinstance(axis.size, int):
            return axis.size
        if axis.at is not None:
            names = [name for _, name in module_stack(axis.at[0]) if name]
            for name in reversed(names):
                found = self._shown(name, axis.size)
                if found is not None:
                    return found
        return self._argument(axis.size)

    def _shown(self, name: str, size: Any) -> Source | None:
        outputs = self.looked.recorded.outputs.get(name, [])
        if len(outputs) != 1:
            return None
        for i, leaf in enumerate(pytree.tree_leaves(outputs[0])):
            if not isinstance(leaf, torch.Tensor):
                continue
            # The axes of a grid are the last ones of an image; a batch may have the same size.
            for j in reversed(range(leaf.dim())):
                own = expr(leaf.shape[j])
                if not isinstance(own, int) and same(own, size):
                    axes = self.origins.setdefault(name, [])
                    if (i, j) not in axes:
                        axes.append((i, j))
                    return Source(name, axes.index((i, j)))
        return None

    def _argument(self, size: Any) -> Source:
        text = printed(size)
        if text not in self._formulas:
            symbols = self.looked.captured.guards.symbols
            free = {str(symbol) for symbol in size.free_symbols}
            if not free <= set(symbols):
                raise CaptureError(
                    f"expected a layout of tokens that the sizes of the arguments tell, got {text}"
                )
            self._formulas[text] = len(self.arguments)
            self.arguments.append(formula(symbols, text))
        return Source("", self._formulas[text])


def _calls(
    recorded: _Recorded, name: str, module: nn.Module
) -> frozenset[tuple[str, tuple[Any, ...]]]:
    """The kinds of calls of a module that a call of the model contains."""
    return frozenset(call_of(module, *call) for call in recorded.calls.get(name, []))


def _forms(runtime: Runtime, template: nn.Module, recorded: _Recorded, kind: Kind) -> None:
    """Build the forms of each owner's calls; owners that are alike share theirs.

    Where the code knows a size of one from others, an example of one gets a form of its own.
    """
    made: dict[Any, list[Form]] = {}
    for name, verdict in kind.verdicts.items():
        module = template.get_submodule(name)
        for args, kwargs in recorded.calls.get(name, []):
            structure, spec, leaves = flatten(args, kwargs)
            flags = flags_of(module, watched(module))
            alike = (type(module), repr(module), structure, constants_of(leaves), flags, verdict)
            key = (*alike, tuple(_about(leaf) for leaf in leaves), _tensors(module))
            forms = made.get(key, [])
            if not forms:
                about = (module, structure, leaves, spec, verdict, runtime.config.at(name), name)
                examples = [_example(leaf) for leaf in leaves]
                single = any(1 in e.shape for e in examples if isinstance(e, torch.Tensor))
                for ones in (False, True):
                    try:
                        form = build(*about, flags, trusted=True, traced=True, ones=ones)
                    except Exception:
                        if ones or not single:
                            raise
                        continue  # code that is another one for a size of one than for two
                    forms.append(form)
                    given = [examples[i] for i in form.positions]
                    if form.guards.accept(given, typed=False) is not None:
                        break
                if not any(form.own for form in forms):
                    made[key] = forms
            for form in forms:
                runtime.keep_form(name, form)


def _example(leaf: Any) -> Any:
    """A leaf of a traced call, with the sizes that it has in the example."""
    if isinstance(leaf, torch.Tensor):
        return torch.empty([hint(n) for n in leaf.shape], dtype=leaf.dtype, device="meta")
    return hint(leaf) if isinstance(leaf, torch.SymInt) else leaf


def _about(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (tuple(map(str, leaf.shape)), leaf.dtype, leaf.device)
    return None


def _tensors(module: nn.Module) -> tuple[Any, ...]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return tuple((name, t.shape, t.dtype, t.device) for name, t in named)


def extend(
    runtime: Runtime,
    module: nn.Module,
    name: str,
    structure: str,
    spec: Any,
    leaves: list[Any],
    kind: Kind,
    trusted: bool,
) -> None:
    """Build the form for another kind of call of an owner, on a bare copy of it, and keep it."""
    config = runtime.config.at(name)
    flags = flags_of(module, watched(module))
    inside = runtime.running()[0] is not None

    def work() -> Any:
        template = bare(duplicate(module, share=True))
        verdict = kind.verdicts[name]
        return build(
            *(template, structure, leaves, spec, verdict, config, name, flags),
            trusted=trusted,
            inside=inside,
            traced=not kind.guards.symbols,
        )

    runtime.keep_form(name, clean_thread(work))


# --- putting it into the model --------------------------------------------------------------------


def install(runtime: Runtime, model: nn.Module, nodes: Mapping[str, nn.Module]) -> None:
    """Make the owners of nodes owners, with the nodes as their children, in place."""
    owners: dict[str, nn.Module] = {}
    for key, node in nodes.items():
        name, _, child = key.rpartition(".")
        owner = owners[name] = model.get_submodule(name)
        if hasattr(owner, child):
            raise ConfigError(
                f"'{key}': expected a free name for the node, got a module with an attribute of "
                f"that name; leave it out with exclude=({name!r},)"
            )
        node.train(owner.training)
        owner.add_module(child, node)
    inside = {name.rpartition(".")[0] for name in owners if name}
    around = {".".join(name.split(".")[:i]) for name in inside for i in range(name.count(".") + 2)}
    for name in sorted((around | set(owners)) - {""}):
        model.get_submodule(name).register_forward_pre_hook(Entry(runtime, name), with_kwargs=True)
    for name, owner in owners.items():
        if state_of(owner) is None:
            own(owner, runtime, name)
    model.register_forward_pre_hook(Before(runtime), with_kwargs=True)
    model.register_forward_hook(After(runtime), always_call=True)


def keep(runtime: Runtime, model: nn.Module, outcome: Outcome) -> None:
    """From now on calls of that kind are served."""
    for name, axes in outcome.origins.items():
        module = model.get_submodule(name)
        hooks = [h for h in module._forward_hooks.values() if isinstance(h, Origin)]
        mine = next((h for h in hooks if h.runtime is runtime), None)
        if mine is None:
            module.register_forward_hook(Origin(runtime, name, axes))
        elif mine.axes != axes:
            mine.axes = axes
    first = not runtime.kinds
    runtime.keep(outcome.kind)
    if first:
        runtime.report.sites = [entry.site for entry in outcome.plans]
        runtime.report.patterns = outcome.tried
        runtime.report.capture = outcome.note


def judge_again(
    runtime: Runtime, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Judge a kind of call that comes up while the model runs. Threads wait for one another."""
    with _JUDGING:
        if runtime.kind_of(args, kwargs, model.training) is None:
            outcome = judge(runtime, model, args, kwargs)
            if not runtime.kinds:
                refuse_missing(model, set(nodes_in(model)), outcome)
            keep(runtime, model, outcome)


def refuse_missing(model: nn.Module, wanted: set[str], outcome: Outcome) -> None:
    """Raise where a call has no attention at the place of a node."""
    missing = sorted(wanted - set(outcome.nodes))
    if missing:
        raise CaptureError(
            f"expected attention at {', '.join(map(repr, missing))} in this call of "
            f"{type(model).__name__}, found none there"
        )


def refuse_foreign(model: nn.Module, outcome: Outcome) -> None:
    """Raise where the code of a copy reads tensors of the model that it is a copy of."""
    named = {_memory(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    for value in outcome.constants:
        name = named.get(_memory(value)) if isinstance(value, torch.Tensor) else None
        if name is not None:
            raise CaptureError(
                f"expected a model whose code reads its own tensors, got a copy of "
                f"{type(model).__name__} that reads '{name}' of the original: a "
                f"forward or an attribute was replaced by something that holds the original's "
                f"modules; undo that first, or give inplace=True"
            )


def _memory(tensor: torch.Tensor) -> Any:
    """What two tensors have in common that are the same numbers in the same place."""
    if tensor.is_meta or not tensor.numel() or type(tensor) not in (torch.Tensor, nn.Parameter):
        return id(tensor)
    return (tensor.data_ptr(), tensor.shape, tensor.device)
