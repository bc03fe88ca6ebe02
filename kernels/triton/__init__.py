"""The node "swiglu", "dot", "instance" as Triton kernels, for GPUs of any make that Triton knows,
and near attention.

``forward`` and ``backward`` are plain functions on tensors, of the node without near attention, of
which ``near_launch`` has the same; the import registers all of them as operators.
"""

from . import near_op, op  # noqa: F401
from .backward import backward
from .forward import forward

__all__ = ["backward", "forward"]
