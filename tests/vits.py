"""Vision transformers of every description that the property tests draw from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn


@dataclass(frozen=True)
class Shape:
    """depth, heads, head size, prefix tokens, patch grid, batch, and how attention is spelled."""

    depth: int = 2
    heads: int = 2
    head_dim: int = 8
    class_token: bool = True
    registers: int = 0
    grid: tuple[int, int] = (3, 4)
    batch: int = 2
    spelling: str = "fused"
    patch: int = 4

    @property
    def tokens(self) -> int:
        return self.class_token + self.registers + self.grid[0] * self.grid[1]

    def images(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        size = [n * self.patch for n in self.grid]
        return torch.randn(self.batch, 3, *size, dtype=dtype)

    def model(self) -> ViT:
        torch.manual_seed(1)
        return ViT(self).eval()


SPELLINGS = ("fused", "eager", "scaled_query", "scaled_both", "divided", "flat", "einsum")

shapes = st.builds(
    Shape,
    depth=st.integers(1, 3),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8, 10]),
    class_token=st.booleans(),
    registers=st.integers(0, 3),
    grid=st.tuples(st.integers(1, 5), st.integers(2, 5)),
    batch=st.integers(1, 4),
    spelling=st.sampled_from(SPELLINGS),
)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.head_dim, self.spelling = shape.heads, shape.head_dim, shape.spelling
        width = shape.heads * shape.head_dim
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        h, d = self.heads, self.head_dim
        q, k, v = self.qkv(x).reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(b, n, c))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scale = self.head_dim**-0.5
        if self.spelling == "fused":
            return F.scaled_dot_product_attention(q, k, v)
        if self.spelling == "eager":
            return ((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1) @ v
        if self.spelling == "scaled_query":
            return torch.softmax((q * scale) @ k.mT, dim=-1) @ v
        if self.spelling == "scaled_both":
            q, k = q * scale**0.5, k * scale**0.5
            return torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)), dim=3), v)
        if self.spelling == "divided":
            scores = torch.matmul(q, k.permute(0, 1, 3, 2)) / self.head_dim**0.5
            return torch.matmul(scores.softmax(-1).to(v.dtype), v)
        if self.spelling == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
            return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        b, h, n, d = q.shape
        q, k, v = (x.reshape(b * h, n, d) for x in (q, k, v))
        scores = torch.bmm(q * scale, k.transpose(1, 2))
        return torch.bmm(scores.softmax(-1), v).view(b, h, n, d)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.heads * shape.head_dim
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(shape)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patch embedding, class and register tokens, pre-norm layers; returns every token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.heads * shape.head_dim
        self.patch_embed = nn.Conv2d(3, width, shape.patch, shape.patch)
        prefix = shape.class_token + shape.registers
        self.prefix = nn.Parameter(torch.randn(1, prefix, width)) if prefix else None
        self.blocks = nn.ModuleList(Layer(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
