"""The suite "kernels": the Triton kernels of the node on a GPU; on a CPU see `kernels_cpu`.

Beside them: softmax attention by each backend of PyTorch's that runs, the node's reference compiled
by Inductor, and, where they can be imported, flash-linear-attention's causal linear attention and
LaCT's bidirectional SwiGLU layer, the nearest published relative of the node. Every case is checked
before anything of it is timed. A time is that of a replay of a CUDA graph, so that launch overhead
is that of a graph, with L2 flushed before each. The floor of a case is the larger of the bytes that
it must move over the bandwidth of a large copy and its arithmetic over the rate of a large matrix
product, both measured in the same process.
"""

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from t5fx.errors import T5Error
from t5fx.kernels import flops
from t5fx.kernels.reference import reference

from ..harness.results import Experiment, Row
from ..harness.timing import Spread
from . import kernels_cpu

# What matters most first, should time run out.
TOKENS = (4096, 16384, 1024, 8192, 65536, 256)
DIMS = (128, 64)
BATCH_HEADS = ((8, 16), (1, 12))  # filling the chip, and not filling it at few tokens
DTYPE = torch.bfloat16
#: Softmax attention on more query-key pairs than this is left out: it would take seconds.
MAX_PAIRS = 2**36
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
TOLERANCE = 3e-2
NAMES = {"inner": "swiglu", "inner_loss": "dot", "key_norm": "instance"}
#: Tokens of all heads together that a check's intermediate results have memory for.
CHECKED = 2**20
#: Milliseconds that one contender is timed for.
TIMED = 200


def experiments(small: bool = False) -> list[Experiment]:
    if not torch.cuda.is_available():
        return kernels_cpu.experiments(small)
    sizes = itertools.product(TOKENS, DIMS, BATCH_HEADS)
    if small:
        sizes = itertools.product(TOKENS[-1:], DIMS[-1:], BATCH_HEADS[-1:])
    return [
        Experiment(
            "kernels",
            case_name((batch, heads, tokens, dim), work),
            partial(measure, (batch, heads, tokens, dim), work != "forward"),
            *(tokens, batch, "bfloat16"),
            "inference" if work == "forward" else "training",
        )
        for tokens, dim, (batch, heads) in sizes
        for work in ("forward", "forward and backward")
    ]


def case_name(shape: tuple[int, int, int, int], work: str) -> str:
    """Of one (batch, heads, tokens, dim)."""
    batch, heads, tokens, dim = shape
    return f"{batch} x {heads} heads x {tokens} tokens x {dim}, {work}"


def measure(
    shape: tuple[int, int, int, int], with_backward: bool, experiment: Experiment
) -> Iterator[Row]:
    """Rows of the machine and of every contender at one (batch, heads, tokens, dim)."""
    batch, heads, tokens, dim = shape
    bandwidth, rate = ceilings()
    yield experiment.row("machine", "copy bandwidth", bandwidth, unit="bytes/s", better="higher")
    yield experiment.row("machine", "matrix product", rate, unit="FLOP/s", better="higher")

    torch._dynamo.reset()  # or too many sizes would end in eager mode
    tensors, settings = arguments(batch, heads, tokens, dim)
    check(tensors, settings)
    times = {}
    for name, call in contenders(tensors, settings, with_backward):
        if isinstance(call, str):
            yield experiment.row(name, "latency", status="absent", detail=call)
            continue
        try:
            times[name] = replayed(call)
        except RuntimeError as error:  # too little memory, or a backward that is not there
            if name == "t5fx":
                raise
            yield experiment.raised(name, error)
            torch.cuda.empty_cache()

    for name, time in times.items():
        yield latency(experiment, name, time)
    yield from shares(experiment, shape, with_backward, times)


def latency(experiment: Experiment, name: str, time: Spread, timed: str | None = None) -> Row:
    """Of a contender; timed: how, where it is not by replays."""
    how = timed or f"replays of a CUDA graph for {TIMED} ms"
    return experiment.row(name, "latency", time, unit="s", better="lower", detail=how)


