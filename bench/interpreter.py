"""Triton's interpreter, mended where a GPU computes something else.

The interpreter is chosen for a whole process, before the kernels are imported:
``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from t5fx.kernels.triton_kernels import launch, tiles


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """For the time of the context: bfloat16 as on a GPU, calls in a sixth of the time, and the
    interpreter of Triton 3.6 beside NumPy 2.4.
    """
    with (
        mock.patch.object(InterpretedFunction, "__call__", _called),
        mock.patch.object(InterpreterBuilder, "create_dot", _product),
        mock.patch.object(interpreter, "_convert_float", _converted),
        mock.patch.object(interpreter, "_patch_lang_tensor", _tensors_patched),
    ):
        yield


@contextlib.contextmanager
def as_on(architecture: str) -> Iterator[None]:
    """For the time of the context kernels run with the settings of an architecture ("sm_90") and,
    where they would use it, with its approximate tanh: off by the largest error that it may have,
    of either sign.
    """
    with (
        mock.patch.object(launch, "architecture", return_value=architecture),
        mock.patch.object(tiles, "tanh", _approximate_tanh),
    ):
        yield


_call, _dot, _convert = (
    InterpretedFunction.__call__,
    InterpreterBuilder.create_dot,
    interpreter._convert_float,
)
_patch_tensor = interpreter._patch_lang_tensor


def _called(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Triton prepares its language for every call of a function in a kernel, as for the kernel
    itself: most of the time that a kernel takes. Its own functions need it.
    """
    if function.fn.__module__.startswith("triton."):
        return _call(function, *args, **kwargs)
    return function.rewrite()(*args, **kwargs)


def _product(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
    """The interpreter keeps bfloat16 as its bits, and multiplies those."""
    return _dot(builder, _widened(a), _widened(b), *rest)


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.astype(numpy.uint32) << 16
    return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32)


def _converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """The interpreter cuts float32 off, or rounds it and loses what is carried; a GPU rounds to
    nearest even.
    """
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(data, source, target, rounding)
    rounded = torch.from_numpy(numpy.array(data)).bfloat16()
    return rounded.view(torch.int16).numpy().view(numpy.uint16)


def _tensors_patched(tensor: Any, scope: Any) -> None:
    """Triton 3.6 takes arrays of one number for numbers; NumPy 2.4 does not."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


def _approximate_tanh(a: Any) -> Any:
    values = numpy.tanh(a.handle.data)
    off = torch.where(torch.rand(values.shape) < 0.5, 1 + 2**-11, 1 - 2**-11).numpy()
    values = (values * off).clip(-1, 1).astype(numpy.float32)
    return tl.tensor(interpreter.TensorHandle(values, tl.float32), a.type)
