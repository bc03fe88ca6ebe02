"""A transformer of packed tokens, like Flux: what says where they lie is an argument."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

#: Text tokens before those of the image.
TEXT = 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q * rope, k * rope, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Packed(nn.Module):
    """hidden: [B, N, 4]; text: [B, 5, 16]; ids: [N, 3], frame, row and column of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.checkpointed = False

    def forward(self, hidden, text, ids, height=None, width=None):
        places = torch.cat([ids.new_zeros(text.shape[1], 3), ids])
        rope = (places.sum(-1, keepdim=True) * 0.1 * torch.arange(8.0)).cos()[None, None]
        x = torch.cat([text, self.embed(hidden)], dim=1)
        for block in self.blocks:
            on = self.checkpointed
            x = x + (checkpoint(block, x, rope, use_reentrant=False) if on else block(x, rope))
        return x[:, text.shape[1] :]


def model() -> Packed:
    torch.manual_seed(0)
    return Packed().eval()


def call(rows: int, columns: int, batch: int = 2, **more: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.cartesian_prod(
        torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns))
    )
    return {
        "hidden": torch.randn(batch, rows * columns, 4, generator=generator),
        "text": torch.randn(batch, TEXT, 16, generator=generator),
        "ids": ids,
        **more,
    }


def grid_of(hidden, text, ids, **_: object) -> tuple[int, int]:
    return (int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1)


def trained(module: nn.Module) -> nn.Module:
    """New parameters of which the outputs depend on the grid."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if ".t5." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module
