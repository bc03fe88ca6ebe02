"""torch.compile(model, backend="t5"): match, rewrite and lower the graph that Dynamo captured."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.utils import detect_fake_mode
from torch.nn.parallel import DistributedDataParallel

from t5fx.analysis.match import Match
from t5fx.analysis.opaque import opaque_operators
from t5fx.analysis.policy import UNPROVED_SIZES, plan
from t5fx.backend import adapters as adapters
from t5fx.backend.adapters import Place
from t5fx.backend.ddp import average_gradients
from t5fx.backend.handed import Handing, handed_to, offers_of
from t5fx.backend.layouts import LIST, SITE, Layouts, Lists, Told, Variants, set_layouts
from t5fx.backend.notices import summary_of, trace_artifact, warn_nothing, warn_untrained
from t5fx.backend.options import Options
from t5fx.backend.sharing import share_nodes
from t5fx.backend.sites import (
    Site,
    add_site,
    anchor_of,
    blame_break,
    check_all_used,
    check_selection,
    choose_anchor,
    objection_to,
)
from t5fx.config import LinearizeConfig
from t5fx.digest import code_digest
from t5fx.errors import AdapterError, RefusedCallError
from t5fx.frontend.dynamo import (
    Region,
    called,
    model_of,
    name_in_model,
    read,
    resolve,
)
from t5fx.frontend.positions import Positions, Unchanged, lists_in
from t5fx.graph.blocks import close_checkpoints
from t5fx.graph.view import CONSTANT, View
from t5fx.kernels import TTT
from t5fx.kernels.choice import resolved
from t5fx.reports import Report
from t5fx.rewrite.sites import rewrite
from t5fx.runtime.lookup import is_root
from t5fx.runtime.owned import OwnedModule

log = logging.getLogger(__name__)

_TTT = torch.ops.t5fx.ttt.default


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
        gm: the graph that Dynamo captured.
        example_inputs: its inputs.
        mode: Inductor's mode.
        options: fields of `LinearizeConfig`; "adapter": the path of a safetensors file, or a
            module, with trained parameters for all sites; "mode": Inductor's mode; "inductor": a
            dict of Inductor's options.
        more: what later versions of torch hand to every backend.

    Raises:
        ConfigError: an unknown option, or one outside its domain.
        AdapterError: an adapter that does not fit the model.
        RefusedCallError: an attention that has the parameters of a node cannot be one in this call.
        GraphSpecError: a failure of the pass; names the site and says how to leave it out.

    torch wraps these in its `BackendCompilerFailed`.
    """
    chosen = Options.of(mode, options)
    compile_graph = _inductor(chosen, more)
    region = None if _is_linearized(gm) else read(gm, example_inputs)
    if region is None or _in_linearized(region):
        log.info("a linearized model: lowered as it is")
        return compile_graph(_shared(gm), example_inputs)
    layouts = Layouts(chosen.config, region)
    config = layouts.resolved()
    known = _lists(region, example_inputs) | handed_to(region, example_inputs)
    offers = offers_of(region, known)
    report, sites = _rewrite(region, chosen, config, layouts, known)
    listed = [site.listed for site in sites] + [offer.grid for offer in offers]
    lists = Lists([one for one in listed if isinstance(one, Positions)], len(example_inputs))
    log.info("%s", summary_of(report))
    log.debug("%s", report)
    trace_artifact("t5fx_report", lambda: str(report))
    if not sites:
        warn_nothing(report, region)
        plain = compile_graph(gm, example_inputs)
        return Handing(plain, offers, gm, lists) if offers else plain
    lowered, fakes = _lower(gm, region, sites)
    checkpoints = region.checkpoints

    def make(config: LinearizeConfig, told: Told, inputs: list[Any]) -> Callable[..., Any]:
        """The graph with the layouts of a configuration, compiled."""
        ready = _copy(gm, lowered, _graph_copy(lowered.graph))
        set_layouts(ready.graph, _TTT, config, told)
        if not any(isinstance(x, int) for x in inputs):  # which Inductor's subgraphs do not take
            share_nodes(ready)
        close_checkpoints(ready, checkpoints)
        ready.recompile()
        trace_artifact("t5fx_rewritten_graph", lambda: ready.print_readable(print_output=False))
        log.debug("%s", ready.graph)
        return compile_graph(ready, inputs)

    function = make(config, lists.told, [*fakes, *example_inputs])
    if chosen.config.has_callables or lists.told:
        function = Variants(layouts, lists, config, function, make)
    compiled = Compiled(function, sites, chosen, region.numbers.read, layouts)
    return Handing(compiled, offers, gm, lists) if offers else compiled


