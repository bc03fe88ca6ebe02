"""The node's C++ for CPUs: compiled once for a machine, called by `opaque` and `near_op`."""

from .call import DTYPES, backward, forward, serves
from .library import forget, is_available, start
from .near_call import backward as near_backward
from .near_call import forward as near_forward

__all__ = [
    "DTYPES",
    "backward",
    "forget",
    "forward",
    "is_available",
    "near_backward",
    "near_forward",
    "serves",
    "start",
]
