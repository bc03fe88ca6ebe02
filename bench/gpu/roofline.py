"""What the Triton kernels can reach at most on an H200, and what is expected of them, counted and
not measured.

Three times for each kernel: of the bytes that it moves through device memory, of its matrix
products, and of the slots in which its instructions are issued, read off the machine code that the
offline compiler makes of it. The largest is the bound; what is expected lies between it and their
sum. `python -m t5fx.bench.gpu.roofline` counts with the Triton at hand, on any machine, keeps that
in docs/roofline.json beside what other versions gave of the same kernels, and writes
docs/roofline.md of them all; `make roofline` runs it with both that are tested.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from t5fx.errors import T5Error
from t5fx.kernels.triton_kernels import launch

from . import offline

PAGE = Path("docs/roofline.md")
#: {version of Triton: {"kernels": digest of what was counted, "64": rows, "128": rows}}
COUNTS = Path("docs/roofline.json")
DIMS = (64, 128)
TOKENS = (1024, 4096, 16384, 65536)
HEADS = 12


class Gpu(NamedTuple):
    """Rates of a chip, each at the clock of its datasheet."""

    name: str
    bandwidth: float  # bytes/s
    products: float  # FLOP/s of dense 16-bit matrix products
    multiprocessors: int
    clock: float  # Hz

    @property
    def slots(self) -> float:
        """Instructions of threads a second: 4 schedulers, a warp of 32 threads each in a clock."""
        return self.multiprocessors * 4 * 32 * self.clock


#: NVIDIA's datasheet of the H200 SXM; the clock is that at which its 132 multiprocessors, of 4,096
#: FLOP a clock, have the rate of the datasheet.
H200 = Gpu("H200", 4.8e12, 989.4e12, 132, 1.83e9)
#: FlashAttention-3's fastest forward and backward in 16 bits on an H100, FLOP/s, as its paper has
#: them (arXiv 2407.08608): the rival at its best.
FLASH = {"forward": 740e12, "backward": 560e12}

#: By kernel: tensors of N x D read and written in the first pass over the tokens, and in each after
#: it (one for each block of hidden units; what is written is read and added to), products of
#: N x D x D, and its part: "inference" and "training" are of a forward without and with a backward
#: behind it, "forward" of both. The blocks of the keys are those of neighbouring programs, which go
#: through the same tokens at the same time: all but the first find them in the L2 cache.
WORK = {
    "prepare": (1, 0, 0, "forward"),
    "inner_gradient_keys": (2, 0, 6, "inference"),
    "inner_gradient_keys_kept": (3, 0, 6, "training"),
    "query_output": (2, 0, 3, "forward"),
    "inner_gradient_queries": (3, 4, 8, "backward"),
    "second_order_gradient_kept": (4, 6, 15, "backward"),
    "convolution_gradient_queries": (3, 0, 0, "backward"),
    "convolution_gradient_keys": (3, 0, 0, "backward"),
    "key_norm_gradient": (3, 0, 0, "backward"),
}
#: The fewest: each tensor read or written once (q, k, v, o; then q, k, v, dO, dq, dk and dv), and
#: the products of the equations, 5 of them computed again for what nothing of size N may keep.
LEAST = {"forward": (4, 9), "backward": (7, 23)}


@dataclass(frozen=True)
class Kernel:
    """One kernel at one width; all figures are for an element of N x D."""

    name: str
    tensors: int
    products: int
    instructions: float
    spills: float  # instructions that load and store spilled registers
    special: float  # tanh, exponentials and roots
    serialised: bool
    config: str
    resident: int  # programs on a multiprocessor
    ahead: bool = False  # a tile is loaded while the one before it is computed

    def seconds(self, dim: int, gpu: Gpu) -> dict[str, float]:
        """Of an element, under each ceiling."""
        return {
            "memory": 2 * self.tensors / gpu.bandwidth,
            "products": 2 * self.products * dim / gpu.products,
            "issue": self.instructions / gpu.slots,
        }

    def expected(self, dim: int, gpu: Gpu) -> float:
        """Seconds of an element where a program does one thing at a time.

        It loads a tile and waits, convolves it, multiplies and waits. One on a multiprocessor: the
        three times add up. Of several, one runs while others wait, unless they wait for the same:
        the throughput of a closed queueing network at least (Zahorjan et al., "Balanced job bound
        analysis of queueing networks", 1982). What is loaded ahead takes no time but the memory's.
        """
        times = self.seconds(dim, gpu)
        ahead = times.pop("memory") if self.ahead else 0.0
        waits = sum(times.values()) + (self.resident - 1) * max(times.values())
        return max(ahead, waits / self.resident)


def kernels(dim: int, architecture: str = "sm_90") -> list[Kernel]:
    """Those of a forward and a backward in bfloat16 on a grid of two axes, in order."""
    found = offline.launches(architecture, torch.bfloat16, dim, heads=HEADS)
    return [_kernel(name, *found[name], dim, architecture) for name in WORK]


def _kernel(name: str, function: object, arguments: dict, dim: int, architecture: str) -> Kernel:
    compiled = offline.compiled(function, arguments, architecture)
    code = offline.instructions(compiled)
    counts = offline.token_loop(code)
    block_n, block_m = arguments["BLOCK_N"], arguments.get("BLOCK_M", 0)
    warps, stages = arguments["num_warps"], arguments["num_stages"]
    # Blocks of hidden units: each goes through all tokens.
    passes = -(-dim // block_m) if block_m else 1
    if name == "query_output" and passes > 1:
        raise T5Error(f"{name}: expected one block of hidden units, got {passes}")
    each = warps * 32 / (block_n * dim) * passes

    def of(*names: str) -> float:
        return each * sum(counts[name] for name in names)

    first, later, products, _ = WORK[name]
    return Kernel(
        name, first + later * (passes - 1), products,
        each * sum(counts.values()), of("LDL", "STL"), of("MUFU"), offline.serialised(code),
        f"{block_n} x {block_m or dim}, {warps} warps, {stages} stage",
        offline.resident(compiled, architecture), bool(arguments.get("AHEAD")),
    )  # fmt: skip


def is_of(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a kernel runs in a forward, or in a forward and a backward."""
    part = WORK[name][3]
    return part in parts or part == ("training" if "backward" in parts else "inference")


def bound(rows: list[Kernel], parts: tuple[str, ...], dim: int, gpu: Gpu) -> tuple[float, float]:
    """(seconds of an element, share of the roofline) if every kernel met its lowest ceiling."""
    chosen = [row for row in rows if is_of(row.name, parts)]
    seconds = sum(max(row.seconds(dim, gpu).values()) for row in chosen)
    tensors, products = (sum(LEAST[part][i] for part in parts) for i in (0, 1))
    floor = max(2 * tensors / gpu.bandwidth, 2 * products * dim / gpu.products)
    return seconds, floor / seconds


def expected(rows: list[Kernel], parts: tuple[str, ...], dim: int, gpu: Gpu, tokens: int) -> float:
    """Seconds of an element by ``Kernel.expected``, and of the partial sums through memory."""
    seconds = sum(row.expected(dim, gpu) for row in rows if is_of(row.name, parts))
    return seconds + partial_bytes(parts, dim, tokens) / gpu.bandwidth


def bytes_over_least(rows: list[Kernel], parts: tuple[str, ...], dim: int, tokens: int) -> float:
    """Bytes through device memory over the fewest, partial sums of the gradients included."""
    moved = sum(2 * row.tensors for row in rows if is_of(row.name, parts))
    least = 2 * sum(LEAST[part][0] for part in parts)
    return (moved + partial_bytes(parts, dim, tokens)) / least


@functools.cache
def partial_bytes(parts: tuple[str, ...], dim: int, tokens: int) -> float:
    """Bytes of an element for the sums that programs write, and another kernel reads, once each."""
    rows = 2 ** (tokens.bit_length() // 2)
    on_chip = mock.patch.object(launch, "multiprocessors", return_value=H200.multiprocessors)
    with on_chip:
        found = offline.launches(
            "sm_90", torch.bfloat16, dim, grid=(rows, tokens // rows), heads=HEADS, batch=1
        )
    sums = [
        found[name][1]["partial"]
        for name in WORK
        if is_of(name, parts) and name in found and "partial" in found[name][1]
    ]
    return sum(2 * 4 * tensor.numel() for tensor in sums) / (HEADS * tokens * dim)


def speed_up(seconds: float, parts: tuple[str, ...], tokens: int) -> float:
    """Over FlashAttention-3 at its best, of a head of 128 on many tokens."""
    flash = sum(4 * tokens * {"forward": 1, "backward": 2.5}[p] / FLASH[p] for p in parts)
    return flash / seconds


def digest() -> str:
    """Of the kernels' code and settings."""
    folder = Path(launch.__file__).parent
    sources = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


def count(path: Path = COUNTS) -> dict[str, Any]:
    """Counts with the Triton at hand, and keeps that beside what other versions gave of the same
    kernels; what they gave of others is dropped.
    """
    own = digest()
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept = {version: counts for version, counts in kept.items() if counts["kernels"] == own}
    kept[triton.__version__] = {"kernels": own} | {
        str(dim): [dataclasses.asdict(row) for row in kernels(dim)] for dim in DIMS
    }
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    return kept


#: Rows by the version of Triton, newest first, then by D.
Tables = dict[str, dict[int, list[Kernel]]]


def tables(counts: dict[str, Any]) -> Tables:
    versions = sorted(counts, key=lambda v: [int(n) for n in re.findall(r"\d+", v)], reverse=True)
    return {v: {dim: [Kernel(**row) for row in counts[v][str(dim)]] for dim in DIMS}
            for v in versions}  # fmt: skip


BOTH = ("forward", "backward")


def page(found: Tables, gpu: Gpu = H200) -> str:
    lines = [*_introduction(found, gpu)]
    for dim in DIMS:
        lines += _kernels_table(found, dim, gpu)
    return "\n".join([*lines, *_together(found, gpu), *_over_flash(found, gpu)]) + "\n"


def _introduction(found: Tables, gpu: Gpu) -> list[str]:
    return [
        "# What the kernels can reach on an H200",
        "",
        "Counted, not measured: nothing here has run on a GPU. `make roofline` writes this page,",
        f"on any machine; this one with Triton {' and '.join(found)}.",
        "",
        "Each kernel of `kernels/triton` is compiled for sm_90 and its loop",
        "over tiles of tokens is read instruction by instruction. Figures are for one element of",
        "N x D of one head, bfloat16, a grid of two axes. *Tensors* are those of N x D that are",
        "read and written; *dots* the products of N x D x D; *instructions* those of a thread, in",
        "brackets the share that stores and loads spilled registers; *programs* those that a",
        "multiprocessor has room for. Times are in femtoseconds. Those of the bytes, the products",
        f"and the instructions are at the rates of the datasheet: {gpu.bandwidth / 1e12:.1f} TB/s,",
        f"{gpu.products / 1e12:.0f} TFLOP/s, and one instruction of a warp a clock on each of the",
        f"four schedulers of {gpu.multiprocessors} multiprocessors at {gpu.clock / 1e9:.2f} GHz.",
        "*Serialised*: for want of registers each matrix instruction waits for the one before it.",
        "",
        "Two figures are made of these times:",
        "",
        "- **At most** takes the largest of the three, bold: a kernel that loads, multiplies and",
        "  computes all at once. None of ours does: a program waits for each product and, unless",
        "  it loads its tiles *ahead*, for each tile. It is a bound, not a forecast.",
        "- **Expected** says what that costs: where one program has a multiprocessor to itself,",
        "  its three times add up; where there is room for n, one runs while another waits unless",
        "  both want the same, and the time is (their sum + (n - 1) x the largest) / n. Bytes that",
        "  come while the tile before them is computed are left out of it, and are its floor.",
        "",
        "Neither has the time of a launch, how long the first bytes of a load take, or programs",
        "that are idle in the last round.",
    ]


def _kernels_table(found: Tables, dim: int, gpu: Gpu) -> list[str]:
    lines = [
        "",
        f"## Heads of {dim}",
        "",
        "| kernel | Triton | tile | programs | tensors | dots | instructions | memory | products "
        "| issue | expected |",
        "| :-- | :-- | :-- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for rows in zip(*(of_dim[dim] for of_dim in found.values()), strict=True):
        for version, row in zip(found, rows, strict=True):
            times = row.seconds(dim, gpu)
            cells = [f"{1e15 * t:.0f}" for t in times.values()]
            most = list(times.values()).index(max(times.values()))
            cells[most] = f"**{cells[most]}**"
            cells.append(f"{1e15 * row.expected(dim, gpu):.0f}")
            tile = row.config + ", ahead" * row.ahead + ", serialised" * row.serialised
            share = f" ({100 * row.spills / row.instructions:.0f} %)" if row.spills else ""
            lines.append(
                f"| {row.name} | {version} | {tile} | {row.resident} | {row.tensors} | "
                f"{row.products} | {row.instructions:.0f}{share} | {' | '.join(cells)} |"
            )
    return lines


def _together(found: Tables, gpu: Gpu) -> list[str]:
    lines = [
        "",
        "## Together",
        "",
        "The roofline is the larger of the fewest bytes and the fewest products; the share of it",
        "is what is left if every kernel met its own floor, and if every one took what is expected",
        "of it, on so many tokens that partial sums are nothing.",
        "",
        "| | Triton | share at most | expected | bounded by |",
        "| :-- | :-- | --: | --: | :-- |",
    ]
    for dim in DIMS:
        for parts in (("forward",), BOTH):
            for version, of_dim in found.items():
                rows = of_dim[dim]
                seconds, share = bound(rows, parts, dim, gpu)
                likely = sum(r.expected(dim, gpu) for r in rows if is_of(r.name, parts))
                limits = collections.Counter[str]()
                for row in rows:
                    if is_of(row.name, parts):
                        times = row.seconds(dim, gpu)
                        limit = max(times, key=times.__getitem__)
                        limits[limit] += times[limit]
                named = ", ".join(f"{k} {100 * v / seconds:.0f} %" for k, v in limits.most_common())
                lines.append(
                    f"| {' and '.join(parts)}, {dim} | {version} | {share:.2f} | "
                    f"{share * seconds / likely:.2f} | {named} |"
                )
    lines += [
        "",
        f"Bytes through memory over the fewest, of {HEADS} heads, with the partial sums of the",
        "gradients written and read once by as many programs as are launched, whatever the L2",
        "cache keeps of them. Of heads of 128 the second pass of inner_gradient_keys is not",
        "counted: another program makes it at the same time as the first, and finds what that one",
        "read in the L2 cache. *Kept*: the convolved keys, which a forward that is trained writes",
        "and second_order_gradient reads.",
        "",
        f"| | {' | '.join(f'{n:,} tokens' for n in TOKENS)} |",
        f"| :-- {'| --: ' * len(TOKENS)}|",
    ]
    newest = next(iter(found.values()))
    for dim in DIMS:
        for parts in (("forward",), BOTH):
            moved = [f"{bytes_over_least(newest[dim], parts, dim, n):.2f}" for n in TOKENS]
            lines.append(f"| {' and '.join(parts)}, {dim} | {' | '.join(moved)} |")
    return lines


def _over_flash(found: Tables, gpu: Gpu) -> list[str]:
    lines = [
        "",
        "Over FlashAttention-3 at its fastest (740 TFLOP/s forward, 560 backward: "
        "[arXiv 2407.08608](https://arxiv.org/abs/2407.08608)),",
        f"heads of 128, {HEADS} of them; with what is expected go the partial sums through memory.",
        "Neither FlashAttention nor these kernels fill the chip at 1,024 tokens: launches count.",
        "",
        "| tokens | Triton | forward, at most | expected | both directions, at most | expected |",
        "| --: | :-- | --: | --: | --: | --: |",
    ]
    for tokens in TOKENS:
        for version, of_dim in found.items():
            cells = []
            for parts in (("forward",), BOTH):
                least = bound(of_dim[128], parts, 128, gpu)[0]
                likely = expected(of_dim[128], parts, 128, gpu, tokens)
                cells += [f"{speed_up(t, parts, tokens):.1f}x" for t in (least, likely)]
            lines.append(f"| {tokens:,} | {version} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    PAGE.write_text(page(tables(count())))
    print(PAGE.read_text())
