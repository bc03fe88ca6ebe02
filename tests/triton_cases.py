"""Calls of the Triton kernels and of the float64 reference on the same arguments, compared."""

from contextlib import contextmanager
from unittest import mock

import nodes
import torch

from t5fx.kernels import ttt
from t5fx.kernels.reference import reference
from t5fx.kernels.triton_kernels import backward, configs, forward

#: Largest error allowed, relative to the norm of what is right: of 16 bits, twelve roundings.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 12 * 2**-11, torch.bfloat16: 12 * 2**-8}

NAMES = ("q", "k", "v", "w1", "w2", "w3", "conv_q.w", "conv_q.b", "conv_k.w", "conv_k.b")


def arguments(*, dtype=torch.float32, device="cpu", layout="BHND", shift=0.0, **sizes):
    """(tensors, keywords, gradient of the output): q, k, v in a dtype and a layout in memory."""
    (q, k, v, weights, conv), settings = nodes.arguments(**sizes)
    weights = [w * w.shape[1] ** -0.5 for w in weights]
    tensors = [lay_out(x.to(dtype), layout) for x in (q, k + shift, v)]
    tensors += [t.float() for t in (*weights, *conv)]
    keywords = {name: settings[name] for name in ("scale", "grid", "prefix", "locality")}
    grad_out = lay_out(torch.randn_like(v).to(dtype), layout)
    tensors = [move(t, device) for t in tensors]
    return tensors, keywords | {"key_norm_eps": 1.0}, move(grad_out, device)


def move(tensor, device):
    """On a device, with its strides."""
    if tensor.device.type == torch.device(device).type:
        return tensor
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return moved.copy_(tensor)


def lay_out(x, layout):
    """The same numbers in other strides."""
    if layout == "packed":  # [B, N, 3, H, D], as a joint projection gives it
        packed = torch.stack([x, x, x]).permute(1, 3, 0, 2, 4).contiguous()
        return packed[:, :, 1].transpose(1, 2)
    if layout == "channels first":  # [B, H, D, N]
        return x.mT.contiguous().mT
    if layout == "every other":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1).flatten(-2)[..., ::2]
    assert layout == "BHND"
    return x.contiguous()


def split(tensors):
    """q, k, v, weights, conv."""
    return *tensors[:3], tensors[3:6], tensors[6:]


def run(tensors, keywords, grad_out):
    """[output, gradient of each tensor] of the kernels."""
    args = split(tensors)
    out, saved = forward(*args, **keywords)
    dq, dk, dv, weights, conv = backward(grad_out, *args, saved, **keywords)
    return [out, dq, dk, dv, *weights, *conv]


def run_op(tensors, keywords, grad_out):
    """The same through `ttt` and autograd."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = ttt(*split(leaves), **keywords, impl="triton")
    grads = torch.autograd.grad(out, leaves, grad_out, materialize_grads=True)
    return [out.detach(), *grads]


def run_reference(tensors, keywords, grad_out):
    """The same of the reference, in float64."""
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    out = reference(
        *split(leaves), inner="swiglu", inner_loss="dot", key_norm="instance", **keywords
    )
    grads = torch.autograd.grad(out, leaves, grad_out.double(), materialize_grads=True)
    return [out.detach(), *grads]


def rms(x):
    """Root of the mean square."""
    return x.norm() / x.numel() ** 0.5


def assert_close(results, wanted, tolerance):
    """Each tensor to a share of its norm, or of a typical one, if that is more.

    What is nearly 0 is held to a thousandth of the largest; a convolution's gradient, the sum over
    all tokens of what q or k get, to what the sum would be if its terms did not cancel.
    """
    floor = 1e-3 * max(rms(w) for w in wanted)
    for name, result, want in zip(("out", *NAMES), results, wanted, strict=False):
        assert result.shape == want.shape, name
        typical = floor
        if name.startswith("conv"):
            terms = wanted[1 if name.startswith("conv_q") else 2]
            typical = rms(terms) * (terms.shape[0] * terms.shape[2]) ** 0.5
        error = (result.double() - want).norm()
        allowed = tolerance * max(want.norm(), typical * want.numel() ** 0.5)
        assert error <= allowed, f"{name}: error {error:.2e}, norm {want.norm():.2e}"


def check(**case):
    """Output and all gradients against the float64 reference; returns what the kernels gave."""
    tensors, keywords, grad_out = arguments(**case)
    with poisoned():
        results = run(tensors, keywords, grad_out)
    dtypes = [t.dtype for t in (grad_out, *tensors)]
    assert [r.dtype for r in results] == dtypes
    assert_close(results, run_reference(tensors, keywords, grad_out), TOLERANCE[grad_out.dtype])
    return results


@contextmanager
def poisoned():
    """Fresh memory is full of NaN: what is read before it is written, or never written, shows.

    Whole numbers are the largest there are.
    """
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poisoned_new_empty(tensor, *args, **kwargs):
        fresh = new_empty(tensor, *args, **kwargs)
        return fresh.fill_(torch.nan if fresh.is_floating_point() else torch.iinfo(fresh.dtype).max)

    def poisoned_empty_like(tensor, **kwargs):
        return empty_like(tensor, **kwargs).fill_(torch.nan)

    with (
        mock.patch("torch.Tensor.new_empty", poisoned_new_empty),
        mock.patch("torch.empty_like", poisoned_empty_like),
    ):
        yield


@contextmanager
def small_tiles():
    """Several tiles, chunks of tokens, blocks and parts of hidden units, on little data."""
    small = configs.Config(block_n=16, block_m=16, warps=4, stages=1, programs=1, parts=2)
    rows = dict.fromkeys(configs.HALF, dict.fromkeys(configs.WIDTHS, small))
    with mock.patch.multiple(configs, HALF=rows, SMALL=rows, WIDE=rows):
        yield
