"""Attentions that someone could pick instead of a TTT node, and softmax, which all replace.

Each says what is timed (`attend`), what that must give (`exact`, plainly written, in float64), and
what it needs. They compute different things: that one is fast says nothing about what a model with
it is worth, and a model that was trained with softmax must be trained again for all but the 8-bit
ones. A new one is one class, and its name in `PEERS`.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from t5fx.analysis.clock import clock
from t5fx.kernels import ttt
from t5fx.kernels.reference import reference

#: Of windows on the grid, in tokens.
RADIUS = 8


@dataclass(frozen=True)
class Shape:
    """q, k and v are [batch, heads, side * side, dim]; trained: a backward pass is part of it."""

    batch: int
    heads: int
    side: int
    dim: int
    dtype: torch.dtype
    device: str
    trained: bool

    @property
    def tokens(self) -> int:
        return self.side**2

    def __str__(self) -> str:
        work = "forward and backward" if self.trained else "forward"
        return f"{self.batch} x {self.heads} heads x {self.tokens} tokens x {self.dim}, {work}"

    def random(self) -> Tensor:
        """A tensor like q, k, v and the output, [B, N, H, D] in memory, as projections leave it."""
        sizes = self.batch, self.tokens, self.heads, self.dim
        return torch.randn(sizes, dtype=self.dtype, device=self.device).transpose(1, 2)


class Peer:
    """An attention, made for a shape.

    source: the module and the name in it that it needs beyond torch, imported as `library`.
    install: how to get them. gpu, trains: whether it needs a GPU and has a backward pass.
    compiled: whether Inductor compiles `attend`. rough: whether it computes with 8 bits.
    parameters: that it has beside q, k and v.
    """

    name: ClassVar[str]
    source: ClassVar[tuple[str, str] | None] = None
    install: ClassVar[str] = ""
    gpu: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    compiled: ClassVar[bool] = False
    rough: ClassVar[bool] = False

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.parameters: list[Tensor] = []
        self.detail = ""
        self.library = self.found()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What is timed; parameters, if there are any, follow v."""
        raise NotImplementedError

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What it must give: its definition, on float64 tensors."""
        raise NotImplementedError

    @classmethod
    def found(cls) -> Any:
        """What `source` names, or None."""
        if cls.source is None:
            return None
        try:
            return getattr(importlib.import_module(cls.source[0]), cls.source[1], None)
        except (ImportError, OSError):  # not installed, or built for another torch
            return None

    @classmethod
    def absent(cls, shape: Shape) -> str:
        """Why it cannot run here and what would help, or ""."""
        if shape.trained and not cls.trains:
            return "has no backward pass"
        if cls.gpu and shape.device != "cuda":
            return "; ".join(filter(None, ("needs a CUDA GPU", cls.install)))
        if cls.source and cls.found() is None:
            return f"needs {cls.source[0]}: {cls.install}"
        return ""


class Call:
    """One call of an attention on random inputs of its own.

    Gives the output and, where the shape is trained, the gradients of all inputs and parameters.
    """

    def __init__(self, peer: Peer) -> None:
        inputs = [*(peer.shape.random() for _ in "qkv"), *peer.parameters]
        self.leaves = [t.detach().requires_grad_(peer.shape.trained) for t in inputs]
        self.grad_out = peer.shape.random() if peer.shape.trained else None
        self.function: Callable[..., Tensor] = peer.attend
        if peer.compiled:
            self.function = torch.compile(peer.attend, dynamic=False)

    def __call__(self) -> list[Tensor]:
        return _outcome(self.function, self.leaves, self.grad_out)

    def in_float64(self, function: Callable[..., Tensor]) -> list[Tensor]:
        """What another function gives of the same inputs, in float64."""
        leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in self.leaves]
        return _outcome(function, leaves, None if self.grad_out is None else self.grad_out.double())


def _outcome(
    function: Callable[..., Tensor], leaves: list[Tensor], grad_out: Tensor | None
) -> list[Tensor]:
    if grad_out is None:
        with torch.no_grad():
            return [function(*leaves)]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad_out)]


def softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """mask: True where a query sees a key."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


