"""The plan: steps in the order of their worth, each with the seconds that it may take."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from t5fx.kernels.triton_kernels import configs

from ...suites import kernels
from .. import tune

#: Products by the name that a case has: of float32 also in tf32.
PRODUCTS = ("bfloat16", "float16", "tf32", "float32")
#: (batch, heads) that do not fill the chip at few tokens, and that do.
BATCH_HEADS = ((1, 12), (8, 16))
WORKS = ("forward", "forward and backward")
CHECKERS = ("memcheck", "racecheck")
#: (batch, heads, tokens) that each kernel is timed alone at.
ALONE = (1, 12, 16384)


@dataclass(frozen=True)
class Item:
    """One case: run in a worker by a function of this package that yields rows.

    name: within its step. run: module and function. arguments: of the function, as JSON has them.
    seconds: after which it hangs and is killed.
    """

    name: str
    run: str
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 60.0


@dataclass(frozen=True)
class Step:
    """Items that share a budget.

    seconds: the budget. least: with less than this left it is not begun.
    assembler: "own", Triton's; "newer", skipped where there is none; "chosen", what parity chose.
    """

    name: str
    items: tuple[Item, ...]
    seconds: float
    least: float = 5.0
    assembler: str = "chosen"


def case(products: str, **sizes: Any) -> dict[str, Any]:
    """The fields of a `parity.Case`."""
    tf32 = products == "tf32"
    return {"dtype": "float32" if tf32 else products, "tf32": tf32, **sizes}


def compiling(rehearse: str, architecture: str) -> list[list[tuple[str, Item]]]:
    """(assembler, item) of all kernels to compile, the most urgent group first."""

    def item(products: str, dim: int, **more: Any) -> Item:
        about = {"products": products, "dim": dim, "architecture": architecture} | more
        name = ", ".join([products, f"D = {dim}", *(f"{n} {v}" for n, v in more.items())])
        return Item(name, "compiling.case", about, 240)

    def tried(kernel: str, dim: int) -> list[Item]:
        others = tune.candidates(kernel, architecture, dim)
        return [item("bfloat16", dim, kernel=kernel, settings=list(other)) for other in others]

    kernel = next(iter(configs.HALF))
    if rehearse:
        return [
            [("own", item("bfloat16", 16, kernel=kernel))],
            [],
            [],
            [("own", tried(kernel, 16)[0])],
        ]
    first = [item(p, d) for p, d in itertools.product(PRODUCTS, (128, 64))]
    widths = [("bfloat16", d) for d in (16, 32, 96, 256)] + [("float16", d) for d in (32, 256)]
    widths += [("tf32", 32), ("float32", 32)]
    candidates = [tried(kernel, dim) for dim, kernel in itertools.product((128, 64), configs.HALF)]
    return [
        [("own", one) for one in first],
        [("newer", one) for one in first],
        [("own", item(*one)) for one in widths],
        [("own", one) for one in itertools.chain.from_iterable(candidates)],
    ]


def plan(rehearse: str = "") -> list[Step]:
    """All steps after the machine's and the compilation's.

    rehearse: "full" and "tiny" have sizes for the interpreter.
    """
    tools = [Item(tool, "tools.sanitizer", {"tool": tool}, 120) for tool in CHECKERS]
    return [
        *parity(rehearse),
        headline(rehearse),
        alone(rehearse),
        inductor(rehearse),
        Step("model", (Item("DINOv2-L", "compiled.model", {}, 240),), 100, 30),
        Step("ncu", (Item("costliest kernels", "tools.ncu", {}, 80),), 60, 20),
        Step("sanitizer", tuple(tools), 100, 20),
        *extension(rehearse),
    ]


def parity(rehearse: str) -> list[Step]:
    """Every kernel against float64: with both assemblers, then all widths with the chosen one."""

    def item(products: str, dim: int, repeats: int, about: str = "", **sizes: Any) -> Item:
        sizes = case(products, head_dim=dim, value_dim=dim, **sizes)
        arguments = {"case": sizes, "repeats": repeats, "products": products}
        name = ", ".join(filter(None, (products, f"D = {dim}", about)))
        return Item(name, "exactness.by_kernel", arguments, 60)

    odd = {"grid": (33, 65), "prefix": 0, "suffix": 5}
    small = {"grid": (3, 3), "batch": 1, "heads": 1}
    if rehearse:
        first = [item(p, 16, 2, **small) for p in PRODUCTS[: 1 if rehearse == "tiny" else 4]]
        widths = [item("float16", 24, 1, "no convolution", locality="none", **small)]
    else:
        first = [item(p, d, 5) for p, d in itertools.product(PRODUCTS, (64, 128))]
        widths = [
            *(item("bfloat16", d, 2) for d in (16, 32, 72, 96, 256)),
            item("bfloat16", 64, 2, "three axes", grid=(5, 6, 7)),
            item("bfloat16", 64, 2, "one axis", grid=(1000,)),
            item("bfloat16", 64, 2, "no convolution", locality="none", layout="BHND"),
            item("bfloat16", 128, 2, "odd grid", **odd),
            item("float16", 128, 2, "odd grid", **odd),
            item("float16", 64, 2, "small gradients", gradient=1e-4),
            *(item("float16", d, 2) for d in (16, 32, 256)),
            *(item(p, d, 2) for p in ("float32", "tf32") for d in (16, 32)),
            item("float32", 64, 2, "odd grid", **odd),
        ]
    return [
        Step("parity", tuple(first), 45, 5, "own"),
        Step("parity, newer assembler", tuple(first), 30, 5, "newer"),
        Step("widths", tuple(widths), 35),
    ]


def headline(rehearse: str) -> Step:
    """t5 against softmax: as in the suite "kernels", whose rows it writes."""
    sizes = list(itertools.product((4096, 16384, 1024, 8192), (128, 64), BATCH_HEADS))
    if rehearse:
        sizes = [(16, 16, (1, 1))]
    return Step(
        "headline",
        tuple(speed((*shape, n, dim), work) for n, dim, shape in sizes for work in WORKS),
        80,
    )


def speed(shape: tuple[int, int, int, int], work: str, seconds: float = 40) -> Item:
    arguments = {"shape": list(shape), "work": work}
    return Item(kernels.case_name(shape, work), "speed.attention", arguments, seconds)


def alone(rehearse: str) -> Step:
    """Each kernel by itself, over a few settings."""
    batch, heads, tokens = (1, 1, 16) if rehearse else ALONE
    most = 1 if rehearse else 100
    own = list(configs.HALF)
    if rehearse == "tiny":
        own = own[-2:]  # the last ones of a backward, of which one works in place
    return Step(
        "alone",
        tuple(
            Item(
                f"{kernel}, D = {dim}",
                "speed.alone",
                {"kernel": kernel, "shape": [batch, heads, tokens, dim], "most": most},
                40,
            )
            for dim in ((16,) if rehearse else (128, 64))
            for kernel in own
        ),
        60,
    )


def inductor(rehearse: str) -> Step:
    """Compiled: sizes of 1 become constants in a static graph, so that these are other binaries."""
    dim = 16 if rehearse else 64
    small = {"grid": (3, 3), "batch": 1, "heads": 1} if rehearse else {}
    kinds: list[tuple[str, dict[str, Any]]] = [("static", {}), ("dynamic", {})]
    if rehearse == "tiny":
        kinds.pop()
    if not rehearse:
        kinds[1:1] = [("static", {"batch": 1, "heads": 1})]
        kinds += [("dynamic", {"grid": (33, 65)}), ("static", {"locality": "none"})]
    items = [
        Item(
            ", ".join([compiled, f"D = {dim}", *(f"{n} {v}" for n, v in sizes.items())]),
            "compiled.inductor",
            {
                "case": case("bfloat16", head_dim=dim, value_dim=dim, **small | sizes),
                "compiled": compiled,
            },
            60,
        )
        for compiled, sizes in kinds
    ]
    shape = [1, 1, 16, 16] if rehearse else [2, 4, 900, 64]
    graphs = Item("CUDA graph", "compiled.graph", {"shape": shape}, 30)
    return Step("inductor", (items[0], graphs, *items[1:]), 60)


def extension(rehearse: str) -> list[Step]:
    """What only a second call has the time for."""
    offsets = {"heads": 4, "tokens": 16, "dim": 16}
    if rehearse:
        return [Step("long", (Item("64-bit offsets", "long.offsets", offsets),), 60)]
    offsets = {"heads": 36, "tokens": 2**20, "dim": 64}
    sizes = itertools.product((65536, 262144), (128, 64), WORKS)
    long = [speed((1, 12, n, d), work, 90) for n, d, work in sizes]
    few = [
        speed((*shape, n, d), work)
        for n, d, shape, work in itertools.product((512, 256), (128, 64), BATCH_HEADS, WORKS)
    ]
    return [
        Step("long", (Item("64-bit offsets", "long.offsets", offsets, 120),), 60),
        Step("million tokens", (Item("bfloat16, D = 64", "long.million", {}, 120),), 60),
        Step("long sequences", tuple(long), 120),
        Step("few tokens", tuple(few), 60),
    ]
