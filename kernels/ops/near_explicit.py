"""Near attention with its backward written out, in blocks of batch items and heads.

The equations are those of `near`; in the comments s is a logit, p a weight, g the gradient of the
attention's output.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import near
from .explicit import token_major_empty
from .precision import widest

#: Elements that the keys of all windows of a block may have: 32 MiB in float32.
BLOCK = 2**23


def forward(
    q: Tensor, k: Tensor, v: Tensor, base: Tensor, mixing: Sequence[Tensor], **settings: Any
) -> Tensor:
    """`near.reference`, the output ``[B, N, H, Dv]`` in memory."""
    out = token_major_empty(q, v.shape[3])
    for items, heads in _blocks(q, settings["grid"], settings["neighborhood"]):
        block = (x[items, heads] for x in (q, k, v, base))
        gates = [gate[heads] for gate in mixing]
        out[items, heads] = near.reference(*block, gates, **settings)
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Sequence[Tensor],
    *,
    scale: float,
    grid: Sequence[int],
    prefix: int,
    neighborhood: int,
    coarse: int,
) -> list[Tensor]:
    """Gradients of q, k, v, ``base`` (token-major, in q's, k's, v's and q's dtype) and mixing."""
    wide = widest(q, k, v, *mixing)
    grads = [token_major_empty(*about) for about in ((q, q.shape[3]), (k, k.shape[3]))]
    grads += [token_major_empty(v, v.shape[3]), token_major_empty(q, v.shape[3])]
    grad_mixing = [torch.zeros_like(gate, dtype=wide) for gate in mixing]
    rest = q.shape[2] - math.prod(grid)
    parts = near.Parts.of(q.new_zeros((), dtype=wide), grid, rest, neighborhood, coarse)
    for items, heads in _blocks(q, grid, neighborhood):
        gate = mixing[0][heads].to(wide)[:, None, None] if mixing else 0.5
        block = [x[items, heads].to(wide) for x in (q, k, v, grad)]
        block[0] = block[0] * scale
        dq, dk, dv, along = _backward(*block, gate, parts, grid, prefix)
        for whole, part in zip(grads, (dq * scale, dk, dv), strict=False):
            whole[items, heads] = part.to(whole.dtype)
        base = block[3] if mixing else 0.5 * block[3]
        whole = grads[3][items, heads]
        whole.zero_()
        near.cut(whole, grid, prefix)[1].copy_(near.cut(base, grid, prefix)[1])
        for total in grad_mixing:
            total[heads] += along.sum((0, 2))
    return [*grads, *grad_mixing]


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    gate: Any,
    parts: near.Parts,
    grid: Sequence[int],
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the scaled queries, of keys and values, and g . a of each grid token."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    before, x, after = near.cut(q, grid, prefix)
    g_before, g, g_after = near.cut(grad, grid, prefix)
    into = near.cut(dq, grid, prefix)
    for exact, outer, to in ((before, g_before, into[0]), (after, g_after, into[2])):
        p = (exact @ k.mT).softmax(-1)
        ds = _softmax_backward(p, outer @ v.mT)
        dv += p.mT @ outer
        dk += ds.mT @ exact
        to.copy_(ds @ k)

    keys, values = (parts.shared(t, grid, prefix) for t in (k, v))
    count = keys.shape[-2]
    logits = x @ keys.mT + parts.bias
    dp = g @ values.mT
    _, key_grid, _ = near.cut(k, grid, prefix)
    _, value_grid, _ = near.cut(v, grid, prefix)
    if parts.window is not None:
        tokens = parts.window.tokens
        around, among = key_grid[:, :, tokens], value_grid[:, :, tokens]
        own = (around @ x[..., None]).squeeze(-1) + parts.window.bias
        logits = torch.cat([logits, own], dim=-1)
        dp = torch.cat([dp, (among @ g[..., None]).squeeze(-1)], dim=-1)
    p = logits.softmax(-1)
    along = (p * dp).sum(-1, keepdim=True)
    ds = p * (dp - along) * gate
    p = p * gate

    dkeys, dvalues = ds[..., :count].mT @ x, p[..., :count].mT @ g
    into[1].copy_(ds[..., :count] @ keys)
    _, dk_grid, _ = near.cut(dk, grid, prefix)
    _, dv_grid, _ = near.cut(dv, grid, prefix)
    if parts.window is not None:
        into[1].add_((ds[..., None, count:] @ around).squeeze(-2))
        flat = tokens.flatten()
        dk_grid.index_add_(2, flat, (ds[..., count:, None] * x[..., None, :]).flatten(2, 3))
        dv_grid.index_add_(2, flat, (p[..., count:, None] * g[..., None, :]).flatten(2, 3))
    rest = q.shape[2] - x.shape[2]
    for total, part in ((dk, dkeys), (dv, dvalues)):
        head, on_grid, tail = near.cut(total, grid, prefix)
        head.add_(part[:, :, :prefix])
        tail.add_(part[:, :, prefix:rest])
        if parts.cells is not None:
            on_grid.add_(near.spread(part[:, :, rest:], parts.cells.means, grid))
    return dq, dk, dv, along.squeeze(-1)


def _softmax_backward(p: Tensor, dp: Tensor) -> Tensor:
    return p * (dp - (p * dp).sum(-1, keepdim=True))


def _blocks(q: Tensor, grid: Sequence[int], side: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of the heads."""
    batch, heads, tokens, width = q.shape
    fitting = max(1, BLOCK // (tokens * width * max(side, 1) ** len(grid)))
    for item in range(batch):
        for head in range(0, heads, fitting):
            yield slice(item, item + 1), slice(head, min(heads, head + fitting))
