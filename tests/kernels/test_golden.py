"""The node against outputs and gradients of the paper authors' own module, in float64."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from t5fx.kernels import ttt

FILES = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))
VARIANTS = {"swiglu-dot": ("swiglu", "dot"), "mlp-l2": ("mlp2", "l2")}


def load(path):
    """Metadata and tensors of a golden file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def attention(x, params, *, heads, grid, inner, inner_loss):
    """The authors' block: one qkv Linear, the node, the output projection."""
    batch, tokens, width = x.shape
    qkv = torch.nn.functional.linear(x, params["qkv.weight"], params["qkv.bias"])
    q, k, v = qkv.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    names = [name for name in ("w1", "w2", "w3") if name in params]
    out = ttt(
        q,
        k,
        v,
        [params[name][0] for name in names],
        [params[f"{x}_conv2d.{y}"] for x in "qk" for y in ("weight", "bias")],
        scale=(width // heads) ** -0.5,
        grid=grid,
        inner=inner,
        inner_loss=inner_loss,
    )
    out = out.transpose(1, 2).reshape(batch, tokens, width)
    return torch.nn.functional.linear(out, params["proj.weight"], params["proj.bias"])


def test_every_golden_file_is_here():
    assert len(FILES) == 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_output_and_all_gradients(path):
    metadata, golden = load(path)
    inner, inner_loss = VARIANTS[metadata["variant"]]
    grid = tuple(int(size) for size in metadata["grid"].split("x"))
    params = {
        name.removeprefix("param."): tensor.requires_grad_()
        for name, tensor in golden.items()
        if name.startswith("param.")
    }
    x = golden["x"].requires_grad_()
    out = attention(
        x, params, heads=int(metadata["heads"]), grid=grid, inner=inner, inner_loss=inner_loss
    )
    grads = torch.autograd.grad(out, [x, *params.values()], golden["grad_out"])

    assert out.dtype == torch.float64
    torch.testing.assert_close(out, golden["out"], rtol=0, atol=1e-9)
    expected = [golden["grad_x"], *(golden[f"grad.{name}"] for name in params)]
    assert len(expected) == sum("grad" in name for name in golden) - 1  # all but grad_out
    for name, grad, wanted in zip(["x", *params], grads, expected, strict=True):
        torch.testing.assert_close(
            grad, wanted, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert wanted.abs().max() > 1e-6, f"the file says nothing about {name}"
