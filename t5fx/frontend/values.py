"""Numbers that a model's code reads from the values of its arguments: `mask.sum(1).tolist()`.

A trace does not have them. Where it fails without, it is made once more with those of the call,
and serves calls in which the code reads the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from t5fx.graph.view import View, changed

#: What makes a number of Python of a tensor of one element. `tolist` is one `item` for each.
_READS: dict[Any, Callable[[int | bool], Any]] = {
    Tensor.item: lambda value: value,
    Tensor.__bool__: bool,
    Tensor.__int__: int,
    Tensor.__index__: int,
    Tensor.__float__: float,
}
#: So many numbers may be read in one call; each is computed again in every call.
_MOST = 256


@dataclass(frozen=True)
class Value:
    """A whole number, or a truth value, that code computes from arguments and reads.

    leaves: which of the leaves of the arguments `compute` takes.
    """

    leaves: tuple[int, ...]
    compute: fx.GraphModule
    value: int | bool

    def again(self, leaves: Sequence[Any]) -> Tensor:
        """The tensor of one element that is read in a call with these leaves."""
        with torch.no_grad():
            result: Tensor = self.compute(*(leaves[i] for i in self.leaves))
        return result

    def holds(self, leaves: Sequence[Any]) -> bool:
        """Whether a call reads the same number; it waits for the device."""
        return bool(self.again(leaves).item() == self.value)


class Values(TorchFunctionMode):
    """Around a trace of `model(*args, **kwargs)`: the numbers that its code reads from arguments.

    given: the code gets those of this call, each listed in `read`; else what a trace gives it.
    missed: numbers were read, and not given.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: bool
    ) -> None:
        super().__init__()
        self.model, self.given, self.missed = model, given, False
        self._known: dict[fx.Node, Value] = {}
        self._leaves = [leaf for _, leaf in _paths(args, kwargs)]
        self._places = {path: i for i, (path, _) in enumerate(_paths(args, kwargs))}
        self._inputs: dict[fx.Node, int] = {}

    @property
    def read(self) -> tuple[Value, ...]:
        return tuple(self._known.values())

    def __enter__(self) -> Values:
        self._hook = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._hook.remove()

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for path, leaf in _paths(args, kwargs):
            node = _node(leaf)
            if node is not None and path in self._places:
                self._inputs[node] = self._places[path]

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _READS and _is_whole(args[0]) and _node(args[0]) is not None:
            found = self._value(args[0]) if self.given else None
            if found is not None:
                return _READS[function](found.value)
            self.missed = True
        return function(*args, **(kwargs or {}))

    def _value(self, tensor: Tensor) -> Value | None:
        """What a traced tensor is in this call; None where more than arguments decide it."""
        node, mode = _node(tensor), get_proxy_mode()
        assert node is not None and mode is not None
        if node in self._known:
            return self._known[node]
        view = View(node.graph, mode.tracer.root)
        needed = _ancestors(view, node)
        if not all(self._may_run(view, n) for n in needed) or len(self._known) == _MOST:
            return None
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for one in sorted(needed, key=lambda n: n.op != "placeholder"):
            copies[one] = graph.node_copy(one, copies.__getitem__)
            copies[one].meta = {}
        graph.output(copies[node])
        leaves = tuple(self._inputs[n] for n in needed if n.op == "placeholder")
        with _disable_current_modes():
            compute = fx.GraphModule(mode.tracer.root, graph)
            value: Any = Value(leaves, compute, 0).again(self._leaves).item()
        self._known[node] = Value(leaves, compute, value)
        return self._known[node]

    def _may_run(self, view: View, node: fx.Node) -> bool:
        """Whether an operator computes the same from arguments again, and changes none of them."""
        if node.op == "placeholder":
            leaf = self._leaves[self._inputs[node]] if node in self._inputs else None
            return isinstance(leaf, Tensor) and not leaf.is_meta and not is_fake(leaf)
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        return not random and all(view.base_of(t).op == "call_function" for t in changed(node))


def _paths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    leaves, _ = pytree.tree_flatten_with_path((args, kwargs))
    return [(pytree.keystr(path), leaf) for path, leaf in leaves]


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _node(leaf: Any) -> fx.Node | None:
    """The node that a trace, if there is one, has for a tensor."""
    mode = get_proxy_mode()
    if mode is None or not isinstance(leaf, Tensor):
        return None
    slot: Any = get_proxy_slot(leaf, mode.tracer, None)
    return None if slot is None else slot.proxy.node


def _ancestors(view: View, node: fx.Node) -> list[fx.Node]:
    """What a node is computed from, with what changes that in place, in the order of the graph."""
    needed: set[fx.Node] = set()
    bases: set[fx.Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current in needed:
            continue
        needed.add(current)
        bases.add(view.base_of(current))
        queue += current.all_input_nodes
        if not queue:
            rest = [n for n in view.graph.nodes if n not in needed]
            queue = [n for n in rest if any(view.base_of(t) in bases for t in changed(n))]
    return [n for n in view.graph.nodes if n in needed]
