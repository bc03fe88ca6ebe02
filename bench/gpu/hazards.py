"""Whether machine code for Hopper touches what a matrix instruction in flight still works on.

A warpgroup's matrix instruction (PTX ``wgmma.mma_async``, SASS ``HGMMA``) only starts where it
stands. Until a wait, the registers of its left operand must not be written, and those of its
accumulator neither read nor written, except by the next product into the same accumulator (PTX ISA,
"Asynchronous warpgroup-level matrix instructions"). Several assemblers are reported to have broken
that in code with register operands. In SASS ``gsb0`` at the end of an HGMMA closes a group, and
``WARPGROUP.DEPBAR.LE gsb0, N`` waits for all but the N newest closed ones.

What lies in shared memory is not followed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from .offline import Instruction

#: Registers of a left operand: 64 rows of 32 bytes among the 128 threads of a warpgroup.
LEFT = 4
#: Groups behind a product beyond which they are not counted: waits name fewer.
MOST_GROUPS = 8
#: Instructions whose first registers are read, though nothing in their operands says so.
ONLY_READ = (
    "ISETP",
    "FSETP",
    "DSETP",
    "HSETP2",
    "FCHK",
    "R2P",
    "BRX",
    "BRXU",
    "JMX",
    "CALL",
    "RET",
)
#: Moves of two registers without a width in their name.
PAIRS = ("CS2R", "DADD", "DMUL", "DFMA", "I2F.F64", "F2F.F64.F32")


class Hazard(NamedTuple):
    """An instruction that touches what a product in flight works on."""

    kind: str  # "writes a left operand", "writes an accumulator" or "reads an accumulator"
    instruction: Instruction
    product: Instruction

    def __str__(self) -> str:
        found, product = self.instruction, self.product
        return (
            f"{found.address:#06x} {found.name} {found.operands.strip()} {self.kind} of "
            f"{product.address:#06x} {product.name} {product.operands.strip()}"
        )


class Access(NamedTuple):
    """The registers of an instruction."""

    reads: frozenset[int]
    writes: frozenset[int]


def is_product(instruction: Instruction) -> bool:
    """Whether it is a warpgroup's matrix instruction."""
    return instruction.name.startswith("HGMMA")


@functools.lru_cache(2**12)
def left_operand(product: Instruction) -> frozenset[int]:
    """The registers of a product's left operand; none if it lies in shared memory."""
    found = re.match(r"R(\d+)$", _split(product.operands)[1])
    return frozenset(range(int(found[1]), int(found[1]) + LEFT)) if found else frozenset()


