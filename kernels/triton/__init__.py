"""The node "swiglu", "dot", "instance" as Triton kernels, for GPUs of any make that Triton knows.

``forward`` and ``backward`` are plain functions on tensors.
"""

from .backward import backward
from .forward import forward

__all__ = ["backward", "forward"]
