"""torch.compile(model, backend="t5"): match, rewrite and lower the graph that Dynamo captured."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.utils import detect_fake_mode
from torch._logging import trace_structured
from torch.nn.parallel import DistributedDataParallel

from t5fx.analysis.match import Match
from t5fx.analysis.opaque import opaque_operators
from t5fx.analysis.policy import Plan, plan
from t5fx.backend import adapters as adapters
from t5fx.backend.adapters import Adapter, Identity, Place
from t5fx.backend.sharing import share_nodes
from t5fx.config import LinearizeConfig
from t5fx.digest import code_digest
from t5fx.errors import AdapterError, ConfigError, NothingRewrittenWarning, UntrainedWarning
from t5fx.frontend.dynamo import (
    Region,
    Tensor,
    called,
    inside_compiled_module,
    is_sharded,
    model_of,
    name_in_model,
    read,
    resolve,
)
from t5fx.graph.blocks import close_checkpoints
from t5fx.graph.view import View, expr, same
from t5fx.kernels import TTT
from t5fx.kernels.choice import resolved
from t5fx.reports import Report, why_nothing
from t5fx.rewrite.sites import rewrite, settings
from t5fx.runtime.lookup import is_root
from t5fx.runtime.owned import OwnedModule

log = logging.getLogger(__name__)

_TTT = torch.ops.t5fx.ttt.default

#: Fields of LinearizeConfig that mean nothing to a graph that Dynamo captured.
_NOT_HERE = ("dynamic",)

#: What attention looks like whose tokens or products a graph break has taken away.
_CUT = ("cross-attention", "not-attention", "grid-unknown")


@dataclasses.dataclass(frozen=True)
class Options:
    """What `torch.compile(..., backend="t5", options=...)` was given, checked.

    config: the fields of LinearizeConfig; adapter: trained parameters; mode and inductor:
    Inductor's mode and its own options.
    """

    config: LinearizeConfig
    adapter: Adapter | None
    mode: str | None
    inductor: dict[str, Any]

    @classmethod
    def of(cls, mode: str | None, options: dict[str, Any] | None) -> Options:
        """Raises `ConfigError` for an option that is unknown or outside its domain."""
        given = dict(options or {})
        names = [f.name for f in dataclasses.fields(LinearizeConfig) if f.name not in _NOT_HERE]
        own = ("adapter", "mode", "inductor")
        unknown = [repr(name) for name in given if name not in (*names, *own)]
        if unknown:
            raise ConfigError(
                f"options of backend='t5': expected any of {', '.join((*own, *names))}; got "
                f"{', '.join(unknown)}. Inductor's own options go into 'inductor'"
            )
        inductor = given.pop("inductor", None) or {}
        if not isinstance(inductor, dict):
            raise ConfigError(f"inductor: expected a dict of options, got {inductor!r}")
        mode = given.pop("mode", None) or mode
        origin = given.pop("adapter", None)
        adapter = None if origin is None else Adapter(origin)
        base = LinearizeConfig() if adapter is None else adapter.config or LinearizeConfig()
        config = dataclasses.replace(base, **given)
        for fields in (dataclasses.asdict(config), *config.overrides.values()):
            for name, value in fields.items():
                if callable(value):
                    raise ConfigError(
                        f"{name}: a graph does not know the arguments of the call; expected a "
                        f"value, got a callable, which t5fx.linearize takes"
                    )
        return cls(config, adapter, mode, inductor)


def t5(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> Callable[..., Any]:
    """The backend "t5" of torch.compile.

    On a linearized model it compiles with Inductor. On any other it first rewrites every legal
    softmax attention of the graph into a TTT node, as `t5fx.linearize` does; the new parameters are
    kept beside the model (`t5fx.adapter`), the same ones in every compilation of it.

    Args:
        gm, example_inputs: what Dynamo gives a backend.
        mode: Inductor's mode.
        options: fields of `LinearizeConfig`; "adapter": the path of a safetensors file, or a
            module, with trained parameters for all sites; "mode": Inductor's mode; "inductor": a
            dict of Inductor's options.
        more: what later versions of torch hand to every backend.

    Raises:
        ConfigError: an unknown option, or one outside its domain.
        AdapterError: an adapter that does not fit the model.
        GraphSpecError: a failure of the pass; names the site and says how to leave it out.

    torch wraps these in its `BackendCompilerFailed`.
    """
    chosen = Options.of(mode, options)
    compile_graph = _inductor(chosen, more)
    region = read(gm, example_inputs)
    if _is_linearized(gm) or _in_linearized(region):
        log.info("a linearized model: lowered as it is")
        return compile_graph(_shared(gm), example_inputs)
    report, sites = _rewrite(region, chosen)
    log.info("%s", _summary(report))
    log.debug("%s", report)
    _trace("t5fx_report", lambda: str(report))
    if not sites:
        _warn_nothing(report, region)
        return compile_graph(gm, example_inputs)
    lowered, fakes = _lower(gm, region, sites)
    _trace("t5fx_rewritten_graph", lambda: lowered.print_readable(print_output=False))
    log.debug("%s", lowered.graph)
    function = compile_graph(lowered, [*fakes, *example_inputs])
    return Compiled(function, sites, chosen, region.numbers.read)


@dataclasses.dataclass
class Site:
    """A rewritten site of a graph: which input is its anchor, and what its node is.

    key: of the node in the graph; name: in the model. node: that of the model which is being
    compiled; dtype, device: of its parameters, as the graph was compiled.
    """

    key: str
    name: str
    anchor: int
    identity: Identity
    node: weakref.ref[TTT]
    dtype: torch.dtype
    device: torch.device

    def present(self) -> TTT:
        """`node`, while the model is being compiled."""
        node = self.node()
        assert node is not None
        return node


class Compiled:
    """A compiled graph that is given the new parameters of the model it is called for."""

    def __init__(
        self,
        function: Callable[..., Any],
        sites: list[Site],
        options: Options,
        numbers: dict[int, torch.Tensor],
    ) -> None:
        self.function = function
        self.sites = sites
        self.options = options
        self.numbers: dict[int, tuple[torch.Tensor, Any]] = {
            position: (value, None) for position, value in numbers.items()
        }

    def __call__(self, *args: Any) -> Any:
        self._check_numbers(args)
        fresh: list[torch.Tensor] = []
        active = DistributedDataParallel._active_ddp_module
        for site in self.sites:
            anchor = args[site.anchor]
            entry = adapters.held(anchor, site.identity)
            node = self._make(site, anchor) if entry is None else entry.follow(anchor)
            weights, conv = node.tensors()
            tensors = [*weights, *conv]
            for tensor in tensors:
                if tensor.dtype != site.dtype or tensor.device != site.device:
                    raise AdapterError(
                        f"'{site.name}': expected new parameters in {site.dtype} on "
                        f"{site.device}, as when the model was compiled, got {tensor.dtype} on "
                        f"{tensor.device}; they are moved and cast with the model, not apart"
                    )
            if active is not None:
                _average_gradients(active, node)
            fresh += tensors
        return self.function(*fresh, *args)

    def _make(self, site: Site, anchor: torch.Tensor) -> TTT:
        """The node of another model, or of another anchor, that this graph serves too."""
        anchor = _anchor(anchor, site.name)
        options, name, owner = self.options, site.name, None
        model, full = model_of(anchor), name_in_model(anchor)
        if model is not None and full is not None:
            name = site.identity.place.key(full) or name
            owner = resolve(model, name.rpartition(".")[0])
        node, made = adapters.obtain(
            anchor, site.identity, name, options.adapter, options.config, owner
        )
        _check_selection(options.config, name, node)
        if made and options.adapter is None:
            _warn_untrained(anchor, len(self.sites), options.config)
        return node

    def _check_numbers(self, args: tuple[Any, ...]) -> None:
        """The scales that were read from a model's buffers must still be what they were."""
        for position, (value, seen) in self.numbers.items():
            tensor = args[position]
            version = None if tensor.is_inference() else tensor._version
            if version is None or seen is None or seen[0]() is not tensor or seen[1] != version:
                if not torch.equal(tensor.detach().cpu(), value.cpu()):
                    raise AdapterError(
                        f"expected the constant {value.item()}, which a rewritten attention was "
                        f"compiled with, in a buffer of the model, got {tensor.item()}: call "
                        f"torch.compiler.reset()"
                    )
                self.numbers[position] = (value, (weakref.ref(tensor), version))


