"""A flat graph as a tree of modules: one callable module for each module of the original.

Sharding and hooks work on modules, so a rewritten graph has to run as the modules it came from.
`Block` mirrors one module of the original: it holds its parameters and runs the pieces of captured
graphs that ran inside it. One tree serves every capture of a model; a piece is one stretch of one
captured graph inside one module.
"""

from __future__ import annotations

import copy
import itertools
import linecache
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import fx, nn

from t5fx.errors import UnavailableMethodError
from t5fx.match import module_stack

_counter = itertools.count()


class Mode:
    """Shared by the blocks of one tree: which combination of flags and dtypes they are in.

    number is None after a change of any block's train/eval flag, dtype or device.
    """

    def __init__(self) -> None:
        self.number: int | None = None


class Inside:
    """What a block keeps beside its tensors, under one name that no model uses.

    source: the original's module, for its plain data and its code; pieces: compiled stretches of
    captured graphs, by number, which are functions of the block and hold nothing of it.
    """

    def __init__(self, source: nn.Module, mode: Mode) -> None:
        self.source = source
        self.mode = mode
        self.pieces: dict[int, Callable[..., Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Inside:
        new = Inside(copy.deepcopy(self.source, memo), copy.deepcopy(self.mode, memo))
        new.pieces = dict(self.pieces)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "mode": self.mode, "pieces": {}}


class Block(nn.Module):
    """One module of a linearized model: the original's parameters, buffers and children.

    Its code are pieces of captured graphs. Plain data of the original module can be read;
    its methods raise `UnavailableMethodError`.
    """

    def __init__(self, like: nn.Module, mode: Mode) -> None:
        super().__init__()
        self._t5 = Inside(like, mode)
        self._parameters = dict(like._parameters)
        self._buffers = dict(like._buffers)
        self._non_persistent_buffers_set = set(like._non_persistent_buffers_set)
        self.training = like.training

    def forward(self, *inputs: Any, piece: int) -> Any:
        """Run one piece: the tensors and sizes it reads -> those of its values read outside."""
        return self._t5.pieces[piece](self, *inputs)

    def __setattr__(self, name: str, value: Any) -> None:
        changes = name == "training" and self.__dict__.get(name) is not value
        super().__setattr__(name, value)
        if changes and "_t5" in self.__dict__:  # torch.compile writes the flag that is there
            self._t5.mode.number = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inside = self.__dict__.get("_t5")
            if inside is None or name.startswith("__") or not hasattr(inside.source, name):
                raise
        value = getattr(inside.source, name)
        if callable(value) and not isinstance(value, type):
            raise UnavailableMethodError(
                f"'{name}' is a method of {type(inside.source).__name__}, whose code was not "
                f"rewritten: call the linearized model itself, or linearize a module whose "
                f"forward does what '{name}' does"
            )
        return value

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Block:
        super()._apply(fn, recurse)
        self._t5.mode.number = None
        return self

    def _get_name(self) -> str:
        return type(self._t5.source).__name__

    def extra_repr(self) -> str:
        return "" if self._modules else self._t5.source.extra_repr()


class ListBlock(Block):
    """A block for a ModuleList or a Sequential: its children by position."""

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

    def __getitem__(self, index: int | slice) -> Any:
        return list(self._modules.values())[index]


class DictBlock(Block):
    """A block for a ModuleDict: its children by name."""

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __getitem__(self, key: str) -> Any:
        return self._modules[key]

    def __contains__(self, key: str) -> bool:
        return key in self._modules

    def keys(self) -> Any:
        return self._modules.keys()

    def values(self) -> Any:
        return self._modules.values()

    def items(self) -> Any:
        return self._modules.items()


def block_for(like: nn.Module, mode: Mode) -> Block:
    """The kind of block that a module needs."""
    if isinstance(like, nn.ModuleList | nn.Sequential):
        return ListBlock(like, mode)
    return (DictBlock if isinstance(like, nn.ModuleDict) else Block)(like, mode)


def mirror(model: nn.Module, root: Block) -> None:
    """Fill `root` with a block for each module of `model`; aliases stay aliases."""
    seen: dict[int, nn.Module] = {id(model): root}

    def fill(source: nn.Module, target: nn.Module) -> None:
        for name, child in source._modules.items():
            if child is None:
                target._modules[name] = None
                continue
            if id(child) not in seen:
                seen[id(child)] = block_for(child, root._t5.mode)
                fill(child, seen[id(child)])
            target._modules[name] = seen[id(child)]

    fill(model, root)


def distribute(graph: fx.Graph, root: Block, modules: dict[str, nn.Module]) -> int:
    """Cut a flat graph into pieces and give each to its block; returns the root's piece.

    Every run of neighbouring nodes that ran inside one call of a module becomes one piece of that
    module's block. modules: leaf modules that `call_module` nodes call, put under their owners.
    """
    adopt(root, modules)
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
    stacks = _stacks(nodes)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    output = next(n for n in graph.nodes if n.op == "output")
    return _Cutter(root, stacks).root_piece(nodes, inputs, output)


def adopt(root: Block, modules: Mapping[str, nn.Module]) -> None:
    """Put modules under their owners, where there is none of that name yet."""
    for key, module in modules.items():
        parent, _, name = key.rpartition(".")
        owner = root.get_submodule(parent)
        if name not in owner._modules:
            owner.add_module(name, module)


Stack = tuple[tuple[str, str], ...]


def _stacks(nodes: list[fx.Node]) -> dict[fx.Node, Stack]:
    """The calls around each node below the root, each nested in the one before by name.

    A node without a record (sizes, blocks without gradients) joins the calls that the nodes
    around it share, so that it does not cut a module's call in two.
    """
    found: dict[fx.Node, Stack | None] = {}
    for node in nodes:
        entries = module_stack(node)
        nested: list[tuple[str, str]] = []
        for key, name in entries:
            if name and (not nested or name.startswith(nested[-1][1] + ".")):
                nested.append((key, name))
        found[node] = tuple(nested) if entries else None
    after: list[Stack | None] = []
    following: Stack | None = None
    for node in reversed(nodes):
        following = found[node] if found[node] is not None else following
        after.append(following)
    result: dict[fx.Node, Stack] = {}
    previous: Stack = ()
    for node, following in zip(nodes, reversed(after), strict=True):
        own = found[node]
        if own is None:
            shared = itertools.takewhile(
                lambda pair: pair[0] == pair[1], zip(previous, following or (), strict=False)
            )
            own = tuple(a for a, _ in shared)
        result[node] = previous = own
    return result


class _Cutter:
    def __init__(self, root: Block, stacks: dict[fx.Node, Stack]) -> None:
        self.root = root
        self.stacks = stacks

    def root_piece(self, nodes: list[fx.Node], inputs: list[fx.Node], output: fx.Node) -> int:
        return self._piece("", nodes, 0, inputs, output.args[0])

    def _piece(
        self, name: str, nodes: list[fx.Node], depth: int, inputs: list[fx.Node], result: Any
    ) -> int:
        """Compile the nodes that ran in one call of module `name`; `result` is returned."""
        graph = fx.Graph()
        values = {node: graph.placeholder(node.name) for node in inputs}

        def value(node: fx.Node) -> fx.Node:
            if node not in values:  # a parameter, read where it is first needed
                assert node.op == "get_attr"
                values[node] = graph.get_attr(_inside(name, str(node.target)))
            return values[node]

        for call, group in itertools.groupby(nodes, lambda n: self.stacks[n][depth : depth + 1]):
            members = list(group)
            if not call:
                for node in members:
                    values[node] = graph.node_copy(node, value)
                    if node.op == "call_module":
                        values[node].target = _inside(name, str(node.target))
                continue
            child = call[0][1]
            reads, gives = self._boundary(child, members)
            result_inside: Any = gives[0] if len(gives) == 1 else tuple(gives)
            number = self._piece(child, members, depth + 1, reads, result_inside)
            called = graph.create_node(
                "call_module",
                _inside(name, child),
                tuple(value(n) for n in reads),
                {"piece": number},
                name=f"{child.rpartition('.')[2]}_out",  # a child may well be called "self"
            )
            for i, node in enumerate(gives):
                alone = len(gives) == 1
                values[node] = (
                    called if alone else graph.call_function(operator.getitem, (called, i))
                )
        graph.output(fx.map_arg(result, value))
        number = next(_counter)
        block = self.root.get_submodule(name)
        assert isinstance(block, Block)
        block._t5.pieces[number] = _compile(graph, f"{name or 'root'}_{number}")
        return number

    def _boundary(self, name: str, members: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """What a stretch of nodes reads from outside its module, and what is read of it."""
        inside = set(members)
        reads = {
            source: None
            for node in members
            for source in node.all_input_nodes
            if source not in inside
            and not (source.op == "get_attr" and str(source.target).startswith(f"{name}."))
        }
        gives = [node for node in members if any(user not in inside for user in node.users)]
        return list(reads), gives


def _inside(name: str, target: str) -> str:
    return target.removeprefix(f"{name}.") if name else target


def _compile(graph: fx.Graph, title: str) -> Callable[..., Any]:
    """The Python function of a piece, with source lines for tracebacks."""
    code = graph.python_code("self")
    filename = f"<t5fx {title}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
    scope = dict(code.globals)
    exec(compile(code.src, filename, "exec"), scope)
    function = scope["forward"]
    assert callable(function)
    return function
