"""From one module and the arguments of one of its calls to a graph of that module alone.

The calls of its children stay calls of its children; its own operators are ATen's before any
decomposition, as torch.export has them. Sizes are symbols, with guards where the code compares
them. Nothing is computed: the arguments are described, not given.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import _config as symbolic_config
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    py_sym_types,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from t5fx.frontend.calls import Guards, guards_of
from t5fx.frontend.unchanged import unchanged


@dataclass(frozen=True)
class Described:
    """A tensor argument: what tracing needs to know of it.

    fixed: axes whose sizes are constants.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    fixed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Size:
    """An integer argument that is computed from the sizes of tensors."""

    value: int


@dataclass(frozen=True)
class Number:
    """A floating-point argument."""

    value: float


def described(value: Any, *, traced: bool, ones: bool = False) -> Any:
    """Of one leaf of a call's arguments what tracing needs; what is no tensor and no size itself.

    traced: it was seen in a trace, where sizes that are plain numbers are constants. ones: so are
    sizes of one; without, they are taken for sizes of two, since batches of one are not the rule.
    """
    least = 1 if ones else 2
    if isinstance(value, torch.Tensor):
        shape = tuple(hint(n, least) for n in value.shape)
        try:
            stride = tuple(hint(n, least) for n in value.stride())
        except RuntimeError:  # a sparse or nested tensor
            stride = ()
        fixed = tuple(
            i
            for i, n in enumerate(value.shape)
            if (traced and isinstance(n, int)) or (ones and shape[i] == 1)
        )
        return Described(shape, stride, value.dtype, value.device, value.requires_grad, fixed)
    if isinstance(value, torch.SymInt):
        return Size(hint(value, least))
    if isinstance(value, torch.SymFloat):
        return Number(float(value))
    if isinstance(value, torch.SymBool):
        return bool(value)
    if type(value) is float:
        return Number(value)
    return value


def hint(size: Any, least: int = 1) -> int:
    """The example's size; symbols that are less than `least` in the example are taken for it."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    values = size.node.shape_env.backed_var_to_val
    free = size.node.expr.free_symbols
    if any(symbol not in values for symbol in free):
        return int(size)
    known = {symbol: max(least, int(values[symbol])) for symbol in free}
    return int(size.node.expr.xreplace(known))


@dataclass
class OwnerGraph:
    """A traced call of one module.

    The placeholders are the arguments' leaves that are no constants, at `positions`. `call_module`
    and `get_attr` nodes are relative to the module; constants are values that it has nowhere.
    """

    graph: fx.Graph
    guards: Guards
    positions: tuple[int, ...]
    out_spec: Any
    constants: dict[str, Any] = field(default_factory=dict)


@fx.node.has_side_effect
def child_call(name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Stands for the call of a child while its parent is traced; never runs."""
    raise AssertionError(f"the call of '{name}' was not put back")


def trace(owner: nn.Module, leaves: list[Any], spec: Any, inline: frozenset[str]) -> OwnerGraph:
    """Trace `owner.forward` on described leaves of (args, kwargs).

    inline: names of the descendants whose code is part of the graph; calls of all others stay.
    Raises whatever the module's code raises on such arguments.
    """
    try:
        with unchanged(owner):
            return _trace(owner, leaves, spec, inline, ones=True)
    except Exception:  # sizes of one that the code cannot have as symbols
        with unchanged(owner):
            return _trace(owner, leaves, spec, inline, ones=False)


