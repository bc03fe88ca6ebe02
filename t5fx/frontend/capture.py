"""From a model and one call of it to a graph: `torch.export`, dynamic where the model allows it.

A `Capture` is an `fx.GraphModule` whose placeholders are the leaves of the call's arguments and
whose parameters, buffers and constants are `get_attr` nodes, with what is needed to call it again:
the shapes it is valid for and the structure of its output.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental import _config as symbolic_config

from t5fx.errors import CaptureError
from t5fx.frontend.calls import Guards, guards_of
from t5fx.frontend.growth import Growth, SizesGrewError
from t5fx.frontend.unchanged import unchanged
from t5fx.frontend.unfit import causes
from t5fx.frontend.values import Value, Values
from t5fx.graph.blocks import inline_blocks
from t5fx.graph.modules import module_name
from t5fx.graph.view import View
from t5fx.graph.writes import scatter_writes
from t5fx.patterns import patterns

#: Module (child of the root) that holds the constants and subgraphs of captures.
CONSTANTS = "captured"

#: What is tried, in this order: (numbers that are read are given, dynamic sizes, those of one too).
#: Numbers are given where it failed without, since such a capture serves fewer calls.
_ATTEMPTS = (
    *((False, True, True), (False, True, False), (False, False, True)),
    *((True, True, True), (True, False, True)),
)


@dataclass
class Capture:
    """A traced call; see the module's docstring. `note` says how sizes were captured, and why.

    values: numbers that the code has read from the arguments' values, which hold for the graph.
    """

    graph: fx.Graph
    guards: Guards
    out_spec: Any
    note: str
    dynamic: bool
    constants: dict[str, Any] = field(default_factory=dict)
    values: tuple[Value, ...] = ()


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: bool | None,
    restart: Callable[[], None] = lambda: None,
) -> Capture:
    """Trace `model(*args, **kwargs)`, with dynamic sizes, static ones, or (None) what works.

    Dynamic sizes that become long formulas, which takes minutes, work only where they are asked
    for. restart: is called before each attempt. Raises `CaptureError` where the model cannot be
    traced, or not with dynamic sizes if these are asked for.
    """
    failed: Exception | None = None
    grew = False
    reason, missed = "asked for", False
    for given, sizes, ones in _ATTEMPTS:
        if dynamic not in (None, sizes) or (given and not missed) or (missed and not ones):
            continue
        if grew and sizes:
            continue
        values = Values(model, args, kwargs, given)
        note = "dynamic sizes" if sizes else f"static sizes ({reason})"
        try:
            restart()
            with Growth() if sizes and dynamic is None else nullcontext():
                program = _export(model, args, kwargs, values, sizes, ones)
            captured = _from_program(model, program, args, kwargs, note, dynamic=sizes)
        except Exception as error:
            failed, missed = error, missed or values.missed
            grew |= isinstance(error, SizesGrewError)
            if sizes:
                reason = f"dynamic sizes failed: {first_line(error)}"
            continue
        if captured.guards.pinned and sizes and ones and not given:
            continue  # The model fixes a size of one that was kept dynamic: simpler without it.
        captured.values = values.read
        if captured.values:
            shown = ", ".join(str(one.value) for one in captured.values[:8])
            captured.note += f"; numbers read from the values of the arguments: {shown}"
        return captured
    assert failed is not None
    raise _failed(model, args, kwargs, failed) from failed


def _failed(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> CaptureError:
    why = "".join(f". Note that {cause}" for cause in causes(model, args, kwargs, error))
    return CaptureError(
        f"expected a model that torch.export can trace; {type(model).__name__} failed with "
        f"{type(error).__name__}: {first_line(error)}{why}"
    )


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: Values,
    dynamic: bool,
    ones: bool,
) -> ExportedProgram:
    """torch.export; with `ones`, sizes of one are dynamic too (by default it takes them static)."""
    # torch.export marks the tensors it is given; an aborted one would leave its marks on them.
    args, kwargs = pytree.tree_map(_alias, (args, kwargs))
    shapes = _dynamic_shapes(model, args, kwargs, ones) if dynamic else None
    hook = model.register_forward_hook(_register_outputs)
    try:
        with (
            symbolic_config.patch(backed_size_oblivious=ones),
            torch.enable_grad(),
            unchanged(model),
            values,
        ):
            return export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    finally:
        hook.remove()


def _register_outputs(_model: nn.Module | None, _args: Any, outputs: Any) -> None:
    """Make pytree nodes of the objects around tensors that a model returns, for torch.export.

    Dataclasses, and any other object whose attributes are or contain tensors: a cache of keys and
    values, say.
    """
    for leaf in pytree.tree_leaves(outputs):
        kind = type(leaf)
        if kind in pytree.SUPPORTED_NODES:  # the second of its kind
            pass
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            pytree.register_dataclass(kind)
        elif _is_object(leaf) and _has_tensors(leaf):
            flatten, unflatten = _flatten_object, partial(_unflatten_object, kind)
            pytree.register_pytree_node(
                kind, flatten, unflatten, flatten_with_keys_fn=_flatten_with_keys
            )
        else:
            continue
        _register_outputs(None, None, pytree.SUPPORTED_NODES[kind].flatten_fn(leaf)[0])


def _is_object(value: Any) -> bool:
    """Something with attributes of its own, and neither torch's nor a class or function."""
    plain = isinstance(value, torch.Tensor | nn.Module | type) or callable(value)
    return hasattr(value, "__dict__") and not plain and not isinstance(value, torch.SymInt)