def _check_selection(config: LinearizeConfig, name: str, node: TTT) -> None:
    """A graph compiled for one module serves another: the options must mean the same for both."""
    owner = name.rpartition(".")[0]
    if not config.selects(owner) or not adapters.matches(node, config.at(owner)):
        raise ConfigError(
            f"'{name}' runs a graph that was compiled for another module with the same code, but "
            f"include, exclude or overrides treat the two differently; compile the whole model, or "
            f"give each module options without these"
        )


def _anchor(value: Any, name: str) -> nn.Parameter:
    if not isinstance(value, nn.Parameter):
        raise AdapterError(
            f"'{name}': expected the model's own parameters, got a tensor in the place of one (as "
            f"torch.func.functional_call and nn.DataParallel do); new parameters are kept with the "
            f"model's: use t5fx.linearize, which puts them into the model"
        )
    return value


def _is_linearized(gm: fx.GraphModule) -> bool:
    """Whether the graph is (a part of) a linearized model, whose author chose what to rewrite."""
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return any(
        node.target in (_TTT, torch.ops.t5fx.ttt)
        or any(
            isinstance(kind, type) and issubclass(kind, OwnedModule | TTT)
            for _, kind in (node.meta.get("nn_module_stack") or {}).values()
        )
        for graph in graphs
        for node in graph.nodes
    )


