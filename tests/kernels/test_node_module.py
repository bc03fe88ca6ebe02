"""The module TTT: its parameters, fresh values and dropout; and what wrong arguments are told."""

import copy
import math

import nodes
import pytest
import torch
from torch import nn

import t5fx.errors
from t5fx.kernels import TTT, NodeArgumentError, inner_model, ttt

close = torch.testing.assert_close


def make(num_heads=2, head_dim=4, value_dim=6, grid_ndim=2, **settings):
    return TTT(num_heads, head_dim, value_dim, grid_ndim, **{"scale": 0.5} | settings)


def qkv(tokens=7, dtype=torch.float32):
    q, k = torch.randn(2, 2, 2, tokens, 4, dtype=dtype)
    return q, k, torch.randn(2, 2, tokens, 6, dtype=dtype)


@pytest.mark.parametrize("grid_ndim", [1, 2, 3])
@pytest.mark.parametrize(
    ("locality", "widths"),
    [("dwc_qk", {"dwc_q": 8, "dwc_k": 8}), ("dwc_v", {"dwc_v": 12}), ("none", {})],
)
def test_parameters(locality, widths, grid_ndim):
    module = make(locality=locality, grid_ndim=grid_ndim)
    shapes = {"w1": (2, 4, 4), "w2": (2, 4, 4), "w3": (2, 4, 6)}
    for name, channels in widths.items():
        shapes[f"{name}.weight"] = (channels, 1) + (3,) * grid_ndim
        shapes[f"{name}.bias"] = (channels,)
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == shapes


@pytest.mark.parametrize("inner", nodes.INNERS)
def test_forward_is_the_function(inner):
    module = make(inner=inner, inner_loss="l2", key_norm="rms", key_norm_eps=0.1)
    q, k, v = qkv()
    weights = [getattr(module, name) for name in inner_model(inner).weight_names]
    conv = [getattr(module, f"dwc_{x}").get_parameter(y) for x in "qk" for y in ("weight", "bias")]
    expected = ttt(
        *(q, k, v, weights, conv),
        scale=0.5,
        grid=(2, 3),
        prefix=1,
        inner=inner,
        inner_loss="l2",
        key_norm="rms",
        key_norm_eps=0.1,
    )
    assert torch.equal(module(q, k, v, (2, 3), 1), expected)
    assert module.flops(2, 7) == 4 * (
        inner_model(inner).flops(7, 4, 6) + inner_model(inner).output_flops(7, 4, 6)
    )


def test_fresh_values_depend_on_seed_and_name_only():
    reference = make(seed=3, name="blocks.0.attn").state_dict()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = make(seed=3, name="blocks.0.attn")
    again.reset_parameters()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, reference[name]) for name, x in again.state_dict().items())
    others = make(seed=4, name="blocks.0.attn"), make(seed=3, name="blocks.1.attn")
    for other in others:
        assert not any(torch.equal(x, reference[name]) for name, x in other.state_dict().items())
    values = [tuple(x.flatten().tolist()) for x in reference.values()]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fresh_values_are_the_same_in_every_dtype(dtype):
    reference, other = make().state_dict(), make(dtype=dtype).state_dict()
    assert all(torch.equal(x.to(dtype), other[name]) for name, x in reference.items())


def test_distribution_of_fresh_values():
    module = TTT(6, 64, 64, 2, scale=1.0)
    for weight in (module.w1, module.w2, module.w3):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert abs(weight.mean().item()) < 1e-3
    # PyTorch's default: variance 1 / (3 fan in), bounded by 1 / sqrt(fan in).
    default = nn.Conv2d(384, 384, 3, groups=384)
    for name, x in module.dwc_q.named_parameters():
        assert x.std().item() == pytest.approx(default.get_parameter(name).std().item(), rel=0.1)
        assert 0.3 < x.abs().max().item() <= 1 / math.sqrt(9)


def test_meta_device_then_materialised():
    with torch.device("meta"):
        implicit = make()
    module = make(device="meta")
    assert all(x.is_meta for m in (module, implicit) for x in m.parameters())
    q, k, v = (x.to("meta") for x in qkv())
    assert module(q, k, v, (2, 3), 1).shape == (2, 2, 7, 6)
    module.to_empty(device="cpu").reset_parameters()
    expected = make().state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in module.state_dict().items())


def test_deepcopy_is_independent():
    module = make()
    twin = copy.deepcopy(module)
    args = (*qkv(), (2, 3), 1)
    assert torch.equal(twin(*args), module(*args))
    nn.init.ones_(twin.w3)
    assert not torch.equal(twin(*args), module(*args))


def test_representation_names_the_settings():
    text = repr(make(inner="mlp2", key_norm="rms"))
    assert "inner='mlp2'" in text and "key_norm='rms'" in text and "heads=2" in text