def _has_tensors(value: Any, depth: int = 8) -> bool:
    """Whether tensors or traced sizes are in `value` or, up to a depth, in its attributes."""
    return any(
        isinstance(leaf, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool)
        or (depth > 0 and _is_object(leaf) and _has_tensors(vars(leaf), depth - 1))
        for leaf in pytree.tree_leaves(value)
    )


def _flatten_object(value: Any) -> tuple[list[Any], tuple[tuple[str, ...], dict[str, Any]]]:
    """The attributes with tensors; the names of these, and all others as they are."""
    inner = {name: one for name, one in vars(value).items() if _has_tensors(one)}
    rest = {name: one for name, one in vars(value).items() if name not in inner}
    return list(inner.values()), (tuple(inner), rest)


def _flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
    children, context = _flatten_object(value)
    keys = map(pytree.GetAttrKey, context[0])
    return list(zip(keys, children, strict=True)), context


def _unflatten_object(
    kind: type, children: Iterable[Any], context: tuple[tuple[str, ...], dict[str, Any]]
) -> Any:
    value: Any = object.__new__(kind)
    vars(value).update(context[1], **dict(zip(context[0], children, strict=True)))
    return value


def _dynamic_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], ones: bool
) -> dict[str, Any]:
    """Every size of every tensor automatic, under the names that `forward` gives its arguments."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    shapes: dict[str, Any] = pytree.tree_map(partial(_all_dims, ones=ones), dict(bound.arguments))
    return shapes


def _alias(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if leaf.is_inference():
        leaf = leaf.clone()
    return leaf.detach().requires_grad_(leaf.requires_grad)


def _all_dims(leaf: Any, ones: bool) -> Any:
    """Every size of a tensor, but the channels of [B, N, C] and [B, C, ...], which heads need.

    ones: sizes of one, too.
    """
    if not isinstance(leaf, torch.Tensor):
        return None
    sizes = {i: Dim.AUTO for i, size in enumerate(leaf.shape) if ones or size > 1}
    if leaf.is_floating_point() and leaf.dim() >= 3:
        sizes.pop(2 if leaf.dim() == 3 else 1, None)
    return sizes


def _from_program(
    model: nn.Module,
    program: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    note: str,
    dynamic: bool,
) -> Capture:
    """Turn lifted parameters, buffers and constants of a program into `get_attr` nodes."""
    inline_blocks(program.graph_module, {p.anchor for p in patterns() if p.telling})
    graph = program.graph_module.graph
    graph.owning_module = None  # attributes are those of the model from here on
    targets = {s.arg.name: s for s in program.graph_signature.input_specs if s.target}
    constants: dict[str, Any] = {}
    users = []
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in targets:
            spec = targets[node.name]
            target = str(spec.target)
            if target in program.constants and spec.persistent is None:
                name = f"c{len(constants)}"
                target = f"{CONSTANTS}.{name}"
                constants[target] = program.constants[str(spec.target)]
            node.op, node.target = "get_attr", target
            node.args, node.kwargs = (), {}
        elif node.op == "placeholder":
            users.append(node)
        elif node.op == "get_attr":  # a subgraph: a branch of a condition, say
            name = f"g{len(constants)}"
            constants[f"{CONSTANTS}.{name}"] = getattr(program.graph_module, str(node.target))
            node.target = f"{CONSTANTS}.{name}"
        elif "_assert_tensor_metadata" in str(node.target):
            graph.erase_node(node)  # holds for the captured dtypes, which `Guards` checks
    _use_first_names(graph, model)
    scatter_writes(View(graph, program.graph_module))
    guards = guards_of(users)
    if dynamic:
        sizes = [w[2] for w in guards.leaves if isinstance(w, tuple)]
        dynamic = any(isinstance(s, str) for size in sizes for s in size)
        shown = ", ".join(
            f"{node.name} [{', '.join(map(str, wanted[2]))}]"
            for node, wanted in zip(users, guards.leaves, strict=True)
            if isinstance(wanted, tuple)
        )
        note = f"dynamic sizes: {shown}" if dynamic else "static sizes (the model fixes them all)"
    return Capture(graph, guards, program.call_spec.out_spec, note, dynamic, constants)


def _use_first_names(graph: fx.Graph, model: nn.Module) -> None:
    """Call a module that has several names by that which `named_modules` gives it."""
    first = {id(module): name for name, module in model.named_modules()}
    every = model.named_modules(remove_duplicate=False)
    others = {name: first[id(module)] for name, module in every if name != first[id(module)]}
    for node in graph.nodes if others else ():
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {
            key: (others.get(module_name(str(value[0])), value[0]), *value[1:])
            if isinstance(value, tuple)
            else value
            for key, value in stack.items()
        }


def first_line(error: BaseException) -> str:
    """What an error says, in one line; of a long one, its first words."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else line[:300].rpartition(" ")[0] + " ..."
