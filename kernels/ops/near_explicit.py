"""Near attention with its backward written out, in blocks of batch items and heads.

The equations are those of `near`; g is the gradient of what is returned.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .explicit import token_major_empty
from .near import Near, reference, spread, weigh
from .precision import widest

#: Elements that the keys of all windows of a block may have: 32 MiB in float32.
BLOCK = 2**23


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor,
    mixing: Sequence[Tensor],
    *,
    key_mask: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """`near.reference`, the output ``[B, N, H, Dv]`` in memory."""
    out = token_major_empty(q, v.shape[3])
    for items, heads in _blocks(q, settings["grid"], settings["neighborhood"]):
        queries, keys, values, own = (x[items, heads] for x in (q, k, v, base))
        gates = [gate[heads] for gate in mixing]
        mask = None if key_mask is None else key_mask[items]
        out[items, heads] = reference(queries, keys, values, own, gates, key_mask=mask, **settings)
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
    key_mask: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of q, k, v, ``base`` (token-major, in q's, k's, v's and q's dtype) and mixing."""
    wide = widest(q, k, v, *mixing)
    grads = [token_major_empty(*about) for about in ((q, q.shape[3]), (k, k.shape[3]))]
    grads += [token_major_empty(v, v.shape[3]), token_major_empty(q, v.shape[3])]
    grad_mixing = [torch.zeros_like(gate, dtype=wide) for gate in mixing]
    places = (q.new_zeros((), dtype=wide), grid, prefix, neighborhood, coarse)
    near = Near.of(*places)
    for items, heads in _blocks(q, grid, neighborhood):
        if key_mask is not None:
            near = Near.of(*places, key_mask[items])
        gate = mixing[0][heads].to(wide)[:, None, None] if mixing else 0.5
        queries, keys, values, outer = (x[items, heads].to(wide) for x in (q, k, v, grad))
        keys, values = near.shown(keys), near.shown(values)
        dq, dk, dv, along = _backward(queries * scale, keys, values, outer, gate, near)
        dk, dv = near.shown(dk), near.shown(dv)
        for whole, part in zip(grads, (dq * scale, dk, dv), strict=False):
            whole[items, heads] = part.to(whole.dtype)
        base = near.split(outer)[1] * (1.0 if mixing else 0.5)
        whole = grads[3][items, heads].zero_()
        near.split(whole)[1].copy_(base)
        for total in grad_mixing:
            total[heads] += along.sum((0, 2))
    return [*grads, *grad_mixing]


def _backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, gate: Any, near: Near
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the scaled queries, of keys and values, and g . a of each grid token."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    before, x, after = near.split(q)
    g_before, g, g_after = near.split(grad)
    into = near.split(dq)
    for exact, outer, to in ((before, g_before, into[0]), (after, g_after, into[2])):
        p = near.exact(exact, k)
        ds = _softmax_backward(p, outer @ v.mT)
        dv += p.mT @ outer
        dk += ds.mT @ exact
        to.copy_(ds @ k)

    # With P, O the weights of what is shared and of the window, and l the logits: a = P V + O v.
    keys, values = near.shared(k), near.shared(v)
    on_grid = near.split(k)[1]
    shared, own = weigh(near, x, keys, on_grid)
    dp, done = g @ values.mT, torch.zeros_like(own)
    if near.window is not None:
        tokens, beyond = near.window
        done = (near.split(v)[1][:, :, tokens] @ g[..., None]).squeeze(-1).masked_fill_(beyond, 0)
    # The weights as the softmax gave them, and their gradients.
    rest = keys.shape[-2] - (0 if near.left is None else near.left.shape[-1])
    plain, plain_own = shared.clone(), own
    if near.left is not None:
        left = near.left.clamp(min=1)
        if near.window is not None:
            dp[..., rest:] -= near.per_cell(done)
            plain_own = own + near.at_window(shared[..., rest:]).masked_fill(beyond, 0)
        dp[..., rest:] /= left
        plain[..., rest:] *= left
    along = (plain * dp).sum(-1, keepdim=True) + (plain_own * done).sum(-1, keepdim=True)
    dl, dl_own = plain * (dp - along) * gate, plain_own * (done - along) * gate
    if near.left is not None:
        dl[..., rest:] /= left
        if near.window is not None:
            dl_own = dl_own - near.at_window(dl[..., rest:]).masked_fill(beyond, 0)
    shared, own = shared * gate, own * gate

    into[1].copy_(dl @ keys)
    if near.window is not None:
        into[1].add_((dl_own[..., None, :] @ on_grid[:, :, tokens]).squeeze(-2))
        flat = tokens.flatten()
        for total, weights, rows in ((dk, dl_own, x), (dv, own, g)):
            outer = weights[..., None] * rows[..., None, :]
            near.split(total)[1].index_add_(2, flat, outer.flatten(2, 3))
    for total, weights, rows in ((dk, dl, x), (dv, shared, g)):
        part = weights.mT @ rows
        head, image, tail = near.split(total)
        head.add_(part[:, :, : near.prefix])
        tail.add_(part[:, :, near.prefix : rest])
        if near.cells is not None:
            image.add_(spread(part[:, :, rest:], near.cells.inside))
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
