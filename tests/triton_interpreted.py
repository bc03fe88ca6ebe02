"""The Triton kernels in Triton's interpreter, on a CPU. Run by test_triton.py, in a process of its
own: the interpreter is chosen for a whole process, before the kernels are imported."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpretedFunction
from triton_cases import arguments, assert_close, check, poisoned, run

from t5fx.kernels.errors import NodeArgumentError
from t5fx.kernels.triton_kernels import configs, forward
from t5fx.kernels.triton_kernels.query import query_output

LAYOUTS = ["BHND", "packed", "channels first", "every other"]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles, chunks of tokens and blocks of hidden units, on few tokens and channels."""
    small = configs.Config(block_n=16, block_m=16, warps=4, stages=1, programs=1)
    rows = dict.fromkeys(configs.WIDTHS, small)
    monkeypatch.setattr(configs, "HALF", dict.fromkeys(configs.HALF, rows))
    monkeypatch.setattr(configs, "WIDE", configs.HALF)


sizes = st.integers(1, 4)


def test_this_is_the_interpreter():
    assert isinstance(query_output, InterpretedFunction)


@settings(max_examples=4)
@given(
    grid=st.lists(sizes, min_size=1, max_size=3).map(tuple),
    prefix=st.integers(0, 2),
    suffix=st.integers(0, 2),
    head_dim=st.sampled_from([16, 24]),
    value_dim=st.sampled_from([16, 20]),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_equals_the_reference(grid, prefix, suffix, head_dim, value_dim, layout, dtype):
    check(
        batch=1, heads=2, grid=grid, prefix=prefix, suffix=suffix, head_dim=head_dim,
        value_dim=value_dim, layout=layout, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("grid", [(1,), (7,), (7, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_token_counts(grid, dtype):
    check(batch=1, heads=1, head_dim=16, value_dim=16, grid=grid, prefix=0, suffix=0, dtype=dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_without_convolution(layout):
    check(
        batch=2, heads=2, head_dim=16, value_dim=24, grid=(9,), layout=layout, locality="none",
    )  # fmt: skip


def test_heads_of_72():
    check(batch=1, heads=1, head_dim=72, value_dim=16, grid=(2, 2), prefix=0, dtype=torch.float16)


def test_three_axes():
    check(batch=1, heads=1, head_dim=16, value_dim=16, grid=(2, 2, 3), prefix=0)


def test_the_same_bits_each_time():
    case = arguments(batch=1, heads=2, head_dim=24, value_dim=16, grid=(20,), prefix=0)
    with poisoned():
        first, second = run(*case), run(*case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_shift_of_all_keys_changes_nothing():
    """The shift is as large as float32 can bear: the keys are multiples of 2**-11."""
    sizes = {"batch": 1, "heads": 1, "head_dim": 16, "value_dim": 16, "grid": (6, 6)}
    tensors, keywords, grad_out = arguments(**sizes)
    tensors[1] = (tensors[1] * 2048).round() / 2048
    here = run(tensors, keywords, grad_out)
    tensors[1] = tensors[1] + 1024
    there = run(tensors, keywords, grad_out)
    assert_close(there, [t.double() for t in here], 2e-4)


def test_expanded_gradient_of_the_output():
    tensors, keywords, grad_out = arguments(batch=1, heads=1, head_dim=16, value_dim=16, grid=(5,))
    ones = torch.ones((), dtype=grad_out.dtype).expand_as(grad_out)
    expanded, dense = (run(tensors, keywords, g) for g in (ones, ones.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dtype": torch.float64}, "q: expected float32, float16 or bfloat16"),
        ({"head_dim": 264}, "at most 256 channels"),
        ({"locality": "dwc_v"}, "locality: expected"),
    ],
)
def test_what_the_kernels_cannot_take(change, complaint):
    case = {"batch": 1, "heads": 1, "head_dim": 16, "value_dim": 16, "grid": (2,)} | change
    tensors, keywords, _ = arguments(**case)
    with pytest.raises(NodeArgumentError, match=complaint):
        forward(*tensors[:3], tensors[3:6], tensors[6:], **keywords)
