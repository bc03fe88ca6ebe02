"""The default node, forward and backward written out, for the cache of a CPU.

The equations are those of ``t5fx.kernels.ttt`` for inner "swiglu", inner_loss "dot", key_norm
"instance" and locality "dwc_qk" or "none". The work is cut into blocks of batch items and heads,
and long ones into chunks of tokens, so that what one block computes stays in the cache; nothing of
size N outlives its block but the results.

In the comments below G counts the pairs (batch item, head) of a block: ``x`` is ``[G, N, D]``, a
weight ``[G, in, out]``, as in ``inner/``. Token-major is ``[b, N, h, D]``: an image with its
channels last, which is what the convolutions want.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

#: Elements of one ``[G, N, D]`` tensor of a block, for each thread: 1 MiB in float32. Smaller ones
#: cost more in calls than they save in the cache; larger ones do not fit beside each other.
BLOCK = 2**18

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    *,
    scale: float,
    grid: Sequence[int],
    prefix: int,
    eps: float,
) -> tuple[Tensor, list[Tensor]]:
    """The output ``[B, H, N, Dv]`` in q's dtype and W', ``[B, H, in, out]`` each.

    ``weights`` and ``conv`` are in the dtype of the computation; so is W'. In memory the output is
    ``[B, N, H, Dv]``, so that a model's ``transpose(1, 2).flatten(2)`` copies nothing.
    """
    rate = scale / q.shape[2]
    scratch = Scratch(weights[0].dtype, q.device)
    out = token_major_empty(q, v.shape[3])
    updated = [w.new_empty(len(q), *w.shape) for w in weights]
    for items, heads in _blocks(q):
        kernels = _of_heads(conv, heads, q.shape[1])
        old = [_flat(w[heads].expand(items.stop - items.start, -1, -1, -1)) for w in weights]
        new = [
            u[items, heads].copy_(w[heads]).flatten(0, 1)
            for u, w in zip(updated, weights, strict=True)
        ]

        key, _ = _normed(k[items, heads], eps, scratch)
        _add_conv_(key, kernels[2:], grid, prefix)
        x, g = _flat(key.transpose(1, 2)), _flat(v[items, heads].to(key.dtype))
        for t in _chunks(x):
            _ascend_(new, rate, x[:, t], g[:, t], old, scratch)

        x = _flat(_queries(q[items, heads], kernels[:2], grid, prefix, scratch))
        result = out[items, heads]
        for t in _chunks(x):
            part = x[:, t]
            a, b = scratch.several("a b", part.shape)
            torch.bmm(part, new[0], out=a)
            torch.bmm(part, new[1], out=b)
            y = scratch("y", (*part.shape[:2], g.shape[2]))
            torch.bmm(F.silu(a, inplace=True).mul_(b), new[2], out=y)
            result[:, :, t] = y.unflatten(0, result.shape[:2])
    return out, updated


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    updated: Sequence[Tensor],
    *,
    scale: float,
    grid: Sequence[int],
    prefix: int,
    eps: float,
) -> list[Tensor]:
    """Gradients of q, k, v (token-major, in their dtypes), of the weights and of conv.

    ``grad``: of the output; ``updated``: W' from ``forward``. All else is computed again.
    """
    rate, wide = scale / q.shape[2], weights[0].dtype
    scratch = Scratch(wide, q.device)
    grad_q, grad_k, grad_v = (token_major_empty(x, x.shape[3]) for x in (q, k, v))
    grad_weights = [w.new_zeros(w.shape) for w in weights]
    grad_conv = [c.new_zeros(c.shape) for c in conv]
    for items, heads in _blocks(q):
        kernels = _of_heads(conv, heads, q.shape[1])
        grad_kernels = _of_heads(grad_conv, heads, q.shape[1])
        old = [_flat(w[heads].expand(items.stop - items.start, -1, -1, -1)) for w in weights]
        new = [u[items, heads].flatten(0, 1) for u in updated]
        shape = q[items, heads].shape[:2]

        # Through o = f_W'(q), to the queries and to W'. W' = W + rate G, G = sum_t d(v.f_W)/dW.
        query = _queries(q[items, heads], kernels[:2], grid, prefix, scratch)
        x, g = _flat(query), _flat(grad[items, heads].to(wide))
        grad_x = scratch("grad", query.transpose(1, 2).shape)
        grad_new = [torch.zeros_like(u) for u in new]
        for t in _chunks(x):
            da, db = _ascend_(grad_new, 1.0, x[:, t], g[:, t], new, scratch)
            dx = torch.bmm(da, new[0].mT, out=scratch("dx", da.shape)).baddbmm_(db, new[1].mT)
            grad_x[:, t] = dx.unflatten(0, shape).transpose(1, 2)
        _conv_backward_(
            grad_x, grad_kernels[:2], q[items, heads].transpose(1, 2), kernels[:2], grid, prefix
        )
        grad_q[items, heads] = grad_x.transpose(1, 2)

        # Through G, to the keys, the values and W.
        normed, rstd = _normed(k[items, heads], eps, scratch)
        key = scratch("key", normed.shape).copy_(normed) if kernels else normed
        _add_conv_(key, kernels[2:], grid, prefix)
        x, g = _flat(key.transpose(1, 2)), _flat(v[items, heads].to(wide))
        step = [rate * d for d in grad_new]
        grad_g = grad_v[items, heads]
        for t in _chunks(x):
            dx, dg = _ascend_backward_(grad_new, step, x[:, t], g[:, t], old, scratch)
            grad_x[:, t] = dx.unflatten(0, shape).transpose(1, 2)
            grad_g[:, :, t] = dg.unflatten(0, shape)
        _conv_backward_(grad_x, grad_kernels[2:], normed, kernels[2:], grid, prefix)
        grad_k[items, heads] = _norm_backward_(grad_x, normed, rstd, scratch).transpose(1, 2)
        for total, d in zip(grad_weights, grad_new, strict=True):
            total[heads] += d.unflatten(0, shape).sum(0)
    return [grad_q, grad_k, grad_v, *grad_weights, *grad_conv]


def token_major_empty(x: Tensor, width: int) -> Tensor:
    """An empty ``[B, H, N, width]`` with the memory of ``[B, N, H, width]``, in x's dtype."""
    batch, heads, tokens, _ = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)


