"""The stages of the pass in their order, for models, for graphs, and for calls of another kind.

1. frontend: the model is captured as one graph. It is not run: it judges.
2. analysis (`plan`): attention is matched, proved to be legal, its layout found, its cost compared.
3. rewrite: the modules that own attention get graphs of their own with TTT nodes in them; a given
   graph is rewritten as it is.
4. runtime: nodes, hooks and rewritten forms are put into the model; `Runtime` serves its calls, and
   comes back to stage 1 for a kind of call that was not judged yet.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx, nn

from t5fx.analysis.opaque import opaque_operators
from t5fx.analysis.policy import UNPROVED_SIZES, Plan, plan
from t5fx.config import LinearizeConfig
from t5fx.errors import CaptureError, ConfigError, NothingRewrittenError, RefusedCallError
from t5fx.frontend.calls import Signature
from t5fx.frontend.capture import Capture, capture, first_line
from t5fx.frontend.copies import duplicate
from t5fx.frontend.positions import Positions, is_coarser, lists_in, objection, positions_in
from t5fx.frontend.record import Recorded
from t5fx.frontend.shapes import add_shapes
from t5fx.graph.view import View
from t5fx.graph.writes import settle
from t5fx.kernels import TTT
from t5fx.reports import Report, Tried, why_nothing
from t5fx.rewrite.forms import constants_of, flatten
from t5fx.rewrite.sites import nodes_for, rewrite, settings
from t5fx.runtime.describe import sites_of, tell_library
from t5fx.runtime.hooks import Origin
from t5fx.runtime.install import Outcome, install, keep, refuse_foreign, refuse_missing
from t5fx.runtime.lookup import CONFIG, REPORT, nodes_in
from t5fx.runtime.make import calls_of, extend, make_forms
from t5fx.runtime.owned import current_flags
from t5fx.runtime.places import Looked, Places, verdicts_of
from t5fx.runtime.state import Kind, Runtime
from t5fx.runtime.templates import bare, clean_thread
from t5fx.wrappers import plain_name

#: What the graph of a call says of a node, apart from the options.
_OF_THE_CALL = ("num_heads", "head_dim", "value_dim", "scale", "locality", "grid_ndim")

#: Tracing is for one call at a time.
_JUDGING = threading.RLock()


def runtime_for(model: nn.Module, config: LinearizeConfig) -> Runtime:
    """What the modules of a model that is being linearized are going to share."""
    return Runtime(
        *(config, Signature(model.forward), type(model).__name__),
        judge=judge_again,
        extend=extend,
    )


def _nodes_of(model: nn.Module) -> dict[str, TTT]:
    """The nodes of a model by key; those of wrapped modules by the names without the wrappers."""
    return {plain_name(key): node for key, node in nodes_in(model).items()}


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
    existing = _nodes_of(model) | dict(nodes or {})
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
    config = runtime.config
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
    places = Places(looked, recorded)
    verdicts, layouts = verdicts_of(looked, places)
    structure, _, leaves = flatten(args, kwargs)
    listed = positions_in(leaves) if config.gives_layout else ()
    grids = {entry.site.grid for entry in chosen if config.gives_layout and entry.site.grid}
    kind = Kind(
        structure=structure,
        constants=constants_of(leaves),
        training=model.training,
        given=given,
        guards=looked.captured.guards,
        layouts=layouts,
        verdicts=verdicts,
        calls={n: calls_of(looked.recorded, n, template.get_submodule(n)) for n in verdicts},
        flags={
            name: current_flags(template.get_submodule(name), one, runtime.forms.get(name, ()))
            for name, one in verdicts.items()
        },
        arguments=tuple(places.arguments),
        positions={grid: tuple(p for p in listed if is_coarser(grid, p.sides)) for grid in grids},
        lists=tuple(places.lists),
        values=looked.captured.values,
    )
    try:
        make_forms(runtime, template, looked.recorded, kind)
    except CaptureError as error:
        cause = error.__cause__
        if not kind.values or cause is None:
            raise
        raise CaptureError(
            f"expected attention in modules that can be traced by themselves, where "
            f"{type(template).__name__} reads numbers from the values of its arguments, got "
            f"{type(cause).__name__}: {first_line(cause)}. Move the attention into a module whose "
            f"forward reads none"
        ) from cause
    origins = {name: tuple(axes) for name, axes in places.origins.items()}
    captured = looked.captured
    constants = list(captured.constants.values())
    opaque = [] if looked.plans else opaque_operators(looked.view)
    return Outcome(
        kind, looked.plans, nodes, origins, captured.note, looked.tried, constants, opaque
    )


def _look(
    template: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: LinearizeConfig,
    existing: Mapping[str, TTT],
    dynamic: bool | None,
    known: bool,
) -> Looked:
    recorded = Recorded()
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
    lists = _lists(captured, args, kwargs)
    plans = plan(
        view,
        config.called(lambda f: f(*args, **kwargs)),
        lambda m: m.key in existing if existing else None,
        tried=tried,
        objection=objector(config, args, kwargs),
        lists=lists,
    )
    return Looked(captured, view, plans, tried, recorded)


def _lists(
    captured: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[fx.Node, Positions | str]:
    """What the inputs of a capture that list positions say in the call that was captured."""
    inputs = captured.graph.find_nodes(op="placeholder")
    return {inputs[i]: one for i, one in lists_in(flatten(args, kwargs)[2]).items()}


def objector(
    config: LinearizeConfig, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[str, tuple[int, ...]], str | None]:
    """Says of a grid that is given for an owner why it is not that of a call, or None."""
    leaves = flatten(args, kwargs)[2]

    @functools.cache
    def against(owner: str, grid: tuple[int, ...]) -> str | None:
        return objection(leaves, grid, constant=not callable(config.at(owner).grid))

    return against


def _lacks_proofs(plans: list[Plan]) -> bool:
    """Whether nothing is rewritten, and something perhaps for sizes that could not be compared."""
    rewritten = any(entry.site.status == "rewritten" for entry in plans)
    return not rewritten and any(entry.site.reason in UNPROVED_SIZES for entry in plans)


def refuse_calls(view: View, plans: list[Plan], existing: Mapping[str, TTT]) -> None:
    """Raise where a site that has a node cannot be rewritten to that node in this call."""
    for entry in plans:
        site, node = entry.site, existing.get(entry.match.key)
        if node is None:
            continue
        if site.status != "rewritten":
            raise RefusedCallError(
                f"this call asks of '{site.fqn}', which was rewritten, what its TTT node cannot "
                f"do: {site.reason} ({site.detail}); call the model as when it was linearized, or "
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


def judge_again(
    runtime: Runtime,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    before: Kind | None = None,
) -> None:
    """Judge a kind of call that comes up while the model runs. Threads wait for one another.

    before: what it was judged to be, which holds no longer.
    """
    with _JUDGING:
        found = runtime.kind_of(args, kwargs, model.training)
        if found is None or found[0] is before:
            outcome = judge(runtime, model, args, kwargs)
            if not runtime.kinds:
                refuse_missing(model, set(_nodes_of(model)), outcome)
            keep(runtime, model, outcome)


def build(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: LinearizeConfig,
    nodes: Mapping[str, TTT],
    *,
    inplace: bool,
) -> nn.Module:
    """The linearized form of a model.

    nodes: by key, those of the sites that are to be rewritten; where there are none, the
    configuration chooses the sites and fresh ones are made. Raises `RefusedCallError` where a
    site that has a node cannot be rewritten to it, `CaptureError` where it is not in the model.
    """
    result = model if inplace else duplicate(model)
    runtime = runtime_for(result, config)
    outcome = judge(runtime, result, args, kwargs, nodes)
    if not inplace:
        refuse_foreign(model, outcome)
    refuse_missing(model, set(nodes), outcome)
    if not outcome.nodes:
        told = Report(type(model).__name__, sites=[entry.site for entry in outcome.plans])
        told.opaque = outcome.opaque
        raise NothingRewrittenError(why_nothing(told))
    install(runtime, result, outcome.nodes)
    keep(runtime, result, outcome)
    _warn_unmatched(config, runtime.report)
    tell_library(result, config)
    count_parameters(runtime.report, result)
    return result


def with_nodes(model: nn.Module, config: LinearizeConfig, nodes: Mapping[str, TTT]) -> nn.Module:
    """Give a model nodes that were saved, in place; its first call is judged when it comes.

    A GraphModule is rewritten at once.
    """
    if isinstance(model, fx.GraphModule):
        return build_graph(model, (), {}, config, nodes)
    runtime = runtime_for(model, config)
    runtime.report.capture = "saved: the first call is judged when it comes"
    runtime.report.sites = sites_of(nodes)
    install(runtime, model, nodes)
    tell_library(model, config)
    count_parameters(runtime.report, model)
    return model


def explained(
    model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], config: LinearizeConfig
) -> Report:
    """What would be done to a model, without doing it."""
    told = Report(type(model).__name__)
    if isinstance(model, fx.GraphModule):
        _plan_graph(duplicate(model, share=True), arguments, keywords, config, {}, told)
    else:
        template = bare(duplicate(model, share=True))
        bound = Signature(template.forward).bind(arguments, keywords)
        captured = clean_thread(lambda: capture(template, *bound, dynamic=False))
        told.capture = captured.note
        view = View(captured.graph, template, captured.constants)
        resolved = config.called(lambda f: f(*bound[0], **bound[1]))
        against = objector(config, *bound)
        lists = _lists(captured, *bound)
        plans = plan(view, resolved, tried=told.patterns, objection=against, lists=lists)
        _tell(told, view, plans)
    _warn_unmatched(config, told)
    count_parameters(told, model)
    return told


def _warn_unmatched(config: LinearizeConfig, told: Report) -> None:
    """Warn of patterns for names of modules that none of a model's attentions has."""
    owners = [site.fqn for site in told.sites]
    given: dict[str, Iterable[str]] = {
        "include": config.include,
        "exclude": config.exclude,
        "overrides": config.overrides,
    }
    for field, names in given.items():
        for pattern in names:
            if owners and not any(fnmatchcase(owner, pattern) for owner in owners):
                shown = ", ".join(map(repr, owners[:4])) + (", ..." if owners[4:] else "")
                warnings.warn(
                    f"{field}: expected a pattern for names of modules with attention ({shown}), "
                    f"got {pattern!r}, which matches none of them and has no effect",
                    stacklevel=4,
                )


