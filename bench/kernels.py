"""Times the Triton kernels of the node on a GPU: ``python -m t5fx.bench.kernels [results.csv]``.

Beside them: softmax attention by each backend of PyTorch's that runs, and the node's reference
compiled by Inductor. Every row is checked against the reference before anything of it is timed. A
time is the median of many replays of a CUDA graph, so that launch overhead is that of a graph, with
L2 flushed before each. The floor of a row is the larger of the bytes that it must move over the
bandwidth of a large copy and its arithmetic over the rate of a large matrix product, both measured
in the same run.
"""

import argparse
import csv
import itertools
import subprocess
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from t5fx.kernels import flops
from t5fx.kernels.reference import reference
from t5fx.kernels.triton_kernels import backward, forward

DIMS = (64, 128)
TOKENS = (256, 1024, 4096, 16384, 65536)
BATCH_HEADS = ((1, 12), (8, 16))  # not filling the chip at few tokens, and filling it
DTYPE = torch.bfloat16
#: Softmax attention on more query-key pairs than this is left out: it would take seconds.
MAX_PAIRS = 2**36
TOLERANCE = 3e-2
NAMES = {"inner": "swiglu", "inner_loss": "dot", "key_norm": "instance"}


def main() -> None:
    """Writes a row of the CSV for each size, pass (forward, or with backward) and contender."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("csv", nargs="?", default="kernels.csv")
    path = parser.parse_args().csv
    if not torch.cuda.is_available():
        raise SystemExit("t5fx.bench.kernels: expected a GPU that torch.cuda sees; got none")
    machine = versions() | ceilings()
    print(*(f"{name}: {value}" for name, value in machine.items()), sep="\n")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = None
        for row in rows(machine["copy_bytes_per_s"], machine["matmul_flop_per_s"]):
            writer = writer or csv.DictWriter(file, [*row, *machine])
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row | machine)
            file.flush()
            print(*row.values(), sep="\t", flush=True)


def versions() -> dict[str, str]:
    """What the figures depend on."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.split("\n")[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
    }


def ceilings() -> dict[str, float]:
    """Bytes per second of a large copy, read and written, and FLOP/s of a large bf16 product."""
    source = torch.randn(2**30, device="cuda", dtype=DTYPE)
    target = torch.empty_like(source)
    copy = median(lambda: target.copy_(source))
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=DTYPE)
    product = median(lambda: a @ b)
    return {
        "copy_bytes_per_s": 2 * source.nbytes / copy,
        "matmul_flop_per_s": 2 * 8192**3 / product,
    }


