"""Every kernel against float64, its own results told from what it was given wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from t5fx.kernels.triton_kernels import configs

from ...harness.results import Experiment, Row
from .machine import _none
from .worker import Context

#: The kernel that each tensor of a comparison comes from, by how its name begins; the first fits.
#: The key norm's statistics and the sums of partial results are small kernels without settings,
#: which stand for those whose results they finish.
KERNELS = {
    "mean": "prepare",
    "rstd": "prepare",
    "offsets": "prepare",
    "taps": "prepare",
    "quads": "prepare",
    "w": "inner_gradient",
    "out": "query_output",
    "dq": "convolution_gradient",
    "dk": "key_norm_gradient",
    "dv": "second_order_gradient",
    "dw": "second_order_gradient",
    "dconv": "convolution_gradient",
}


def kernel_of(tensor: str) -> str:
    """The kernel that a tensor comes from; the tensor's own name where none is known."""
    return next((k for start, k in KERNELS.items() if tensor.startswith(start)), tensor)


def by_kernel(
    context: Context, name: str, case: dict[str, Any], repeats: int, products: str
) -> Iterator[Row]:
    """A row for each kernel: its largest error over what is allowed."""
    found = compared(context, case, repeats=repeats)
    sizes = case | {"dtype": products}
    yield from rows(experiment(name, sizes), found, repeats)


def experiment(name: str, case: dict[str, Any]) -> Experiment:
    batch, mode = case.get("batch", 2), "training"
    return Experiment("lease", name, _none, 0, batch, case["dtype"], mode)


def compared(context: Context, case: dict[str, Any], **how: Any) -> Any:
    """The `Comparison` of a case."""
    from t5fx.kernels.triton_kernels.parity import Case, compare

    made = case | {"grid": tuple(case["grid"])} if "grid" in case else case
    return compare(Case(**made), context.device, **how)


def rows(experiment: Experiment, found: Any, repeats: int) -> Iterator[Row]:
    """Of a comparison: by kernel, then whether all repeats gave the same bits."""
    ratios: dict[str, list[tuple[str, float]]] = {kernel: [] for kernel in configs.HALF}
    for tensor, (error, allowed) in found.errors.items():
        ratio = error / allowed if allowed else (0.0 if not error else math.inf)
        ratios.setdefault(kernel_of(tensor), []).append((tensor, ratio))
    first = found.first_wrong
    for kernel, own in ratios.items():
        about = {"unit": "of what is allowed", "better": "lower"}
        if not own:
            yield experiment.row(kernel, "error", status="absent", detail="no result of its own")
            continue
        wrong = [tensor for tensor, ratio in own if not ratio <= 1]
        worst = max((r for _, r in own), key=lambda r: math.inf if math.isnan(r) else r)
        if wrong:
            value = worst if math.isfinite(worst) else None
            begun = f"the first wrong tensor is {first}, of {kernel_of(first)}" if first else ""
            detail = f"{', '.join(wrong)}: {worst:.3g} of what is allowed; {begun}"
            yield experiment.row(kernel, "error", value, status="refused", detail=detail, **about)
        else:
            yield experiment.row(kernel, "error", worst, **about)
    if repeats > 1:
        measure = f"equal bits in {repeats} runs"
        if found.same_bits:
            yield experiment.row("all kernels", measure, 1.0)
        else:
            detail = "other bits in another run: a race, or memory that nothing wrote"
            yield experiment.row("all kernels", measure, status="refused", detail=detail)
