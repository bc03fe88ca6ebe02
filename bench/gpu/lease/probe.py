"""A forward and a backward of the kernels, for profilers and checkers to watch.

Usage: python -m t5fx.bench.gpu.lease.probe BATCH HEADS TOKENS WIDTH...
"""

from __future__ import annotations

import sys

import torch

from ...suites import kernels


def main(arguments: list[str]) -> None:
    """Tensors are made on the CPU, so that little else than the kernels is watched."""
    batch, heads, tokens, *widths = map(int, arguments)
    for dim in widths:
        tensors, settings = kernels.arguments(batch, heads, tokens, dim, "cpu")
        packed = torch.stack([t.transpose(1, 2) for t in tensors[:3]], 2).cuda()
        inputs = list(packed.permute(2, 0, 3, 1, 4))
        tensors = inputs + [t.cuda() for t in tensors[3:]]
        grad_out = torch.randn(inputs[2].shape).to(kernels.DTYPE).cuda()
        kernels.kernels(tensors, settings, grad_out)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