def build_graph(
    gm: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: LinearizeConfig,
    nodes: Mapping[str, TTT],
) -> fx.GraphModule:
    """A copy of the graph with TTT nodes in it; `build` describes `nodes` and the errors.

    Raises `ConfigError` for a layout that is a callable: the graph has no place to call it.
    """
    if config.has_callables:
        raise ConfigError(
            "grid, prefix, suffix: expected values for a GraphModule, whose graph keeps the layout "
            "of the example, got a callable of the call's arguments; linearize a module instead"
        )
    told = Report(type(gm).__name__)
    view, plans = _plan_graph(gm, args, kwargs, config, nodes, told)
    refuse_calls(view, plans, nodes)
    if not told.rewritten:
        raise NothingRewrittenError(why_nothing(told))
    for key, module in rewrite(view, plans, nodes).items():
        module.train(gm.training)
        gm.add_submodule(key, module)
    gm.recompile()
    gm.meta[REPORT], gm.meta[CONFIG] = told, config
    count_parameters(told, gm)
    return gm


def _plan_graph(
    gm: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: LinearizeConfig,
    nodes: Mapping[str, TTT],
    told: Report,
) -> tuple[View, list[Plan]]:
    """Judge a given graph, which gets shapes and loses its writes in place."""
    told.capture = add_shapes(gm, args, kwargs)
    view = View(gm.graph, gm)
    settle(view)
    resolved = config.called(lambda f: f(*args, **kwargs))
    plans = plan(
        view,
        resolved,
        lambda m: m.key in nodes if nodes else None,
        tried=told.patterns,
        objection=objector(config, args, kwargs),
    )
    _tell(told, view, plans)
    return view, plans


def _tell(told: Report, view: View, plans: list[Plan]) -> None:
    told.sites = [entry.site for entry in plans]
    told.opaque = [] if plans else opaque_operators(view)


def count_parameters(report: Report, model: nn.Module) -> None:
    parameters = list(model.parameters())
    report.total = sum(p.numel() for p in parameters)
    report.trainable = sum(p.numel() for p in parameters if p.requires_grad)