class Scratch:
    """Memory that the steps of all blocks write to in turn: fresh pages cost more than products."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        """A contiguous tensor of that shape; it takes the place of the last one of its name."""
        size = math.prod(shape)
        if name not in self._held or self._held[name].numel() < size:
            self._held[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._held[name][:size].view(shape)

    def several(self, names: str, shape: Sequence[int]) -> list[Tensor]:
        """One for each of the names, which spaces separate."""
        return [self(name, shape) for name in names.split()]


def _ascend_(
    sums: Sequence[Tensor],
    alpha: float,
    x: Tensor,
    g: Tensor,
    weights: Sequence[Tensor],
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """sums += alpha * d/dW sum_t g_t . f_W(x_t); returns the gradients of x W1 and x W2."""
    a, b, dz, s, z = scratch.several("a b dz s z", x.shape)
    torch.bmm(x, weights[0], out=a)
    torch.bmm(x, weights[1], out=b)
    torch.bmm(g, weights[2].mT, out=dz)
    torch.ops.aten.silu.out(a, out=s)
    sums[2].baddbmm_(torch.mul(s, b, out=z).mT, g, alpha=alpha)
    da = torch.ops.aten.silu_backward.grad_input(b.mul_(dz), a, grad_input=a)
    db = dz.mul_(s)
    sums[0].baddbmm_(x.mT, da, alpha=alpha)
    sums[1].baddbmm_(x.mT, db, alpha=alpha)
    return da, db


def _ascend_backward_(
    sums: Sequence[Tensor],
    step: Sequence[Tensor],
    x: Tensor,
    g: Tensor,
    weights: Sequence[Tensor],
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """Gradients of <step, d/dW sum_t g_t . f_W(x_t)>: those of W added to sums, x's, g's returned.

    With a = x W1, b = x W2, dz = g W3^T that is sum_t (dz b silu'(a)) . p + (dz silu(a)) . r
    + (silu(a) b) . t, where p, r, t are what x and g make of the step.
    """
    a, b, dz, p, r, t = scratch.several("a b dz p r t", x.shape)
    sigma, first, second, rest = scratch.several("sigma first second rest", x.shape)
    grad_x, grad_g = scratch("dx", x.shape), scratch("dg", g.shape)
    for matrices, source, targets in ((weights, x, (a, b, dz)), (step, x, (p, r, t))):
        torch.bmm(source, matrices[0], out=targets[0])
        torch.bmm(source, matrices[1], out=targets[1])
        torch.bmm(g, matrices[2].mT, out=targets[2])
    torch.sigmoid(a, out=sigma)
    s = a.mul_(sigma)
    torch.sub(1, sigma, out=rest)
    torch.addcmul(sigma, s, rest, out=first)  # silu'(a)
    # silu''(a) = (1 - sigma) (sigma + silu' - sigma silu)
    torch.addcmul(sigma, sigma, s, value=-1, out=second).add_(first).mul_(rest)
    dzb = torch.mul(dz, b, out=rest)

    torch.bmm(torch.mul(s, b, out=sigma), step[2], out=grad_g)
    torch.bmm(torch.mul(dzb, first, out=sigma), step[0].mT, out=grad_x)
    grad_x.baddbmm_(torch.mul(dz, s, out=sigma), step[1].mT)

    da = second.mul_(dzb).mul_(p)
    da.addcmul_(torch.mul(r, dz, out=sigma).addcmul_(t, b), first)
    p.mul_(first)
    ddz = b.mul_(p).addcmul_(r, s)
    db = p.mul_(dz).addcmul_(t, s)
    sums[0].baddbmm_(x.mT, da)
    sums[1].baddbmm_(x.mT, db)
    sums[2].baddbmm_(ddz.mT, g)
    grad_x.baddbmm_(da, weights[0].mT).baddbmm_(db, weights[1].mT)
    return grad_x, grad_g.baddbmm_(ddz, weights[2])


def _normed(k: Tensor, eps: float, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """(k - mean) / sqrt(var + eps) over the tokens, token-major, and 1 / sqrt(var + eps)."""
    k = k.transpose(1, 2)
    x = scratch("normed", k.shape)
    torch.sub(k, k.mean(1, keepdim=True, dtype=x.dtype), out=x)
    # torch.var and vector_norm are many times slower over any axis but the last.
    rstd = torch.mul(x, x, out=scratch("a", x.shape)).mean(1, keepdim=True).add_(eps).rsqrt_()
    return x.mul_(rstd), rstd


def _norm_backward_(grad: Tensor, normed: Tensor, rstd: Tensor, scratch: Scratch) -> Tensor:
    """The gradient of k from that of the normed keys, in the latter's place."""
    along = torch.mul(grad, normed, out=scratch("a", grad.shape)).mean(1, keepdim=True)
    return grad.sub_(grad.mean(1, keepdim=True)).addcmul_(normed, along, value=-1).mul_(rstd)


def _queries(
    q: Tensor, kernel: Sequence[Tensor], grid: Sequence[int], prefix: int, scratch: Scratch
) -> Tensor:
    """q after its convolution, ``[b, h, N, D]``."""
    if not kernel:
        return q.to(scratch.dtype)
    x = scratch("query", q.transpose(1, 2).shape).copy_(q.transpose(1, 2))
    _add_conv_(x, kernel, grid, prefix)
    return x.transpose(1, 2)


def _image(x: Tensor, grid: Sequence[int], prefix: int) -> Tensor:
    """The grid tokens of a token-major tensor as ``[b, C, *grid]``; a view of a contiguous one."""
    cells = x.narrow(1, prefix, math.prod(grid))
    return cells.flatten(2).unflatten(1, tuple(grid)).movedim(-1, 1)


def _add_conv_(x: Tensor, kernel: Sequence[Tensor], grid: Sequence[int], prefix: int) -> None:
    """x += conv(x) on the grid tokens of a contiguous token-major x."""
    if kernel:
        image = _image(x, grid, prefix)
        weight, bias = kernel
        image += _CONV[len(grid)](image, weight, bias, padding=1, groups=image.shape[1])


def _conv_backward_(
    grad: Tensor,
    grad_kernel: Sequence[Tensor],
    x: Tensor,
    kernel: Sequence[Tensor],
    grid: Sequence[int],
    prefix: int,
) -> None:
    """The gradient of x from that of x + conv(x), in the latter's place; adds to the kernel's."""
    if not kernel:
        return
    image, grad_image = _image(x, grid, prefix).to(grad.dtype), _image(grad, grid, prefix)
    ones, zeros = [1] * len(grid), [0] * len(grid)
    channels = image.shape[1]
    dx, dw, db = torch.ops.aten.convolution_backward(
        *(grad_image, image, kernel[0], [channels]),
        *(ones, ones, ones, False, zeros, channels, [True, True, True]),
    )
    grad_image += dx
    grad_kernel[0].add_(dw)
    grad_kernel[1].add_(db)


def _flat(x: Tensor) -> Tensor:
    """``[b, h, ...]`` -> ``[G, ...]``: a view of one item or one head, else maybe a copy."""
    return x.flatten(0, 1)


def _of_heads(conv: Sequence[Tensor], some: slice, heads: int) -> list[Tensor]:
    """The channels of these heads."""
    return [c.unflatten(0, (heads, -1))[some].flatten(0, 1) for c in conv]


def _budget(x: Tensor) -> int:
    """Elements that a tensor of a block may have. Only a CPU is worth cutting the work for."""
    return BLOCK * torch.get_num_threads() if x.device.type == "cpu" else x.numel()


def _blocks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of the heads: several items with all heads, or some heads of one."""
    batch, heads, tokens, width = x.shape
    fitting = max(1, _budget(x) // (tokens * width))
    for items in _cut(batch, fitting // heads):
        for some in _cut(heads, fitting):
            yield items, some


def _chunks(x: Tensor) -> Iterator[slice]:
    """Slices of the tokens of ``[G, N, D]``."""
    pairs, tokens, width = x.shape
    return _cut(tokens, _budget(x) // (pairs * width))


def _cut(size: int, most: int) -> Iterator[slice]:
    """Slices of equal length up to the last one, none longer than ``most`` (at least 1)."""
    count = max(1, -(-size // max(1, most)))
    length = max(1, -(-size // count))
    return (slice(i, min(size, i + length)) for i in range(0, size, length))
