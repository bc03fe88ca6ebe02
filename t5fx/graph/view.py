"""One vocabulary for the operators of torch-level and ATen graphs.

`View` reads an `fx.Graph` without changing it: the canonical operator of a node (the ATen base
name, whether the code has a function, a method, an overload or a leaf module), its arguments by
name, and its sizes as integers or symbolic expressions.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch
from torch import fx

from t5fx.graph.names import canonical, class_name, is_pointwise
from t5fx.graph.sizes import Size, expr, plus

#: Argument names by position, for operators whose torch-level functions carry no schema.
_NAMES = {
    **dict.fromkeys(
        ("softmax", "log_softmax", "sum", "logsumexp", "amax", "amin", "mean", "max", "min"),
        ("input", "dim"),
    ),
    "repeat_interleave": ("input", "repeats", "dim"),
    "transpose": ("input", "dim0", "dim1"),
    **dict.fromkeys(("norm", "normalize"), ("input", "p", "dim")),
    "linalg_vector_norm": ("input", "ord", "dim"),
    "clamp": ("input", "min", "max"),
    "clamp_min": ("input", "min"),
    "dropout": ("input", "p", "train"),
    "masked_fill": ("input", "mask", "value"),
    "where": ("condition", "input", "other"),
    "cat": ("tensors", "dim"),
    "stack": ("tensors", "dim"),
    "unbind": ("input", "dim"),
    "chunk": ("input", "chunks", "dim"),
    "split": ("input", "split_size", "dim"),
    "select": ("input", "dim", "index"),
    "slice": ("input", "dim", "start", "end", "step"),
    "slice_scatter": ("input", "src", "dim", "start", "end", "step"),
    "pad_sequence": ("sequences", "batch_first", "padding_value"),
    **dict.fromkeys(
        ("im2col", "unfold"), ("input", "kernel_size", "dilation", "padding", "stride")
    ),
    "flex_attention": ("query", "key", "value"),
    "scaled_dot_product_attention": (
        *("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
    ),
}
_SYNONYMS = {
    **{"self": "input", "tensor": "input", "training": "train", "attn_bias": "attn_mask"},
    **{"split_sizes": "split_size", "axis": "dim"},
}


#: Key of the metadata of a placeholder that is a constant of the model, not an argument.
CONSTANT = "t5fx_constant"


class View:
    """Canonical reading of a graph.

    root resolves `call_module` and `get_attr` targets; constants those that it does not have.
    """

    def __init__(
        self, graph: fx.Graph, root: torch.nn.Module, constants: dict[str, Any] | None = None
    ) -> None:
        self.graph = graph
        self.root = root
        self.constants = constants or {}
        self._ops: dict[fx.Node, str] = {}
        #: What a node yields, and its sizes where all are numbers: symbolic ones may become so.
        self._shapes: dict[fx.Node, tuple[torch.Tensor, tuple[Size, ...]]] = {}
        #: Masks need no proof here: the graph of the whole model had it.
        self.trusted = False
        #: Results of the graph that nobody reads, and calls of modules that nobody reads are for
        #: nothing else: another graph had it. None where nothing is known of that.
        self.unread: set[fx.Node] | None = None

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """Position of every node in the graph."""
        return {node: i for i, node in enumerate(self.graph.nodes)}

    @cached_property
    def live(self) -> set[fx.Node]:
        """The nodes whose values the outputs, or what is changed in place, depend on."""
        stack = [n for n in self.graph.nodes if n.op == "output" or changed(n)]
        found = set(stack)
        while stack:
            for node in stack.pop().all_input_nodes:
                if node not in found:
                    found.add(node)
                    stack.append(node)
        return found

    def op(self, node: fx.Node) -> str:
        """Canonical operator name of a node, or its fx kind for placeholders and the like."""
        name = self._ops.get(node)
        if name is None:
            name = self._ops[node] = self._name(node)
        return name

    def module(self, node: fx.Node) -> torch.nn.Module:
        """The leaf module that a `call_module` node calls."""
        return self.root.get_submodule(str(node.target))

    def attribute(self, node: fx.Node) -> Any:
        """What a `get_attr` node reads, or None where it is not at hand."""
        if str(node.target) in self.constants:
            return self.constants[str(node.target)]
        value: Any = self.root
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        return value

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_function":
            target = node.target
            if isinstance(target, torch._ops.OpOverload):
                return canonical(target._schema.name.split("::")[-1])
            if target is getattr:  # x.mT, x.shape in torch.fx.symbolic_trace
                return canonical(str(node.args[1]))
            return canonical(getattr(target, "__name__", str(target)))
        if node.op == "call_method":
            return canonical(str(node.target))
        if node.op == "call_module":
            for cls in type(self.module(node)).__mro__:
                if cls.__module__.startswith("torch.nn.modules"):
                    return canonical(class_name(cls.__name__))
            return "call_module"
        return node.op

    def arg(self, node: fx.Node, name: str, default: Any = None) -> Any:
        """Argument `name` of a node, by position, keyword, schema default or module attribute."""
        if node.op == "call_module":
            if name == "train":
                return self.module(node).training
            return node.args[0] if name == "input" else getattr(self.module(node), name, default)
        for key, value in node.kwargs.items():
            if _SYNONYMS.get(key, key) == name:
                return value
        if isinstance(node.target, torch._ops.OpOverload):
            for i, argument in enumerate(node.target._schema.arguments):
                if _SYNONYMS.get(argument.name, argument.name) == name:
                    if i < len(node.args):
                        return node.args[i]
                    return argument.default_value if argument.has_default_value() else default
            return default
        if getattr(node.target, "__name__", node.target) == "narrow":
            if name in ("start", "end"):
                start, length = node.args[2], node.args[3]
                return start if name == "start" else plus(start, length)
        names = _NAMES.get(self.op(node), ("input", "other"))
        if name in names and names.index(name) < len(node.args):
            return node.args[names.index(name)]
        return default

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """Tensor-valued inputs of a node, in order."""
        return [n for n in node.all_input_nodes if self.val(n) is not None]

    def val(self, node: fx.Node) -> torch.Tensor | None:
        """The (fake) tensor that a node yields, or None."""
        value = self.meta(node)
        return value if isinstance(value, torch.Tensor) else None

    @staticmethod
    def meta(node: fx.Node) -> Any:
        """What capture recorded as the value of a node: tensors, sizes, tuples or None."""
        for key in ("val", "example_value", "tensor_meta"):
            if key in node.meta:
                value = node.meta[key]
                if key == "tensor_meta" and hasattr(value, "shape"):
                    return torch.empty(value.shape, dtype=value.dtype, device="meta")
                return value
        return None

    def shape(self, node: fx.Node) -> tuple[Size, ...]:
        """Sizes of a tensor node."""
        value = self.val(node)
        if value is None:
            return ()
        known = self._shapes.get(node)
        if known is not None and known[0] is value:
            return known[1]
        shape = tuple(expr(n) for n in value.shape)
        if all(isinstance(n, int) for n in shape):
            self._shapes[node] = value, shape
        return shape

    @cached_property
    def sizes(self) -> dict[Size, fx.Node]:
        """The first node that computes a symbolic size, by its expression."""
        found: dict[Size, fx.Node] = {}
        for node in self.graph.nodes:
            value = self.meta(node)
            if isinstance(value, torch.SymInt):
                found.setdefault(expr(value), node)
        return found

    def scalar(self, value: Any) -> float | None:
        """A constant number: a Python scalar, or a one-element buffer or constant; else None."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, fx.Node) and self.op(value) in _SAME_NUMBER and value.args:
            return self.scalar(value.args[0])
        if isinstance(value, fx.Node) and value.op == "get_attr":
            tensor = self.attribute(value)
            constant = isinstance(tensor, torch.Tensor) and not isinstance(
                tensor, torch.nn.Parameter
            )
            if constant and tensor.numel() == 1 and not tensor.is_meta and not self.mutated(value):
                return float(tensor)
        return self._folded(value) if isinstance(value, fx.Node) else None

    def _folded(self, node: fx.Node) -> float | None:
        """The value of a one-element tensor that the graph computes from constant numbers."""
        name, value = self.op(node), self.val(node)
        if name not in _FOLDED or value is None or self.mutated(node):
            return None
        if any(size != 1 for size in self.shape(node)):
            return None
        if name in ("full", "scalar_tensor"):
            return self.scalar(node.args[-1])
        if name in ("tensor", "as_tensor"):
            return self.scalar(node.args[0])
        numbers = [self.scalar(a) for a in node.args[:2]]
        if None in numbers or not numbers:
            return None
        tensors = [torch.tensor(n, dtype=torch.float64) for n in numbers if n is not None]
        return float(getattr(torch, name)(*tensors))

    @cached_property
    def _mutations(self) -> dict[fx.Node, list[fx.Node]]:
        """What changes each tensor in place (through any view of it), in order."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in self.graph.nodes:
            for tensor in changed(node):
                for base in {self.base_of(tensor), self.base_of(node)}:
                    found.setdefault(base, []).append(node)
        return found

    def base_of(self, node: fx.Node) -> fx.Node:
        """The tensor that a node is a view of, as far as layout and in-place operators tell."""
        while True:
            if not self.aliases(node):
                return node
            node = node.args[0]

    def aliases(self, node: fx.Node) -> bool:
        """Whether a node may be a view of its first argument, or is that changed in place."""
        view = self.op(node) in _VIEWS and "clone" not in str(node.target)
        first = node.args[0] if node.args else None
        return isinstance(first, fx.Node) and (view or bool(changed(node)))

    def mutated(self, node: fx.Node, after: fx.Node | None = None) -> bool:
        """Whether a tensor is changed in place anywhere, or after node `after` has run."""
        found = self._mutations.get(self.base_of(node), [])
        return bool(found) and (after is None or self.order[found[-1]] > self.order[after])

    def mutated_before(self, node: fx.Node, reader: fx.Node) -> fx.Node | None:
        """What changed a tensor in place last, after a node made it and before another reads it."""
        found = self._mutations.get(self.base_of(node), ())
        first, last = self.order[node], self.order[reader]
        return next((n for n in reversed(found) if first < self.order[n] < last), None)

    def escapes(self, node: fx.Node, reader: fx.Node, inside: Collection[fx.Node]) -> bool:
        """Whether what `reader` reads of `node`, one of the nodes `inside`, gets out of them.

        Not if it only checks it, or computes something that only they read, or nobody.
        """
        stack, seen = [(node, reader)], set(inside)
        while stack:
            source, node = stack.pop()
            if node.op == "output":
                if source not in (self.unread or ()):
                    return True
            elif node not in seen and "_assert_tensor_metadata" not in str(node.target):
                seen.add(node)
                if changed(node) or (not node.users and self._acts(node)):
                    return True
                stack += [(node, user) for user in node.users]
        return False

    def _acts(self, node: fx.Node) -> bool:
        """Whether a node that nobody reads may be there for something else than its value."""
        if node.op == "call_module":
            return self.unread is None
        return self.meta(node) is None

    def depends_on_input(self, node: fx.Node) -> bool:
        """Whether the values of a node depend on the inputs of the model, not only its sizes."""
        stack, seen = [node], set()
        while stack:
            current = stack.pop()
            if current.op == "placeholder":
                return True
            if current not in seen and not isinstance(self.meta(current), int | torch.SymInt):
                seen.add(current)
                stack.extend(current.all_input_nodes)
        return False

    def pointwise(self, node: fx.Node) -> bool:
        """Whether the operator maps each element by itself (broadcasting allowed)."""
        return is_pointwise(self.op(node))


_SAME_NUMBER = ("identity", "to", "detach")

#: Operators that are folded where all they read are constant numbers.
_FOLDED = {
    "full",
    "scalar_tensor",
    "tensor",
    "as_tensor",
    "sqrt",
    "rsqrt",
    "pow",
    "mul",
    "div",
    "reciprocal",
}

#: Operators whose output may be a view of their input.
_VIEWS = {
    *("reshape", "expand", "permute", "transpose", "t", "mT", "slice", "select", "getitem"),
    *("unbind", "chunk", "split", "detach", "identity", "to", "movedim"),
}


def changed(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node changes in place."""
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        if not schema.is_mutable or schema.name == "aten::detach_":
            return []
        arguments = zip(schema.arguments, node.args, strict=False)
        written = [a for s, a in arguments if s.alias_info is not None and s.alias_info.is_write]
    else:
        name = str(getattr(node.target, "__name__", node.target))
        method = node.op == "call_method" and name.endswith("_") and not name.endswith("__")
        operator = name in ("setitem", "iadd", "isub", "imul", "itruediv", "imatmul", "ipow")
        function = node.op == "call_function" and (operator or bool(node.kwargs.get("inplace")))
        written = list(node.args[:1]) if method or function else []
    return [a for a in written if isinstance(a, fx.Node)]