def _in_linearized(region: Region) -> bool:
    """Whether the graph is a stretch between the rewritten modules of a linearized model."""
    roots = [module for module in called() if is_root(module)]
    own = {id(p) for root in roots for p in (*root.parameters(), *root.buffers())}
    return any(id(tensor.value) in own for tensor in region.tensors.values())


def _rewrite(region: Region, options: Options) -> tuple[Report, list[Site]]:
    """Rewrite a graph in place; afterwards the nodes of its sites exist, beside the model."""
    anchors: dict[str, tuple[fx.Node, Place]] = {}
    config, adapter = options.config, options.adapter

    def decided(match: Match) -> bool | None:
        if match.binding is not None and match.key not in anchors:
            found = _choose_anchor(region, match)
            if found is not None:
                anchors[match.key] = found
        if not config.selects(region.public(match.owner)):
            return None
        if adapter is not None:
            return region.public(match.key) in adapter.sites
        if match.key not in anchors:
            return None
        node, place = anchors[match.key]
        anchor, owner = region.tensors[node].value, region.owner(match.owner)
        return adapters.was_rewritten(owner, anchor, place, config) or None

    plans = plan(region.view, config, decided, region.public, owner=region.owner)
    report = Report("this graph", sites=[entry.site for entry in plans])
    report.opaque = [] if plans else opaque_operators(region.view)
    for entry in plans:
        objection = _objection(region, entry, entry.match.key in anchors)
        if entry.site.status == "rewritten" and objection:
            entry.site.status, entry.site.reason = "skipped", "excluded"
            entry.site.detail = objection
        _blame_break(region, entry)
    chosen = {e.match.key: e for e in plans if e.site.status == "rewritten"}
    sites: list[Site] = []
    made: list[Site] = []
    try:
        for key, entry in chosen.items():
            _add_site(region, key, entry, *anchors[key], options, sites, made)
        rewrite(region.view, plans, {site.key: site.present() for site in sites})
        if adapter is not None and region.whole:
            _all_used(adapter, sites)
    except Exception:
        for site in made:
            owner = region.owner(chosen[site.key].match.owner)
            adapters.forget(region.value(site.anchor), site.identity, owner)
        raise
    if made and adapter is None:
        _warn_untrained(region.value(made[0].anchor), len(made), config)
    return report, sites


