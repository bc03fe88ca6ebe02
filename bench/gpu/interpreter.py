"""Triton's interpreter mended, so that the kernels compute in it as on a GPU, bfloat16 included.

The interpreter is chosen for a whole process, by ``TRITON_INTERPRET=1`` before the kernels are
imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from t5fx.errors import T5Error
from t5fx.kernels.triton_kernels import configs, launch
from t5fx.kernels.triton_kernels import tiles as tiles_of

#: Several tiles, chunks of tokens, blocks and parts of hidden units, on little data; part of a tile
#: is loaded before the products of the one before it.
SMALL = configs.Config(16, 16, warps=4, stages=1, programs=1, parts=2, ahead=1)


@contextmanager
def mended(*, small: bool = True, architecture: str = "sm_90") -> Iterator[None]:
    """The interpreter with a GPU's bfloat16 and tanh.

    small: also launch every kernel with the settings `SMALL`, not with those of the architecture.

    Raises `T5Error` where the kernels were imported for a GPU.
    """
    if not launch.INTERPRETED:
        raise T5Error(
            "expected Triton's interpreter, got kernels for a GPU; set TRITON_INTERPRET=1 before "
            "t5fx is imported"
        )
    with ExitStack() as stack:
        for change in (plain_calls, numbers, bfloat16, tanh):
            stack.enter_context(change())
        stack.enter_context(mock.patch.object(launch, "architecture", return_value=architecture))
        if small:
            stack.enter_context(small_tiles())
        yield


@contextmanager
def small_tiles() -> Iterator[None]:
    """Every kernel with the settings `SMALL`."""
    rows = dict.fromkeys(configs.WIDTHS, SMALL)
    half = dict.fromkeys(configs.HALF, rows)
    with mock.patch.multiple(configs, HALF=half, SMALL=half, WIDE=half):
        yield


@contextmanager
def plain_calls() -> Iterator[None]:
    """Triton prepares its language for every call of a function in a kernel, as for the kernel
    itself: most of the time that a kernel would take. Its own functions need it.
    """
    prepared = InterpretedFunction.__call__

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn.__module__.startswith("triton."):
            return prepared(function, *args, **kwargs)
        return function.rewrite()(*args, **kwargs)

    with mock.patch.object(InterpretedFunction, "__call__", call):
        yield


@contextmanager
def numbers() -> Iterator[None]:
    """The interpreter of Triton 3.6 takes arrays of one number for numbers, which NumPy 2.4 does
    not; that of 3.9 does as here.
    """
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    with mock.patch.object(interpreter, "_patch_lang_tensor", patched):
        yield


@contextmanager
def bfloat16() -> Iterator[None]:
    """The interpreter keeps bfloat16 as its bits. It multiplies those in a product, and cuts
    float32 off, or rounds it and loses what is carried; a GPU rounds to nearest even.
    """
    product, convert = InterpreterBuilder.create_dot, interpreter._convert_float

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(numpy.uint32) << 16
        return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32)

    def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(builder, widened(a), widened(b), *rest)

    def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding)
        rounded = torch.from_numpy(numpy.array(data)).bfloat16()
        return rounded.view(torch.int16).numpy().view(numpy.uint16)

    with (
        mock.patch.object(InterpreterBuilder, "create_dot", create_dot),
        mock.patch.object(interpreter, "_convert_float", converted),
    ):
        yield


@contextmanager
def tanh() -> Iterator[None]:
    """The GPU's own, with the largest error that it may have, its sign by a bit of the value."""

    def approximate(a: Any) -> Any:
        values = numpy.tanh(a.handle.data)
        odd = numpy.asarray(values, numpy.float32).view(numpy.uint32) & 1
        off = numpy.where(odd, 1 + 2**-11, 1 - 2**-11)
        values = (values * off).clip(-1, 1).astype(numpy.float32)
        return tl.tensor(interpreter.TensorHandle(values, tl.float32), a.type)

    with mock.patch.object(tiles_of, "tanh", approximate):
        yield
