"""From a model and one call of it to a graph: `torch.export`, dynamic where the model allows it.

A `Capture` is an `fx.GraphModule` whose placeholders are the leaves of the call's arguments and
whose parameters, buffers and constants are `get_attr` nodes, with what is needed to call it again:
the shapes it is valid for and the structure of its output.
"""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental import _config as symbolic_config

from t5fx.canon import expr
from t5fx.errors import CaptureError

#: Module (child of the root) that holds the constants and subgraphs of captures.
CONSTANTS = "captured"


@dataclass
class Guards:
    """For which tensors a capture is valid: dtypes, ranks, sizes, and relations between sizes.

    leaves: for each argument leaf None, or (dtype, device, sizes); a size is a number or the name
    of a symbol. check: takes the symbols' values, says whether every relation holds. pinned: a
    relation leaves a symbol only one value.
    """

    leaves: list[tuple[torch.dtype, torch.device, tuple[int | str, ...]] | None]
    symbols: tuple[str, ...] = ()
    source: str = "True"
    pinned: bool = False
    check: Callable[..., bool] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = ", ".join(self.symbols)
        helpers: dict[str, Any] = {"Min": min, "Max": max, "Mod": lambda a, b: a % b}
        self.check = eval(f"lambda {names}: {self.source}", {**helpers, **_math()})

    def accept(self, leaves: list[Any]) -> bool:
        values: dict[str, Any] = {}
        for leaf, wanted in zip(leaves, self.leaves, strict=True):
            if wanted is None:
                continue
            dtype, device, sizes = wanted
            if leaf.dtype != dtype or leaf.dim() != len(sizes) or leaf.device != device:
                return False
            for size, want in zip(leaf.shape, sizes, strict=True):
                if isinstance(want, str):
                    if values.setdefault(want, size) != size:
                        return False
                elif size != want:
                    return False
        return bool(self.check(**values))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "check"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()


@dataclass
class Capture:
    """A traced call; see the module's docstring. `note` says how sizes were captured, and why."""

    graph: fx.Graph
    guards: Guards
    out_spec: Any
    note: str
    dynamic: bool
    constants: dict[str, Any] = field(default_factory=dict)


class Signature:
    """Brings every way of writing a call of `forward` to one: arguments by name."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.signature = inspect.signature(forward)
        kinds = {p.kind for p in self.signature.parameters.values()}
        self.positional = bool(
            kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}
        )
        self.defaults = {n: p.default for n, p in self.signature.parameters.items()}
        self.rest = next(
            (n for n, p in self.signature.parameters.items() if p.kind == p.VAR_KEYWORD), None
        )

    def bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) in canonical form; arguments equal to their defaults are left out.

        Raises TypeError like the original for arguments that do not fit.
        """
        bound = self.signature.bind(*args, **kwargs)
        if self.positional:
            return bound.args, bound.kwargs
        named = dict(bound.arguments)
        if self.rest in named:
            named.update(named.pop(self.rest))
        return (), {n: v for n, v in named.items() if not self._is_default(n, v)}

    def _is_default(self, name: str, value: Any) -> bool:
        default = self.defaults.get(name, inspect.Parameter.empty)
        plain = value is None or isinstance(value, bool | int | float | str)
        return plain and type(value) is type(default) and bool(value == default)


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seconds: float
) -> Capture:
    """Trace `model(*args, **kwargs)`; sizes are dynamic if that takes at most `seconds`.

    Past the budget, or where dynamic sizes fail, sizes are static. Raises `CaptureError` where
    the model cannot be traced at all.
    """
    reason = "asked for"
    if seconds > 0:
        try:
            start = time.monotonic()
            program = _within(seconds, lambda: _export(model, args, kwargs, dynamic=True))
            captured = _from_program(program, args, kwargs, "dynamic sizes", dynamic=True)
            if not captured.guards.pinned:
                return captured
            # The model fixes a size of one that was kept dynamic; without it, all is simpler.
            rest = seconds - (time.monotonic() - start)
            program = _within(rest, lambda: _export(model, args, kwargs, dynamic=True, ones=False))
            return _from_program(program, args, kwargs, "dynamic sizes", dynamic=True)
        except _OutOfTimeError:
            reason = f"with dynamic sizes it took more than {seconds:g} s"
        except Exception as error:
            reason = f"dynamic sizes failed: {first_line(error)}"
    try:
        program = _within(None, lambda: _export(model, args, kwargs, dynamic=False))
    except Exception as error:
        raise CaptureError(
            f"expected a model that torch.export can trace; {type(model).__name__} failed with "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return _from_program(program, args, kwargs, f"static sizes ({reason})", dynamic=False)


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: bool,
    ones: bool = True,
) -> ExportedProgram:
    """torch.export; with `ones`, sizes of one are dynamic too (by default it takes them static)."""
    # torch.export marks the tensors it is given; an aborted one would leave its marks on them.
    args, kwargs = pytree.tree_map(_alias, (args, kwargs))
    shapes = _dynamic_shapes(model, args, kwargs) if dynamic else None
    hook = model.register_forward_hook(_register_outputs)
    try:
        with symbolic_config.patch(backed_size_oblivious=ones), torch.enable_grad():
            return export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    finally:
        hook.remove()