def _trace(
    owner: nn.Module, leaves: list[Any], spec: Any, inline: frozenset[str], *, ones: bool
) -> OwnerGraph:
    environment = ShapeEnv(duck_shape=False, specialize_zero_one=not ones)
    fake = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    positions = tuple(
        i for i, leaf in enumerate(leaves) if isinstance(leaf, Described | Size | Number)
    )
    given = [_symbolic(fake, environment, i, leaves[i]) for i in positions]
    specs: list[Any] = []

    def body(*inputs: Any) -> list[Any]:
        full = list(leaves)
        for i, value in zip(positions, inputs, strict=True):
            full[i] = value
        args, kwargs = pytree.tree_unflatten(full, spec)
        with _children_called(owner, inline):
            outputs, out_spec = pytree.tree_flatten(owner.forward(*args, **kwargs))
        specs.append(out_spec)
        return list(outputs)

    with (
        symbolic_config.patch(backed_size_oblivious=ones),
        torch.enable_grad(),
        enable_python_dispatcher(),  # for factories of tensors with symbolic sizes
        fake,
        warnings.catch_warnings(),
    ):
        # Said of the transposes of weights, when they become fake ones.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        traced = make_fx(body, pre_dispatch=True)(*given)
    graph = traced.graph
    constants: dict[str, Any] = {}
    graph.owning_module = None
    names = _names_of(owner)
    for node in list(graph.nodes):
        if node.target is child_call:
            name, *rest = node.args
            node.op, node.target, node.args = "call_module", name, tuple(rest)
        elif node.op == "get_attr":
            value = _attribute(traced, str(node.target))
            if id(value) in names:
                node.target = names[id(value)]
            else:
                node.target = f"c{len(constants)}"
                constants[node.target] = value
        elif "_assert_tensor_metadata" in str(node.target):
            graph.erase_node(node)
    placeholders = list(graph.find_nodes(op="placeholder"))
    guards = guards_of(placeholders)
    return OwnerGraph(graph, guards, positions, specs[-1], constants)


def _symbolic(fake: FakeTensorMode, environment: ShapeEnv, i: int, leaf: Any) -> Any:
    source = ConstantSource(f"leaf{i}")
    if isinstance(leaf, Size):
        symbol = environment.create_symbol(
            leaf.value, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        return environment.create_symintnode(symbol, hint=leaf.value, source=source)
    if isinstance(leaf, Number):
        symbol = environment.create_unspecified_symbol(
            leaf.value, source, dynamic_dim=DimDynamic.DYNAMIC
        )
        return environment.create_symfloatnode(symbol, hint=leaf.value, source=source)
    stride = leaf.stride or None
    like = (
        torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        if stride is None
        else torch.empty_strided(leaf.shape, stride, dtype=leaf.dtype, device="meta")
    )
    kinds = [
        DimDynamic.STATIC if axis in leaf.fixed else DimDynamic.DYNAMIC
        for axis in range(like.dim())
    ]
    context = StatelessSymbolicContext(dynamic_sizes=kinds)
    value: torch.Tensor = fake.from_tensor(like, source=source, symbolic_context=context)
    with fake:
        value = value.to(leaf.device)
    return value.requires_grad_(leaf.requires_grad)


@contextmanager
def _children_called(owner: nn.Module, inline: frozenset[str]) -> Iterator[None]:
    """Record the calls of the owner's descendants, instead of what they do.

    To be entered while `make_fx` runs the function that it traces: it puts a call of its own in
    the place of `nn.Module.__call__`.
    """
    names = {id(m): n for n, m in owner.named_modules() if n and n not in inline}
    original, thread = nn.Module.__call__, threading.get_ident()

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = names.get(id(module))
        mode = get_proxy_mode() if name is not None else None
        if mode is None or threading.get_ident() != thread:
            return original(module, *args, **kwargs)
        return _record(mode.tracer, name, lambda *a, **k: original(module, *a, **k), args, kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


def _record(tracer: Any, name: str | None, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    def proxy(value: Any) -> Any:
        traced = isinstance(value, (torch.Tensor, *py_sym_types))
        return tracer.unwrap_proxy(value) if traced else value

    read, named = pytree.tree_map(proxy, (args, kwargs))
    given = {id(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
    with disable_proxy_modes_tracing():
        out = run(*args, **kwargs)
        # What it hands on unchanged is a value of its own in the graph: somebody may hook it.
        out = pytree.tree_map_only(
            torch.Tensor, lambda t: torch.ops.aten.alias.default(t) if id(t) in given else t, out
        )
    node = tracer.create_proxy("call_function", child_call, (name, *read), named)
    return track_tensor_tree(out, node, constant=None, tracer=tracer)


def _names_of(owner: nn.Module) -> dict[int, str]:
    """Where in a module each tensor is that its code can read: parameters, buffers, attributes."""
    names: dict[int, str] = {}
    for prefix, module in owner.named_modules():
        stem = f"{prefix}." if prefix else ""
        tensors = {**module._parameters, **module._buffers, **vars(module)}
        for name, value in tensors.items():
            if isinstance(value, torch.Tensor):
                names.setdefault(id(value), f"{stem}{name}")
    return names


def _attribute(root: Any, target: str) -> Any:
    for part in target.split("."):
        root = getattr(root, part)
    return root
