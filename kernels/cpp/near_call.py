"""Calls of ``near_forward.cpp`` and ``near_backward.cpp``: what `near_explicit` does."""

import ctypes
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_gates, check_grid, check_grid_ndim, check_mask, check_tokens
from ..errors import NodeArgumentError
from ..explicit import token_major_empty
from .call import alike, check_cpu, launch

_TENSORS = ("q", "k", "v", "grad", "base", "gate")
_RESULTS = ("out", "grad_q", "grad_k", "grad_v", "grad_base", "grad_gate")
_SIZES = ("batch", "heads", "tokens", "dim", "value")
_Strides, _Grid = ctypes.c_int64 * 20, ctypes.c_int64 * 3


class _Call(ctypes.Structure):
    """`ttt::NearCall` of near.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_TENSORS, *_RESULTS, "mask")),
        ("strides", _Strides),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("grid", _Grid),
        *((name, ctypes.c_int64) for name in ("prefix", "side", "cells")),
        ("scale", ctypes.c_double),
        ("threads", ctypes.c_int64),
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor,
    mixing: Sequence[Tensor],
    *,
    scale: float,
    grid: Sequence[int],
    prefix: int,
    neighborhood: int,
    coarse: int,
    key_mask: Tensor | None = None,
) -> Tensor:
    """`near_explicit.forward` in C++: q, k, v, base in DTYPES with any strides, a float32 gate."""
    dtype, (q, k, v, base) = q.dtype, alike(q, k, v, base)
    out = token_major_empty(q, v.shape[3])
    settings = (scale, grid, prefix, neighborhood, coarse)
    _run("near_forward", (q, k, v), {"base": base}, mixing, {"out": out}, key_mask, *settings)
    return out.to(dtype)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Sequence[Tensor],
    *,
    scale: float,
    grid: Sequence[int],
    prefix: int,
    neighborhood: int,
    coarse: int,
    key_mask: Tensor | None = None,
) -> list[Tensor]:
    """`near_explicit.backward` in C++, for the same dtypes as `forward`."""
    grad, q, k, v = alike(grad, q, k, v)
    grads = [token_major_empty(x, x.shape[3]) for x in (q, k, v, v)]
    # That of the gate has a batch axis until it is summed.
    grad_mixing = [gate.new_empty(len(q), *gate.shape) for gate in mixing]
    results = dict(zip(_RESULTS[1:], [*grads, *grad_mixing], strict=False))
    settings = (scale, grid, prefix, neighborhood, coarse)
    _run("near_backward", (q, k, v), {"grad": grad}, mixing, results, key_mask, *settings)
    return [*grads, *(g.sum(0) for g in grad_mixing)]


def _run(
    name: str,
    qkv: Sequence[Tensor],
    other: dict[str, Tensor],
    mixing: Sequence[Tensor],
    results: dict[str, Tensor],
    key_mask: Tensor | None,
    scale: float,
    grid: Sequence[int],
    prefix: int,
    neighborhood: int,
    coarse: int,
) -> None:
    """``other``: base or the gradient, which are shaped as v.

    With a mask each item is a call of its own: what a query sees is not the same for all.
    """
    q, k, v = qkv
    _check(q, k, v, other, mixing, key_mask, grid, prefix, neighborhood, coarse)
    items: list[tuple[slice, Tensor | None]] = [(slice(None), None)]
    if key_mask is not None and not key_mask.all():
        masks = enumerate(key_mask.contiguous())
        items = [(slice(i, i + 1), None if mask.all() else mask) for i, mask in masks]
    gates = dict(zip(_TENSORS[5:], [gate.contiguous() for gate in mixing], strict=False))
    for item, mask in items:
        tensors = {
            kind: x[item] for kind, x in {"q": q, "k": k, "v": v, **other, **results}.items()
        }
        strides = (tensors[kind].stride() if kind in tensors else (0,) * 4 for kind in _TENSORS[:5])
        call = _Call(
            **{kind: x.data_ptr() for kind, x in (tensors | gates).items()},
            mask=None if mask is None else mask.data_ptr(),
            strides=_Strides(*itertools.chain.from_iterable(strides)),
            **dict(zip(_SIZES, (*tensors["q"].shape, v.shape[3]), strict=True)),
            grid=_Grid(*(1,) * (3 - len(grid)), *grid),
            prefix=prefix,
            side=neighborhood,
            cells=coarse,
            scale=scale,
            threads=torch.get_num_threads(),
        )
        launch(name, call, tensors["q"], f"near attention's {name.removeprefix('near_')}")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    other: dict[str, Tensor],
    mixing: Sequence[Tensor],
    key_mask: Tensor | None,
    grid: Sequence[int],
    prefix: int,
    neighborhood: int,
    coarse: int,
) -> None:
    """What is behind a pointer nobody checks: raises where the call would read past an end."""
    check_grid_ndim(len(grid))
    check_tokens(q, k, v)
    check_gates(mixing, q.shape[1])
    if key_mask is not None:
        check_mask(key_mask, q)
    check_grid(grid, prefix, q.shape[2])
    if neighborhood < 0 or coarse < 0:
        raise NodeArgumentError(
            f"neighborhood and coarse: expected 0 or more; got {neighborhood} and {coarse}"
        )
    for name, tensor in other.items():
        if tensor.shape != v.shape:
            raise NodeArgumentError(
                f"{name}: expected shape {list(v.shape)}; got {list(tensor.shape)}"
            )
    if len(mixing) > 1 or any(gate.dtype != torch.float32 for gate in mixing):
        raise NodeArgumentError(
            f"mixing: expected at most a gate in float32; got {[gate.dtype for gate in mixing]}"
        )
    check_cpu(q, k, v, *other.values(), *mixing, *([] if key_mask is None else [key_mask]))
