"""The call of ``forward.cpp``."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..explicit import token_major_empty
from .library import start

#: What q, k and v may be; parameters and W' are float32.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

_POINTERS = (
    *("q", "k", "v", "out", "w1", "w2", "w3", "new1", "new2", "new3"),
    *("conv_q", "bias_q", "conv_k", "bias_k"),
)
_SIZES = ("batch", "heads", "tokens", "dim", "value", "axes")


class _Call(ctypes.Structure):
    """`ttt::Call` of forward.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("strides", ctypes.c_int64 * 12),
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
    """`explicit.forward` in C++: q, k, v of one of DTYPES and any strides, parameters float32."""
    batch, heads, tokens, dim = q.shape
    value = v.shape[3]
    k, v = k.to(q.dtype), v.to(q.dtype)
    weights, conv = [w.contiguous() for w in weights], [c.contiguous() for c in conv]
    out = token_major_empty(q, value)
    updated = [w.new_empty(batch, *w.shape) for w in weights]
    tensors = (q, k, v, out, *weights, *updated, *conv)
    call = _Call(
        *(t.data_ptr() for t in tensors),
        *(None,) * (len(_POINTERS) - len(tensors)),
        (ctypes.c_int64 * 12)(*q.stride(), *k.stride(), *v.stride()),
        *(batch, heads, tokens, dim, value, len(grid) if conv else 0),
        (ctypes.c_int64 * 3)(*grid),
        *(prefix, scale, eps, torch.get_num_threads()),
    )
    function = start("forward").result()[f"ttt_forward_{DTYPES[q.dtype]}"]
    function(ctypes.byref(call))
    return out, updated
