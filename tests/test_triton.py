"""The Triton kernels: in Triton's interpreter anywhere, compiled where there is a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import triton
from triton_cases import arguments, check, run

LAYOUTS = ["BHND", "packed"]
HALF = [torch.float16, torch.bfloat16]


@pytest.mark.skipif(
    triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
    reason="the interpreter of triton 3.6 takes arrays of one number for numbers, numpy 2.4 not",
)
def test_in_the_interpreter():
    """tests/triton_interpreted.py in a process of its own."""
    file = Path(__file__).with_name("triton_interpreted.py")
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=5"]
    command = [sys.executable, "-m", "pytest", *options, str(file)]
    child = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout[-10_000:] + child.stderr[-2_000:]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [16, 32, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_widths(dtype, dim, layout):
    check(device="cuda", heads=3, head_dim=dim, value_dim=dim, grid=(13, 17), dtype=dtype,
          layout=layout)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("locality", ["dwc_qk", "none"])
@pytest.mark.parametrize("grid", [(1,), (7,), (63,), (1000,), (7, 9), (33, 65), (5, 6, 7)])
def test_grids(grid, locality, dtype):
    check(device="cuda", head_dim=64, value_dim=48, grid=grid, locality=locality, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_each_time(dtype):
    case = arguments(device="cuda", head_dim=64, value_dim=64, grid=(60, 70), dtype=dtype)
    first = run(*case)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(*case), strict=True))


@pytest.mark.gpu
def test_a_million_tokens():
    check(device="cuda", batch=1, heads=1, head_dim=64, value_dim=64, grid=(1024, 1024),
          dtype=torch.bfloat16)  # fmt: skip


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """A packed projection of more than 2**31 numbers; its last head is right."""
    tensors, keywords, grad_out = arguments(
        device="cuda", batch=1, heads=1, head_dim=64, value_dim=64, grid=(1024, 1024),
        prefix=0, suffix=0, dtype=torch.bfloat16,
    )  # fmt: skip
    small = run(tensors, keywords, grad_out)
    tokens = tensors[0].shape[2]
    packed = torch.empty(1, tokens, 36, 64, dtype=torch.bfloat16, device="cuda")
    for i in range(3):
        packed[:, :, 33 + i] = tensors[i][:, 0]
        tensors[i] = packed[:, :, 33 + i, None].transpose(1, 2)
    large = run(tensors, keywords, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))


@pytest.mark.gpu
def test_cuda_graph():
    case = arguments(device="cuda", head_dim=64, value_dim=64, grid=(30, 30), dtype=torch.bfloat16)
    wanted = run(*case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(*case)
    for result in results:
        result.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))
