"""Sums of what the programs of another kernel wrote, in a fixed order: no float atomics."""

import triton
import triton.language as tl

from .tiles import SIZES


@triton.jit
def _load(w1, w2, w3, owner, at, D: tl.constexpr, DV: tl.constexpr):
    """Elements ``at`` of the matrices of one owner, laid one behind the other, float32."""
    x1 = tl.load(w1 + owner * (D * D) + at, mask=at < D * D, other=0.0)
    x2 = tl.load(
        w2 + owner * (D * D) + at - D * D, mask=(at >= D * D) & (at < 2 * D * D), other=0.0
    )
    x3 = tl.load(
        w3 + owner * (D * DV) + at - 2 * D * D,
        mask=(at >= 2 * D * D) & (at < 2 * D * D + D * DV),
        other=0.0,
    )
    return x1.to(tl.float32) + x2.to(tl.float32) + x3.to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def sum_matrices(
    partial, base1, base2, base3, out1, out2, out3, largest,
    owners, base_owners, rows, base_rows, scale, num_tokens,
    D: tl.constexpr, DV: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = sum over base_rows of base + scale / num_tokens * sum over rows of partial, for three
    matrices.

    partial: ``[rows, owners, 2*D*D + D*Dv]`` float32; out: ``[owners, ...]`` contiguous, each in a
    dtype of its own; base: ``[base_rows, base_owners, ...]``, read at owner modulo base_owners.
    LARGEST: also ``[owners, blocks of BLOCK]`` float32, the largest magnitude of each block.
    """
    SIZE: tl.constexpr = 2 * D * D + D * DV
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    owner = (tl.program_id(0) // BLOCKS).to(tl.int64)
    at = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(rows):
        total += tl.load(partial + (row * owners + owner) * SIZE + at, mask=inside, other=0.0)
    total *= tl.cast(scale, tl.float32) / num_tokens
    for row in range(base_rows):
        base_owner = row * base_owners + owner % base_owners
        total += _load(base1, base2, base3, base_owner, at, D, DV)
    if LARGEST:
        tl.store(largest + tl.program_id(0), tl.max(tl.abs(total), 0))
    first = at < D * D
    tl.store(out1 + owner * (D * D) + at, total.to(out1.dtype.element_ty), mask=first)
    second = (at >= D * D) & (at < 2 * D * D)
    tl.store(out2 + owner * (D * D) + at - D * D, total.to(out2.dtype.element_ty), mask=second)
    third = (at >= 2 * D * D) & inside
    tl.store(out3 + owner * (D * DV) + at - 2 * D * D, total.to(out3.dtype.element_ty), mask=third)