def wrong(**changes):
    """Arguments of `ttt` with some of them replaced: a value, or a function of the right one."""
    (q, k, v, weights, conv), settings = nodes.arguments()
    values = {"q": q, "k": k, "v": v, "weights": weights, "conv": conv} | settings
    for name, change in changes.items():
        values[name] = change(values[name]) if callable(change) else change
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": lambda q: q[0]}, r"q: expected shape \[B, H, N, D\]; got \[2, 6, 3\]"),
        ({"k": lambda k: k[:, :, 1:]}, r"k: expected shape \[2, 2, 6, 3\]; got \[2, 2, 5, 3\]"),
        ({"v": lambda v: v[:1]}, r"v: expected shape \[2, 2, 6, 4\]; got \[1, 2, 6, 4\]"),
        ({"v": lambda v: v[0]}, r"v: expected shape \[2, 2, 6, Dv\]; got \[2, 6, 4\]"),
        ({"q": lambda q: q.long()}, "q: expected a floating-point dtype; got torch.int64"),
        ({"q": lambda q: q[:, :, :0]}, r"q: expected at least one token; got shape \[2, 2, 0, 3\]"),
        ({"weights": lambda w: w[:2]}, r"weights: expected 3 tensors \(w1, w2, w3\); got 2"),
        (
            {"weights": lambda w: [w[0], w[1], w[0]]},
            r"w3: expected shape \[2, 3, 4\]; got \[2, 3, 3\]",
        ),
        ({"conv": ()}, "conv: expected 4 tensors .* got 0"),
        (
            {"conv": lambda c: [c[0][:2], *c[1:]]},
            r"conv weight of q: expected shape \[6, 1, 3, 3\]; got \[2, 1, 3, 3\]",
        ),
        (
            {"conv": lambda c: [*c[:3], c[3][:2]]},
            r"conv bias of k: expected shape \[6\]; got \[2\]",
        ),
        ({"grid": (2, 3)}, r"prefix \+ prod\(grid\) <= N = 6; got grid \(2, 3\), prefix 1"),
        ({"grid": (0, 3)}, r"sizes of at least 1.* got grid \(0, 3\)"),
        ({"prefix": -1}, r"prefix >= 0 .* got grid \(2, 2\), prefix -1"),
        ({"grid": (1, 1, 1, 1)}, "grid: expected 1, 2 or 3 axes; got 4"),
        ({"inner": "swish"}, "inner: expected one of .*'mlp2'.*'swiglu'; got 'swish'"),
        ({"inner_loss": "l1"}, "inner_loss: expected one of 'dot', 'l2'; got 'l1'"),
        ({"key_norm": "batch"}, "key_norm: expected one of 'instance', .*; got 'batch'"),
        ({"locality": "cpe"}, "locality: expected one of 'dwc_qk', 'dwc_v', 'none'; got 'cpe'"),
        ({"impl": "cuda"}, "impl: expected one of 'auto', 'reference', 'triton'; got 'cuda'"),
    ],
)
def test_wrong_arguments_are_told_what_was_expected(changes, message):
    with pytest.raises(NodeArgumentError, match=message) as caught:
        ttt(**wrong(**changes))
    assert isinstance(caught.value, t5fx.errors.T5Error)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ["inner", "inner_loss", "key_norm", "locality", "mix", "impl"])
def test_the_operator_and_the_module_know_their_names_too(name):
    with pytest.raises(NodeArgumentError, match=f"{name}: expected one of .* got 'x'"):
        torch.ops.t5fx.ttt(**wrong(**{name: "x"}), mixing=[], affine=[])
    with pytest.raises(NodeArgumentError, match=f"{name}: expected one of .* got 'x'"):
        make(**{name: "x"})


def test_the_module_asks_for_its_implementation():
    module = make()
    module.impl = "x"
    with pytest.raises(NodeArgumentError, match=r"impl: expected one of .* got 'x'"):
        module(*qkv(), (2, 3), 1)


def test_module_checks_its_grid():
    with pytest.raises(NodeArgumentError, match="grid: expected 1, 2 or 3 axes; got 4"):
        make(grid_ndim=4)
    with pytest.raises(NodeArgumentError, match=r"grid: expected 2 axes; got \(6,\)"):
        make()(*qkv(), (6,), 1)
    make(grid_ndim=0, locality="none")(*qkv())


def test_parameters_elsewhere_are_told_and_never_read():
    node = TTT(2, 8, 8, 2, scale=1.0)
    q = torch.randn(1, 2, 12, 8)
    node.dwc_q.to("meta")
    told = "conv: expected tensors on cpu, as q is; got one on meta"
    with pytest.raises(NodeArgumentError, match=told):
        node(q, q, q, grid=(3, 4))