class Compiled:
    """A compiled graph that is given the new parameters of the model it is called for."""

    def __init__(
        self,
        function: Callable[..., Any],
        sites: list[Site],
        options: Options,
        numbers: dict[int, torch.Tensor],
        layouts: Layouts,
    ) -> None:
        self.function = function
        self.layouts = layouts
        self.sites = sites
        self.options = options
        self.numbers = numbers
        self._read = Unchanged()

    def __call__(self, *args: Any) -> Any:
        self._check_numbers(args)
        self.layouts.check()
        fresh: list[torch.Tensor] = []
        active = DistributedDataParallel._active_ddp_module
        for site in self.sites:
            anchor = args[site.anchor]
            entry = adapters.held(anchor, site.identity)
            node = self._make(site, anchor) if entry is None else entry.follow(anchor)
            tensors = [tensor for some in node.tensors() for tensor in some]
            for tensor in tensors:
                if tensor.dtype != site.dtype or tensor.device != site.device:
                    raise AdapterError(
                        f"'{site.name}': expected new parameters in {site.dtype} on "
                        f"{site.device}, as when the model was compiled, got {tensor.dtype} on "
                        f"{tensor.device}; move or cast the model, and these follow"
                    )
            if active is not None:
                average_gradients(active, node)
            fresh += tensors
        return self.function(*fresh, *args)

    def _make(self, site: Site, anchor: torch.Tensor) -> TTT:
        """The node of another model, or of another anchor, that this graph serves too."""
        anchor = anchor_of(anchor, site.name)
        options, name, owner = self.options, site.name, None
        model, full = model_of(anchor), name_in_model(anchor)
        if model is not None and full is not None:
            name = site.identity.place.key(full) or name
            owner = resolve(model, name.rpartition(".")[0])
        node, made = adapters.obtain(
            anchor, site.identity, name, options.adapter, options.config, owner
        )
        check_selection(options.config, name, node)
        if made and options.adapter is None:
            warn_untrained(anchor, len(self.sites), options.config)
        return node

    def _check_numbers(self, args: tuple[Any, ...]) -> None:
        """The scales that were read from a model's buffers must still be what they were."""
        for position, value in self.numbers.items():
            tensor = args[position]
            if not self._read(position, [tensor]):
                if not torch.equal(tensor.detach().cpu(), value.cpu()):
                    raise AdapterError(
                        f"expected the constant {value.item()}, which a rewritten attention was "
                        f"compiled with, in a buffer of the model, got {tensor.item()}: call "
                        f"torch.compiler.reset()"
                    )
                self._read.note(position, [tensor])


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


def _lists(region: Region, example_inputs: list[Any]) -> dict[fx.Node, Positions | str]:
    """What the inputs of a graph that list positions say, but for those that the model has."""
    given = [
        None if node in region.tensors or CONSTANT in node.meta else value
        for node, value in zip(region.inputs, example_inputs, strict=True)
    ]
    return {region.inputs[i]: one for i, one in lists_in(given).items()}