def _register_outputs(_model: nn.Module, _args: Any, outputs: Any) -> None:
    """Make pytree nodes of the plain dataclasses that a model returns, for torch.export."""
    for leaf in pytree.tree_leaves(outputs):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            if type(leaf) not in pytree.SUPPORTED_NODES:  # two of a kind
                pytree.register_dataclass(type(leaf))
            _register_outputs(_model, _args, leaf)


def _dynamic_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Every size of every tensor automatic, under the names that `forward` gives its arguments."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    shapes: dict[str, Any] = pytree.tree_map(_all_dims, dict(bound.arguments))
    return shapes


def _alias(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if leaf.is_inference():
        leaf = leaf.clone()
    return leaf.detach().requires_grad_(leaf.requires_grad)


def _all_dims(leaf: Any) -> Any:
    """Every size of a tensor, but the channels of [B, N, C] and [B, C, ...], which heads need."""
    if not isinstance(leaf, torch.Tensor):
        return None
    sizes = dict.fromkeys(range(leaf.dim()), Dim.AUTO)
    if leaf.is_floating_point() and leaf.dim() >= 3:
        del sizes[2 if leaf.dim() == 3 else 1]
    return sizes


class _OutOfTimeError(BaseException):
    """Raised inside a capture that is past its budget; no `except Exception` swallows it."""


_workers = [ThreadPoolExecutor(1, thread_name_prefix="t5fx-capture")]


def _within(seconds: float | None, work: Callable[[], Any]) -> Any:
    """Run `work` in a thread kept for it and abort it after `seconds`.

    The tracing modes that torch.export enters are thread-local: an aborted capture's thread is not
    used again, so whatever it left behind harms nobody. No thread ends, since torch 2.11 keeps
    pointers into the one that first used fake tensors.
    """
    thread: dict[str, int] = {}

    def run() -> Any:
        thread["ident"] = threading.get_ident()
        return work()

    future = _workers[-1].submit(run)
    try:
        return future.result(seconds)
    except FutureTimeoutError:
        if future.done():
            raise
    _workers.append(ThreadPoolExecutor(1, thread_name_prefix="t5fx-capture"))
    kind = ctypes.py_object(_OutOfTimeError)
    while not future.done():  # again after a while, should somebody have swallowed it
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread["ident"]), kind)
        wait([future], 5.0)
    return future.result()


def _from_program(
    program: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    note: str,
    dynamic: bool,
) -> Capture:
    """Turn lifted parameters, buffers and constants of a program into `get_attr` nodes."""
    _inline_blocks(program.graph_module)
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
    leaves = pytree.tree_leaves((args, kwargs))
    guards = _guards(users, leaves)
    if dynamic:
        sizes = [w[2] for w in guards.leaves if w is not None]
        dynamic = any(isinstance(s, str) for size in sizes for s in size)
        shown = ", ".join(
            f"{node.name} [{', '.join(map(str, wanted[2]))}]"
            for node, wanted in zip(users, guards.leaves, strict=True)
            if wanted is not None
        )
        note = f"dynamic sizes: {shown}" if dynamic else "static sizes (the model fixes them all)"
    return Capture(graph, guards, program.call_spec.out_spec, note, dynamic, constants)


_NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def _inline_blocks(owner: fx.GraphModule) -> None:
    """Put the bodies of `no_grad`, `enable_grad` and `autocast` blocks in the place of their calls.

    Attention inside such a block is then seen like any other. Whoever runs the graph restores the
    modes should an error leave it halfway.
    """
    for node in list(owner.graph.nodes):
        if node.op != "get_attr" or not node.users:
            continue
        if all(user.target in (_NO_GRAD, _AUTOCAST) for user in node.users):
            body = getattr(owner, str(node.target))
            _inline_blocks(body)
            if any(user.target is _AUTOCAST for user in node.users) and not _can_inline(body):
                continue
            for user in list(node.users):
                _inline(owner, user, body)
            owner.graph.erase_node(node)


def _can_inline(body: fx.GraphModule) -> bool:
    """Whether to inline an autocast block: where Dynamo cannot follow, only for its attention."""
    if hasattr(torch.amp.autocast_mode, "_UnmanagedAutocast"):  # not in torch 2.11
        return True
    names = (str(node.target) for node in body.graph.nodes)
    return any("softmax" in name or "scaled_dot_product" in name for name in names)


