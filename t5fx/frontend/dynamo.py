"""A graph that Dynamo hands to a backend, made readable for the pass.

Dynamo gives a model's parameters as inputs, names modules by the expression that reaches them from
the compiled frame, and keeps checkpointed stretches as functions. Here parameters are attributes
again, under the names that `named_parameters` gives them on the model; modules have the names of
`named_modules`; checkpointed stretches are part of the graph, tagged to be recomputed.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.source import NNModuleSource
from torch._dynamo.symbolic_convert import InstructionTranslator

from t5fx.frontend.breaks import Break, breaks
from t5fx.graph.blocks import Checkpoint, open_checkpoints, open_multi_head_attention
from t5fx.graph.modules import module_name, through_attributes
from t5fx.graph.sizes import guard_equal
from t5fx.graph.view import CONSTANT, View
from t5fx.graph.writes import settle

_STEP = r"\._(?:modules|parameters|buffers)\[['\"]?([^'\"\]]+)['\"]?\]"
_TENSOR = re.compile(rf"^(?P<root>.*?)(?P<path>(?:{_STEP})+)(?:\.(?P<attribute>\w+))?$")


@dataclass
class Tensor:
    """A parameter, buffer or other tensor of a module that Dynamo gives as an input.

    position: among the inputs; name: in the module `root` (an expression, such as "L['self']");
    value: the tensor of the call that is being compiled.
    """

    position: int
    root: str
    name: str
    value: torch.Tensor


class Numbers(dict[str, Any]):
    """The tensors of a graph by name; those of one element as numbers, and which of them were read.

    A model's tensors are inputs of a Dynamo graph, so a number that a rewrite took from one has to
    be compared with the tensor of each call.
    """

    def __init__(self, tensors: dict[str, tuple[int, torch.Tensor]]) -> None:
        super().__init__()
        self.read: dict[int, torch.Tensor] = {}
        self._tensors = tensors
        for name, (_, value) in tensors.items():
            usable = value.numel() == 1 and not value.is_meta and not value.is_complex()
            fixed = usable and not isinstance(value, nn.Parameter)
            self[name] = value if fixed else None

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if value is not None:
            self.read[self._tensors[name][0]] = value.detach().clone()
        return value


@dataclass
class Region:
    """One Dynamo graph, readable.

    inputs: for each of Dynamo's inputs the node that stands for it. tensors: by node, those that
    are parameters and buffers. labels: what the names of each root's modules begin with here, to
    tell two models in one graph apart; "" where there is only one. models: the model of each root.
    numbers: values that the rewrite may rely on, if it says so. begin, end: the graph breaks around
    it, None where the compiled code begins and ends; ddp: where DDP has split it; whole: it is one
    whole model.
    """

    view: View
    inputs: list[fx.Node]
    tensors: dict[fx.Node, Tensor]
    labels: dict[str, str]
    models: dict[str, nn.Module | None]
    checkpoints: list[Checkpoint]
    numbers: Numbers
    begin: Break | None
    end: Break | None
    ddp: bool
    whole: bool
    holders: dict[str, Counter[int]] = field(default_factory=dict)

    def public(self, key: str) -> str:
        """The name in its model of what has the name `key` in the graph."""
        for label in self.labels.values():
            if label and key.startswith(label):
                return key[len(label) :]
        return key

    def owner(self, name: str) -> nn.Module | None:
        """The module that has this name in the graph, or None where its model is not known."""
        public = self.public(name)
        for root, label in self.labels.items():
            model = self.models[root]
            if model is not None and name == label + public:
                return resolve(model, public)
        return None

    def value(self, position: int) -> torch.Tensor:
        """The tensor of one of Dynamo's inputs."""
        return self.tensors[self.inputs[position]].value