def median(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    return triton.testing.do_bench(call, warmup=50, rep=200, quantiles=[0.5]) / 1000


def replayed(call: Callable[[], object]) -> float:
    """Seconds that a call takes as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median(graph.replay)


def rows(bandwidth: float, rate: float) -> Iterator[dict[str, object]]:
    """Sizes, seconds and the share of the roofline of every contender."""
    for (batch, heads), dim, tokens in itertools.product(BATCH_HEADS, DIMS, TOKENS):
        torch._dynamo.reset()  # or too many sizes would end in eager mode
        tensors, settings = arguments(batch, heads, tokens, dim)
        check(tensors, settings)
        arithmetic = flops(tokens, dim, num_heads=heads, batch=batch)
        moved = batch * heads * tokens * dim * DTYPE.itemsize
        for name, with_backward, call in contenders(tensors, settings):
            # Forward: q, k, v and the output. Backward: q, k, v, the output's gradient and three
            # more; arithmetic as the equations have it, about twice the forward's and a half.
            bytes_moved = moved * (4 + 7 * with_backward)
            floor = max(bytes_moved / bandwidth, arithmetic * (1 + 2.5 * with_backward) / rate)
            seconds = replayed(call)
            yield {
                "batch": batch,
                "heads": heads,
                "dim": dim,
                "tokens": tokens,
                "pass": "forward+backward" if with_backward else "forward",
                "contender": name,
                "seconds": seconds,
                "bytes_per_s": bytes_moved / seconds,
                "share_of_roofline": floor / seconds,
            }


def arguments(
    batch: int, heads: int, tokens: int, dim: int, device: str = "cuda"
) -> tuple[list[Tensor], dict[str, object]]:
    """[q, k, v of a packed projection, weights, convolutions], and the node's settings."""
    packed = torch.randn(batch, tokens, 3, heads, dim, device=device, dtype=DTYPE)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    weights = [torch.randn(heads, dim, dim, device=device) * dim**-0.5 for _ in range(3)]
    conv = []
    for _ in "qk":
        conv += [torch.randn(heads * dim, 1, 3, 3, device=device) / 9]
        conv += [torch.randn(heads * dim, device=device)]
    width = 2 ** (tokens.bit_length() // 2)
    settings = {"scale": dim**-0.5, "grid": (tokens // width, width), "prefix": 0}
    return [q, k, v, *weights, *conv], settings | {"key_norm_eps": 1.0, "locality": "dwc_qk"}


def node(tensors: list[Tensor]) -> tuple:
    """The tensors as the node takes them."""
    return *tensors[:3], tensors[3:6], tensors[6:]


def kernels(tensors: list[Tensor], settings: dict, grad_out: Tensor) -> list[Tensor]:
    """The output and the gradients of all tensors, by the kernels."""
    out, saved = forward(*node(tensors), **settings)
    dq, dk, dv, weights, conv = backward(grad_out, *node(tensors), saved, **settings)
    return [out, dq, dk, dv, *weights, *conv]


def differentiated(function: Callable, leaves: list[Tensor], grad_out: Tensor) -> tuple:
    """The gradients of leaves, by autograd."""
    return torch.autograd.grad(function(*leaves), leaves, grad_out)


def check(tensors: list[Tensor], settings: dict) -> None:
    """Raises where the kernels differ from the reference in float32, on one batch item."""
    tensors = [t[:1] for t in tensors[:3]] + tensors[3:]
    grad_out = torch.randn_like(tensors[2])
    leaves = [t.detach().float().requires_grad_() for t in tensors]
    out = reference(*node(leaves), **NAMES, **settings)
    wanted = [out, *torch.autograd.grad(out, leaves, grad_out.float())]
    for result, want in zip(kernels(tensors, settings, grad_out), wanted, strict=True):
        error = ((result.float() - want).norm() / want.norm()).item()
        if not error <= TOLERANCE:
            sizes = list(tensors[0].shape)
            raise SystemExit(f"q {sizes}: expected errors up to {TOLERANCE}; got {error:.1e}")


def contenders(
    tensors: list[Tensor], settings: dict
) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """(name, whether the backward is part of it, call)."""
    grad_out = torch.randn_like(tensors[2])
    leaves = [t.detach().requires_grad_() for t in tensors]
    yield "t5fx", False, lambda: forward(*node(tensors), **settings)
    yield "t5fx", True, lambda: kernels(tensors, settings, grad_out)

    @torch.compile
    def compiled(*leaves: Tensor) -> Tensor:
        return reference(*node(list(leaves)), **NAMES, **settings)

    yield "reference, Inductor", False, lambda: compiled(*tensors)
    yield "reference, Inductor", True, partial(differentiated, compiled, leaves, grad_out)

    batch, heads, tokens, _ = tensors[0].shape
    if batch * heads * tokens**2 > MAX_PAIRS:
        return
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

        def softmax(*qkv: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*qkv)

        try:
            softmax(*tensors[:3])
        except RuntimeError as error:  # this build or GPU has it not
            print(backend.name, str(error).partition("\n")[0])
            continue
        yield backend.name, False, partial(softmax, *tensors[:3])
        yield backend.name, True, partial(differentiated, softmax, leaves[:3], grad_out)


if __name__ == "__main__":
    main()