def _rewrite(
    region: Region,
    options: Options,
    resolved: LinearizeConfig,
    layouts: Layouts,
    lists: dict[fx.Node, Positions | str],
) -> tuple[Report, list[Site]]:
    """Rewrite a graph in place; afterwards the nodes of its sites exist, beside the model.

    resolved: the configuration with the layouts of the call that is being compiled; lists: what
    the inputs say there that list positions.
    """
    anchors: dict[str, tuple[fx.Node, Place]] = {}
    config, adapter = options.config, options.adapter

    def decided(match: Match) -> bool | None:
        if match.binding is not None and match.key not in anchors:
            found = choose_anchor(region, match)
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

    judged = partial(
        plan,
        region.view,
        resolved,
        decided,
        region.public,
        owner=region.owner,
        objection=layouts.objection(),
        lists=lists,
        fixed=True,
    )
    plans = judged()
    if any(e.site.reason in UNPROVED_SIZES and decided(e.match) for e in plans):
        _fix_all_sizes(region)
        plans = judged()
    report = Report("this graph", sites=[entry.site for entry in plans])
    report.opaque = [] if plans else opaque_operators(region.view)
    for entry in plans:
        objection = objection_to(region, entry, entry.match.key in anchors)
        if entry.site.status == "rewritten" and objection:
            entry.site.status, entry.site.reason = "skipped", "excluded"
            entry.site.detail = objection
        blame_break(region, entry)
        if entry.site.status != "rewritten" and decided(entry.match):
            raise RefusedCallError(
                f"this call asks of '{entry.site.fqn}', which has the parameters of a TTT node, "
                f"what the node cannot do: {entry.site.reason} ({entry.site.detail}); call the "
                f"model as before, or leave the attention out: options={{'exclude': "
                f"['{entry.site.fqn}']}}"
            )
    chosen = {e.match.key: e for e in plans if e.site.status == "rewritten"}
    sites: list[Site] = []
    made: list[Site] = []
    try:
        for key, entry in chosen.items():
            add_site(region, key, entry, *anchors[key], options, sites, made)
        rewrite(region.view, plans, {site.key: site.present() for site in sites})
        if adapter is not None and region.whole:
            check_all_used(adapter, sites)
    except Exception:
        for site in made:
            owner = region.owner(chosen[site.key].match.owner)
            adapters.forget(region.value(site.anchor), site.identity, owner)
        raise
    if made and adapter is None:
        warn_untrained(region.value(made[0].anchor), len(made), config)
    return report, sites


def _fix_all_sizes(region: Region) -> None:
    """Make constants of the sizes of all inputs, with which more can be proved than with symbols.

    Other sizes are then another graph.
    """
    for node in region.inputs:
        value = View.meta(node)
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(size, torch.SymInt):
                int(size)


def _lower(
    gm: fx.GraphModule, region: Region, sites: list[Site]
) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """The rewritten graph with all parameters as inputs, the new ones first; fakes of these."""
    graph = region.view.graph
    owner: Any = graph.owning_module
    fake_mode = detect_fake_mode([View.meta(n) for n in graph.nodes])
    assert fake_mode is not None
    fakes: list[torch.Tensor] = []
    inputs: dict[str, tuple[list[fx.Node], ...]] = {}
    first = next(iter(graph.nodes))
    for site in sites:
        node = site.node()
        assert node is not None
        names = {id(parameter): name for name, parameter in node.named_parameters()}
        lists: tuple[list[fx.Node], ...] = tuple([] for _ in node.tensors())
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
            new.meta = {**call.meta, SITE: region.public(call.target)}
            new.meta[LIST] = by_key[call.target].listed
            call.replace_all_uses_with(new)
            graph.erase_node(call)
    return owner, fakes


def _impl(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """What `impl` "auto" is for a call in the graph; its argument, so that caches can tell."""
    q, k, v, *lists = fx.map_arg(arguments, View.meta)
    parameters = [tensor for some in lists for tensor in some]
    node = {n: x for n, x in keywords.items() if n not in ("grid", "prefix", "key_mask")}
    masked = keywords.get("key_mask") is not None
    return resolved(node["impl"], q, k, v, parameters, len(keywords["grid"]), node, masked)


def _shared(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a linearized model's graph, its equal nodes compiled once."""
    copy = _copy(gm, gm, _graph_copy(gm.graph))
    share_nodes(copy)
    copy.recompile()
    return copy


def _graph_copy(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph, with what Dynamo recorded about its inputs."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for old, new in zip(
        graph.find_nodes(op="placeholder"), copy.find_nodes(op="placeholder"), strict=True
    ):
        new._dynamo_source = old._dynamo_source
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
