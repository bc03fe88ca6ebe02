"""A checker of races and bounds for kernels in Triton's interpreter.

The interpreter runs the programs of a launch one after the other, and each as if by one thread:
what goes wrong only when they run at once does not show in its results. So every load, store,
atomic and barrier of a launch is recorded, and the addresses are compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import numpy
import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

READ, WRITE, ATOMIC = range(3)
#: Bytes that are told apart: the smallest number that kernels load and store has 16 bits.
GRANULE = 2


class Fault(NamedTuple):
    """What a launch did that it must not."""

    kind: str
    kernel: str
    addresses: int  # how many, in units of two bytes
    programs: tuple[int, ...]  # of the first of them


@dataclass
class Record:
    """What was found in the launches of a context."""

    faults: list[Fault] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)  # the name of each that was launched


class _Events:
    """The accesses of a launch."""

    def __init__(self, tensors: Sequence[torch.Tensor] = ()) -> None:
        extents = sorted(_extent(tensor) for tensor in tensors if tensor.numel())
        #: Where the memory of each begins, and where that of those up to it ends.
        self.begins = numpy.array([begin for begin, _ in extents], numpy.uint64)
        self.ends = numpy.maximum.accumulate(numpy.array([e for _, e in extents], numpy.uint64))
        #: Accesses out of bounds, which are not made, by kind: (how many, program of the first).
        self.outside: dict[int, tuple[int, int]] = {}
        self.program = 0
        self.barriers = 0  # of the program so far
        self.time = 0
        self.rows: list[tuple[Any, ...]] = []
        #: By program and address of an atomic: (time, barriers) of each.
        self.atomics: dict[int, dict[int, list[tuple[int, int]]]] = {}

    def add(self, kind: int, pointers: Any, mask: Any) -> Any:
        """Notes an access; returns the mask of what is within bounds."""
        size = max(GRANULE, pointers.get_element_ty().primitive_bitwidth // 8)
        exist = numpy.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        below = numpy.searchsorted(self.begins, pointers.data, side="right") - 1
        inside = (below >= 0) & (pointers.data + numpy.uint64(size) <= self.ends[below])
        wrong = int((exist & ~inside).sum())
        if wrong:
            count, first = self.outside.get(kind, (0, self.program))
            self.outside[kind] = count + wrong * (size // GRANULE), first
        exist = exist & inside
        self.time += 1
        first = pointers.data[exist].astype(numpy.uint64).ravel()
        at = (first[:, None] + numpy.arange(0, size, GRANULE, dtype=numpy.uint64)).ravel()
        self.rows.append((at, kind, self.program, self.time, self.barriers))
        if kind == ATOMIC:
            for address in first.tolist():
                mine = self.atomics.setdefault(self.program, {}).setdefault(address, [])
                mine.append((self.time, self.barriers))
        return TensorHandle(exist, tl.int1)

    def table(self) -> tuple[Any, ...]:
        """[address, kind, program, time, barriers], an element for each two bytes accessed."""
        columns = [numpy.concatenate([row[0] for row in self.rows] or [numpy.array([])])]
        counts = [len(row[0]) for row in self.rows]
        for i in range(1, 5):
            columns.append(numpy.repeat(numpy.array([row[i] for row in self.rows], int), counts))
        return tuple(columns)

    def ordered(self, before: tuple[int, int, int], after: tuple[int, int]) -> bool:
        """Whether an access (program, time, barriers) is done before one of another program
        (program, time), by an atomic of both at one address.

        A barrier must lie between an access and the atomic behind it: other threads made it.
        """
        program, time, barriers = before
        other, later = after
        theirs = self.atomics.get(other, {})
        return any(
            released > time
            and passed > barriers
            and any(released < t < later for t, _ in theirs[at])
            for at, mine in self.atomics.get(program, {}).items()
            if at in theirs
            for released, passed in mine
        )


@contextlib.contextmanager
def recorded(*, backwards: bool = False) -> Iterator[Record]:
    """Checks every launch in the context; the record fills as they end. Faults are:

    - "written by two programs": an address, unless by atomics alone;
    - "read by one program, written by another": an address;
    - "read after write without a barrier": by one program, as another thread may have written it;
    - "read out of bounds", "written out of bounds": an address in no argument's memory. Such an
      access is not made; a read gives the mask's other value.

    Two programs are in order where both did an atomic at one address in between: it is taken to
    release what came before it and to acquire what comes behind.

    Args:
        backwards: the programs run in the opposite order. What only one order gets right, such as a
            program that takes itself for the last one, shows in the other.
    """
    record, events = Record(), _Events()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    add, swap = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas
    barrier, turn = InterpreterBuilder.create_barrier, InterpreterBuilder.set_grid_idx
    execute = GridExecutor.__call__

    def create_masked_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        mask = events.add(READ, pointers, mask)
        return load(builder, pointers, mask, *rest)

    def create_masked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask = events.add(WRITE, pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    def create_atomic_rmw(
        builder: Any, operator: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        mask = events.add(ATOMIC, pointers, mask)
        return add(builder, operator, pointers, value, mask, *rest)

    def create_atomic_cas(builder: Any, pointers: Any, *rest: Any) -> Any:
        events.add(ATOMIC, pointers, _Everywhere)
        return swap(builder, pointers, *rest)

    def create_barrier(builder: Any) -> Any:
        events.barriers += 1
        return barrier(builder)

    def set_grid_idx(builder: Any, x: int, y: int, z: int) -> Any:
        sizes = builder.grid_dim
        if backwards:
            x, y, z = (size - 1 - i for size, i in zip(sizes, (x, y, z), strict=True))
        events.program, events.barriers = (x * sizes[1] + y) * sizes[2] + z, 0
        return turn(builder, x, y, z)

    def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal events
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        events = _Events(tensors)
        result = execute(executor, *args, **kwargs)
        kernel = executor.fn.__name__
        record.kernels.append(kernel)
        record.faults += _faults(events, kernel)
        return result

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", create_masked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", create_masked_store),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", create_atomic_rmw),
        mock.patch.object(InterpreterBuilder, "create_atomic_cas", create_atomic_cas),
        mock.patch.object(InterpreterBuilder, "create_barrier", create_barrier),
        mock.patch.object(InterpreterBuilder, "set_grid_idx", set_grid_idx),
        mock.patch.object(GridExecutor, "__call__", call),
    ):
        yield record


class _Everywhere:
    data = numpy.array(True)


def _faults(events: _Events, kernel: str) -> list[Fault]:
    """All of one launch."""
    names = {READ: "read out of bounds", WRITE: "written out of bounds"}
    found = [
        Fault(names.get(kind, "written out of bounds"), kernel, count, (first,))
        for kind, (count, first) in events.outside.items()
    ]
    table = events.table()
    if table[0].size:
        order = numpy.lexsort((table[3], table[0]))  # by address, then time
        found += _conflicts(events, kernel, tuple(column[order] for column in table))
    return found


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The first address of a tensor, and the one behind its last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    end = tensor.data_ptr() + (last + 1) * tensor.element_size()
    return tensor.data_ptr(), end


def _conflicts(events: _Events, kernel: str, table: tuple[Any, ...]) -> list[Fault]:
    """Of the accesses by address and time: races between programs and within one."""
    at, kind, program, _, barriers = table
    places = numpy.arange(at.size)
    starts = numpy.flatnonzero(numpy.r_[True, at[1:] != at[:-1]])
    counts = numpy.diff(numpy.r_[starts, at.size])
    many = numpy.minimum.reduceat(program, starts) != numpy.maximum.reduceat(program, starts)
    many &= numpy.maximum.reduceat(kind, starts) > READ
    found: dict[str, tuple[int, tuple[int, ...]]] = {}

    # By one program: whether the last write before a read lies behind the same barrier.
    written = numpy.maximum.accumulate(numpy.where(kind > READ, places, -1))
    again = (kind == READ) & (written >= numpy.repeat(starts, counts))
    again &= (barriers[written] == barriers) & ~numpy.repeat(many, counts)
    if again.any():
        first = (int(program[again][0]),)
        found["read after write without a barrier"] = len(numpy.unique(at[again])), first

    # By several: few addresses, one after the other.
    for begin, count in zip(starts[many], counts[many], strict=True):
        own = slice(begin, begin + count)
        accesses = list(zip(*(column[own].tolist() for column in table[1:]), strict=True))
        for name, *programs in _at_one_address(events, accesses):
            number, first = found.get(name, (0, tuple(programs)))
            found[name] = number + 1, first
    return [Fault(name, kernel, count, first) for name, (count, first) in found.items()]


def _at_one_address(
    events: _Events, accesses: list[tuple[int, int, int, int]]
) -> Iterator[tuple[Any, ...]]:
    """(kind of fault, programs) of accesses (kind, program, time, barriers) in order of time, each
    kind once.
    """
    seen = set()
    for place, (kind, program, time, barriers) in enumerate(accesses):
        for earlier, other, before, passed in accesses[:place]:
            if (kind == READ and earlier == READ) or (kind == ATOMIC and earlier == ATOMIC):
                continue
            if other == program:
                wrong = kind == READ and earlier != READ and passed == barriers
                name = "read after write without a barrier"
            else:
                wrong = not events.ordered((other, before, passed), (program, time))
                both = kind != READ and earlier != READ
                name = (
                    "written by two programs" if both else "read by one program, written by another"
                )
            if wrong and name not in seen:
                seen.add(name)
                yield (name, program) if other == program else (name, other, program)
