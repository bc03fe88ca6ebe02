"""The fused call: `scaled_dot_product_attention`, in any of its forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from t5fx.analysis.key_masks import KeyMask, key_mask
from t5fx.analysis.masks import harmless, refusal
from t5fx.graph.view import View
from t5fx.patterns.base import Binding, Pattern, Refusal
from t5fx.patterns.operands import fused_binding

#: torch's own: the name in torch.nn.functional may be given to something else later.
_ATTENTION = F.scaled_dot_product_attention


def _repeated(q: Tensor, x: Tensor) -> Tensor:
    return x[:, :1].repeat_interleave(q.shape[1], 1)


class Fused(Pattern):
    """F.scaled_dot_product_attention, its ATen overloads and the backends they decompose to."""

    name = "fused"
    anchor = "scaled_dot_product_attention"
    whole = True

    examples: ClassVar = {
        "plain": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        "scale given": lambda q, k, v: F.scaled_dot_product_attention(
            4 * q, k, v, scale=q.shape[-1] ** -0.5 / 4
        ),
        "scaled in place": lambda q, k, v: F.scaled_dot_product_attention(
            q.clone().mul_(q.shape[-1] ** -0.5), k, v, scale=1.0
        ),
        "grouped heads": lambda q, k, v: F.scaled_dot_product_attention(
            q, k[:, :1], v[:, :1], enable_gqa=True
        ),
        "grouped heads, repeated": lambda q, k, v: F.scaled_dot_product_attention(
            q, _repeated(q, k), _repeated(q, v)
        ),
        "grouped heads, expanded": lambda q, k, v: F.scaled_dot_product_attention(
            q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)
        ),
        "a mask of ones": lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
        ),
    }
    rejects: ClassVar = {
        "causal": (
            "causal",
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        ),
        "causal mask": (
            "causal",
            lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, attn_mask=torch.ones(q.shape[2], q.shape[2]).tril().bool()
            ),
        ),
        "tokens repeated": (
            "cross-attention",
            lambda q, k, v: F.scaled_dot_product_attention(
                q, k[:, :, ::2].repeat_interleave(2, 2), v[:, :, ::2].repeat_interleave(2, 2)
            ),
        ),
    }

    @staticmethod
    def shape(q: Any, k: Any, v: Any) -> Any:
        return _ATTENTION(q, k, v)

    def bind(self, view: View, found: dict[str, fx.Node]) -> Binding:
        node = found["scaled_dot_product_attention"]
        if view.arg(node, "is_causal", False):
            raise Refusal("causal", "is_causal=True: each token may see only earlier ones")
        mask = view.arg(node, "attn_mask")
        query, key, value = (view.arg(node, name) for name in ("query", "key", "value"))
        masks: tuple[KeyMask, ...] = ()
        if mask is not None and not harmless(view, mask):
            rank, hidden = len(view.shape(query)), view.val(mask)
            kind = "bool" if hidden is not None and hidden.dtype == torch.bool else "added"
            known = key_mask(view, mask, query, rank - 2, rank - 1, kind, node)
            if known is None:
                raise Refusal(*refusal(view, mask))
            masks = (known,)
        dropout = view.arg(node, "dropout_p", 0.0) or 0.0
        scale = view.arg(node, "scale")
        return replace(fused_binding(view, node, (query, key, value), scale, dropout), masks=masks)
