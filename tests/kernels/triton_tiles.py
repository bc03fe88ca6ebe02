"""The Triton kernels with the tiles that an H100 gets, in Triton's interpreter, at about a thousand
tokens. Run by test_triton.py, in a process of its own, as triton_interpreted.py is; its tests use
tiles of 16 x 16.
"""

import pytest
import torch
from triton_cases import TOLERANCE, arguments, assert_close, check, poisoned, run, run_reference

from t5fx.bench.gpu.interpreter import mended
from t5fx.kernels.triton_kernels import launch

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")


@pytest.fixture(autouse=True)
def _mended():
    with mended(small=False):
        yield


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        (torch.bfloat16, 64),
        pytest.param(torch.float16, 128, marks=pytest.mark.slow),
        pytest.param(torch.float16, 64, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 128, marks=pytest.mark.slow),
    ],
)
def test_a_thousand_tokens(dtype, dim):
    """An odd grid, tokens before and behind it, several tiles in each chunk."""
    check(
        batch=1, heads=1, head_dim=dim, value_dim=dim, grid=(31, 33), prefix=1, suffix=4,
        layout="packed", dtype=dtype,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 64), (64, 16), (24, 40), (128, 16), (256, 16)])
def test_odd_pairs_of_widths(dim, value_dim, dtype):
    check(
        batch=1, heads=1, head_dim=dim, value_dim=value_dim, grid=(9, 15), prefix=1, suffix=1,
        dtype=dtype,
    )  # fmt: skip


def test_tf32_is_told_to_every_product(monkeypatch):
    """The interpreter multiplies exactly or, from Triton 3.9 on, after a rounding to tf32: either
    is within what ten bits of mantissa make of float32.
    """
    monkeypatch.setattr(launch, "precision", lambda: "tf32")
    tensors, keywords, grad_out = arguments(
        batch=1, heads=1, head_dim=32, value_dim=32, grid=(5, 9), prefix=1, suffix=0
    )
    with poisoned():
        results = run(tensors, keywords, grad_out)
    wanted = run_reference(tensors, keywords, grad_out)
    assert_close(results, wanted, TOLERANCE[torch.float16])
