"""The kernels and the float64 reference on the same numbers, compared.

For tests, for the check that decides whether a GPU's kernels are trusted, and for measurements on a
borrowed GPU. On the device "cpu" the kernels run in Triton's interpreter, where that was chosen
(``TRITON_INTERPRET=1``) before they were imported.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..errors import NodeArgumentError
from ..functional import ttt
from ..inner import inner_model
from ..inner.swiglu import SwiGLU
from ..key_norm import KEY_NORMS
from ..locality import add_depthwise_conv
from ..reference import reference
from .backward import backward
from .forward import Saved, forward
from .launch import INTERPRETED

#: Largest error allowed, relative to the norm of what is right: of 16 bits, twelve roundings; of
#: tf32, which has the fraction of float16, as many.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 12 * 2**-11, torch.bfloat16: 12 * 2**-8}
TF32_TOLERANCE = 12 * 2**-11

#: Saved tensors that are compared, in the order of computation; then what `run` returns.
SAVED = ("mean", "rstd", "taps", "w1'", "w2'", "w3'")
NAMES = (
    *("out", "dq", "dk", "dv", "dw1", "dw2", "dw3"),
    *("dconv_q.weight", "dconv_q.bias", "dconv_k.weight", "dconv_k.bias"),
)
LAYOUTS = ("BHND", "packed", "channels first", "every other")


@dataclass(frozen=True)
class Case:
    """One call of the node, by what its result may depend on; plain data."""

    dtype: str = "bfloat16"  # of q, k, v and the output's gradient
    head_dim: int = 64
    value_dim: int = 64
    grid: tuple[int, ...] = (13, 17)  # 1 to 3 axes
    prefix: int = 1
    suffix: int = 0
    batch: int = 2
    heads: int = 3
    locality: str = "dwc_qk"  # or "none"
    layout: str = "packed"  # or another of LAYOUTS
    gradient: float = 1.0  # size of the output's gradient
    tf32: bool = False  # float32 is multiplied in tf32
    parameters: str = "float32"  # their dtype
    key_norm_eps: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Comparison:
    """How far the kernels are from the reference.

    errors: by name, in the order of computation, the norm of the difference and what is allowed.
    first_wrong: the first name whose error is larger, or None. same_bits: whether every repetition
    gave the same.
    """

    errors: dict[str, tuple[float, float]]
    first_wrong: str | None
    same_bits: bool

    @property
    def ok(self) -> bool:
        return self.first_wrong is None and self.same_bits

    def __str__(self) -> str:
        if self.first_wrong is not None:
            error, allowed = self.errors[self.first_wrong]
            return f"{self.first_wrong} has an error of {error:.3g}, {allowed:.3g} is allowed"
        return "right" if self.same_bits else "two runs differ in their bits"


def compare(
    case: Case,
    device: torch.device | str,
    *,
    training: bool = True,
    repeats: int = 1,
    compiled: str | None = None,
    poison: bool = True,
) -> Comparison:
    """Run the kernels on a case and hold everything they give to the float64 reference.

    Args:
        training: the backward too.
        repeats: runs whose bits have to be equal.
        compiled: None, eager; "static" or "dynamic", by Inductor with such sizes, where what is
            saved for the backward is not seen.
        poison: fresh memory is full of NaN.

    Raises:
        NodeArgumentError: ``compiled`` in the interpreter, whose kernels no compiler can trace.
    """
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(case.seed)
    tensors, keywords, grad_out = arguments(
        batch=case.batch,
        heads=case.heads,
        head_dim=case.head_dim,
        value_dim=case.value_dim,
        grid=case.grid,
        prefix=case.prefix,
        suffix=case.suffix,
        locality=case.locality,
        layout=case.layout,
        gradient=case.gradient,
        dtype=dtype,
        parameters=getattr(torch, case.parameters),
        key_norm_eps=case.key_norm_eps,
        device=device,
        generator=generator,
    )
    call = _eager if compiled is None else _compiled(compiled)
    fresh = poisoned(device, traced=compiled is not None) if poison else as_it_is()
    with fresh, _tf32(case.tf32):
        results = call(tensors, keywords, grad_out, training)
        again = (call(tensors, keywords, grad_out, training) for _ in range(repeats - 1))
        same = all(same_bits(results, other) for other in again)
    wanted = _wanted(tensors, keywords, grad_out, training)
    tolerance = TF32_TOLERANCE if case.tf32 and dtype == torch.float32 else TOLERANCE[dtype]
    errors = errors_of(results, wanted, tolerance, case.gradient)
    wrong = (name for name, (error, allowed) in errors.items() if not error <= allowed)
    return Comparison(errors, next(wrong, None), same)


def arguments(
    *,
    batch: int,
    heads: int,
    head_dim: int,
    value_dim: int,
    grid: Sequence[int],
    prefix: int,
    suffix: int,
    locality: str = "dwc_qk",
    layout: str = "BHND",
    gradient: float = 1.0,
    shift: float = 0.0,
    key_norm_eps: float = 1.0,
    dtype: torch.dtype = torch.float32,
    parameters: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """(q, k, v, weights and convolutions in a row; keywords; gradient of the output), all random.

    The weights are large enough for W' to differ from W. ``shift`` is added to every key.
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    tokens = prefix + math.prod(grid) + suffix
    inputs = [random(batch, heads, tokens, size) for size in (head_dim, head_dim, value_dim)]
    inputs[1] += shift
    shapes = inner_model("swiglu").weight_shapes(head_dim, value_dim)
    own = [random(heads, *shape) * shape[0] ** -0.5 for shape in shapes]
    if locality == "dwc_qk":
        channels = heads * head_dim
        for _ in "qk":
            own += [random(channels, 1, *(3,) * len(grid)), random(channels)]
    grad_out = gradient * random(batch, heads, tokens, value_dim)
    tensors = [lay_out(x.to(dtype), layout) for x in inputs]
    tensors += [t.to(parameters) for t in own]
    keywords = {
        **{"scale": 0.7, "grid": tuple(grid), "prefix": prefix},
        **{"key_norm_eps": key_norm_eps, "locality": locality},
    }
    tensors = [move(t, device) for t in tensors]
    return tensors, keywords, move(lay_out(grad_out.to(dtype), layout), device)


