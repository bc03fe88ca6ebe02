"""What the Triton kernels can reach at most on an H200, counted and not measured.

Three ceilings for each kernel: the bytes that it moves through device memory, its matrix products,
and the slots in which its instructions are issued, read off the machine code that the offline
compiler makes of it. `python -m t5fx.bench.roofline` writes docs/roofline.md, on any machine.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from t5fx.errors import T5Error

from . import offline

PAGE = Path("docs/roofline.md")
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

    def seconds(self, dim: int, gpu: Gpu) -> dict[str, float]:
        """Of an element, under each ceiling."""
        return {
            "memory": 2 * self.tensors / gpu.bandwidth,
            "products": 2 * self.products * dim / gpu.products,
            "issue": self.instructions / gpu.slots,
        }


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


def bytes_over_least(rows: list[Kernel], parts: tuple[str, ...], dim: int, tokens: int) -> float:
    """Bytes through device memory over the fewest, partial sums of the gradients included.

    The sums of a program, 3 D^2 float32, are written and read once; there is one program on each
    multiprocessor for each of its blocks of hidden units.
    """
    moved = sum(2 * row.tensors for row in rows if is_of(row.name, parts))
    launches = {"forward": 1, "backward": 2}
    programs = H200.multiprocessors * (2 if dim <= 64 else 1)
    partial = sum(launches[part] for part in parts) * programs * 3 * dim * dim * 4 * 2
    least = 2 * sum(LEAST[part][0] for part in parts)
    return (moved + partial / (HEADS * tokens * dim)) / least


def speed_up(seconds: float, parts: tuple[str, ...], tokens: int) -> float:
    """Over FlashAttention-3 at its best, of a head of 128 on many tokens."""
    flash = sum(4 * tokens * {"forward": 1, "backward": 2.5}[p] / FLASH[p] for p in parts)
    return flash / seconds


def page(gpu: Gpu = H200) -> str:
    lines = [
        "# What the kernels can reach on an H200",
        "",
        "Counted, not measured: nothing here has run on a GPU. `python -m t5fx.bench.roofline`",
        f"writes this page, on any machine; this one with Triton {triton.__version__}.",
        "",
        "Each kernel of [kernels/triton](../kernels/triton) is compiled for sm_90 and its loop",
        "over tiles of tokens is read instruction by instruction. Figures are for one element of",
        "N x D of one head, bfloat16, a grid of two axes. *Tensors* are those of N x D that are",
        "read and written; *products* those of N x D x D; *instructions* those of a thread, in",
        "brackets the share that stores and loads spilled registers. The three times, in",
        "femtoseconds, are those of the bytes, the products and the instructions at the rates of",
        f"the datasheet: {gpu.bandwidth / 1e12:.1f} TB/s, {gpu.products / 1e12:.0f} TFLOP/s, and",
        "one instruction of a warp a clock on each of the four schedulers of",
        f"{gpu.multiprocessors} multiprocessors at {gpu.clock / 1e9:.2f} GHz. The largest, bold,",
        "is the kernel's floor; waiting for memory and for one another comes on top. *Serialised*:",
        "for want of registers each matrix instruction waits for the one before it.",
    ]
    table = {dim: kernels(dim) for dim in DIMS}
    for dim, rows in table.items():
        lines += [
            "",
            f"## Heads of {dim}",
            "",
            "| kernel | tile | tensors | products | instructions | memory | products | issue |",
            "| :-- | :-- | --: | --: | --: | --: | --: | --: |",
        ]
        for row in rows:
            times = row.seconds(dim, gpu)
            cells = [f"{1e15 * t:.0f}" for t in times.values()]
            most = list(times.values()).index(max(times.values()))
            cells[most] = f"**{cells[most]}**"
            tile = row.config + (", serialised" if row.serialised else "")
            share = f" ({100 * row.spills / row.instructions:.0f} %)" if row.spills else ""
            lines.append(
                f"| {row.name} | {tile} | {row.tensors} | {row.products} | "
                f"{row.instructions:.0f}{share} | {' | '.join(cells)} |"
            )
    lines += ["", "## Together", ""]
    lines += [
        "The roofline is the larger of the fewest bytes and the fewest products; the share of it",
        "is what is left if every kernel met its own floor.",
        "",
        "| | share of the roofline at most | bounded by | bytes over the fewest, by tokens |",
        "| :-- | --: | :-- | :-- |",
    ]
    both = ("forward", "backward")
    for dim, rows in table.items():
        for parts in (("forward",), both):
            seconds, share = bound(rows, parts, dim, gpu)
            limits = collections.Counter[str]()
            for row in rows:
                if is_of(row.name, parts):
                    times = row.seconds(dim, gpu)
                    limit = max(times, key=times.__getitem__)
                    limits[limit] += times[limit]
            named = ", ".join(f"{k} {100 * v / seconds:.0f} %" for k, v in limits.most_common())
            moved = ", ".join(
                f"{bytes_over_least(rows, parts, dim, n):.2f} at {n:,}" for n in TOKENS
            )
            lines.append(f"| {' and '.join(parts)}, {dim} | {share:.2f} | {named} | {moved} |")
    lines += [
        "",
        f"The bytes are of {HEADS} heads, with the partial sums of the gradients written and read",
        "once by as many programs as fill the chip, whatever the L2 cache keeps of them. Of heads",
        "of 128 the second pass of inner_gradient_keys is not counted: another program makes it at",
        "the same time as the first, and finds what that one read in the L2 cache. *Kept*: the",
        "convolved keys, which a forward that is trained writes and second_order_gradient reads.",
        "",
        "Over FlashAttention-3 at its fastest (740 TFLOP/s forward, 560 backward: "
        "[arXiv 2407.08608](https://arxiv.org/abs/2407.08608)), heads of 128, at most:",
        "",
        "| tokens | forward | forward and backward |",
        "| --: | --: | --: |",
    ]
    rows = table[128]
    for tokens in TOKENS:
        cells = [
            f"{speed_up(bound(rows, parts, 128, gpu)[0], parts, tokens):.1f}x"
            for parts in (("forward",), both)
        ]
        lines.append(f"| {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE.read_text())