def _inline(owner: fx.GraphModule, call: fx.Node, body: fx.GraphModule) -> None:
    """Replace one call of a block by the nodes of its body, with its mode set around them."""
    graph = owner.graph
    stack = _shared_stack(body)

    def switch(function: Callable[..., Any], *args: Any) -> fx.Node:
        node = graph.call_function(function, args)
        node.meta.update({"val": None, **({"nn_module_stack": stack} if stack else {})})
        return node

    with graph.inserting_before(call):
        values: dict[fx.Node, fx.Node] = {}
        results: Any = ()
        if call.target is _NO_GRAD:
            enabled, _, *inputs = call.args
            switch(torch._C._set_grad_enabled, enabled)
        else:
            *setting, _ = call.args[:5]
            inputs = list(call.args[5:])
            mode = switch(torch.amp.autocast_mode._enter_autocast, *setting)
        sources = iter(inputs)
        for node in body.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(sources)  # type: ignore[assignment]
            elif node.op == "output":
                results = fx.map_arg(node.args[0], lambda n: values[n])
            else:
                values[node] = graph.node_copy(node, lambda n: values[n])
                if node.op == "get_attr":  # a subgraph of the body's own
                    values[node].target = f"{call.name}_{node.target}"
                    setattr(owner, f"{call.name}_{node.target}", getattr(body, str(node.target)))
        if call.target is _NO_GRAD:
            switch(torch._C._set_grad_enabled, not enabled)
        else:
            switch(torch.amp.autocast_mode._exit_autocast, mode)
    for item in list(call.users):
        item.replace_all_uses_with(results[item.args[1]])
        graph.erase_node(item)
    graph.erase_node(call)


def _shared_stack(body: fx.GraphModule) -> dict[str, Any]:
    """The module calls around all of a block: where its mode is set and where it is left."""
    stacks = [n.meta["nn_module_stack"] for n in body.graph.nodes if n.meta.get("nn_module_stack")]
    levels = zip(*(stack.items() for stack in stacks), strict=False)
    return dict(
        level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)
    )


class AutocastState:
    """The autocast modes at some point, to come back to after an error inside a captured block.

    depth: how many autocast blocks are open; torch drops its cast weights when the last one ends.
    """

    def __init__(self, devices: tuple[str, ...]) -> None:
        self.depth = torch.autocast_increment_nesting() - 1
        torch.autocast_decrement_nesting()
        self.cache = torch.is_autocast_cache_enabled()
        self.modes = [
            (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices
        ]

    @staticmethod
    def devices(graph: fx.Graph) -> tuple[str, ...]:
        """The devices whose autocast mode a captured graph sets."""
        enter = torch.amp.autocast_mode._enter_autocast
        return tuple(dict.fromkeys(str(n.args[0]) for n in graph.nodes if n.target is enter))

    def restore(self) -> None:
        open_blocks = torch.autocast_increment_nesting() - self.depth
        for _ in range(open_blocks):
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(self.cache)
        for device, enabled, dtype in self.modes:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


def _guards(users: list[fx.Node], leaves: list[Any]) -> Guards:
    """Read dtypes, sizes and the relations between sizes off the placeholders' fake tensors."""
    from torch.utils._sympy.printers import PythonPrinter

    wanted: list[tuple[torch.dtype, torch.device, tuple[int | str, ...]] | None] = []
    symbols: dict[str, Any] = {}
    environment = None
    for node, leaf in zip(users, leaves, strict=True):
        value = node.meta.get("val")
        if not isinstance(leaf, torch.Tensor) or not isinstance(value, torch.Tensor):
            wanted.append(None)
            continue
        sizes = tuple(n if isinstance(n, int) else str(n) for n in map(expr, value.shape))
        for size, symbol in zip(value.shape, map(expr, value.shape), strict=True):
            if isinstance(size, torch.SymInt) and not isinstance(symbol, int):
                symbols.setdefault(str(symbol), symbol)
                environment = size.node.shape_env
        wanted.append((leaf.dtype, leaf.device, sizes))
    relations: list[str] = []
    pinned = False
    if environment is not None:
        printer = PythonPrinter()
        for name, symbol in symbols.items():
            bounds = environment.var_to_range.get(symbol)
            if bounds is not None and bounds.lower.is_Integer and bounds.lower > 0:
                relations.append(f"{name} >= {int(bounds.lower)}")
            if bounds is not None and bounds.upper.is_Integer:
                relations.append(f"{name} <= {int(bounds.upper)}")
        for guard in environment.guards:
            relation = environment.replace(guard.expr)
            free = {str(s) for s in relation.free_symbols}
            if free and free <= set(symbols):
                relations.append(printer.doprint(relation))
                pinned |= (
                    relation.is_Equality and relation.rhs.is_Integer and relation.lhs.is_Symbol
                )
    source = " and ".join(f"({r})" for r in dict.fromkeys(relations)) or "True"
    return Guards(wanted, tuple(symbols), source, pinned)


def _math() -> dict[str, Any]:
    import math

    return {"math": math, "torch": torch}


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
