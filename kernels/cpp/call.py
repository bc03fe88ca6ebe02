"""Calls of ``forward.cpp`` and ``backward.cpp``: what `explicit` does, for its arguments."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_counts, check_shapes
from ..errors import NodeArgumentError
from ..explicit import token_major_empty
from ..variant import Variant
from .library import is_available, start

#: What q, k and v may be; parameters and W' are float32.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

_TENSORS = (
    *("q", "k", "v", "grad", "w1", "w2", "w3", "conv_q", "bias_q", "conv_k", "bias_k"),
    *("new1", "new2", "new3", "out", "grad_q", "grad_k", "grad_v", "grad1", "grad2", "grad3"),
    *("grad_conv_q", "grad_bias_q", "grad_conv_k", "grad_bias_k"),
)
_SIZES = ("batch", "heads", "tokens", "dim", "value", "axes")
_Strides, _Grid = ctypes.c_int64 * 16, ctypes.c_int64 * 3


class _Call(ctypes.Structure):
    """`ttt::Call` of node.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        ("strides", _Strides),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("grid", _Grid),
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
    dtype, (q, k, v) = q.dtype, alike(q, k, v)
    out = token_major_empty(q, v.shape[3])
    updated = [w.new_empty(len(q), *w.shape) for w in weights]
    settings = (grid, prefix, scale, eps)
    _run("forward", (q, k, v), None, weights, conv, updated, [out], *settings)
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
    grad, q, k, v = alike(grad, q, k, v)
    grads = [token_major_empty(x, x.shape[3]) for x in (q, k, v)]
    # Those of the parameters have a batch axis until they are summed.
    grad_parameters = [x.new_empty(len(q), *x.shape) for x in (*weights, *conv)]
    results, settings = [None, *grads, *grad_parameters], (grid, prefix, scale, eps)
    updated = [u.contiguous() for u in updated]
    _run("backward", (q, k, v), grad, weights, conv, updated, results, *settings)
    return [*grads, *(g.sum(0) for g in grad_parameters)]


def serves(q: Tensor, wide: torch.dtype, name: str) -> bool:
    """Whether ``<name>.cpp`` is what computes with q in the dtype ``wide``; waits for it."""
    return q.device.type == "cpu" and wide == torch.float32 and is_available(name)


def alike(*tensors: Tensor) -> list[Tensor]:
    """In the dtype that they share, or else in float32."""
    same = len({x.dtype for x in tensors}) == 1
    return [x if same else x.float() for x in tensors]


def check_cpu(*tensors: Tensor) -> None:
    """Raise unless all of them are in the memory that the C++ reads."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise NodeArgumentError(f"expected tensors on one CPU; got one on {tensor.device}")


def launch(name: str, call: ctypes.Structure, q: Tensor, what: str) -> None:
    """Calls ``<name>.cpp`` for q's dtype; ``what`` it is, for an error."""
    function = start(name).result()[f"ttt_{DTYPES[q.dtype]}"]
    function.restype = ctypes.c_bool
    if not function(ctypes.byref(call)):
        raise MemoryError(
            f"{what} of q {list(q.shape)}: expected memory for its scratch buffers, got none"
        )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor | None,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    updated: Sequence[Tensor],
    grid: Sequence[int],
    prefix: int,
) -> None:
    """What is behind a pointer nobody checks: raises where the call would read past an end."""
    node = Variant(locality="dwc_qk" if conv else "none")
    check_counts(node, weights, conv, [], [], grid)
    check_shapes(node, q, k, v, weights, conv, [], [], grid=grid, prefix=prefix)
    wanted = [(len(q), *w.shape) for w in weights]
    got = [tuple(u.shape) for u in updated]
    if got != wanted:
        raise NodeArgumentError(f"updated weights: expected shapes {wanted}; got {got}")
    if grad is not None and grad.shape != v.shape:
        raise NodeArgumentError(f"gradient: expected shape {list(v.shape)}; got {list(grad.shape)}")
    check_cpu(q, k, v, *weights, *conv, *updated, *(() if grad is None else (grad,)))


def _run(
    name: str,
    qkv: Sequence[Tensor],
    grad: Tensor | None,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    updated: Sequence[Tensor],
    results: Sequence[Tensor | None],
    grid: Sequence[int],
    prefix: int,
    scale: float,
    eps: float,
) -> None:
    """Calls a library; ``results`` are what `_TENSORS` has from "out" on."""
    q, k, v = qkv
    _check(q, k, v, grad, weights, conv, updated, grid, prefix)
    weights, conv = [w.contiguous() for w in weights], [c.contiguous() for c in conv]
    tensors = (q, k, v, grad, *weights, *(conv or (None,) * 4), *updated, *results)
    call = _Call(
        *[None if t is None else t.data_ptr() for t in tensors],
        *(None,) * (len(_TENSORS) - len(tensors)),
        _Strides(*q.stride(), *k.stride(), *v.stride(), *(() if grad is None else grad.stride())),
        *(*q.shape, v.shape[3], len(grid) if conv else 0),
        _Grid(*(grid if conv else ())),
        *(prefix, scale, eps, torch.get_num_threads()),
    )
    launch(name, call, q, f"the TTT node's {name}")
