"""What a linearized model knows while it runs: which kind of call this is, and its tokens' layout.

The model's own code runs. Hooks at the modules whose outputs show the sides of the grid record
them, once a call; each owner of a rewritten attention reads them. A record belongs to a thread and
to a call: where none is at hand the answer is an error, never another call's grid.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from t5fx.config import LinearizeConfig
from t5fx.errors import LayoutUnknownError, RefusedCallError
from t5fx.frontend.calls import Guards, Signature
from t5fx.frontend.positions import Positions, Reading, Unchanged, may_list, objection
from t5fx.frontend.values import Value
from t5fx.reports import Report
from t5fx.rewrite.forms import Verdict, constants_of, flatten, size_of

#: Kinds of calls, and forms of a module, that are kept; the least recently used go first.
KEPT = 64
#: Added to a recorded size: compilers take sizes of 0 and 1 for constants.
SHIFT = 2


#: Stands for a module's name in a `Source`.
LISTED = "(positions)"


class Source(NamedTuple):
    """Where a size of the grid is read in a call: which number that a module's output showed.

    module: its name, with the numbers that its `Origin` hook records; "" for the call of the model
    itself, with those that `Kind.arguments` computes from the arguments; LISTED for the sides that
    `Kind.lists` have, one list after the other.
    """

    module: str
    place: int


Term = int | Source


class List(NamedTuple):
    """An argument that lists the positions of a grid, and how many tokens its rows are.

    tokens: a number, or which of `Kind.arguments` computes it.
    """

    positions: Positions
    tokens: Term


@dataclass(frozen=True)
class Layout:
    """prefix, grid and suffix of one attention's tokens. None: what is left of the tokens."""

    prefix: Term | None
    grid: tuple[Term, ...]
    suffix: Term | None


@dataclass
class Kind:
    """One kind of calls of the model that was judged.

    structure, constants, training: what calls of the kind have in common, with `guards`; given:
    the values of layouts that are callables. layouts: by owner, one for each of its attentions;
    flags: by owner, the values of the attributes that choose its code's way (`owned.flags_of`);
    arguments: formulas of the guards' symbols, for sizes that no module's output shows. positions:
    for each grid that was given, the arguments that list its positions. lists: the arguments that
    tell the sides of grids, which each call has its own of. values: numbers that the code reads
    from arguments.
    """

    structure: str
    constants: tuple[Any, ...]
    training: bool
    given: Any
    guards: Guards
    layouts: Mapping[str, tuple[Layout | None, ...]]
    verdicts: Mapping[str, Verdict]
    calls: Mapping[str, frozenset[tuple[str, tuple[Any, ...]]]]
    flags: Mapping[str, tuple[Any, ...]]
    arguments: tuple[Callable[..., int], ...] = ()
    positions: Mapping[tuple[int, ...], tuple[Positions, ...]] = field(default_factory=dict)
    lists: tuple[List, ...] = ()
    values: tuple[Value, ...] = ()


class Records(threading.local):
    """What the calls of one thread left behind; see `Runtime`."""

    def __init__(self) -> None:
        self.kind: Kind | None = None
        self.sizes: dict[str, torch.Tensor] = {}
        #: The model and the arguments of the call that is running, until it is over.
        self.call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None
        #: The backward pass in which these were found again, or -1.
        self.backward = -1