def read(gm: fx.GraphModule, example_inputs: list[Any]) -> Region:
    """A readable copy of a Dynamo graph; `gm` stays as it is."""
    owner = fx.GraphModule({}, fx.Graph())
    for name, value in (*gm.named_children(), *gm.named_buffers(), *gm.named_parameters()):
        if "." not in name:
            setattr(owner, name, value)
    graph = owner.graph
    copies: dict[fx.Node, fx.Node] = {}
    found = dict(_tensors(gm, example_inputs))
    labels = _labels({tensor.root for tensor in found.values()})
    names = {root: _prefix(root, found) for root in labels}
    models = {root: _model(root, found) for root in labels}
    inputs: list[fx.Node] = []
    tensors: dict[fx.Node, Tensor] = {}
    for node in gm.graph.nodes:
        tensor = found.get(node)
        if tensor is None:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            if node.op == "placeholder" and _is_of_module(getattr(node, "_dynamo_source", None)):
                copies[node].meta[CONSTANT] = True
        else:
            tensor.name = _joined(names[tensor.root], tensor.name)
            copy = graph.create_node("get_attr", labels[tensor.root] + tensor.name, name=node.name)
            copy.meta = dict(node.meta)
            tensors[copies.setdefault(node, copy)] = tensor
        if node.op == "placeholder":
            inputs.append(copies[node])
    checkpoints = open_checkpoints(owner)
    open_multi_head_attention(owner)
    canonical = {root: _first_names(model) for root, model in models.items()}
    for node in graph.nodes:
        _rename(node, names, labels, models, canonical)
    numbers = Numbers({str(n.target): (t.position, t.value) for n, t in tensors.items()})
    view = View(graph, owner, numbers)
    settle(view)
    _same_sizes(view)
    begin, end = breaks(gm)
    ddp = "DDPOptimizer" in str(getattr(gm, "compile_subgraph_reason", None))
    inner = any(names.values()) or len(labels) > 1
    return Region(
        *(view, inputs, tensors, labels, models, checkpoints, numbers, begin, end, ddp),
        whole=begin is end is None and not (inner or inside_compiled_module()),
    )


def _same_sizes(view: View) -> None:
    """Guard that sequences that are padded to one length have it, if all do in the example.

    Each may have a size of its own in a dynamic graph: images in a list, say. Only with equal sizes
    is the batch on one grid; for a call with others Dynamo compiles anew.
    """
    for node in view.graph.nodes:
        if view.op(node) == "pad_sequence":
            sequences = [n for n in view.arg(node, "sequences") if isinstance(n, fx.Node)]
            values = [view.val(n) for n in sequences]
            guard_equal([value.shape[0] for value in values if value is not None])


def _tensors(gm: fx.GraphModule, example_inputs: list[Any]) -> Iterator[tuple[fx.Node, Tensor]]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    for i, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        source = getattr(node, "_dynamo_source", None)
        name = getattr(source, "name", "")
        match = _TENSOR.match(through_attributes(name() if callable(name) else name))
        if match is not None and isinstance(value, torch.Tensor):
            parts = re.findall(_STEP, match["path"])
            parts += [match["attribute"]] if match["attribute"] else []
            yield node, Tensor(i, match["root"], clean(parts), value)


def _is_of_module(source: Any) -> bool:
    """Whether an input of a Dynamo graph is a module's attribute, or in one: a list of tables."""
    while source is not None and not isinstance(source, NNModuleSource):
        source = getattr(source, "base", None)
    return source is not None


def clean(parts: list[str]) -> str:
    """A name in the model as its author knows it, without the wrappers of torch.compile."""
    return ".".join(part for part in parts if part != "_orig_mod")


def _labels(roots: set[str]) -> dict[str, str]:
    if len(roots) < 2:
        return dict.fromkeys(roots, "")
    return {root: f"model{i}." for i, root in enumerate(sorted(roots))}


def _joined(prefix: str, name: str) -> str:
    """`name` under `prefix`; a prefix that begins with "-" is taken off instead."""
    if prefix.startswith("-"):
        return name.removeprefix(prefix[1:]).lstrip(".")
    return f"{prefix}.{name}".strip(".")


def _prefix(root: str, found: dict[fx.Node, Tensor]) -> str:
    """Where the module that a graph calls `root` is in the model that is being called."""
    for tensor in found.values():
        if tensor.root == root and (full := name_in_model(tensor.value)) is not None:
            return difference(full, tensor.name)
    return ""


def _model(root: str, found: dict[fx.Node, Tensor]) -> nn.Module | None:
    """The model that a root is (a part of): the one being called, or what the root itself is."""
    value = next(tensor.value for tensor in found.values() if tensor.root == root)
    model = model_of(value)
    if model is None:
        try:
            output = InstructionTranslator.current_tx().output
            model = eval(root, {"L": output.local_scope, "G": output.global_scope})
        except Exception:  # not an expression of the frame's variables, or no frame
            return None
    return traced_module(model) if isinstance(model, nn.Module) else None


def _first_names(model: nn.Module | None) -> dict[int, str]:
    """Modules by identity: the name under which `named_modules` lists each."""
    if model is None:
        return {}
    return {id(module): clean(name.split(".")) for name, module in model.named_modules()}


