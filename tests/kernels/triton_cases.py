"""Calls of the Triton kernels and of the float64 reference on the same arguments, compared."""

from t5fx.kernels.triton_kernels import parity
from t5fx.kernels.triton_kernels.parity import TOLERANCE, poisoned, split

__all__ = ["arguments", "assert_close", "check", "poisoned", "run", "run_op", "run_reference",
           "split"]  # fmt: skip


def arguments(*, batch=2, heads=2, prefix=1, suffix=1, **rest):
    """(tensors, keywords, gradient of the output): see `parity.arguments`."""
    return parity.arguments(batch=batch, heads=heads, prefix=prefix, suffix=suffix, **rest)


def run(*case):
    """[output, gradient of each tensor] of the kernels."""
    return list(parity.run(*case).values())


def run_op(*case):
    """The same through `ttt` and autograd."""
    return list(parity.run_op(*case).values())


def run_reference(*case):
    """The same of the reference, in float64."""
    return list(parity.run_reference(*case).values())


def assert_close(results, wanted, tolerance):
    """Each tensor to a share of its norm, or of a typical one, if that is more."""
    results, wanted = (dict(zip(parity.NAMES, t, strict=False)) for t in (results, wanted))
    for name, (error, allowed) in parity.errors_of(results, wanted, tolerance).items():
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check(**case):
    """Output and all gradients against the float64 reference; returns what the kernels gave."""
    tensors, keywords, grad_out = arguments(**case)
    with poisoned():
        results = run(tensors, keywords, grad_out)
    dtypes = [t.dtype for t in (grad_out, *tensors)]
    assert [r.dtype for r in results] == dtypes
    assert_close(results, run_reference(tensors, keywords, grad_out), TOLERANCE[grad_out.dtype])
    return results