def _blame_break(region: Region, entry: Plan) -> None:
    """Say of what a graph break has made unreadable that the break is why."""
    broken, site = region.begin or region.end, entry.site
    binding, view = entry.match.binding, region.view
    if site.reason == "cross-attention" and binding is not None:
        queries, keys = (view.shape(x.like)[x.token] for x in (binding.q, binding.k))
        if not same(expr(queries), expr(keys)):
            return  # it would be one without the break, too
    leaves = site.reason == "probabilities-used" and region.end is not None
    if broken is not None and site.status == "skipped" and (site.reason in _CUT or leaves):
        site.reason, site.detail = "graph-break", f"{broken} cuts it off: {site.detail}"


def _objection(region: Region, entry: Plan, has_anchor: bool) -> str:
    """Why a site that could be rewritten has to be left in a graph that Dynamo captured, or ""."""
    if entry.match.binding is None:
        return ""
    value = region.view.val(entry.match.binding.q.like)
    while value is not None and torch._C._functorch.is_functorch_wrapped_tensor(value):
        if torch._C._functorch.is_batchedtensor(value):
            return "it runs inside of torch.func.vmap; t5fx.linearize the model"
        value = torch._C._functorch.get_unwrapped(value)
    if not has_anchor:
        return (
            "no parameter of a module feeds it, with which new ones could be kept; "
            "t5fx.linearize puts them into the model"
        )
    return ""


def _refuse_sharded(tensor: torch.Tensor, name: str) -> None:
    if is_sharded(tensor):
        raise AdapterError(
            f"'{name}': expected a model whose parameters are whole, got one that is split over "
            f"devices (FSDP, DTensor); new ones beside it would not be: linearize the model first, "
            f"then shard and compile that"
        )


def _add_site(
    region: Region,
    key: str,
    entry: Plan,
    anchor: fx.Node,
    place: Place,
    options: Options,
    sites: list[Site],
    made: list[Site],
) -> None:
    """Add a site with its node to `sites`, and where it had to be made also to `made`."""
    adapter, tensor = options.adapter, region.tensors[anchor]
    values = tuple(settings(region.view, entry).items())
    identity = Identity(place, values, adapter.source if adapter else None)
    name = region.public(key)
    _refuse_sharded(tensor.value, name)
    owner = region.owner(entry.match.owner)
    node, new = adapters.obtain(tensor.value, identity, name, adapter, options.config, owner)
    like = next(node.parameters())
    if new and entry.impl is not None:
        node.impl = entry.impl  # for later graphs too
    site = Site(key, name, tensor.position, identity, weakref.ref(node), *_like(like))
    sites.append(site)
    if new:
        made.append(site)


def _choose_anchor(region: Region, match: Match) -> tuple[fx.Node, Place] | None:
    """The parameter that a site's node is looked up by: of its owner, or else the nearest before q.

    One that no other module has, where there is one.
    """
    binding = match.binding
    assert binding is not None
    inside = f"{match.owner}." if match.owner else ""
    owned = [
        (_holders(region, tensor) > 1, str(node.target), node)
        for node, tensor in region.tensors.items()
        if str(node.target).startswith(inside) and isinstance(tensor.value, nn.Parameter)
    ]
    node = min(owned)[2] if owned else None
    queue, seen = deque([binding.q.node, binding.k.node, binding.v.node]), set()
    while node is None and queue:
        current = queue.popleft()
        if current in region.tensors and isinstance(region.tensors[current].value, nn.Parameter):
            node = current
        elif current not in seen:
            seen.add(current)
            queue.extend(current.all_input_nodes)
    return None if node is None else (node, Place.between(str(node.target), match.key))


