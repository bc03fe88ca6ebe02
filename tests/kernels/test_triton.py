"""The Triton kernels: in Triton's interpreter anywhere, compiled where there is a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_cases import arguments, assert_close, check, run, run_reference, split
from vits import Shape

import t5fx
from t5fx.bench.gpu import offline
from t5fx.kernels import ttt

pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
    # Said of the float32 layers of a model, and once before the first graph of CUDA's.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
]

LAYOUTS = ["BHND", "packed"]
HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "file",
    [
        # Its six minutes are for the night; by day `test_trust` runs the kernels' own check.
        pytest.param("triton_interpreted", marks=[pytest.mark.extras, pytest.mark.slow]),
        pytest.param("triton_near", marks=pytest.mark.extras),
        *("triton_races", "triton_tiles"),
    ],
)
def test_in_the_interpreter(file, slow):
    """A file of tests in a process of its own; of two of them what is slow at night, and the second
    takes so long that the oldest torch has it at night, too.
    """
    path = Path(__file__).with_name(f"{file}.py")
    chosen = ["-m", "slow" if slow else "not slow"]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=5", *chosen]
    command = [sys.executable, "-m", "pytest", *options, str(path)]
    kernels = offline.launches("sm_90", torch.bfloat16, 64).values()
    names = " ".join(sorted({kernel.__name__ for kernel, _ in kernels}))
    child = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "T5FX_KERNELS": names},
        capture_output=True,
        text=True,
    )
    nothing = 5  # no test chosen
    assert child.returncode in ((0, nothing) if slow else (0,)), (
        child.stdout[-10_000:] + child.stderr[-2_000:]
    )


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


@pytest.mark.gpu
def test_impl_triton_compiled_for_all_resolutions():
    """By Inductor, forward and backward in one graph each, and compiled once."""

    def call(q, k, v, weights, conv, grid, **keywords):
        return ttt(q, k, v, weights, conv, grid=grid, **keywords, impl="triton").transpose(1, 2)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for height, width in ((14, 15), (20, 21), (33, 17)):
        tensors, keywords, grad_out = arguments(
            device="cuda", head_dim=64, value_dim=64, grid=(height, width), dtype=torch.bfloat16,
            layout="packed",
        )  # fmt: skip
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = compiled(*split(leaves), **keywords)
        grads = torch.autograd.grad(out.transpose(1, 2), leaves, grad_out)
        assert_close([out.detach().transpose(1, 2), *grads],
                     run_reference(tensors, keywords, grad_out), 3e-2)  # fmt: skip
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_linearized_model_compiled_with_the_kernels(mode, monkeypatch):
    """backend="t5", CUDA graphs included, against the same model in float64."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the patches' convolution
    shape = Shape(depth=2, heads=2, head_dim=64, grid=(12, 12))
    model, images = shape.model(), shape.images()
    configs = (t5fx.LinearizeConfig(min_tokens=0, impl=i) for i in ("triton", "reference"))
    lin, exact = (t5fx.linearize(model, (images,), config=c) for c in configs)
    wanted = exact.double()(images.double())
    lin, images = lin.cuda(), images.cuda()
    lin(images)  # captures it on this device, which no compiler can follow
    fast = torch.compile(lin, backend="t5", fullgraph=True, options={"mode": mode})
    for _ in range(4):
        with torch.no_grad():
            got = fast(images).clone()
        torch.testing.assert_close(got.cpu().double(), wanted.detach(), rtol=1e-4, atol=1e-5)
    # The squares' sum would be that of a layer norm's: always the same.
    probe = torch.randn(wanted.shape, dtype=torch.float64)
    (fast(images) * probe.cuda()).sum().backward()
    (wanted * probe).sum().backward()
    for name, parameter in exact.named_parameters():
        grad = lin.get_parameter(name).grad.cpu().double()
        assert (grad - parameter.grad).norm() <= 1e-3 * parameter.grad.norm() + 1e-6, name


@pytest.mark.gpu
@pytest.mark.parametrize("locality", ["dwc_qk", "none"])
def test_opcheck(locality):
    tensors, keywords, grad = arguments(
        device="cuda", heads=2, head_dim=16, value_dim=20, grid=(4, 4), locality=locality
    )
    rest = (0.7, list(keywords["grid"]), keywords["prefix"], 1.0)
    leaves = split([t.requires_grad_() for t in tensors])
    forward = torch.ops.t5fx.ttt_triton_forward
    assert set(torch.library.opcheck(forward.default, (*leaves, *rest)).values()) == {"SUCCESS"}
    plain = split([t.detach() for t in tensors])
    _, *saved = forward(*plain, *rest)
    results = torch.library.opcheck(
        torch.ops.t5fx.ttt_triton_backward.default, (grad, *plain, saved, *rest)
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    """CUDA's own checker over every kernel, in a process of its own."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    options = ["--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":  # torch asks the driver for what this one may not have
        options += ["--report-api-errors", "no"]
    small = Path(__file__).with_name("triton_sanitized.py")
    child = subprocess.run(
        [sanitizer, *options, sys.executable, small.name],
        cwd=small.parent,
        env={name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    output = child.stdout[-5_000:] + child.stderr[-2_000:]
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not reach the GPU of this machine")
    assert child.returncode == 0, output
    assert "ERROR SUMMARY: 0 errors" in output or "0 hazards displayed" in output, output
