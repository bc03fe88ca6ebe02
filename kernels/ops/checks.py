"""What the arguments of the TTT node have to be, and the errors where they are not."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .errors import NodeArgumentError, require_name
from .inner import inner_model
from .locality import CONVOLVED
from .variant import AFFINE, Variant

#: Implementations that can be asked for; see ``t5fx.kernels.ttt``.
IMPLS = ("auto", "reference", "triton")


def check_impl(variant: Variant, impl: str) -> None:
    """Raise unless there is such an implementation, for that variant."""
    require_name("impl", impl, IMPLS)
    if impl == "triton" and not variant.is_written_out:
        raise NodeArgumentError(
            'impl: expected "auto" or "reference", got "triton", which has kernels for inner '
            '"swiglu", inner_loss "dot", key_norm "instance" and locality "dwc_qk" or "none" '
            f"alone; got {variant.settings()}"
        )


def check_maskable(variant: Variant, dtype: torch.dtype) -> None:
    """Raise unless the Triton kernels take a key mask with that variant and dtype."""
    obstacle = mask_obstacle(variant, dtype)
    if obstacle is not None:
        raise NodeArgumentError(
            f'key_mask: expected what kernels take with impl="triton"; got {obstacle}; use '
            f'impl="auto" or impl="reference"'
        )


def mask_obstacle(variant: Variant, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot take a key mask; None where they can."""
    if variant.is_near:
        return "near attention (neighborhood, coarse) with a key mask, which they have not"
    if dtype == torch.float16:
        return "float16 with a key mask, by which values of few tokens that count may overflow"
    if not variant.key_norm_eps:
        return "key_norm_eps 0 with a key mask"
    return None


def check_counts(
    variant: Variant,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    mixing: Sequence[Tensor],
    affine: Sequence[Tensor],
    grid: Sequence[int],
) -> None:
    """Raise unless there are as many tensors of each kind and grid axes as needed."""
    if not variant.is_anything:
        raise NodeArgumentError(
            f"neighborhood, coarse: expected near attention with inner {variant.inner!r}, which is "
            f"nothing else; got neighborhood {variant.neighborhood}, coarse {variant.coarse}"
        )
    names = inner_model(variant.inner).weight_names
    _expect("weights", f"{len(names)} tensors ({', '.join(names)})", len(weights), len(names))
    convolved = CONVOLVED[variant.locality]
    wanted = f"{2 * len(convolved)} tensors (a weight and a bias for each of {convolved!r})"
    _expect("conv", wanted, len(conv), 2 * len(convolved))
    gates = int(variant.is_gated)
    _expect("mixing", "a gate, [H]" if gates else "nothing", len(mixing), gates)
    names = AFFINE if variant.qk_affine else ()
    wanted = ", ".join(names) if names else "nothing"
    _expect("affine", wanted, len(affine), len(names))
    if variant.needs_grid:
        check_grid_ndim(len(grid))


def check_grid_ndim(grid_ndim: int) -> None:
    """Raise unless a node exists for that number of grid axes."""
    if grid_ndim not in (1, 2, 3):
        raise NodeArgumentError(f"grid: expected 1, 2 or 3 axes; got {grid_ndim}")


def check_shapes(
    variant: Variant,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    mixing: Sequence[Tensor],
    affine: Sequence[Tensor],
    *,
    grid: Sequence[int],
    prefix: int,
    key_mask: Tensor | None = None,
) -> None:
    """Raise unless dtypes are floating and shapes fit each other; counts are right."""
    check_tokens(q, k, v)
    if key_mask is not None:
        check_mask(key_mask, q)
    _, heads, tokens, head_dim = q.shape
    value_dim = v.shape[3]

    model = inner_model(variant.inner)
    shapes = model.weight_shapes(head_dim, value_dim)
    for name, weight, shape in zip(model.weight_names, weights, shapes, strict=True):
        _expect_tensor(name, weight, (heads, *shape))

    widths = {"q": head_dim, "k": head_dim, "v": value_dim}
    for i, name in enumerate(CONVOLVED[variant.locality]):
        channels = heads * widths[name]
        _expect_tensor(f"conv weight of {name}", conv[2 * i], (channels, 1) + (3,) * len(grid))
        _expect_tensor(f"conv bias of {name}", conv[2 * i + 1], (channels,))
    check_gates(mixing, heads)
    for name, tensor in zip(AFFINE, affine, strict=False):
        _expect_tensor(name, tensor, (heads * head_dim,))
    if variant.needs_grid:
        check_grid(grid, prefix, tokens)


def check_mask(key_mask: Tensor, q: Tensor) -> None:
    """Raise unless a key mask says of each token of each item whether it counts."""
    if key_mask.dtype != torch.bool or key_mask.shape != (q.shape[0], q.shape[2]):
        raise NodeArgumentError(
            f"key_mask: expected a bool tensor [{q.shape[0]}, {q.shape[2]}], true for tokens that "
            f"count; got {key_mask.dtype} {list(key_mask.shape)}"
        )


def check_gates(mixing: Sequence[Tensor], heads: int) -> None:
    """Raise unless a gate has a number for each head."""
    for gate in mixing:
        _expect_tensor("gate", gate, (heads,))


def check_grid(grid: Sequence[int], prefix: int, tokens: int) -> None:
    """Raise unless so many tokens can be a prefix, a grid and a suffix."""
    if prefix < 0 or any(size < 1 for size in grid) or prefix + math.prod(grid) > tokens:
        raise NodeArgumentError(
            "grid: expected sizes of at least 1, prefix >= 0 and prefix + prod(grid) <= N = "
            f"{tokens}; got grid {tuple(grid)}, prefix {prefix}"
        )


def check_device(q: Tensor, others: Mapping[str, Tensor | Sequence[Tensor]]) -> None:
    """Raise unless all tensors are where q is; kernels read their memory as it is there."""
    for name, found in others.items():
        for tensor in [found] if isinstance(found, Tensor) else found:
            if tensor.device != q.device:
                raise NodeArgumentError(
                    f"{name}: expected tensors on {q.device}, as q is; got one on {tensor.device}"
                )


def check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless q, k are [B, H, N, D] and v is [B, H, N, Dv], N at least 1, all floating."""
    if q.dim() != 4:
        raise NodeArgumentError(f"q: expected shape [B, H, N, D]; got {list(q.shape)}")
    if q.shape[2] < 1:
        raise NodeArgumentError(f"q: expected at least one token; got shape {list(q.shape)}")
    _expect_tensor("q", q, q.shape)
    _expect_tensor("k", k, q.shape)
    value_dim = v.shape[-1] if v.dim() == 4 else "Dv"
    _expect_tensor("v", v, (*q.shape[:3], value_dim))


def _expect(name: str, wanted: str, got: int, expected: int) -> None:
    if got != expected:
        raise NodeArgumentError(f"{name}: expected {wanted}; got {got}")


def _expect_tensor(name: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
    if list(tensor.shape) != list(shape):
        sizes = ", ".join(str(size) for size in shape)
        raise NodeArgumentError(f"{name}: expected shape [{sizes}]; got {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise NodeArgumentError(f"{name}: expected a floating-point dtype; got {tensor.dtype}")