class Softmax(Peer):
    """On a GPU by the backend that is fastest at the shape.

    Called directly: Inductor compiles it to the same call.
    """

    name = "softmax, SDPA"
    exact = staticmethod(softmax)

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.backend = SDPBackend.FLASH_ATTENTION  # a CPU has no other but the unfused one
        if shape.device == "cuda":
            others = SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
            self.backend = min((self.backend, *others), key=self._seconds)
        self.detail = self.backend.name

    def _seconds(self, backend: SDPBackend) -> float:
        """Of a backend; infinite where this build or GPU has it not."""
        self.backend = backend
        work = Call(self)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they say why it has it not
                work()
                return clock(work, torch.device(self.shape.device), repeats=5)
        except RuntimeError:
            return math.inf

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(q, k, v)


class Node(Peer):
    """The TTT node with the settings of `linearize`; its parameters are trained with it."""

    name = "TTT"
    compiled = True
    impl = "auto"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        heads, dim = shape.heads, shape.dim
        sizes = [(heads, dim, dim)] * 3 + [(heads * dim, 1, 3, 3), (heads * dim,)] * 2
        scales = [dim**-0.5] * 3 + [1 / 9, 1.0] * 2
        self.parameters = [
            scale * torch.randn(size, device=shape.device)
            for size, scale in zip(sizes, scales, strict=True)
        ]
        self.settings = {"scale": dim**-0.5, "grid": (shape.side, shape.side), "prefix": 0}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor) -> Tensor:
        return ttt(q, k, v, parameters[:3], parameters[3:], impl=self.impl, **self.settings)

    def exact(self, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor) -> Tensor:
        names = {"inner": "swiglu", "inner_loss": "dot", "key_norm": "instance"}
        names |= {"key_norm_eps": 1.0, "locality": "dwc_qk"}
        return reference(q, k, v, parameters[:3], parameters[3:], **names, **self.settings)


class TritonNode(Node):
    name = "TTT, Triton"
    gpu = True
    impl = "triton"


def positive(x: Tensor) -> Tensor:
    """The feature map of "Transformers are RNNs" (arXiv 2006.16236)."""
    return F.elu(x) + 1


class Linear(Peer):
    """Linear attention over all tokens, as that paper has it: two products."""

    name = "linear attention"
    compiled = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = positive(q), positive(k)
        return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT)

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = positive(q) @ positive(k).mT
        return weights / weights.sum(-1, keepdim=True) @ v