@functools.lru_cache(2**12)
def accumulator(product: Instruction) -> frozenset[int]:
    """The registers of a product's result: 64 rows among the 128 threads of a warpgroup."""
    columns, kind = re.match(r"HGMMA\.(?:SP\.)?64x(\d+)x\d+\.(F16|F32)", product.name).groups()
    first = int(re.match(r"R(\d+)", product.operands)[1])
    return frozenset(range(first, first + int(columns) // (2 if kind == "F32" else 4)))


@functools.lru_cache(2**16)
def accesses(instruction: Instruction) -> Access:
    """The registers that an instruction reads and writes.

    An unknown instruction is taken to write its first operand and to read the others.
    """
    name, operands = instruction.name, _split(instruction.operands)
    while operands and re.match(r"!?U?P(\d|T|R)$", operands[0]):  # predicates come first
        operands.pop(0)
    if is_product(instruction):
        own = accumulator(instruction)
        added_to = own if "RZ" not in operands else frozenset()
        return Access(left_operand(instruction) | added_to, own)
    stores = bool(operands) and not re.match(r"R(\d+|Z)\b", operands[0])
    writes: frozenset[int] = frozenset()
    if operands and not stores and not name.startswith(ONLY_READ):
        writes = _registers(operands.pop(0), _width(name))
    reads: frozenset[int] = frozenset()
    for place, operand in enumerate(operands):
        wide = stores and place == len(operands) - 1  # what is stored, behind the address
        addend = ".WIDE" in name and place == len(operands) - 1
        reads |= _registers(operand, _width(name) if wide and "[" not in operand else 1 + addend)
    return Access(reads, writes)


def _split(operands: str) -> list[str]:
    return [operand.strip() for operand in operands.split(",")] if operands.strip() else []


def _width(name: str) -> int:
    """Registers of what an instruction moves."""
    if name.startswith(("LDSM", "STSM")):
        return int(name[-1]) if name[-1].isdigit() and name[-2] == "." else 1
    parts = name.split(".")
    if "128" in parts:
        return 4
    if "64" in parts or "WIDE" in parts or (name.startswith(PAIRS) and "32" not in parts[1:2]):
        return 2
    return 1


def _registers(operand: str, width: int) -> frozenset[int]:
    """Those that an operand names; an address of 64 bits has two."""
    found: set[int] = set()
    for number, long in re.findall(r"(?<![A-Z])R(\d+)(\.64)?", operand):
        found.update(range(int(number), int(number) + (2 if long else width)))
    return frozenset(found)


def hazards(code: Sequence[Instruction]) -> list[Hazard]:
    """Every hazard in the code of a kernel (`offline.instructions`), in order of address.

    All paths through branches count: a product is in flight where it may be.
    """
    at = {instruction.address: place for place, instruction in enumerate(code)}
    #: Products that may be in flight before an instruction: place -> groups closed since, itself
    #: included, at least. None: no path leads there yet.
    states: list[dict[int, int] | None] = [None] * len(code)
    found: dict[tuple[int, int, str], Hazard] = {}
    pending = [0] if code else []
    states[:1] = [{}] if code else []
    while pending:
        place = pending.pop()
        instruction = code[place]
        flying = states[place] or {}
        for product in flying:
            for kind in _kinds(instruction, code[product]):
                found[place, product, kind] = Hazard(kind, instruction, code[product])
        after = _after(instruction, place, flying)
        for following in _following(instruction, place, at):
            if following < len(code) and _merge(states, following, after):
                pending.append(following)
    return [found[key] for key in sorted(found)]


def _kinds(instruction: Instruction, product: Instruction) -> list[str]:
    """What an instruction does to a product in flight."""
    reads, writes = accesses(instruction)
    own, left = accumulator(product), left_operand(product)
    if is_product(instruction) and accumulator(instruction) == own:
        # The next one into the same accumulator waits for it by itself.
        reads, writes = left_operand(instruction), writes - own
    kinds = {
        "writes a left operand": writes & left,
        "writes an accumulator": writes & own,
        "reads an accumulator": reads & own,
    }
    return [kind for kind, registers in kinds.items() if registers]


def _after(instruction: Instruction, place: int, flying: dict[int, int]) -> dict[int, int]:
    """What may be in flight behind an instruction."""
    if is_product(instruction):
        closes = "gsb0" in instruction.operands
        flying = {**flying, place: 0}
        return {p: min(n + closes, MOST_GROUPS) for p, n in flying.items()}
    if instruction.name.startswith("WARPGROUP.DEPBAR") and not instruction.predicated:
        kept = int(re.search(r"gsb0, (0x[0-9a-f]+)", instruction.operands)[1], 16)
        return {p: n for p, n in flying.items() if n <= kept}
    return flying


def _following(instruction: Instruction, place: int, at: dict[int, int]) -> list[int]:
    """The instructions that may come next."""
    if instruction.target is not None:
        ahead = [place + 1] if instruction.predicated else []
        return ahead + ([at[instruction.target]] if instruction.target in at else [])
    if instruction.name.startswith("EXIT") and not instruction.predicated:
        return []
    return [place + 1]


def _merge(states: list[dict[int, int] | None], place: int, more: dict[int, int]) -> bool:
    """Joins what another path brings; whether that is news."""
    here = states[place]
    if here is None:
        states[place] = dict(more)
        return True
    merged = {p: min(here.get(p, MOST_GROUPS), more.get(p, MOST_GROUPS)) for p in here | more}
    states[place] = merged
    return merged != here
