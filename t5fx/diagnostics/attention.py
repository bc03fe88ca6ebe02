"""The measures themselves, on the queries, keys and values of one attention site."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from t5fx.kernels import TTT
from t5fx.kernels.near import reference
from t5fx.kernels.precision import widest


def key_shift(k: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """How far the keys of each head are shifted from the origin: |mean of k| / mean of |k|.

    The shift ratio r of "Linearizing Vision Transformer with Test-Time Training" (arXiv
    2605.02772): the Euclidean norm of the mean key over the mean Euclidean norm of the keys. It is
    0 for keys around the origin, 1 for keys that are all alike, and about 1/sqrt(N) for N keys that
    are drawn independently around the origin. Softmax attention does not depend on it.

    Args:
        k: [..., N, D], any floating dtype.
        key_mask: [..., N], which of them count; None for all.

    Returns:
        [...], in the wider of k's dtype and float32; 0 where all keys are 0.
    """
    k = k.to(torch.promote_types(k.dtype, torch.float32))
    if key_mask is not None:  # both means are by the same number
        k = torch.where(key_mask[..., None], k, 0)
    lengths = k.norm(dim=-1).mean(-1)
    return k.mean(-2).norm(dim=-1) / lengths.clamp_min(torch.finfo(k.dtype).tiny)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    queries: Sequence[int],
    key_mask: Tensor | None = None,
) -> Tensor:
    """The attention probabilities of some queries: softmax over the keys of s q_i . k_j.

    Args:
        q, k: [..., N, D]; scale: s; queries: Q positions of tokens; key_mask: [..., N], which
            tokens count as keys, one at least; None for all.

    Returns:
        [..., Q, N], in the wider of q's dtype and float32.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = scale * q[..., list(queries), :].to(wide) @ k.to(wide).mT
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[..., None, :], -math.inf)
    return logits.softmax(-1)


def implicit_attention(
    attend: Callable[[Tensor], Tensor], v: Tensor, queries: Sequence[int]
) -> Tensor:
    """What an attention of any kind gives to each value: A(i, j) = tr(d o_i / d v_j) / Dv.

    The derivative of an output token with respect to a value token is a Dv x Dv matrix; its mean
    diagonal is the weight with which o_i follows v_j, channel by channel. In softmax attention the
    matrix is the attention probability times the identity, so that A is the probability. In a TTT
    node A may be negative, and its sum over j is not 1. The paper (arXiv 2605.02772) defines the
    implicit attention as d o_i / d v_j and leaves open how the matrix becomes a number.

    A TTT node's output is not linear in v (the trained weights multiply each other), so this is
    the derivative at the values that are given. It takes Dv gradients for each query and memory for
    one; nothing of size N x N is made.

    Args:
        attend: from values [B, H, N, Dv] to outputs [B, H, N, Dv] as differentiable operators, no
            batch item and no head depending on another.
        v: [B, H, N, Dv].
        queries: Q positions of tokens.

    Returns:
        [B, H, Q, N], in v's dtype.
    """
    v = v.detach().clone().requires_grad_()
    with torch.enable_grad():
        outputs = attend(v)
    rows = []
    for query in queries:
        row = torch.zeros_like(v[..., 0])
        for channel in range(v.shape[-1]):
            chosen = outputs[:, :, query, channel].sum()
            (gradient,) = torch.autograd.grad(chosen, v, retain_graph=True)
            row += gradient[..., channel]
        rows.append(row / v.shape[-1])
    return torch.stack(rows, dim=2)


def node_attention(
    node: TTT,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Sequence[int],
    *,
    grid: Sequence[int] = (),
    prefix: int = 0,
    key_mask: Tensor | None = None,
) -> Tensor:
    """`implicit_attention` of a TTT node, near attention included, in less time.

    Near attention is linear in the values, with one weight for all channels of a token: one
    gradient for each query is enough for it, and none more for prefix and suffix tokens, which get
    nothing else.

    Args:
        node: it stays as it is.
        q, k: [B, H, N, D]; v: [B, H, N, Dv]; the tokens ordered prefix, grid, suffix.
        queries: Q positions of tokens. grid, prefix, key_mask: as the node takes them.

    Returns:
        [B, H, Q, N], in the widest of the tensors' dtypes and float32.
    """
    lists = node.tensors()
    wide = widest(q, k, v, *(tensor for some in lists for tensor in some))
    weights, conv, mixing, affine = ([t.detach().to(wide) for t in some] for some in lists)
    q, k, v = (x.detach().to(wide) for x in (q, k, v))
    place = {"grid": list(grid), "prefix": prefix, "key_mask": key_mask}
    alone = replace(node.variant, neighborhood=0, coarse=0)
    # The reference differentiates to the values alone, on every device and in every dtype.
    settings = {"scale": node.scale, "impl": "reference", **alone.settings(), **place}

    def attend(values: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.t5fx.ttt(q, k, values, weights, conv, [], affine, **settings)
        return outputs

    if not node.variant.is_near:
        return implicit_attention(attend, v, queries)
    near = {"scale": node.scale, "neighborhood": node.neighborhood, "coarse": node.coarse, **place}
    found, shares = _near_attention(q, k, mixing, queries, near)
    reached = [i for i in range(len(queries)) if shares[:, :, i].any()]
    if reached and alone.is_anything:
        rest = implicit_attention(attend, v, [queries[i] for i in reached])
        found[:, :, reached] += shares[:, :, reached, None] * rest
    return found


def _near_attention(
    q: Tensor, k: Tensor, mixing: Sequence[Tensor], queries: Sequence[int], settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """What near attention gives to each value, [B, H, Q, N], and how much of the rest of the node
    is added to it, [B, H, Q]: derivatives by values and outputs of one channel."""
    values, rest = (q.new_zeros(*q.shape[:-1], 1).requires_grad_() for _ in range(2))
    with torch.enable_grad():
        outputs = reference(q, k, values, rest, mixing, **settings)
    found, shares = [], []
    for query in queries:
        chosen = outputs[:, :, query].sum()
        by_value, by_rest = torch.autograd.grad(chosen, (values, rest), retain_graph=True)
        found.append(by_value[..., 0])
        shares.append(by_rest[:, :, query, 0])
    return torch.stack(found, dim=2), torch.stack(shares, dim=2)