class CausalLinear(Peer):
    """Linear attention by flash-linear-attention, whose kernels are causal."""

    name = "linear attention, causal, fla"
    source = "fla.ops.linear_attn", "chunk_linear_attn"
    install = "pip install flash-linear-attention"
    gpu = True

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.positive = torch.compile(positive, dynamic=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.positive(q), self.positive(k)
        out, _ = self.library(*(t.transpose(1, 2) for t in (q, k, v)), normalize=True)
        return out.transpose(1, 2)

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (positive(q) @ positive(k).mT).tril()
        return weights / weights.sum(-1, keepdim=True) @ v


class Window(Peer):
    """Softmax in a circle around each query, by flex_attention, as in CLEAR (arXiv 2412.16112)."""

    name = f"window of radius {RADIUS}, flex_attention"
    compiled = True

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        side, tokens = shape.side, shape.tokens

        def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            down, right = query // side - key // side, query % side - key % side
            return down * down + right * right <= RADIUS**2

        self.mask = create_block_mask(near, None, None, tokens, tokens, device=shape.device)

    @classmethod
    def absent(cls, shape: Shape) -> str:
        if shape.trained and shape.device == "cpu":
            return "needs a CUDA GPU: flex_attention has no backward pass on a CPU"
        return super().absent(shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=self.mask)

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        axis = torch.arange(self.shape.side, device=q.device)
        cells = torch.cartesian_prod(axis, axis)
        apart = (cells[:, None] - cells[None]).square().sum(-1)
        return softmax(q, k, v, apart <= RADIUS**2)


class Neighbourhood(Peer):
    """Softmax in a square of the same width around each query, moved inwards at the borders."""

    name = f"neighbourhood of {2 * RADIUS + 1}, natten"
    source = "natten.functional", "na2d"
    install = "natten, in the wheel that its documentation names for this torch and CUDA"
    gpu = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grids = (t.transpose(1, 2).unflatten(1, (self.shape.side, -1)) for t in (q, k, v))
        return self.library(*grids, kernel_size=2 * RADIUS + 1).flatten(1, 2).transpose(1, 2)

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        side, width = self.shape.side, 2 * RADIUS + 1
        axis = torch.arange(side, device=q.device)
        first = (axis - RADIUS).clamp(0, side - width)[:, None]
        near = (axis >= first) & (axis < first + width)
        return softmax(q, k, v, torch.kron(near.byte(), near.byte()).bool())


class Merging(Peer):
    """Softmax on half as many tokens: ToMe for SD (arXiv 2303.17604) merges by the keys.

    In a model one merging of the input serves all three projections; here each of q, k and v is
    merged.
    """

    name = "half the tokens merged, tomesd"
    source = "tomesd.merge", "bipartite_soft_matching_random2d"
    install = "pip install tomesd"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.generator = torch.Generator(shape.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._merged(F.scaled_dot_product_attention, q, k, v, k)

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # In float64 other tokens could be the nearest ones: the merging is that of `attend`.
        return self._merged(softmax, q, k, v, k.to(self.shape.dtype))

    def _merged(
        self, attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, metric: Tensor
    ) -> Tensor:
        side, tokens, heads = self.shape.side, self.shape.tokens, self.shape.heads
        self.generator.manual_seed(0)
        grid = {"w": side, "h": side, "sx": 2, "sy": 2, "r": tokens // 2}
        merge, unmerge = self.library(_rows(metric), **grid, generator=self.generator)
        few = (merge(_rows(t)).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return unmerge(_rows(attention(*few))).unflatten(-1, (heads, -1)).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """[B, H, N, D] to [B, N, H * D]."""
    return x.transpose(1, 2).flatten(2)


class Fp8(Peer):
    """Softmax on e4m3 numbers with a factor for each item and head, by flash-attention 3.

    Rounding q, k and v is part of the time.
    """

    name = "softmax, fp8, flash-attention 3"
    source = "flash_attn_interface", "flash_attn_func"
    install = (
        "flash-attention 3, for Hopper GPUs, as its documentation says (the package index has an "
        "empty one of this name)"
    )
    gpu, trains, rough = True, False, True
    exact = staticmethod(softmax)

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.rounded = torch.compile(_rounded, dynamic=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pairs = [self.rounded(t.transpose(1, 2)) for t in (q, k, v)]
        factors = {f"{x}_descale": factor for x, (_, factor) in zip("qkv", pairs, strict=True)}
        out = self.library(*(numbers for numbers, _ in pairs), **factors)
        # Earlier versions give the logarithms of the sums, too.
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, H, D] as e4m3 numbers, and the factors [B, H] that they were divided by."""
    factor = x.abs().amax((1, 3)).float() / torch.finfo(torch.float8_e4m3fn).max
    return (x / factor[:, None, :, None]).to(torch.float8_e4m3fn), factor


class Sage(Peer):
    """Softmax on 8-bit integer queries and keys."""

    name = "softmax, 8 bit, SageAttention"
    source = "sageattention", "sageattn"
    install = "pip install sageattention"
    gpu, trains, rough = True, False, True
    exact = staticmethod(softmax)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # It centres k in place: softmax does not see that, and no other contender has this k.
        return self.library(q, k, v, tensor_layout="HND", is_causal=False)


#: The first is what the others' speed-ups are over.
PEERS: list[type[Peer]] = [
    *(Softmax, Node, TritonNode, Linear, CausalLinear),
    *(Window, Neighbourhood, Merging, Fp8, Sage),
]