def _holders(region: Region, tensor: Tensor) -> int:
    """Under how many names the model has this parameter."""
    model = region.models[tensor.root]
    if model is None:
        return 1
    holders = region.holders.setdefault(tensor.root, Counter())
    if not holders:
        named = model.named_parameters(remove_duplicate=False)
        holders.update(id(parameter) for _, parameter in named)
    return holders[id(tensor.value)]


def _all_used(adapter: Adapter, sites: list[Site]) -> None:
    unused = sorted(set(adapter.sites) - {site.name for site in sites})
    if unused:
        raise AdapterError(
            f"adapter: {adapter.label} has parameters of {', '.join(map(repr, unused))}, which "
            f"were not rewritten; t5fx.explain says why"
        )


def _lower(
    gm: fx.GraphModule, region: Region, sites: list[Site]
) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """The rewritten graph with all parameters as inputs, the new ones first; fakes of these."""
    graph = region.view.graph
    owner: Any = graph.owning_module
    fake_mode = detect_fake_mode([View.meta(n) for n in graph.nodes])
    assert fake_mode is not None
    fakes: list[torch.Tensor] = []
    inputs: dict[str, tuple[list[fx.Node], list[fx.Node]]] = {}
    first = next(iter(graph.nodes))
    for site in sites:
        node = site.node()
        assert node is not None
        names = {id(parameter): name for name, parameter in node.named_parameters()}
        lists: tuple[list[fx.Node], list[fx.Node]] = ([], [])
        for tensors, placeholders in zip(node.tensors(), lists, strict=True):
            for tensor in tensors:
                with torch.inference_mode(False):
                    fake = fake_mode.from_tensor(tensor.detach(), static_shapes=True)
                    fakes.append(fake.requires_grad_())
                with graph.inserting_before(first):
                    name = f"{site.key}.{names[id(tensor)]}".replace(".", "_")
                    placeholder = graph.placeholder(name)
                placeholder.meta["example_value"] = fake
                placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
                placeholder._dynamo_source = None
                placeholders.append(placeholder)
        inputs[site.key] = lists
    dynamo = gm.graph.find_nodes(op="placeholder")
    for source, node in zip(dynamo, region.inputs, strict=True):
        with graph.inserting_before(first):
            placeholder = graph.placeholder(source.target)
        placeholder.meta = dict(source.meta)
        placeholder._dynamo_source = source._dynamo_source
        if not getattr(node, "_erased", False):
            node.replace_all_uses_with(placeholder)
            if node is first:
                first = node.next
            graph.erase_node(node)
    by_key = {site.key: site for site in sites}
    for call in graph.find_nodes(op="call_module"):
        if call.target in by_key:
            node = by_key[call.target].node()
            assert node is not None
            with graph.inserting_before(call):
                arguments = (*call.args, *inputs[call.target])
                keywords = {"grid": [], **call.kwargs, **node.settings()}
                keywords["impl"] = _impl(arguments, keywords)
                new = graph.call_function(_TTT, arguments, keywords)
            new.meta = call.meta
            call.replace_all_uses_with(new)
            graph.erase_node(call)
    share_nodes(owner)
    close_checkpoints(owner, region.checkpoints)
    return _copy(gm, owner, graph), fakes


