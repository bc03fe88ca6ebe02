"""The operator ``torch.ops.t5fx.ttt``: one node in a captured graph.

It is CompositeImplicitAutograd. torch.export and Dynamo keep the call as one node; autograd,
AOTAutograd with Inductor, FLOP counters and ``ExportedProgram.run_decompositions`` look through it:
at the opaque operators of `opaque` where they compute what is asked for and it is trained or runs
on a CPU, at the launches of ``t5fx.kernels.triton_kernels`` with impl "triton", or "trusted" (what
"auto" becomes before it is in a graph, see `choice`), else at the ordinary operators of
`reference`. For the same reason it has no fake implementation, and torch
accepts none for such an operator: on fake and meta tensors the body itself runs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import cpp, near, near_op, opaque  # noqa: F401 (two of them register operators)
from .checks import check_counts, check_device, check_impl, check_mask, check_maskable
from .choice import TRUSTED
from .masked import folded
from .precision import widest
from .reference import reference
from .variant import Variant

QUALNAME = "t5fx::ttt"


def _ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    mixing: Sequence[Tensor],
    affine: Sequence[Tensor],
    *,
    key_mask: Tensor | None = None,
    scale: float,
    grid: Sequence[int],
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
    """The body; its annotations and defaults are the operator's schema."""
    if impl == TRUSTED:
        impl = "auto" if _is_transformed() else "triton"
    variant = Variant(
        *(inner, inner_loss, key_norm, key_norm_eps, locality),
        *(neighborhood, coarse, mix, qk_affine),
    )
    check_impl(variant, impl)
    check_counts(variant, weights, conv, mixing, affine, grid)
    lists = {"weights": weights, "conv": conv, "mixing": mixing, "affine": affine}
    masks = [] if key_mask is None else [key_mask]
    check_device(q, {"k": k, "v": v, **lists, "key_mask": masks})
    if key_mask is not None:
        check_mask(key_mask, q)
        if impl == "triton":
            check_maskable(variant, q.dtype)
    # Before the node runs, which waits for its own files to be compiled.
    near_tensors = (q, k, v, *weights, *conv, *mixing, *affine)
    closed = variant.is_near and impl != "reference" and _is_closed("near_", *near_tensors)
    shifted = _affine(q, k, affine) if variant.qk_affine else (q, k)
    base = _linear(*shifted, v, weights, conv, key_mask, scale, grid, prefix, variant, impl)
    if not variant.is_near:
        return base
    near_settings = (scale, grid, prefix, neighborhood, coarse)
    if impl == "triton":
        return torch.ops.t5fx.near_triton_forward(q, k, v, base, mixing, *near_settings)[0]
    if closed:
        return torch.ops.t5fx.near_forward(q, k, v, base, mixing, *near_settings, key_mask)
    return near.reference(
        *(q, k, v, base, mixing),
        scale=scale,
        grid=grid,
        prefix=prefix,
        neighborhood=neighborhood,
        coarse=coarse,
        key_mask=key_mask,
    )


def _affine(q: Tensor, k: Tensor, affine: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """q and k with a scale and an offset for each channel, in the dtypes they came in."""
    wide = widest(q, k, *affine)
    heads, width = q.shape[1], q.shape[3]
    q_scale, q_offset, k_scale, k_offset = (x.to(wide).view(heads, 1, width) for x in affine)
    shifted_q, shifted_k = q.to(wide) * q_scale + q_offset, k.to(wide) * k_scale + k_offset
    return shifted_q.to(q.dtype), shifted_k.to(k.dtype)


def _linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    conv: Sequence[Tensor],
    key_mask: Tensor | None,
    scale: float,
    grid: Sequence[int],
    prefix: int,
    variant: Variant,
    impl: str,
) -> Tensor:
    """The node without near attention."""
    eps = variant.key_norm_eps
    closed = impl == "auto" and variant.is_written_out and _is_closed("", q, k, v, *weights, *conv)
    closed = closed and (key_mask is None or eps > 0)
    qkv = (q, k, v)
    if key_mask is not None and (closed or impl == "triton"):
        qkv = folded(
            *(q, k, v, key_mask[:, None, :, None]),
            grid=grid,
            prefix=prefix,
            convolved=bool(conv),
            eps=eps,
            exact=closed,
        )
    call = (*qkv, weights, conv, scale, grid, prefix, eps)
    if impl == "triton":
        # Imported where it is asked for: Triton is slow to import.
        from t5fx.kernels import triton_kernels  # noqa: F401

        trained = _is_transformed() or _is_trained(q, k, v, *weights, *conv)
        return torch.ops.t5fx.ttt_triton_forward(*call, trained)[0]
    if closed:
        return torch.ops.t5fx.ttt_forward(*call)[0]
    return reference(
        q,
        k,
        v,
        weights,
        conv,
        key_mask,
        scale=scale,
        grid=grid,
        prefix=prefix,
        inner=variant.inner,
        inner_loss=variant.inner_loss,
        key_norm=variant.key_norm,
        key_norm_eps=variant.key_norm_eps,
        locality=variant.locality,
    )


def _is_closed(name: str, *tensors: Tensor) -> bool:
    """Whether the opaque operators are the better, which autograd alone can differentiate.

    ``name``: what the names of their files begin with, which are compiled from now on.

    For training: they keep less and compile sooner. On a CPU: they are C++. What is exported is for
    other runtimes, and gets operators that these know.
    """
    if _is_transformed():
        return False
    trained = _is_trained(*tensors)
    if any(not t.is_cpu for t in tensors) or widest(*tensors) != torch.float32:
        return trained
    if torch.compiler.is_exporting() or any(map(is_traceable_wrapper_subclass, tensors)):
        return trained
    cpp.start(f"{name}forward")
    if trained:
        cpp.start(f"{name}backward")
    return True


def _is_trained(*tensors: Tensor) -> bool:
    """Whether autograd records what is done with them."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _is_transformed() -> bool:
    """Whether torch.func's transforms or forward-mode differentiation are on, which want to see
    ordinary operators.
    """
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return transformed or torch.autograd.forward_ad._current_level >= 0


torch.library.define(
    QUALNAME,
    torch.library.infer_schema(_ttt, mutates_args=()),
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(QUALNAME, "CompositeImplicitAutograd")(_ttt)
# torch.func.vmap does not look through a composite operator made in Python unless told to.
torch.library.impl(QUALNAME, "FuncTorchBatchedDecomposition")(_ttt)
