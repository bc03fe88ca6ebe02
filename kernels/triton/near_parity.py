"""The kernels of near attention and what is right in float64 on the same numbers, as ``parity`` has
it of the node.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import near_explicit
from .near_launch import near_backward, near_forward
from .parity import (
    TOLERANCE,
    Case,
    Comparison,
    as_it_is,
    by_inductor,
    errors_of,
    lay_out,
    move,
    poisoned,
    same_bits,
)

#: What is compared, in the order of computation.
NAMES = ("out", "dq", "dk", "dv", "dbase", "dgate")


@dataclass(frozen=True)
class NearCase(Case):
    """One call, by what its result may depend on. `locality` and `key_norm_eps` are not read."""

    neighborhood: int = 3
    coarse: int = 2
    mix: str = "gate"  # or "half"


def compare(
    case: NearCase,
    device: torch.device | str,
    *,
    training: bool = True,
    repeats: int = 1,
    compiled: str | None = None,
    poison: bool = True,
) -> Comparison:
    """Run the kernels on a case and hold what they give to what is right; see `parity.compare`."""
    given = arguments(case, device)
    call = run if compiled is None else _compiled(compiled)
    fresh = poisoned(device, traced=compiled is not None) if poison else as_it_is()
    with fresh:
        results = call(*given, training)
        same = all(same_bits(results, call(*given, training)) for _ in range(repeats - 1))
    wanted = run_reference(*given, training)
    errors = errors_in(results, wanted, given, case)
    wrong = (name for name, (error, allowed) in errors.items() if not error <= allowed)
    return Comparison(errors, next(wrong, None), same)


def arguments(
    case: NearCase, device: torch.device | str
) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """([q, k, v, base, a gate or nothing], keywords, gradient of the output), all random."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    tokens = case.prefix + torch.Size(case.grid).numel() + case.suffix
    widths = (*(case.head_dim,) * 2, *(case.value_dim,) * 3)
    rows = [random(case.batch, case.heads, tokens, width) for width in widths]
    rows[4] *= case.gradient
    *tensors, grad = [move(lay_out(x.to(dtype), case.layout), device) for x in rows]
    if case.mix == "gate":
        tensors.append(random(case.heads).to(getattr(torch, case.parameters)).to(device))
    places = {"grid": case.grid, "prefix": case.prefix}
    window = {"neighborhood": case.neighborhood, "coarse": case.coarse}
    return tensors, {"scale": case.head_dim**-0.5, **places, **window}, grad


def errors_in(
    results: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    given: tuple[list[Tensor], dict[str, Any], Tensor],
    case: NearCase,
) -> dict[str, tuple[float, float]]:
    """`parity.errors_of`. A gate's gradient, a sum over all tokens, is held to what it would be if
    its terms did not cancel.
    """
    tolerance = TOLERANCE[getattr(torch, case.dtype)]
    errors = errors_of(results, wanted, tolerance, case.gradient)
    if "dgate" in errors:
        (*_, base, gate), _, grad = given
        near = (wanted["out"] - base.double()) / gate.double()[:, None, None]
        terms = (near * grad.double()).sum(3)[:, :, case.prefix : near.shape[2] - case.suffix]
        error, allowed = errors["dgate"]
        errors["dgate"] = error, max(allowed, tolerance * float(terms.norm()))
    return errors


def run(
    tensors: Sequence[Tensor], keywords: Mapping[str, Any], grad: Tensor, training: bool = True
) -> dict[str, Tensor]:
    """Output and gradient of each tensor of the kernels, by name."""
    q, k, v, base, *mixing = tensors
    out, saved = near_forward(q, k, v, base, mixing, **keywords)
    grads = near_backward(grad, q, k, v, mixing, saved, **keywords) if training else []
    return dict(zip(NAMES, [out, *grads], strict=False))


def run_reference(
    tensors: Sequence[Tensor], keywords: Mapping[str, Any], grad: Tensor, training: bool = True
) -> dict[str, Tensor]:
    """Output and gradients by name, computed in float64 and in blocks to save memory."""
    q, k, v, base, *mixing = [t.double() for t in tensors]
    results = [near_explicit.forward(q, k, v, base, mixing, **keywords)]
    if training:
        results += near_explicit.backward(grad.double(), q, k, v, mixing, **keywords)
    return dict(zip(NAMES, results, strict=False))


def _compiled(sizes: str) -> Callable[..., dict[str, Tensor]]:
    """`run` through the operators, compiled by Inductor with "static" or "dynamic" sizes."""
    call = by_inductor(_call, sizes)

    def run_op(tensors: Any, keywords: Any, grad: Tensor, training: bool) -> dict[str, Tensor]:
        leaves = [t.detach().requires_grad_(training) for t in tensors]
        results = [call(*leaves[:4], leaves[4:], **keywords)]
        if training:
            results += torch.autograd.grad(results[0], leaves, grad, materialize_grads=True)
        return dict(zip(NAMES, [r.detach() for r in results], strict=False))

    return run_op


def _call(
    q: Tensor, k: Tensor, v: Tensor, base: Tensor, mixing: list[Tensor], *, grid: Any, **rest: Any
) -> Tensor:
    forward = torch.ops.t5fx.near_triton_forward
    out: Tensor = forward(q, k, v, base, mixing, grid=list(grid), **rest)[0]
    return out