class Runtime:
    """What the modules of one linearized model share. It holds none of them.

    kinds: judged kinds of calls, the latest last; forms: by description of an owner, its forms.
    original: the original attention runs, for a while. judge: called with (runtime, model, args,
    kwargs), judges a kind of call; extend: called with (runtime, owner, ...), builds another form
    of an owner. Both are functions of `t5fx.pipeline`, which makes runtimes.
    """

    def __init__(
        self,
        config: LinearizeConfig,
        signature: Signature,
        model: str,
        judge: Callable[..., None],
        extend: Callable[..., None],
    ) -> None:
        self.config = config
        self.signature = signature
        self.judge = judge
        self.extend = extend
        self.report = Report(model)
        self.kinds: list[Kind] = []
        self.forms: dict[str, list[Any]] = {}
        self.original = False
        self._fresh()

    def _fresh(self) -> None:
        self.local = Records()
        #: The same as the thread's, where compiled code can read it.
        self.kind: Kind | None = None
        self.sizes: dict[str, torch.Tensor] = {}
        self.entered: OrderedDict[tuple[Any, ...], tuple[StorageWeakRef, Any]] = OrderedDict()
        self.checked = Unchanged()
        self.reading = Reading()

    def __getstate__(self) -> dict[str, Any]:
        left = ("local", "kind", "sizes", "entered", "checked", "reading", "kinds", "forms")
        return {k: v for k, v in self.__dict__.items() if k not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.original = False  # it is for the model that `t5fx.softmax` was given, not for copies
        self.kinds, self.forms = [], {}
        self._fresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        new = Runtime.__new__(Runtime)
        new.__setstate__(self.__getstate__())
        new.kinds = list(self.kinds)
        new.forms = {name: list(forms) for name, forms in self.forms.items()}
        return new

    # --- one call -------------------------------------------------------------------------------

    def begin(self, kind: Kind, values: Mapping[str, Any], sides: tuple[int, ...]) -> None:
        """A call of the model begins; values: of the kind's symbols; sides: of its `lists`."""
        sizes: dict[str, torch.Tensor] = {}
        if kind.arguments:
            sizes[""] = _as_sizes(_computed(kind, values))
        if sides:
            sizes[LISTED] = _as_sizes(list(sides))
        self._set(kind, sizes)

    def end(self) -> None:
        """The call is over, with a result or an error."""
        self._set(None, {})
        if not torch.compiler.is_compiling():
            self.local.call = None

    def judged_again(self) -> Kind | None:
        """The kind of the call that is running, judged as the model's code is now.

        None where no call is at hand: in compiled code, or where a backward pass computes again.
        """
        if self.local.call is None or self.local.kind is None:
            return None
        before, (model, args, kwargs) = self.local.kind, self.local.call
        self.judge(self, model, args, kwargs, before)
        found = self.kind_of(args, kwargs, model.training)
        assert found is not None
        kind = found[0]
        if any(kind.layouts.get(owner) != known for owner, known in before.layouts.items()):
            raise LayoutUnknownError(
                f"attributes of modules of {self.report.model} were changed after calls like this "
                f"one were judged, and its attention lies otherwise since: call it once more"
            )
        self._set(kind, self.local.sizes)
        return kind

    def _set(self, kind: Kind | None, sizes: dict[str, torch.Tensor]) -> None:
        self.kind, self.sizes = kind, sizes
        if not torch.compiler.is_compiling():
            self.local.kind, self.local.sizes, self.local.backward = kind, sizes, -1

    def record(self, module: str, sizes: list[int]) -> None:
        """The output of a module shows these sizes."""
        found = _as_sizes(sizes)
        if torch.compiler.is_compiling():
            self.sizes[module] = found
            return
        kind, known = self.running()
        backward = self.local.backward
        # Not in place: calls that a backward pass may come back to have noted these sizes.
        self._set(kind, {**known, module: found})
        self.local.backward = backward

    def running(self) -> tuple[Kind | None, dict[str, torch.Tensor]]:
        """The kind of the call that this thread is in, if it is in one, and what was recorded."""
        if torch.compiler.is_compiling():
            return self.kind, self.sizes
        if self.local.backward not in (-1, torch._C._current_graph_task_id()):
            self.end()  # that backward pass is over
        return self.local.kind, self.local.sizes

    def layout(self, owner: str, index: int, tokens: int) -> tuple[int, ...]:
        """(prefix, *grid) of an attention's tokens in the call that is running.

        Raises `LayoutUnknownError` where it is not known, or is not that of so many tokens.
        """
        kind, sizes = self.running()
        found: list[Layout] = []
        for judged in self.kinds[::-1] if kind is None else [kind]:
            layouts = judged.layouts.get(owner)
            wanted = None if layouts is None else layouts[index]
            if wanted is not None and all(t.module in sizes for t in _sources(wanted)):
                found += [] if wanted in found else [wanted]
        if found:
            return self._only(found, sizes, owner, tokens)
        raise LayoutUnknownError(
            f"'{owner}' was called on {tokens} tokens, and where they lie on a grid is not known: "
            f"expected a call of the whole model, or of the module before it whose output shows "
            f"the grid ({', '.join(self._origins(owner)) or 'there is none'}), in the same thread"
        )

    def _only(
        self, found: list[Layout], sizes: dict[str, torch.Tensor], owner: str, tokens: int
    ) -> tuple[int, ...]:
        """What of several layouts is that of so many tokens; raises where it is not one."""
        fitting: list[tuple[int, ...]] = []
        for wanted in found:
            try:
                layout = self._checked(wanted, sizes, owner, tokens)
            except LayoutUnknownError:
                if len(found) == 1:
                    raise
                continue
            fitting += [] if layout in fitting else [layout]
        if len(fitting) == 1:
            return fitting[0]
        shown = " or ".join(f"{p} + {' x '.join(map(str, grid))}" for p, *grid in fitting)
        raise LayoutUnknownError(
            f"'{owner}' was called on {tokens} tokens outside of a call of the whole model, and "
            f"calls of it have shown {shown or 'no such number'} of them; call the whole model"
        )

    def _checked(
        self, wanted: Layout, sizes: dict[str, torch.Tensor], owner: str, tokens: int
    ) -> tuple[int, ...]:
        def value(term: Term | None) -> int | None:
            if isinstance(term, Source):
                return size_of(sizes[term.module], term.place) - SHIFT
            return term

        grid = [value(term) for term in wanted.grid]
        product: Any = 1
        for size in grid:
            product = product * size
        prefix, suffix = value(wanted.prefix), value(wanted.suffix)
        if prefix is None:
            prefix = tokens - product - (suffix or 0)
        if suffix is None:
            suffix = tokens - product - prefix
        if prefix + product + suffix != tokens or (wanted.prefix is None and prefix < 0):
            raise LayoutUnknownError(
                f"'{owner}' was called on {tokens} tokens: expected {prefix} + "
                f"{' x '.join(map(str, grid))} + {suffix}, as the call that is running has shown; "
                f"call the whole model on inputs of this size"
            )
        return (prefix, *grid)  # type: ignore[return-value, arg-type]

    def _origins(self, owner: str) -> list[str]:
        names = {
            "the model" if t.module in ("", LISTED) else t.module
            for kind in self.kinds
            for layout in kind.layouts.get(owner) or ()
            if layout is not None
            for t in _sources(layout)
        }
        return [f"'{name}'" for name in sorted(names)]

    # --- recomputation --------------------------------------------------------------------------

    def enter(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called that contains owners: note with what, or find out again.

        Checkpoints call modules a second time in a backward pass, with the same tensors (or their
        memory); by then other calls of the model may have come and gone.
        """
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if torch._C._current_graph_task_id() != -1:
            self._again(module, tensors)
            return
        kind, sizes = self.running()
        if (kind is not None or sizes) and (
            torch.is_grad_enabled() or any(t.requires_grad for t in tensors[:4])
        ):
            known = (kind, sizes)
            for tensor in tensors[:4]:
                key = self._key(module, tensor)
                if key is not None:
                    reference = StorageWeakRef(tensor.untyped_storage())
                    self.entered[key] = (reference, known)
                    self.entered.move_to_end(key)
            if len(self.entered) > 4096:
                for key, (reference, _) in list(self.entered.items()):
                    if reference.expired():
                        del self.entered[key]

    def _again(self, module: str, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors[:4]:
            found = self.entered.get(self._key(module, tensor) or ())
            if found is not None and not found[0].expired():
                self._resume(*found[1])
                return
        known = [state for reference, state in self.entered.values() if not reference.expired()]
        layouts = {
            (
                self._constants(kind),
                *sorted((n, tuple(t.shape)) for n, t in sizes.items()),
            )
            for kind, sizes in known
        }
        kind, sizes = self.running()
        if kind is not None or sizes:  # set by a module around this one, in the same recomputation
            return
        if len(layouts) > 1:
            raise LayoutUnknownError(
                f"'{module}' is computed again in a backward pass (gradient checkpointing), and "
                f"which of {len(layouts)} calls with different grids it belongs to is not known; "
                f"run the backward pass of each call before the next call"
            )
        if known:
            self._resume(*known[-1])

    def _constants(self, kind: Kind | None) -> frozenset[tuple[str, Layout]]:
        """The layouts of a kind of calls, or of all, that no module's output shows."""
        return frozenset(
            (owner, layout)
            for judged in (self.kinds if kind is None else (kind,))
            for owner, layouts in judged.layouts.items()
            for layout in layouts
            if layout is not None and not list(_sources(layout))
        )

    def _resume(self, kind: Kind | None, sizes: dict[str, torch.Tensor]) -> None:
        self._set(kind, sizes)
        self.local.backward = torch._C._current_graph_task_id()

    @staticmethod
    def _key(module: str, tensor: torch.Tensor) -> tuple[Any, ...] | None:
        if type(tensor) not in (torch.Tensor, nn.Parameter) or not tensor.numel():
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # it has no memory of its own
            return None
        return (module, tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape)

    def check(self, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise `RefusedCallError` where a call's positions are not those of a grid that was given.

        In compiled code, where values cannot be looked at, a check is part of the graph.
        """
        if not kind.positions or torch.jit.is_tracing():
            return
        leaves = flatten(*self.signature.bind(args, kwargs))[2]
        if torch.compiler.is_compiling():
            for known in kind.positions.values():
                for one in known:
                    shown = " x ".join(map(str, one.sides))
                    torch._assert_async(one.kept(leaves[one.leaf]), f"expected positions {shown}")
            return
        lists = [leaf for leaf in leaves if may_list(leaf)]
        for grid in kind.positions:
            if not self.checked(grid, lists):
                if (against := objection(lists, grid, constant=False)) is not None:
                    raise RefusedCallError(against)
                self.checked.note(grid, lists)

    # --- kinds ----------------------------------------------------------------------------------

    def kind_of(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool
    ) -> tuple[Kind, dict[str, Any], tuple[int, ...]] | None:
        """The judged kind of a call, with the values of its symbols and the sides in its lists.

        None where there is none.
        """
        args, kwargs = self.signature.bind(args, kwargs)
        structure, _, leaves = flatten(args, kwargs)
        constants = constants_of(leaves)
        given = self.given(args, kwargs)
        for kind in reversed(self.kinds):
            if kind.structure != structure or kind.training != training or kind.given != given:
                continue
            if kind.constants == constants:
                values = kind.guards.accept(leaves, typed=False)
                if values is None or not self._reads(kind, leaves):
                    continue
                sides = self._sides(kind, values, leaves)
                if sides is not None:
                    return kind, values, sides
        return None

    def _sides(
        self, kind: Kind, values: Mapping[str, Any], leaves: list[Any]
    ) -> tuple[int, ...] | None:
        """The sides that a kind's lists of positions tell; None where they tell of no grid.

        Where values cannot be looked at, as in torch.export, they are those of the example, and
        the graph holds the positions against them.
        """
        found: list[int] = []
        for positions, tokens in kind.lists:
            leaf = leaves[positions.leaf]
            if _is_exporting() or torch.jit.is_tracing():
                shown = " x ".join(map(str, positions.sides))
                torch._assert_async(positions.kept(leaf), f"expected positions {shown}")
                sides: tuple[int, ...] | None = positions.sides
            else:
                sides = self._read(positions, leaf)
            if sides is None:
                return None
            if isinstance(tokens, Source):
                tokens = _computed(kind, values)[tokens.place]
            if math.prod(sides) != tokens:
                return None
            found += sides
        return tuple(found)

    def _reads(self, kind: Kind, leaves: list[Any]) -> bool:
        """Whether the code reads the numbers in this call that it did when the kind was judged.

        Where values cannot be looked at, as in torch.export, the graph holds the call to them.
        """
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            for one in kind.values:
                wanted = f"expected arguments of which the model reads {one.value}"
                torch._assert_async(one.again(leaves) == one.value, wanted)
            return True
        return not kind.values or self._hold(kind, leaves)

    @torch.compiler.disable(
        reason="the model reads numbers from the values of its arguments, and what was judged for "
        "others does not hold for them; compile its blocks"
    )
    def _hold(self, kind: Kind, leaves: list[Any]) -> bool:
        return all(one.holds(leaves) for one in kind.values)

    @torch.compiler.disable(
        reason="which positions the tokens of this call have is read from its values; give `grid` "
        "as numbers for one graph of the whole model, or compile its blocks"
    )
    def _read(self, positions: Positions, leaf: torch.Tensor) -> tuple[int, ...] | None:
        """The sides that a list of positions tells."""
        return self.reading(positions, leaf)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layouts that are callables, evaluated for a call; None where none is."""
        if not self.config.has_callables:
            return None
        return self.config.called(lambda f: f(*args, **kwargs)).layout_key

    def keep(self, kind: Kind) -> None:
        self.kinds = [*self.kinds[-KEPT + 1 :], kind]

    def keep_form(self, owner: str, form: Any) -> None:
        """Of the owner's forms the latest are kept."""
        self.forms[owner] = [*self.forms.get(owner, [])[-KEPT + 1 :], form]


def _is_exporting() -> bool:
    """Whether torch.export traces; Dynamo of torch 2.11 takes `is_exporting` itself for true."""
    return torch.compiler.is_exporting()


# What torch.compiler.assume_constant_result does, which imports all of Dynamo.
_is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _computed(kind: Kind, values: Mapping[str, Any]) -> list[int]:
    """What a kind's formulas say of a call."""
    known = [values[name] for name in kind.guards.symbols]
    return [formula(*known) for formula in kind.arguments]


def _as_sizes(sizes: list[int]) -> torch.Tensor:
    """Sizes as those of a tensor without elements: compilers keep these apart from its values."""
    return torch.empty([*(n + SHIFT for n in sizes), 0])


def _sources(layout: Layout) -> Iterator[Source]:
    for term in (layout.prefix, *layout.grid, layout.suffix):
        if isinstance(term, Source):
            yield term


# --- hooks ----------------------------------------------------------------------------------------
