"""Calls of the Triton kernels and of the float64 reference on the same arguments, compared."""

from contextlib import contextmanager
from unittest import mock

from t5fx.kernels.triton_kernels import configs, parity
from t5fx.kernels.triton_kernels.parity import TOLERANCE, poisoned, split

__all__ = ["arguments", "assert_close", "check", "poisoned", "run", "run_op", "run_reference",
           "small_tiles", "split"]  # fmt: skip


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


@contextmanager
def small_tiles():
    """Several tiles, chunks of tokens, blocks and parts of hidden units, on little data."""
    small = configs.Config(block_n=16, block_m=16, warps=4, stages=1, programs=1, parts=2)
    rows = dict.fromkeys(configs.HALF, dict.fromkeys(configs.WIDTHS, small))
    with mock.patch.multiple(configs, HALF=rows, SMALL=rows, WIDE=rows):
        yield
