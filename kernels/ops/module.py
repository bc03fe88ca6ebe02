"""The node with its parameters."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_grid_ndim, check_impl
from .choice import resolved
from .errors import NodeArgumentError
from .inner import inner_model
from .locality import CONVOLVED
from .variant import AFFINE, NAMES, Variant

#: The attributes of a node that are arguments of the operator.
SETTINGS = ("scale", *NAMES, "impl")


def _hand_out(convolution: Any) -> tuple[Tensor, Tensor]:
    """A convolution's weight and bias, as what its call returns: the operator convolves.

    So hooks around calls of modules (those that bring offloaded weights, FSDP's) have their way.
    """
    return convolution.weight, convolution.bias


class _Conv1d(nn.Conv1d):
    forward = _hand_out  # type: ignore[assignment]


class _Conv2d(nn.Conv2d):
    forward = _hand_out  # type: ignore[assignment]


class _Conv3d(nn.Conv3d):
    forward = _hand_out  # type: ignore[assignment]


_CONV: dict[int, Any] = {1: _Conv1d, 2: _Conv2d, 3: _Conv3d}


class TTT(nn.Module):
    """One attention site's TTT node: ``t5fx.kernels.ttt`` with the parameters it needs.

    Parameters: ``w1``, ``w2``, ``w3`` as far as the inner model has them, ``[H, in, out]``, drawn
    from a normal of standard deviation 0.02 cut off at +-2; ``dwc_q``, ``dwc_k`` (locality
    "dwc_qk") or ``dwc_v`` ("dwc_v"), depthwise convolutions with PyTorch's default initialisation,
    channel h*D + d; ``gate`` ``[H]``, ones, where near attention is mixed in by one; ``q_scale``,
    ``q_offset``, ``k_scale``, ``k_offset`` ``[H*D]``, ones and zeros, with qk_affine. Fresh values
    depend on ``seed`` and ``name`` only: the same on every device and
    in every dtype up to rounding; the global random state is neither read nor changed.

    Args:
        num_heads, head_dim, value_dim: H, D and Dv.
        grid_ndim: spatial axes, 1, 2 or 3; not read with locality "none" and no near attention.
        scale: s, the factor that the softmax gave the logits.
        inner, inner_loss, key_norm, key_norm_eps, locality, neighborhood, coarse, mix, qk_affine,
            impl: see ``t5fx.kernels.ttt``.
        seed, name: choose the fresh values; give each site of a model its own name.

    Raises:
        NodeArgumentError: an unknown name or a wrong number of axes.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        value_dim: int,
        grid_ndim: int,
        *,
        scale: float,
        inner: str = "swiglu",
        inner_loss: str = "dot",
        key_norm: str = "instance",
        key_norm_eps: float = 1.0,
        locality: str = "dwc_qk",
        neighborhood: int = 0,
        coarse: int = 0,
        mix: str = "gate",
        qk_affine: bool = False,
        impl: str = "auto",
        seed: int = 0,
        name: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        variant = Variant(
            *(inner, inner_loss, key_norm, key_norm_eps, locality),
            *(neighborhood, coarse, mix, qk_affine),
        )
        check_impl(variant, impl)
        self.num_heads, self.head_dim, self.value_dim = num_heads, head_dim, value_dim
        self.grid_ndim, self.scale = grid_ndim, scale
        # Plain attributes: compilers that trace the forward read them as constants.
        for setting, value in variant.settings().items():
            setattr(self, setting, value)
        self.impl = impl
        self.seed, self.name = seed, name

        place = torch.empty(0, device=device).device  # None is torch's default device
        model = inner_model(inner)
        self._weight_names = model.weight_names
        shapes = model.weight_shapes(head_dim, value_dim)
        for weight, shape in zip(model.weight_names, shapes, strict=True):
            empty = torch.empty(num_heads, *shape, device=device, dtype=dtype)
            self.register_parameter(weight, nn.Parameter(empty))
        self._conv_names = tuple(f"dwc_{letter}" for letter in CONVOLVED[locality])
        if variant.needs_grid:
            check_grid_ndim(grid_ndim)
        for conv in self._conv_names:
            channels = num_heads * (value_dim if conv == "dwc_v" else head_dim)
            # Made on "meta", where its own initialisation draws no random numbers.
            holder = _CONV[grid_ndim](
                channels, channels, 3, padding=1, groups=channels, device="meta", dtype=dtype
            )
            self.add_module(conv, holder.to_empty(device=place))
        self._needs_grid = variant.needs_grid
        if variant.is_gated:
            self.gate = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        for affine in AFFINE if qk_affine else ():
            empty = torch.empty(num_heads * head_dim, device=device, dtype=dtype)
            self.register_parameter(affine, nn.Parameter(empty))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give every parameter its fresh value, for instance after ``to_empty``."""
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            digest = hashlib.sha256(f"{self.seed}:{self.name}:{name}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            fresh = torch.empty(parameter.shape, device="cpu", dtype=torch.float32)
            if name in self._weight_names:
                fresh = inner_model(str(self.inner)).initial(name, parameter.shape, generator)
            elif name == "gate" or name in AFFINE:
                fresh.fill_(0.0 if name.endswith("_offset") else 1.0)
            else:
                # What nn.Conv does: uniform within 1/sqrt(fan in), one input channel per group.
                bound = 1 / math.sqrt(3**self.grid_ndim)
                fresh.uniform_(-bound, bound, generator=generator)
            parameter.copy_(fresh)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Sequence[int] = (),
        prefix: int = 0,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """``[B, H, N, D]`` twice and ``[B, H, N, Dv]`` -> ``[B, H, N, Dv]``, in q's dtype.

        key_mask: ``[B, N]`` bool, true for tokens that count as keys.
        """
        if self._needs_grid and len(grid) != self.grid_ndim:
            raise NodeArgumentError(f"grid: expected {self.grid_ndim} axes; got {tuple(grid)}")
        tensors = self.tensors()
        settings = self.settings()
        parameters = [tensor for some in tensors for tensor in some]
        masked = key_mask is not None
        settings["impl"] = resolved(self.impl, q, k, v, parameters, len(grid), settings, masked)
        place = {"grid": list(grid), "prefix": prefix, "key_mask": key_mask}
        return torch.ops.t5fx.ttt(q, k, v, *tensors, **place, **settings)

    def tensors(self) -> tuple[list[Tensor], ...]:
        """``weights``, ``conv``, ``mixing`` and ``affine`` of ``torch.ops.t5fx.ttt``."""
        weights = [getattr(self, name) for name in self._weight_names]
        conv = [tensor for name in self._conv_names for tensor in getattr(self, name)()]
        mixing: list[Tensor] = [self.gate] if "gate" in self._parameters else []
        affine = [getattr(self, name) for name in AFFINE] if self.qk_affine else []
        return weights, conv, mixing, affine

    @property
    def variant(self) -> Variant:
        """Which node it is."""
        return Variant(**{name: getattr(self, name) for name in NAMES})

    def settings(self) -> dict[str, Any]:
        """The arguments of ``torch.ops.t5fx.ttt`` that are the same in every call."""
        return {name: getattr(self, name) for name in SETTINGS}

    def flops(self, batch: int, tokens: int, grid: Sequence[int] = ()) -> int:
        """FLOP of one forward's matrix products at these sizes; a multiply-add is two."""
        per_head = self.variant.flops(tokens, self.head_dim, self.value_dim, grid)
        return batch * self.num_heads * per_head

    def extra_repr(self) -> str:
        settings = self.variant.settings() | {"impl": self.impl}
        sizes = (
            f"heads={self.num_heads}, head_dim={self.head_dim}, value_dim={self.value_dim}, "
            f"grid_ndim={self.grid_ndim}, scale={self.scale:.4g}"
        )
        return ", ".join([sizes, *(f"{name}={value!r}" for name, value in settings.items())])
