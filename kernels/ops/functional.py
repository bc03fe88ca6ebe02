"""The node as a checked function, and what it costs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import op  # noqa: F401  (registers torch.ops.t5fx.ttt)
from .checks import check_counts, check_impl, check_shapes
from .choice import resolved
from .variant import Variant


def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor] = (),
    gate: Tensor | None = None,
    affine: Sequence[Tensor] = (),
    *,
    key_mask: Tensor | None = None,
    scale: float,
    grid: Sequence[int] = (),
    prefix: int = 0,
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
) -> Tensor:
    """Attention's linear-time stand-in: train a small model on (k, v) for one step, apply it to q.

    For each batch item and head, with the static weights W of the inner model f_W::

        q <- q_scale q + q_offset;  k <- k_scale k + k_offset       (qk_affine)
        k <- norm(k);  q <- q + conv_q(q);  k <- k + conv_k(k)      (grid tokens only)
        L(W) = -(s/N) sum_t v_t . f_W(k_t)             inner_loss "dot"
        L(W) = (s/2N) sum_t |f_W(k_t) - v_t|^2         inner_loss "l2"
        W' = W - dL/dW;  o_t = f_W'(q_t)

    from "Linearizing Vision Transformer with Test-Time Training" (arXiv 2605.02772).

    With ``neighborhood`` or ``coarse`` softmax attention to what is near is mixed in, on q and k as
    they are given: to the tokens of the window around each grid token, to the mean key and value of
    each coarse cell of the grid (the log of its tokens added to the logit), and to all prefix and
    suffix tokens, in one softmax. Prefix and suffix tokens then get exact softmax attention.

    Tokens are ordered prefix, grid (row-major), suffix; N = prefix + prod(grid) + suffix. Prefix
    and suffix tokens bypass the convolutions and take part in everything else.

    Args:
        q, k: ``[B, H, N, D]``, any floating dtype, any strides, N at least 1.
        v: ``[B, H, N, Dv]``.
        weights: of the inner model, in the order of ``inner_model(inner).weight_names``: for
            "swiglu" ``[H, D, D], [H, D, D], [H, D, Dv]``.
        conv: weight and bias of each depthwise convolution (kernel 3, zero padding 1):
            ``[H*D, 1, 3, ...], [H*D]`` for q, then the same for k, with locality "dwc_qk";
            ``[H*Dv, 1, 3, ...], [H*Dv]`` with "dwc_v"; nothing with "none". Channel h*D + d.
        gate: ``[H]``, where near attention is mixed in by "gate"; else None.
        affine: with ``qk_affine`` q_scale, q_offset, k_scale, k_offset, ``[H*D]`` each, channel
            h*D + d; else nothing.
        key_mask: ``[B, N]`` bool, true for tokens that count as keys; None where all do. Key norm,
            inner loss (N is the number that count) and near attention are over these alone, and
            convolutions see zeros at others of the grid. Every token has an output; where none
            counts it is f_W(q) with the static weights, and near attention is 0. All true is the
            same as None, to the bit.
        scale: s, the factor that the softmax gave the logits. Scales the loss, not q.
        grid: sizes of the one, two or three spatial axes. Not read with locality "none" and
            without near attention.
        prefix: number of tokens before the grid.
        inner: "swiglu" f(x) = (silu(x W1) * (x W2)) W3; "mlp2" silu(x W1) W2;
            "mlp3" silu(silu(x W1) W2) W3; "gate1" silu(x W1) * (x W2). Without training, for
            comparison: linear attention phi(q) (phi(k)^T v) / (phi(q) sum phi(k)) with phi of
            "linear" elu(x) + 1, "linear_projqk" the same on q Pq and k Pk, "lit" relu(x),
            "hedgehog" and "performer", see `t5fx.kernels.inner`; and "none", near attention alone.
        inner_loss: "dot" or "l2".
        key_norm: "instance" (k - mean) / sqrt(var + eps) over the N tokens of a channel, biased
            variance; "instance_center" without the division; "instance_scale" without the mean;
            "rms", "layer" over the D channels of a token; "none".
        key_norm_eps: eps of the key norm.
        locality: "dwc_qk", "dwc_v" or "none".
        neighborhood: side of the window, odd, in tokens; 0 for none. It is moved inwards at the
            borders, as in the natten package.
        coarse: coarse cells along each axis of the grid; 0 for none.
        mix: what becomes of near attention a: "gate" o + gate a, "half" (o + a) / 2.
        qk_affine: whether q and k have a scale and an offset for each channel, before all else but
            near attention. The node of the paper's DiT5 is "mlp2" with "l2", "dwc_qk", this, and a
            neighborhood of 5 mixed by "half".
        impl: "reference", which autograd and compilers see as the ordinary operators it is made
            of; "triton", kernels for a GPU, float32 or narrower, for the settings "swiglu", "dot",
            "instance" and "dwc_qk" or "none", and up to 128 coarse cells (fewer in heads of more
            than 64 channels); or "auto": with the same settings, on a GPU in 16 bits, these
            kernels, once a check of them on that GPU has passed (the first call makes it, in a
            process of its own; T5FX_TRITON=0 switches both off); else one opaque operator with a
            written-out backward where a gradient is recorded, and on a CPU,
            where it is C++ that is compiled once for a machine; the reference for all else, in
            graphs that are exported, and inside torch.func's transforms.

    Returns:
        ``[B, H, N, Dv]`` in q's dtype; computed in the widest of the arguments' dtypes and
        float32, also under autocast. Differentiable in all tensors: any number of times where the
        reference is what runs, else once.

    Raises:
        NodeArgumentError: a ``T5Error`` and ``ValueError`` that says what was expected and got.
        T5Error: a second derivative where the reference is not what ran.

    >>> q, k, v = torch.randn(3, 2, 6, 17, 8).unbind()
    >>> weights = [0.02 * torch.randn(6, 8, 8) for _ in range(3)]
    >>> ttt(q, k, v, weights, scale=8**-0.5, locality="none").shape
    torch.Size([2, 6, 17, 8])
    """
    variant = Variant(
        *(inner, inner_loss, key_norm, key_norm_eps, locality, neighborhood, coarse, mix, qk_affine)
    )
    mixing = [] if gate is None else [gate]
    check_impl(variant, impl)
    check_counts(variant, weights, conv, mixing, affine, grid)
    place: dict[str, Any] = {"grid": list(grid), "prefix": prefix}
    check_shapes(variant, q, k, v, weights, conv, mixing, affine, **place, key_mask=key_mask)
    parameters = [*weights, *conv, *mixing, *affine]
    settings = variant.settings() | {"scale": scale}
    masked = key_mask is not None
    settings["impl"] = resolved(impl, q, k, v, parameters, len(grid), settings, masked)
    tensors = (list(weights), list(conv), mixing, list(affine))
    return torch.ops.t5fx.ttt(q, k, v, *tensors, key_mask=key_mask, **place, **settings)


def flops(
    num_tokens: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    grid: Sequence[int] = (),
    num_heads: int = 1,
    batch: int = 1,
    **settings: Any,
) -> int:
    """FLOP of the node's matrix products, forward; a multiply-add is two.

    "swiglu" with "dot" and Dv = D, the default: 18 N D^2 per head. Softmax attention has 4 N^2 D.
    Norms, convolutions and activations, all O(N D), are not counted. ``grid`` is read for near
    attention; ``settings``: inner, inner_loss, neighborhood, coarse and so on, as `ttt` has them.

    >>> flops(4096, 64) == 18 * 4096 * 64**2
    True
    """
    value_dim = head_dim if value_dim is None else value_dim
    return batch * num_heads * Variant(**settings).flops(num_tokens, head_dim, value_dim, grid)