def shares(
    experiment: Experiment,
    shape: tuple[int, int, int, int],
    with_backward: bool,
    times: dict[str, Spread],
) -> Iterator[Row]:
    """Rows of all contenders: their share of the roofline, and their speed-up over softmax."""
    batch, heads, tokens, dim = shape
    bandwidth, rate = ceilings()
    # Forward: q, k, v and the output. Backward: q, k, v, the output's gradient and three more;
    # 9 products forward and 23 backward, of which 5 compute again what would be too large to keep.
    moved = batch * heads * tokens * dim * DTYPE.itemsize * (4 + 7 * with_backward)
    arithmetic = flops(tokens, dim, num_heads=heads, batch=batch) * (1 + 23 / 9 * with_backward)
    floor = max(moved / bandwidth, arithmetic / rate)
    softmax = [times[backend.name].median for backend in BACKENDS if backend.name in times]
    for name, time in times.items():
        share = Spread(*(floor / seconds for seconds in reversed(time)))
        yield experiment.row(name, "share of roofline", share, unit="share", better="higher")
        if softmax:
            ratio = Spread(*(min(softmax) / seconds for seconds in reversed(time)))
            better = "higher" if name == "t5fx" else ""
            yield experiment.row(name, "speed-up", ratio, unit="x", better=better)


@functools.cache
def ceilings() -> tuple[float, float]:
    """Bytes per second of a large copy, read and written, and FLOP/s of a large bf16 product."""
    source = torch.randn(2**30, device="cuda", dtype=DTYPE)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source)).median
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=DTYPE)
    product = timed(lambda: a @ b).median
    return 2 * source.nbytes / copy, 2 * 8192**3 / product


def timed(call: Callable[[], object], milliseconds: int = TIMED) -> Spread:
    """Seconds that a call takes, timed for so long."""
    import triton  # slow to import, and not there on every platform

    quartiles = [0.25, 0.5, 0.75]
    times = triton.testing.do_bench(
        call, warmup=milliseconds // 4, rep=milliseconds, quantiles=quartiles
    )
    return Spread(*(one / 1000 for one in times))


def replayed(call: Callable[[], object], milliseconds: int = TIMED) -> Spread:
    """Seconds that a call takes as a CUDA graph, replayed for so long."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return timed(graph.replay, milliseconds)


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


def kernels(tensors: list[Tensor], settings: dict, grad_out: Tensor | None) -> list[Tensor]:
    """The output and, given its gradient, the gradients of all tensors, by the kernels."""
    from t5fx.kernels.triton_kernels import backward, forward

    out, saved = forward(*node(tensors), **settings, training=grad_out is not None)
    if grad_out is None:
        return [out]
    dq, dk, dv, weights, conv = backward(grad_out, *node(tensors), saved, **settings)
    return [out, dq, dk, dv, *weights, *conv]


def differentiated(function: Callable, leaves: list[Tensor], grad_out: Tensor) -> tuple:
    """The gradients of leaves, by autograd."""
    return torch.autograd.grad(function(*leaves), leaves, grad_out)


def check(tensors: list[Tensor], settings: dict) -> None:
    """Raises where the kernels differ from the reference in float32, on one batch item, of very
    many tokens on some heads.
    """
    _, heads, tokens, dim = tensors[0].shape
    few = max(1, min(heads, CHECKED // tokens))
    inputs = [t[:1, :few] for t in tensors[:3]]
    conv = [t[: few * dim] for t in tensors[6:]]
    tensors = inputs + [t[:few] for t in tensors[3:6]] + conv
    grad_out = torch.randn_like(tensors[2])
    leaves = [t.detach().float().requires_grad_() for t in tensors]
    out = reference(*node(leaves), **NAMES, **settings)
    wanted = [out, *torch.autograd.grad(out, leaves, grad_out.float())]
    for result, want in zip(kernels(tensors, settings, grad_out), wanted, strict=True):
        error = ((result.float() - want).norm() / want.norm()).item()
        if not error <= TOLERANCE:
            sizes = list(tensors[0].shape)
            raise T5Error(f"q {sizes}: expected errors up to {TOLERANCE}; got {error:.1e}")


def contenders(
    tensors: list[Tensor], settings: dict, with_backward: bool
) -> Iterator[tuple[str, Callable[[], object] | str]]:
    """(name, call, or why there is none)."""
    grad_out = torch.randn_like(tensors[2]) if with_backward else None

    def work(function: Callable, own: list[Tensor]) -> Callable[[], object]:
        if not with_backward:
            return partial(function, *own)
        leaves = [t.detach().requires_grad_() for t in own]
        return partial(differentiated, function, leaves, grad_out)

    yield "t5fx", partial(kernels, tensors, settings, grad_out)

    @torch.compile
    def compiled(*leaves: Tensor) -> Tensor:
        return reference(*node(list(leaves)), **NAMES, **settings)

    yield "reference, Inductor", work(compiled, tensors)

    batch, heads, tokens, _ = tensors[0].shape
    for backend in BACKENDS:
        if batch * heads * tokens**2 > MAX_PAIRS:
            yield backend.name, "too many pairs of tokens: it would take seconds"
            continue

        def softmax(*qkv: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*qkv)

        try:
            softmax(*tensors[:3])
        except RuntimeError as error:  # this build or GPU has it not
            yield backend.name, str(error).partition("\n")[0]
        else:
            yield backend.name, work(softmax, tensors[:3])

    for name, (module, function, call, exact) in OTHERS.items():
        try:
            library = getattr(importlib.import_module(module), function)
        except ImportError as error:
            yield name, f"{error}: PYTHONPATH needs {module}"
            continue
        own = partial(call, library)
        leaves = tensors[:3] if call is fla else tensors[:6]
        check_other(name, own, exact, leaves)
        yield name, work(own, leaves)


def fla(library: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash-linear-attention's causal sum of (q_i . k_j) v_j, ``[B, H, N, D]``."""
    tokens_first = (t.transpose(1, 2) for t in (q, k, v))
    out, _ = library(*tokens_first, scale=1.0, normalize=False)
    return out.transpose(1, 2)


