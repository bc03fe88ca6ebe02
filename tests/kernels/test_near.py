"""Near attention: against loops over tokens, in float64, with all gradients; its operators."""

import itertools
import math

import nodes
import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import t5fx
from t5fx.kernels import TTT, NodeArgumentError, flops, ttt
from t5fx.kernels.near import Near
from t5fx.kernels.variant import AFFINE

close = torch.testing.assert_close
EXACT = {"atol": 1e-10, "rtol": 1e-9}


def naive(q, k, v, *, scale, grid, prefix, neighborhood, coarse, key_mask=None):
    """Near attention token by token, from the description."""
    if key_mask is not None:
        items = zip(q[:, None], k[:, None], v[:, None], key_mask, strict=True)
        places = (scale, grid, prefix, neighborhood, coarse)
        return torch.cat([_naive(*item, *places) for item in items])
    return _naive(q, k, v, torch.ones(q.shape[2]), scale, grid, prefix, neighborhood, coarse)


def _naive(q, k, v, counts, scale, grid, prefix, neighborhood, coarse):
    cells = list(itertools.product(*map(range, grid)))
    tokens = q.shape[2]
    others = [t for t in range(tokens) if not prefix <= t < prefix + len(cells)]
    rows = []
    for t in range(tokens):
        if t in others:
            seen = [[j] for j in range(tokens)]
        else:
            around = [
                range(first, min(first + neighborhood, size))
                for x, size in zip(cells[t - prefix], grid, strict=True)
                for first in [max(0, min(x - neighborhood // 2, size - neighborhood))]
            ]
            window = [prefix + cells.index(c) for c in itertools.product(*around)]
            seen = [[j] for j in (*others, *window)]
            groups = {}
            for i, cell in enumerate(cells):
                name = tuple(x * coarse // size for x, size in zip(cell, grid, strict=True))
                if coarse and prefix + i not in window:
                    groups.setdefault(name, []).append(prefix + i)
            seen += groups.values()
        seen = [kept for some in seen if (kept := [j for j in some if counts[j]])]
        if not seen:
            rows.append(torch.zeros_like(v[:, :, :1]))
            continue
        keys = torch.stack([k[:, :, some].mean(2) for some in seen], 2)
        values = torch.stack([v[:, :, some].mean(2) for some in seen], 2)
        bias = torch.tensor([len(some) for some in seen], dtype=q.dtype).log()
        logits = scale * (q[:, :, t : t + 1] @ keys.mT) + bias
        rows.append(logits.softmax(-1) @ values)
    return torch.cat(rows, 2)


def mixed(base, near, prefix, grid, gate=None):
    """What the node returns, of its two parts."""
    joined = 0.5 * (base + near) if gate is None else base + gate[:, None, None] * near
    t = torch.arange(near.shape[2])
    on_grid = (t >= prefix) & (t < prefix + math.prod(grid))
    return torch.where(on_grid[:, None], joined, near)


@st.composite
def cases(draw):
    axes = draw(st.integers(1, 3))
    grid = tuple(
        draw(st.integers(1, 9 if axes == 1 else 5 if axes == 2 else 3)) for _ in range(axes)
    )
    side, coarse = draw(st.sampled_from([(3, 0), (5, 0), (0, 2), (3, 2), (3, 3), (5, 4), (7, 2)]))
    return {
        "grid": grid,
        "prefix": draw(st.integers(0, 2)),
        "suffix": draw(st.integers(0, 2)),
        "neighborhood": side,
        "coarse": coarse,
        "mix": draw(st.sampled_from(["gate", "half"])),
        "value_dim": draw(st.integers(1, 5)),
        "batch": draw(st.integers(1, 2)),
    }


def call(case, impl, args, gate):
    _, settings = args
    found = settings | {"impl": impl}
    return ttt(*args[0], gate if case["mix"] == "gate" else None, **found)


@examples(25)
@given(cases())
def test_output_and_gradients(case):
    torch.manual_seed(0)
    args = nodes.arguments(requires_grad=True, **case)
    gate = torch.randn(2, dtype=torch.float64, requires_grad=True)
    q, k, v = args[0][:3]
    leaves = [*nodes.tensors(args[0]), *([gate] if case["mix"] == "gate" else [])]
    plain = {n: x for n, x in args[1].items() if n not in ("neighborhood", "coarse", "mix")}
    base = ttt(*args[0], **plain)
    names = ("scale", "grid", "prefix", "neighborhood", "coarse")
    near = naive(q, k, v, **{name: args[1][name] for name in names})
    by = gate if case["mix"] == "gate" else None
    wanted = mixed(base, near, case["prefix"], case["grid"], by)
    probe = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, leaves, probe)
    for impl in ("reference", "auto"):
        out = call(case, impl, args, gate)
        close(out, wanted, **EXACT)
        for found, expected in zip(torch.autograd.grad(out, leaves, probe), grads, strict=True):
            close(found, expected, **EXACT)


@pytest.mark.parametrize("mix", ["gate", "half"])
def test_parameters_alone_need_no_backward_of_the_attention(mix):
    case = {"grid": (4, 5), "neighborhood": 3, "coarse": 2, "mix": mix}
    args, settings = nodes.arguments(**case)
    gate = torch.randn(2, dtype=torch.float64, requires_grad=True)
    leaves = [x.requires_grad_() for x in args[3]] + ([gate] if mix == "gate" else [])
    results = []
    for impl in ("reference", "auto"):
        out = call(case, impl, (args, settings), gate)
        results.append(torch.autograd.grad(out.square().sum(), leaves))
    for found, expected in zip(*results, strict=True):
        close(found, expected, **EXACT)


DIT5 = {"inner": "mlp2", "inner_loss": "l2", "neighborhood": 5, "mix": "half"}


@pytest.mark.parametrize(
    "node", [DIT5, {"neighborhood": 3, "coarse": 2}, {"locality": "none"}, {"impl": "reference"}]
)
def test_scales_and_offsets_of_q_and_k(node):
    """DiT5's node as published, and others, against loops over tokens, with all gradients."""
    grid, prefix = (6, 7), 1
    args, settings = nodes.arguments(grid=grid, prefix=prefix, requires_grad=True, **node)
    q, k, v, weights, conv = args
    affine = [torch.randn(2 * 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    gated = settings.get("coarse") is not None
    gate = torch.randn(2, dtype=torch.float64, requires_grad=True) if gated else None
    out = ttt(*args, gate, affine, qk_affine=True, **settings)

    q_scale, q_offset, k_scale, k_offset = (x.view(2, 1, 3) for x in affine)
    names = ("scale", "grid", "prefix", "inner", "inner_loss", "locality")
    plain = {name: settings[name] for name in names if name in settings}
    moved = (q * q_scale + q_offset, k * k_scale + k_offset, v, weights, conv)
    wanted = nodes.naive(moved, **plain)
    if "neighborhood" in node:
        sizes = {"neighborhood": node["neighborhood"], "coarse": node.get("coarse", 0)}
        near = naive(q, k, v, scale=settings["scale"], grid=grid, prefix=prefix, **sizes)
        wanted = mixed(wanted, near, prefix, grid, gate)
    close(out, wanted, **EXACT)
    probe = torch.randn_like(wanted)
    leaves = [*nodes.tensors(args), *affine, *([gate] if gated else [])]
    grads = (torch.autograd.grad(o, leaves, probe) for o in (out, wanted))
    for found, expected in zip(*grads, strict=True):
        close(found, expected, **EXACT)


def test_fresh_scales_and_offsets_change_nothing():
    torch.manual_seed(0)
    settings = {"scale": 0.5, "neighborhood": 3, "name": "one"}
    q, k, v = torch.randn(3, 2, 2, 13, 4).unbind()
    plain, moved = (TTT(2, 4, 4, 2, qk_affine=some, **settings) for some in (False, True))
    assert moved.state_dict().keys() - plain.state_dict().keys() == set(AFFINE)
    assert all(moved.state_dict()[name].shape == (2 * 4,) for name in AFFINE)
    assert torch.equal(moved(q, k, v, (3, 4)), plain(q, k, v, (3, 4)))
    half = [x.bfloat16() for x in (q, k, v)]
    assert moved(*half, (3, 4)).dtype == torch.bfloat16
    args, settings = nodes.arguments()
    for affine, message in (
        ([], "affine: expected q_scale, q_offset, k_scale, k_offset; got 0"),
        ([torch.ones(3)] * 4, r"q_scale: expected shape \[6\]; got \[3\]"),
    ):
        with pytest.raises(NodeArgumentError, match=message):
            ttt(*args, None, affine, qk_affine=True, **settings)
    with pytest.raises(NodeArgumentError, match="affine: expected nothing; got 4"):
        ttt(*args, None, [torch.ones(6)] * 4, **settings)


def test_every_token_of_the_grid_is_seen_once():
    """With one cell for each token, or a window of the whole grid, it is softmax attention."""
    for case in ({"coarse": 6}, {"neighborhood": 11}, {"neighborhood": 3, "coarse": 6}):
        args, settings = nodes.arguments(grid=(5, 6), **case)
        for weight in args[3]:
            weight.zero_()
        out = ttt(*args, torch.ones(2, dtype=torch.float64), **settings)
        q, k, v = args[:3]
        close(out, scaled_dot_product_attention(q, k, v, scale=settings["scale"]), **EXACT)


def test_windows_move_inwards_at_borders():
    near = Near.of(torch.zeros(()), (1, 7), 0, 3, 0)
    starts = near.window.tokens.unflatten(1, (3, 3))[:, 0, 0]
    assert starts.tolist() == [0, 0, 1, 2, 3, 4, 4]
    assert near.window.beyond.unflatten(1, (3, 3))[:, :, 0].tolist() == [[False, True, True]] * 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_summed_in_float32(dtype):
    case = {"grid": (6, 7), "neighborhood": 5, "coarse": 3, "dtype": dtype}
    args, settings = nodes.arguments(**case)
    gate = torch.randn(2).to(dtype)
    wide = [[y.double() for y in x] if isinstance(x, list) else x.double() for x in args]
    wanted = ttt(*wide, gate.double(), **settings)
    for impl in ("reference", "auto"):
        out = ttt(*args, gate, **settings, impl=impl)
        assert out.dtype == dtype
        close(
            out.double(), wanted, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps
        )


# What torch's own checks warn of, about themselves.
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_opcheck():
    (q, k, v, _, _), _ = nodes.arguments(grid=(4, 5), requires_grad=True)
    base = torch.randn_like(v).requires_grad_()
    gate = torch.randn(2, dtype=torch.float64, requires_grad=True)
    plain = (0.7, [4, 5], 1, 3, 2, None)
    results = torch.library.opcheck(
        torch.ops.t5fx.near_forward.default, (q, k, v, base, [gate], *plain)
    )
    assert set(results.values()) == {"SUCCESS"}
    with torch.no_grad():
        args = (torch.randn_like(v), q.detach(), k.detach(), v.detach(), [gate.detach()], *plain)
    results = torch.library.opcheck(torch.ops.t5fx.near_backward.default, args)
    assert set(results.values()) == {"SUCCESS"}


def test_flops_are_what_the_counter_counts():
    case = {"grid": (6, 7), "prefix": 2, "suffix": 1, "neighborhood": 3, "coarse": 2}
    args, settings = nodes.arguments(requires_grad=True, value_dim=5, head_dim=3, **case)
    gate = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ttt(*args, gate, **settings)
    about = {"grid": (6, 7), "num_heads": 2, "batch": 2, "neighborhood": 3, "coarse": 2}
    convolutions = 2 * 2 * 42 * (2 * 3 * 9) * 2
    counted = counter.get_total_flops() - convolutions
    assert counted == flops(45, 3, 5, **about)
    pairs = 42 * (9 + 4 + 3) + 3 * 45
    assert flops(45, 3, 5, **about) - flops(45, 3, 5, num_heads=2, batch=2) == 4 * 2 * 8 * pairs


def test_module_and_wrong_arguments():
    module = TTT(2, 4, 6, 2, scale=0.5, neighborhood=3, coarse=2)
    assert torch.equal(module.gate, torch.ones(2))
    assert "neighborhood=3, coarse=2, mix='gate'" in repr(module)
    assert "gate" not in TTT(2, 4, 6, 2, scale=0.5, neighborhood=3, mix="half").state_dict()
    assert "gate" not in TTT(2, 4, 6, 2, scale=0.5).state_dict()
    args, settings = nodes.arguments(grid=(3, 3))
    for wrong, message in (
        ({"neighborhood": 4}, "neighborhood: expected 0 or an odd number"),
        ({"neighborhood": 1}, "neighborhood: expected 0 or an odd number"),
        ({"coarse": -1}, "coarse: expected a number of cells"),
        ({"mix": "sum"}, "mix: expected one of 'gate', 'half'"),
        ({"neighborhood": 3}, r"mixing: expected a gate, \[H\]; got 0"),
    ):
        with pytest.raises(NodeArgumentError, match=message):
            ttt(*args, **settings | wrong)
    with pytest.raises(NodeArgumentError, match=r"gate: expected shape \[2\]; got \[3\]"):
        ttt(*args, torch.ones(3), **settings | {"neighborhood": 3})
    for wrong in ({"neighborhood": 2}, {"coarse": 1.5}, {"mix": "sum"}, {"qk_affine": 1}):
        with pytest.raises(t5fx.errors.ConfigError, match=f"{next(iter(wrong))}: expected"):
            t5fx.LinearizeConfig(**wrong)