def _impl(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """What `impl` "auto" is for a call in the graph; its argument, so that caches can tell."""
    q, k, v, *lists = fx.map_arg(arguments, View.meta)
    parameters = [tensor for some in lists for tensor in some]
    node = {n: x for n, x in keywords.items() if n not in ("grid", "prefix")}
    return resolved(node["impl"], q, k, v, parameters, len(keywords["grid"]), node)


def _shared(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a linearized model's graph, its equal nodes compiled once."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = _copy(gm, gm, graph)
    for old, new in zip(
        gm.graph.find_nodes(op="placeholder"),
        copy.graph.find_nodes(op="placeholder"),
        strict=True,
    ):
        new._dynamo_source = old._dynamo_source
    share_nodes(copy)
    copy.recompile()
    return copy


def _copy(gm: fx.GraphModule, owner: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph module with another graph and all that Dynamo told the compiler beside the graph."""
    copy = fx.GraphModule(owner, graph)
    copy.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks", "compile_subgraph_reason"):
        if hasattr(gm, name):
            setattr(copy, name, getattr(gm, name))
    return copy


def _inductor(options: Options, more: dict[str, Any]) -> Callable[..., Any]:
    """Inductor's own backend with these options; its caches know the node's code."""
    known = inspect.signature(torch._TorchCompileInductorWrapper).parameters
    more = {name: value for name, value in more.items() if name in known}
    inner = torch._TorchCompileInductorWrapper(options.mode, options.inductor, None, **more)

    def compile_graph(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        tag = torch.compiler.config.cache_key_tag + code_digest()
        with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            return inner(gm, example_inputs)

    return compile_graph


@dataclasses.dataclass
class _Averaged:
    """The DDP module that a node's gradients are averaged for, and the hooks that do it."""

    ddp: weakref.ref[DistributedDataParallel]
    handles: list[Any]


_averaged: weakref.WeakKeyDictionary[TTT, _Averaged] = weakref.WeakKeyDictionary()


def _average_gradients(ddp: DistributedDataParallel, node: TTT) -> None:
    """Average a node's gradients over the ranks, as DDP does for the model's own parameters.

    Fresh parameters are equal on all ranks by construction.
    """
    known = _averaged.get(node)
    if known is not None and known.ddp() is ddp:
        return
    reference = weakref.ref(ddp)

    def average(parameter: torch.Tensor) -> None:
        module = reference()
        if module is not None and module.require_backward_grad_sync:
            assert parameter.grad is not None
            torch.distributed.all_reduce(parameter.grad, group=module.process_group)
            parameter.grad /= module.process_group.size()

    for handle in known.handles if known is not None else ():
        handle.remove()
    handles = [p.register_post_accumulate_grad_hook(average) for p in node.parameters()]
    _averaged[node] = _Averaged(reference, handles)


_warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def _once(model: nn.Module | None, what: str) -> bool:
    """Whether this is the first time for a model; True where the model is not known."""
    if model is None:
        return True
    said = _warned.setdefault(model, set())
    first = what not in said
    said.add(what)
    return first


def _warn_untrained(anchor: torch.Tensor, count: int, config: LinearizeConfig) -> None:
    model = model_of(anchor)
    if _once(model, f"untrained: {config}"):
        whose = "a model" if model is None else type(model).__name__
        warnings.warn(
            f"{whose} runs with untrained parameters: {count} attentions were rewritten, and their "
            f"outputs do not mean what they meant. Train t5fx.adapter(model).parameters(), or give "
            f"trained ones: options={{'adapter': path or module}}",
            UntrainedWarning,
            stacklevel=2,
        )


def _warn_nothing(report: Report, region: Region) -> None:
    model = next((model_of(t.value) for t in region.tensors.values()), None)
    broken = region.begin or region.end
    if not report.sites and (broken is not None or inside_compiled_module()):
        return  # a stretch between graph breaks
    reasons = ", ".join(sorted(report.counts()))
    if _once(model, f"nothing: {reasons}"):
        report.model = "a graph" if model is None else type(model).__name__
        text = f"{why_nothing(report)}. The graph is compiled as it is"
        if region.ddp:
            text += (
                "; DDP had split it, so that tokens come from nowhere: set "
                "torch._dynamo.config.optimize_ddp = False, or linearize the model first"
            )
        warnings.warn(text, NothingRewrittenWarning, stacklevel=2)


def _like(tensor: torch.Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def _summary(report: Report) -> str:
    counts = ", ".join(f"{n} x {reason}" for reason, n in report.counts().items())
    return f"{len(report.rewritten)} attentions rewritten, {len(report.skipped)} left ({counts})"


def _trace(name: str, payload: Callable[[], str]) -> None:
    """An artifact for tlparse."""
    trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=payload
    )
