"""A grammar of attention: every way of writing it that the matcher must see through.

And of near misses: the same with one thing changed that makes it another attention, or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH = 16  # channels of all heads


@dataclass(frozen=True)
class Spelling:
    """How one attention of [B, N, 16] is written; the fields are keys of the tables below."""

    projection: str = "packed"
    heads: int = 2
    shared: str = "no"
    between: str = "nothing"
    layout: str = "bhnd"
    product: str = "@"
    scale: float = 0.35
    place: str = "product"
    number: str = "python"
    mask: str = "none"
    softmax: str = "method"
    cast: str = "none"
    dropout: str = "none"
    noise: str = "none"
    miss: str = ""

    @property
    def exact(self) -> bool:
        return self.cast == "none"


PROJECTIONS = ("packed", "chunks", "three", "split")
BETWEEN = ("nothing", "norm", "rotary", "norm and rotary")
SHARED = ("no", "repeat_interleave", "expand")
PLACES = ("product", "divided", "q", "k", "both", "q and product", "none", "in place")
NUMBERS = ("python", "tensor", "buffer")
MASKS = ("none", "zeros", "nothing filled", "all true")
SOFTMAXES = ("method", "function", "module", "dtype", "exponential", "without maximum", "log")
CASTS = ("none", "float", "typed")
DROPOUTS = ("none", "function", "module", "zero")
NOISES = ("none", "contiguous", "clone", "identity", "to")

spellings = st.builds(
    Spelling,
    projection=st.sampled_from(PROJECTIONS),
    heads=st.sampled_from([1, 2, 4]),
    shared=st.sampled_from(SHARED),
    between=st.sampled_from(BETWEEN),
    layout=st.sampled_from(["bhnd", "bnhd", "flat"]),
    product=st.sampled_from(["@", "matmul", "einsum", "keys first", "baddbmm"]),
    scale=st.sampled_from([0.35, 1.7, 0.25]),
    place=st.sampled_from(PLACES),
    number=st.sampled_from(NUMBERS),
    mask=st.sampled_from(MASKS),
    softmax=st.sampled_from(SOFTMAXES),
    cast=st.sampled_from(CASTS),
    dropout=st.sampled_from(DROPOUTS),
    noise=st.sampled_from(NOISES),
)


class Attention(nn.Module):
    """Patches, one attention as `spelling` has it, a projection: images [B, 3, H, W] to tokens."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling = spelling
        shared = WIDTH // spelling.heads if spelling.shared != "no" else WIDTH
        self.embed, self.other = nn.Conv2d(3, WIDTH, 4, 4), nn.Conv2d(3, WIDTH, 4, 4)
        self.q, self.k, self.v = (nn.Linear(WIDTH, n) for n in (WIDTH, shared, shared))
        self.norm = nn.LayerNorm(WIDTH // spelling.heads)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.mix = nn.Linear(spelling.heads, spelling.heads)
        self.bias = nn.Parameter(torch.randn(12, 12))
        self.probabilities, self.drop = nn.Softmax(-1), nn.Dropout(0.1)
        self.register_buffer("number", torch.tensor(self.own_scale()), persistent=False)

    def own_scale(self) -> float:
        return 1.0 if self.spelling.place == "none" else self.spelling.scale

    def forward(self, images: Tensor) -> Any:
        x = self.embed(images).flatten(2).transpose(1, 2)
        q, k, v = self.heads_of(x, images)
        miss = MISSES.get(self.spelling.miss, (None, None))[1]
        out = (miss or Attention.attend)(self, q, k, v)
        out, more = out if isinstance(out, tuple) else (out, None)
        out = self.project(out.transpose(1, 2).reshape(len(x), -1, WIDTH))
        return out if more is None else (out, more)

    # q, k, v: [B, heads, N, D]

    def heads_of(self, x: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = self.spelling
        weights = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        sizes = [self.q.out_features, self.k.out_features, self.v.out_features]
        if s.projection == "three":
            parts = [self.q(x), self.k(x), self.v(x)]
        else:
            packed = F.linear(x, weights, bias)
            if s.projection == "packed" and s.shared == "no":
                parts = list(packed.reshape(*x.shape[:2], 3, -1).permute(2, 0, 1, 3).unbind(0))
            elif s.projection == "chunks" and s.shared == "no":
                parts = list(packed.chunk(3, dim=-1))
            else:
                parts = list(packed.split(sizes, dim=-1))
        size = WIDTH // s.heads
        q, k, v = (t.unflatten(-1, (-1, size)).transpose(1, 2) for t in parts)
        if "norm" in s.between:
            q, k = self.norm(q), self.norm(k)
        if "rotary" in s.between:
            q, k = rotated(q), rotated(k)
        if s.shared == "repeat_interleave":
            k, v = (t.repeat_interleave(s.heads, dim=1) for t in (k, v))
        elif s.shared == "expand":
            k, v = (t.expand(-1, s.heads, -1, -1) for t in (k, v))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.weighted(self.weights(self.scores(q, k)), v)

    def factor(self) -> Any:
        s = self.spelling
        if s.number == "python":
            return self.own_scale()
        return (
            self.number if s.number == "buffer" else torch.tensor(self.own_scale()).to(self.number)
        )

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        s, factor = self.spelling, self.factor()
        q, k = self.disturbed(q), self.disturbed(k)
        if s.place == "q":
            q = q * factor
        elif s.place == "k":
            k = factor * k
        elif s.place == "both":
            q, k = q * factor**0.5, k * factor**0.5
        elif s.place == "q and product":
            q = q * 0.5
        scores = self.multiplied(q, k)
        if s.place == "product":
            scores = scores * factor
        elif s.place == "divided":
            scores = scores / (1 / factor)
        elif s.place == "q and product":
            scores = scores * (factor * 2)
        elif s.place == "in place":
            scores *= factor
        return self.masked(self.disturbed(scores))

    def multiplied(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, heads, N, N] for [B, heads, N, D], however."""
        product, layout = self.spelling.product, self.spelling.layout
        if layout == "bnhd":
            return torch.einsum("bnhd,bmhd->bhnm", q.transpose(1, 2), k.transpose(1, 2))
        if layout == "flat" or product == "baddbmm":
            left, right = q.flatten(0, 1), k.flatten(0, 1)
            if product == "baddbmm":
                empty = torch.empty(len(left), left.shape[1], right.shape[1], dtype=q.dtype)
                return torch.baddbmm(empty, left, right.mT, beta=0).view(*q.shape[:3], -1)
            return torch.bmm(left, right.transpose(1, 2)).unflatten(0, q.shape[:2])
        if product == "einsum":
            return torch.einsum("bhid,bhjd->bhij", q, k)
        if product == "keys first":
            return (k @ q.transpose(-2, -1)).transpose(2, 3)
        return q @ k.mT if product == "@" else torch.matmul(q, k.permute(0, 1, 3, 2))

    def masked(self, scores: Tensor) -> Tensor:
        mask = self.spelling.mask
        if mask == "zeros":
            return scores + torch.zeros(scores.shape[-1], dtype=scores.dtype)
        if mask == "nothing filled":
            hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool)
            return scores.masked_fill(hidden, -math.inf)
        if mask == "all true":
            seen = torch.ones(scores.shape[-1], dtype=torch.bool)
            return torch.where(seen, scores, torch.finfo(scores.dtype).min)
        return scores

    def weights(self, scores: Tensor) -> Tensor:
        cast, kind = self.spelling.cast, self.spelling.softmax
        dtype = scores.dtype
        if cast == "float":
            scores = scores.float()
        elif cast == "typed":
            scores = scores.to(torch.float32)
        if kind == "function":
            found = F.softmax(scores, dim=scores.dim() - 1)
        elif kind == "module":
            found = self.probabilities(scores)
        elif kind == "dtype":
            found = torch.softmax(scores, -1, dtype=scores.dtype)
        elif kind == "exponential":
            powers = (scores - scores.amax(-1, keepdim=True)).exp()
            found = powers / powers.sum(dim=-1, keepdim=True)
        elif kind == "without maximum":
            found = (scores - scores.max(dim=-1, keepdim=True).values).softmax(-1)
        elif kind == "log":
            found = scores.log_softmax(dim=-1).exp()
        else:
            found = scores.softmax(-1)
        return self.dropped(found.to(dtype))

    def dropped(self, weights: Tensor) -> Tensor:
        kind = self.spelling.dropout
        if kind == "module":
            return self.drop(weights)
        if kind == "none":
            return weights
        return F.dropout(weights, 0.1 if kind == "function" else 0.0, training=kind == "zero")

    def weighted(self, weights: Tensor, v: Tensor) -> Tensor:
        v = self.disturbed(v)
        if self.spelling.layout == "bnhd":
            out = torch.einsum("bhnm,bmhd->bnhd", weights, v.transpose(1, 2)).transpose(1, 2)
        elif self.spelling.layout == "flat":
            out = torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, v.shape[:2])
        else:
            out = weights @ v
        return self.disturbed(out)

    def disturbed(self, x: Tensor) -> Tensor:
        """The same values, by an operator that does nothing."""
        noise = self.spelling.noise
        if noise == "to":
            return x.to(x.dtype)
        if noise == "identity":
            return nn.functional.dropout(x, 0.5, training=False)
        return x if noise == "none" else getattr(x, noise)()


class Fused(Attention):
    """The same attention as the fused call."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.own_scale())

    def forward(self, images: Tensor) -> Any:
        x = self.embed(images).flatten(2).transpose(1, 2)
        out = self.attend(*self.heads_of(x, images))
        return self.project(out.transpose(1, 2).reshape(len(x), -1, WIDTH))


def rotated(x: Tensor) -> Tensor:
    """A rotary embedding of positions 0, 1, ... in the halves of the channels."""
    first, second = x.chunk(2, dim=-1)
    steps = torch.arange(first.shape[-1], dtype=x.dtype) + 1
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / steps
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _triangle(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool).tril()


def _changed(change: Callable[[Attention, Tensor], Tensor]) -> Callable[..., Any]:
    """The attention with something done to its scores."""
    return lambda m, q, k, v: m.weighted(m.weights(change(m, m.scores(q, k))), v)


def _used(change: Callable[[Attention, Tensor], Tensor]) -> Callable[..., Any]:
    """The attention with something done to its probabilities."""
    return lambda m, q, k, v: m.weighted(change(m, m.weights(m.scores(q, k))), v)


def _mixed(m: Attention, x: Tensor) -> Tensor:
    return m.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _returned(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = m.weights(m.scores(q, k))
    return m.weighted(weights, v), weights


def _across(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Over channels: [D, N] [N, D] [D, N]."""
    return (m.scores(q.mT, k.mT).softmax(-1) @ v.mT).mT


def _mean(k: Tensor) -> Tensor:
    return k.mean((1, 3))[:, None, None, :]


#: What changes the attention, the reasons that are true of it, and how it is written.
MISSES: dict[str, tuple[set[str], Callable[..., Any]]] = {
    "causal, filled": (
        {"causal"},
        _changed(lambda m, s: s.masked_fill(~_triangle(s), -math.inf)),
    ),
    "causal, where": (
        {"causal"},
        _changed(lambda m, s: torch.where(_triangle(s), s, torch.finfo(s.dtype).min)),
    ),
    "bias": ({"additive-bias"}, _changed(lambda m, s: s + m.bias)),
    "bias in place": ({"additive-bias"}, _changed(lambda m, s: s.add_(m.bias))),
    "pairs hidden": (
        {"masked"},
        lambda m, q, k, v: m.weighted(
            m.weights(m.scores(q, k).masked_fill(_mean(k) > _mean(q).mT, -1e9)), v
        ),
    ),
    "soft cap": ({"scores-changed"}, _changed(lambda m, s: 5 * torch.tanh(s / 5))),
    "clamped": ({"scores-changed"}, _changed(lambda m, s: s.clamp(-1, 1))),
    "talking before": ({"scores-changed"}, _changed(_mixed)),
    "talking after": ({"probabilities-used"}, _used(_mixed)),
    "scale of the data": ({"scores-changed"}, _changed(lambda m, s: s * s.std())),
    "thresholded": ({"probabilities-used"}, _used(lambda m, p: p * (p > 0.05))),
    "returned": ({"probabilities-used"}, _returned),
    "applied twice": (  # the second time to values that are no tokens of the image
        {"probabilities-used", "cross-attention"},
        lambda m, q, k, v: (lambda p: m.weighted(p, m.weighted(p, v)))(m.weights(m.scores(q, k))),
    ),
    "over the queries": (
        {"not-attention", "scores-changed"},
        lambda m, q, k, v: m.scores(q, k).softmax(-2) @ v,
    ),
    "over the heads": (
        {"not-attention", "scores-changed"},
        lambda m, q, k, v: m.scores(q, k).softmax(1) @ v,
    ),
    "over channels": ({"not-attention"}, _across),
    "keys of other tokens": (
        {"cross-attention"},
        lambda m, q, k, v: m.attend(q, k.flip(2), v.flip(2)),
    ),
    "values of other tokens": (
        {"cross-attention"},
        lambda m, q, k, v: m.attend(q, k, v.roll(1, 2)),
    ),
    "keys of other images": (
        {"cross-attention"},
        lambda m, q, k, v: m.attend(q, k.roll(1, 0), v.roll(1, 0)),
    ),
    "one query": (
        {"cross-attention"},
        lambda m, q, k, v: m.attend(q[:, :, :1], k, v).expand_as(q),
    ),
    "half of the keys": (
        {"cross-attention"},
        lambda m, q, k, v: m.attend(q, k[:, :, :6], v[:, :, :6]),
    ),
    "tokens in another order": (  # three times the same, which would have to be proved
        {"grid-unknown", "cross-attention"},
        lambda m, q, k, v: m.attend(*(t[:, :, torch.arange(12).roll(5)] for t in (q, k, v))),
    ),
}


def _missing(spelling: Spelling, miss: str) -> Spelling:
    """A near miss; what would hide that it is one is taken out of the spelling."""
    spelling = replace(spelling, miss=miss)
    if miss in ("over channels", "over the heads") or "talking" in miss or "causal" in miss:
        spelling = replace(spelling, heads=2, mask="none", shared="no")
    if miss == "over channels":
        spelling = replace(spelling, layout="bhnd", product="@")
    return spelling


near_misses = st.builds(_missing, spellings, st.sampled_from(list(MISSES)))
