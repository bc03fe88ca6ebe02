"""Calls of ``forward.cpp`` and ``backward.cpp``: what `explicit` does, for its arguments."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..explicit import token_major_empty
from .library import start

#: What q, k and v may be; parameters and W' are float32.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

_TENSORS = (
    *("q", "k", "v", "grad", "w1", "w2", "w3", "conv_q", "bias_q", "conv_k", "bias_k"),
    *("new1", "new2", "new3", "out", "grad_q", "grad_k", "grad_v", "grad1", "grad2", "grad3"),
    *("grad_conv_q", "grad_bias_q", "grad_conv_k", "grad_bias_k"),
)
_SIZES = ("batch", "heads", "tokens", "dim", "value", "axes")


class _Call(ctypes.Structure):
    """`ttt::Call` of node.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        ("strides", ctypes.c_int64 * 16),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("grid", ctypes.c_int64 * 3),
        ("prefix", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("threads", ctypes.c_int64),
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    *,
    scale: float,
    grid: Sequence[int],
    prefix: int,
    eps: float,
) -> tuple[Tensor, list[Tensor]]:
    """`explicit.forward` in C++: q, k, v in DTYPES with any strides, parameters float32."""
    dtype, (q, k, v) = q.dtype, _alike(q, k, v)
    out = token_major_empty(q, v.shape[3])
    updated = [w.new_empty(len(q), *w.shape) for w in weights]
    tensors = _named("q k v out", q, k, v, out) | _parameters(weights, conv)
    tensors |= _named("new1 new2 new3", *updated)
    _run("forward", tensors, scale=scale, grid=grid, prefix=prefix, eps=eps)
    return out.to(dtype), updated


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    updated: Sequence[Tensor],
    *,
    scale: float,
    grid: Sequence[int],
    prefix: int,
    eps: float,
) -> list[Tensor]:
    """`explicit.backward` in C++, for the same dtypes as `forward`; W' is float32 too."""
    grad, q, k, v = _alike(grad, q, k, v)
    grads = [token_major_empty(x, x.shape[3]) for x in (q, k, v)]
    # Those of the parameters have a batch axis until they are summed.
    grad_weights, grad_conv = ([x.new_empty(len(q), *x.shape) for x in p] for p in (weights, conv))
    tensors = _named("grad q k v", grad, q, k, v) | _parameters(weights, conv)
    tensors |= _named("new1 new2 new3", *(u.contiguous() for u in updated))
    tensors |= _named("grad_q grad_k grad_v grad1 grad2 grad3", *grads, *grad_weights)
    tensors |= _named("grad_conv_q grad_bias_q grad_conv_k grad_bias_k", *grad_conv)
    _run("backward", tensors, scale=scale, grid=grid, prefix=prefix, eps=eps)
    return [*grads, *(g.sum(0) for g in (*grad_weights, *grad_conv))]


def _alike(*tensors: Tensor) -> list[Tensor]:
    """In the dtype that they share, or else in float32."""
    same = len({x.dtype for x in tensors}) == 1
    return [x if same else x.float() for x in tensors]


def _named(names: str, *tensors: Tensor) -> dict[str, Tensor]:
    # None of the convolutions' tensors is there without a convolution.
    return dict(zip(names.split(), tensors, strict=bool(tensors)))


def _parameters(weights: Sequence[Tensor], conv: Sequence[Tensor]) -> dict[str, Tensor]:
    named = _named("w1 w2 w3", *weights) | _named("conv_q bias_q conv_k bias_k", *conv)
    return {name: tensor.contiguous() for name, tensor in named.items()}


def _run(
    name: str,
    tensors: dict[str, Tensor],
    *,
    scale: float,
    grid: Sequence[int],
    prefix: int,
    eps: float,
) -> None:
    q, v = tensors["q"], tensors["v"]
    strided: list[Any] = [tensors.get(x) for x in ("q", "k", "v", "grad")]
    strides = [step for x in strided if x is not None for step in x.stride()]
    call = _Call(
        *(tensors[x].data_ptr() if x in tensors else None for x in _TENSORS),
        (ctypes.c_int64 * 16)(*strides),
        *(*q.shape, v.shape[3], len(grid) if "conv_q" in tensors else 0),
        (ctypes.c_int64 * 3)(*(grid if "conv_q" in tensors else ())),
        *(prefix, scale, eps, torch.get_num_threads()),
    )
    start(name).result()[f"ttt_{DTYPES[q.dtype]}"](ctypes.byref(call))
