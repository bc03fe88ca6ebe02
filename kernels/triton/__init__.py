"""The node "swiglu", "dot", "instance" as Triton kernels, for GPUs of any make that Triton knows.

``forward`` and ``backward`` are plain functions on tensors; the import registers them as operators.
"""

from . import op  # noqa: F401
from .backward import backward
from .forward import forward

__all__ = ["backward", "forward"]
