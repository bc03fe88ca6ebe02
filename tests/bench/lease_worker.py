"""A worker of the lease in whose comparisons the kernels give a wrong W'."""

import sys

from t5fx.bench.gpu.lease import worker
from t5fx.kernels.triton_kernels import parity

forward = parity.forward


def wrong(*args, **kwargs):
    out, saved = forward(*args, **kwargs)
    saved.w2.mul_(1.5)
    return out, saved


parity.forward = wrong
sys.exit(worker.main())