def fla_exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


def lact(library: Callable, q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
    """One step of LaCT's inner SwiGLU at rate 1 / N, without Muon, on all tokens."""
    batch, _, tokens, _ = q.shape
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    w1, w2, w3 = (w.mT.repeat(batch, 1, 1) for w in weights)
    rate = torch.full((*q.shape[:2], 1), 1 / tokens, device=q.device)
    with torch.autocast(q.device.type, q.dtype, enabled=q.dtype != torch.float32):
        out = library(w1, w3, w2, q, k, v, rate, rate, rate, use_muon=False)
    return out.unflatten(0, (batch, -1))


def lact_exact(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
    """Its equations: W + G with the rows' norms of W, G of sum_t v_t . f_W(k_t) / N."""
    w1, w2, w3 = weights
    a, b, dz = k @ w1, k @ w2, v @ w3.mT
    sigma = a.sigmoid()
    grads = (
        k.mT @ (dz * b * sigma * (1 + a * (1 - sigma))),
        k.mT @ (dz * a * sigma),
        (a * sigma * b).mT @ v,
    )
    new = []
    for w, grad in zip(weights, grads, strict=True):
        stepped = w + grad / k.shape[2]
        norms = w.norm(dim=-2, keepdim=True)
        new.append(stepped / (stepped.norm(dim=-2, keepdim=True) + 1e-5) * norms)
    return (torch.nn.functional.silu(q @ new[0]) * (q @ new[1])) @ new[2]


#: By name: module and function to import, how it is called, and what it should give.
OTHERS = {
    "chunk_linear_attn": ("fla.ops.linear_attn", "chunk_linear_attn", fla, fla_exact),
    "LaCT": ("bidirectional_lact_layer", "bidirectional_lact_swiglu", lact, lact_exact),
}


def check_other(name: str, call: Callable, exact: Callable, tensors: list[Tensor]) -> None:
    """Raises where a rival differs from its own equations in float32, on few tokens."""
    tensors = [t[:1, :, :256] for t in tensors[:3]] + tensors[3:]
    want = exact(*(t.float() for t in tensors))
    error = ((call(*tensors).float() - want).norm() / want.norm()).item()
    if not error <= TOLERANCE:
        raise T5Error(f"{name}: expected errors up to {TOLERANCE}; got {error:.1e}")
