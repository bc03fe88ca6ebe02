"""The node's C++ for CPUs: compiled once for a machine, called by the operators of `opaque`."""

from .call import DTYPES, backward, forward
from .library import forget, is_available, start

__all__ = ["DTYPES", "backward", "forget", "forward", "is_available", "start"]