def resolve(model: nn.Module, name: str) -> nn.Module | None:
    """The module of a model that has this name, through torch.compile's and DDP's wrappers."""
    module: nn.Module | None = traced_module(model)
    for part in name.split(".") if name else ():
        module = None if module is None else module._modules.get(part)
        if module is None:
            return None
        module = traced_module(module)
    return module


def difference(full: str, name: str) -> str:
    """What to put before `name` to have `full`; "-..." where it is to be taken off instead."""
    if full == name:
        return ""
    if full.endswith("." + name):
        return full[: -len(name) - 1]
    return "-" + name[: -len(full) - 1] if name.endswith("." + full) else ""


def name_in_model(tensor: torch.Tensor) -> str | None:
    """The name of a tensor in the model that is being called, or None outside of any call.

    The model is the outermost compiled module around; where parts of a model are compiled apart,
    it is the outermost module that calls them.
    """
    model = model_of(tensor)
    return None if model is None else _name(model, tensor)


def model_of(tensor: torch.Tensor) -> nn.Module | None:
    """The module in whose call a tensor is being used: see `name_in_model`."""
    holders = [m for m in called() if _name(m, tensor) is not None]
    if not holders:
        return None
    compiled = next((m for m in holders if _is_compiled(m)), holders[0])
    inside = set(map(id, compiled.modules()))
    apart = any(
        _is_compiled(m) for m in holders[0].modules() if id(m) not in inside and m not in holders
    )
    return traced_module(holders[0] if apart else compiled)


def called() -> list[nn.Module]:
    """The modules that are being called in this thread, outermost first."""
    called: list[nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl":
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                called.insert(0, module)
        frame = frame.f_back  # type: ignore[assignment]
    return called


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a parameter is split over devices, by itself or by a module that is being called."""
    loaded = [sys.modules.get(f"torch.distributed.{name}") for name in ("tensor", "fsdp")]
    names = ("DTensor", "FSDPModule", "FullyShardedDataParallel")
    kinds = tuple(getattr(m, n) for m in loaded for n in names if hasattr(m, n))
    return any(isinstance(thing, kinds) for thing in (tensor, *called()))


def inside_compiled_module() -> bool:
    """Whether this thread is past the call of a compiled module, in the middle of its code."""
    modules = [traced_module(m) for m in called() if _is_compiled(m)]
    frame = sys._getframe(1) if modules else None
    while frame is not None:
        # Of frames outside, whose variables live on once they were asked for, none is looked at.
        if frame.f_code.co_name in ("_call_impl", "_wrapped_call_impl", "__call__"):
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and traced_module(owner) is modules[0]:
                return False
        elif any(frame.f_locals.get("self") is m for m in modules):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _is_compiled(module: nn.Module) -> bool:
    optimized = isinstance(module, torch._dynamo.OptimizedModule)
    return optimized or getattr(module, "_compiled_call_impl", None) is not None


def traced_module(module: nn.Module) -> nn.Module:
    """The module that Dynamo traces: inside of torch.compile's and DDP's wrappers, no others."""
    while True:
        if isinstance(module, torch._dynamo.OptimizedModule):
            module = module._orig_mod
        elif isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        else:
            return module


def _name(module: nn.Module, tensor: torch.Tensor) -> str | None:
    module = traced_module(module)
    for tensors in (module.named_parameters(), module.named_buffers()):
        for name, value in tensors:
            if value is tensor:
                return clean(name.split("."))
    return None


def _rename(
    node: fx.Node,
    names: dict[str, str],
    labels: dict[str, str],
    models: dict[str, nn.Module | None],
    canonical: dict[str, dict[int, str]],
) -> None:
    """Give the modules around a node their names in the model: of several names the first."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack and node.op in ("placeholder", "get_attr", "output"):
        return
    paths = [through_attributes(value[0]) for value in stack.values()]
    known = [r for r in names if paths and (paths[0] == r or paths[0].startswith(r + "."))]
    root = max(known, key=len, default=paths[0] if paths else next(iter(names), ""))
    label, prefix, model = labels.get(root, ""), names.get(root, ""), models.get(root)
    above = label + ("" if prefix.startswith("-") else prefix)
    entries = {"": (above.rstrip("."), nn.Module)}
    for (key, (_, kind)), path in zip(stack.items(), paths, strict=True):
        inner = module_name("self" + path.removeprefix(root))
        name = _joined(prefix, clean(inner.split(".")))
        module = None if model is None else resolve(model, name)
        name = canonical.get(root, {}).get(id(module), name)
        entries[f"{key} {path}"] = (label + name, kind)
    node.meta["nn_module_stack"] = entries