def split(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """q, k, v, weights, conv."""
    return *tensors[:3], list(tensors[3:6]), list(tensors[6:])


def run(
    tensors: Sequence[Tensor], keywords: Mapping[str, Any], grad_out: Tensor
) -> dict[str, Tensor]:
    """Output and gradient of each tensor of the kernels, by name."""
    return {n: t for n, t in _eager(tensors, keywords, grad_out).items() if n in NAMES}


def run_reference(
    tensors: Sequence[Tensor], keywords: Mapping[str, Any], grad_out: Tensor
) -> dict[str, Tensor]:
    """Output and gradient of each tensor of the reference in float64, by name."""
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    out = reference(
        *split(leaves), inner="swiglu", inner_loss="dot", key_norm="instance", **keywords
    )
    grads = torch.autograd.grad(out, leaves, grad_out.double(), materialize_grads=True)
    return dict(zip(NAMES, [out.detach(), *grads], strict=False))


def run_op(
    tensors: Sequence[Tensor],
    keywords: Mapping[str, Any],
    grad_out: Tensor,
    training: bool = True,
    call: Callable[..., Tensor] = ttt,
) -> dict[str, Tensor]:
    """Output and gradients by name, of the kernels called by the operator and autograd."""
    leaves = [t.detach().requires_grad_(training) for t in tensors]
    out = call(*split(leaves), **keywords, impl="triton")
    results = [out.detach()]
    if training:
        results += torch.autograd.grad(out, leaves, grad_out, materialize_grads=True)
    return dict(zip(NAMES, results, strict=False))


def _eager(
    tensors: Sequence[Tensor],
    keywords: Mapping[str, Any],
    grad_out: Tensor,
    training: bool = True,
) -> dict[str, Tensor]:
    """What the kernels give, with what they save that can be told apart."""
    q, k, v, weights, conv = split(tensors)
    out, saved = forward(q, k, v, weights, conv, **keywords, training=training)
    results = dict(zip(SAVED, _known(saved, q.shape[3]), strict=True))
    if not conv:
        results.pop("taps")
    results["out"] = out
    if training:
        *grads, dw, dconv = backward(grad_out, q, k, v, weights, conv, saved, **keywords)
        results |= zip(NAMES[1:], (*grads, *dw, *dconv), strict=False)
    return results


def _known(saved: Saved, dim: int) -> list[Tensor]:
    """The tensors named in SAVED, rows of channels in their own order and length."""
    rows = [
        t.unflatten(-1, (2, -1)).mT.flatten(-2)[..., :dim]
        for t in (saved.mean, saved.rstd, saved.taps)
    ]
    return [*rows, saved.w1, saved.w2, saved.w3]


def _compiled(sizes: str) -> Callable[..., dict[str, Tensor]]:
    """`run_op`, its call compiled by Inductor with "static" or "dynamic" sizes."""
    return functools.partial(run_op, call=by_inductor(ttt, sizes))


def by_inductor(function: Callable[..., Any], sizes: str) -> Callable[..., Any]:
    """A function compiled with "static" or "dynamic" sizes."""
    if INTERPRETED:
        raise NodeArgumentError(
            f"compiled: expected None in Triton's interpreter, whose kernels no compiler can "
            f"trace; got {sizes!r}"
        )
    if sizes not in ("static", "dynamic"):
        raise NodeArgumentError(f'compiled: expected None, "static" or "dynamic"; got {sizes!r}')
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    return torch.compile(function, fullgraph=True, dynamic=sizes == "dynamic")


def same_bits(results: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Equal bits, of NaN too."""
    return all(torch.equal(_bits(results[name]), _bits(other[name])) for name in results)


def _bits(tensor: Tensor) -> Tensor:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(whole[tensor.element_size()])


# --- what is right --------------------------------------------------------------------------------


def _wanted(
    tensors: Sequence[Tensor], keywords: Mapping[str, Any], grad_out: Tensor, training: bool
) -> dict[str, Tensor]:
    """All that a forward saves, its output and the gradients, in float64."""
    with torch.no_grad():
        saved = saved_reference(tensors, keywords)
    if training:
        return saved | run_reference(tensors, keywords, grad_out)
    with torch.no_grad():
        args = split([t.double() for t in tensors])
        out = reference(*args, inner="swiglu", inner_loss="dot", key_norm="instance", **keywords)
        return saved | {"out": out}


def saved_reference(tensors: Sequence[Tensor], keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """What `SAVED` names, in float64."""
    _, k, v, weights, conv = split([t.double() for t in tensors])
    batch, heads, tokens, _ = k.shape
    eps = keywords["key_norm_eps"]
    var, mean = torch.var_mean(k, dim=2, correction=0)
    found = {"mean": mean, "rstd": torch.rsqrt(var + eps)}
    keys = KEY_NORMS["instance"](k, eps, None)
    if conv:
        weight_q, bias_q, weight_k, bias_k = conv
        keys = add_depthwise_conv(keys, weight_k, bias_k, keywords["grid"], keywords["prefix"])
        both = (weight_q, bias_q), (weight_k, bias_k)
        found["taps"] = torch.stack([_taps(weight, bias, heads) for weight, bias in both])
    keys, values = keys.flatten(0, 1), v.flatten(0, 1)
    own = [w.expand(batch, -1, -1, -1).flatten(0, 1) for w in weights]
    model = SwiGLU()
    grads = model.gradient(keys, model.hidden(keys, own), own, values)
    rate = keywords["scale"] / tokens
    updated = [w + rate * dw for w, dw in zip(own, grads, strict=True)]
    return found | {
        name: w.unflatten(0, (batch, heads)) for name, w in zip(SAVED[3:], updated, strict=True)
    }


def _taps(weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """``[H, 3**ndim + 1, D]``: x + conv(x) tap by tap, and the bias."""
    taps = weight.flatten(1).unflatten(0, (heads, -1)).mT.clone()
    taps[:, taps.shape[1] // 2] += 1
    return torch.cat([taps, bias.unflatten(0, (heads, 1, -1))], dim=1)


def errors_of(
    results: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    tolerance: float,
    gradient: float = 1.0,
) -> dict[str, tuple[float, float]]:
    """By name: the norm of the difference, and the share of what is right that is allowed.

    What is nearly 0 is held to a thousandth of the largest; a convolution's gradient, the sum over
    all tokens of what q or k get, to what the sum would be if its terms did not cancel; what is
    saved in float32 to float32, and a mean there to the keys' deviation from it.

    Raises:
        ValueError: a shape is wrong.
    """
    small = min(tolerance, TOLERANCE[torch.float32])
    out = rms(wanted["out"])
    # What a gradient would be of an output's gradient of 1.
    most = max((rms(w) / gradient for n, w in wanted.items() if n.startswith("d")), default=0.0)
    largest = max(out, most)
    errors = {}
    for name, result in results.items():
        want = wanted[name]
        if result.shape != want.shape:
            raise ValueError(f"{name}: expected {tuple(want.shape)}, got {tuple(result.shape)}")
        typical = 1e-3 * largest * (gradient if name.startswith("d") else 1.0)
        share = tolerance
        if name.startswith("dconv"):
            terms = wanted["dq" if name.startswith("dconv_q") else "dk"]
            typical = rms(terms) * (terms.shape[0] * terms.shape[2]) ** 0.5
        elif name in SAVED:
            share = small if name in SAVED[:3] else tolerance
            typical = rms(1 / wanted["rstd"]) if name == "mean" else 0.0
        error = (result.double() - want).norm()
        errors[name] = (
            float(error),
            share * max(float(want.norm()), typical * want.numel() ** 0.5),
        )
    return errors


def rms(x: Tensor) -> float:
    """Root of the mean square."""
    return float(x.norm()) / x.numel() ** 0.5


# --- memory ---------------------------------------------------------------------------------------


def move(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On a device, with its strides."""
    if tensor.device.type == torch.device(device).type:
        return tensor
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return moved.copy_(tensor)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """A tensor with the values of ``x`` and the strides of a layout."""
    if layout == "packed":  # [B, N, 3, H, D], as a joint projection gives it
        packed = torch.stack([x, x, x]).permute(1, 3, 0, 2, 4).contiguous()
        return packed[:, :, 1].transpose(1, 2)
    if layout == "channels first":  # [B, H, D, N]
        return x.mT.contiguous().mT
    if layout == "every other":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1).flatten(-2)[..., ::2]
    if layout != "BHND":
        raise NodeArgumentError(f"layout: expected one of {', '.join(LAYOUTS)}; got {layout!r}")
    return x.contiguous()


@contextmanager
def as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """The user's setting that lets float32 be multiplied in tf32, or not."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


#: Bytes that are filled with NaN and given back to the allocator of a GPU: in many small pieces and
#: in a few large ones, for it keeps the two apart.
_POISON = ((64, 512 * 1024), (8, 32 * 1024 * 1024))


@contextmanager
def poisoned(device: torch.device | str = "cpu", *, traced: bool = False) -> Iterator[None]:
    """Fresh memory is full of NaN: what is read before it is written, or never written, shows.

    Whole numbers are the largest there are. ``traced``: compiled code, whose memory comes from the
    allocator alone, which is filled beforehand.
    """
    if traced:
        if torch.device(device).type == "cuda":
            held = [
                torch.full((size // 4,), torch.nan, device=device)
                for count, size in _POISON
                for _ in range(count)
            ]
            del held
        yield
        return
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poisoned_new_empty(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        fresh = new_empty(tensor, *args, **kwargs)
        return fresh.fill_(torch.nan if fresh.is_floating_point() else torch.iinfo(fresh.dtype).max)

    def poisoned_empty_like(tensor: Tensor, **kwargs: Any) -> Tensor:
        return empty_like(tensor, **kwargs).fill_(torch.nan)

    with (
        mock.patch("torch.Tensor.new_empty", poisoned_new_empty),
        mock.patch("torch.empty_like", poisoned_empty_like),
    ):
        yield
