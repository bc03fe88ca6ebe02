"""Key masks of the node, in float64: against slow twins and shorter sequences, all gradients."""

import nodes
import pytest
import torch
from effort import examples
from hypothesis import given
from test_near import cases, mixed
from test_near import naive as naive_near

from t5fx.errors import T5Error
from t5fx.kernels import TTT, NodeArgumentError, ttt

close = torch.testing.assert_close
EXACT = {"atol": 1e-10, "rtol": 1e-9}
DEFAULT = {"neighborhood": 3, "coarse": 2}


def gradients(out, leaves, probe):
    return torch.autograd.grad(out, leaves, probe, materialize_grads=True)


def check(args, settings, key_mask, wanted, gate=None, impls=("reference", "auto")):
    """Output and gradients by both implementations."""
    leaves = [*nodes.tensors(args), *([] if gate is None else [gate])]
    probe = torch.randn_like(wanted)
    grads = gradients(wanted, leaves, probe)
    for impl in impls:
        out = ttt(*args, gate, **settings, impl=impl, key_mask=key_mask)
        close(out, wanted, **EXACT)
        close(gradients(out, leaves, probe), grads, **EXACT)


def random_mask(batch, tokens):
    """At least one token of each item counts."""
    mask = torch.rand(batch, tokens) < torch.rand(batch, 1)
    mask[torch.arange(batch), torch.randint(tokens, (batch,))] = True
    return mask


KINDS = [
    *(("swiglu", "dot", norm) for norm in ("instance_center", "instance_scale", "rms")),
    *(("mlp2", "l2", "instance"), ("mlp3", "dot", "none"), ("gate1", "l2", "layer")),
]


@pytest.mark.parametrize(("inner", "inner_loss", "key_norm"), KINDS)
def test_inner_models_and_key_norms(inner, inner_loss, key_norm):
    settings = {"inner": inner, "inner_loss": inner_loss, "key_norm": key_norm}
    args, settings = nodes.arguments(grid=(2, 3), key_norm_eps=0.3, requires_grad=True, **settings)
    mask = random_mask(2, 8)
    check(args, settings, mask, nodes.naive(args, **settings, key_mask=mask))


@pytest.mark.parametrize(
    ("grid", "locality"), [((5,), "dwc_qk"), ((3, 4), "dwc_v"), ((2, 3, 2), "dwc_qk")]
)
def test_convolutions_see_zeros_where_tokens_do_not_count(grid, locality):
    args, settings = nodes.arguments(grid=grid, locality=locality, suffix=2, requires_grad=True)
    mask = random_mask(2, args[0].shape[2])
    check(args, settings, mask, nodes.naive(args, **settings, key_mask=mask))


@examples(15)
@given(cases())
def test_near_attention(case):
    torch.manual_seed(1)
    args, settings = nodes.arguments(requires_grad=True, **case)
    gate = torch.randn(2, dtype=torch.float64, requires_grad=True)
    gate = gate if case["mix"] == "gate" else None
    mask = torch.rand(*args[0].shape[::2]) < 0.6
    plain = {n: x for n, x in settings.items() if n not in ("neighborhood", "coarse", "mix")}
    base = ttt(*args, **plain, key_mask=mask)
    names = ("scale", "grid", "prefix", "neighborhood", "coarse")
    near = naive_near(*args[:3], **{name: settings[name] for name in names}, key_mask=mask)
    wanted = mixed(base, near, case["prefix"], case["grid"], gate)
    check(args, settings, mask, wanted, gate)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("node", [{}, DEFAULT, *({"inner": inner} for inner in nodes.LINEAR)])
def test_an_item_with_padding_is_the_item_without_it(node, impl):
    """What is padded at the end is as if it were not there, for outputs and all gradients."""
    args, settings = nodes.arguments(
        batch=2, grid=(3, 4), prefix=1, suffix=5, requires_grad=True, **node
    )
    gate = torch.ones(2, dtype=torch.float64, requires_grad=True) if node is DEFAULT else None
    lengths = torch.tensor([14, 16])
    out = ttt(*args, gate, **settings, impl=impl, key_mask=torch.arange(18) < lengths[:, None])
    leaves = [*nodes.tensors(args), *([] if gate is None else [gate])]
    for item, length in enumerate(lengths.tolist()):
        short = [x[item : item + 1, :, :length] for x in args[:3]]
        alone = ttt(*short, *args[3:], gate, **settings, impl=impl)
        kept = out[item : item + 1, :, :length]
        close(kept, alone, **EXACT)
        probe = torch.randn_like(alone)
        found, wanted = (
            torch.autograd.grad(o, leaves, probe, retain_graph=True, materialize_grads=True)
            for o in (kept, alone)
        )
        close(found, wanted, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("key_norm", ["instance", "instance_scale", "instance_center"])
def test_all_true_is_none_to_the_bit(key_norm, impl, dtype):
    args, settings = nodes.arguments(
        grid=(6, 7), dtype=dtype, requires_grad=True, key_norm=key_norm, **DEFAULT
    )
    gate = torch.randn(2).to(dtype).requires_grad_()
    mask = torch.ones(2, 44, dtype=torch.bool)
    results = []
    for key_mask in (None, mask):
        out = ttt(*args, gate, **settings, impl=impl, key_mask=key_mask)
        leaves = [*nodes.tensors(args), gate]
        results.append((out, *gradients(out, leaves, torch.ones_like(out))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # Nor does another item's padding matter.
    mask[1, 30:] = False
    out = ttt(*args, gate, **settings, impl=impl, key_mask=mask)
    assert torch.equal(out[0], results[0][0][0]) and not torch.equal(out[1], results[0][0][1])


@pytest.mark.parametrize("eps", [1.0, 0.0])
@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("inner", ["swiglu", "mlp2", "linear", "performer"])
def test_where_no_token_counts_the_static_weights_answer(inner, impl, eps):
    args, settings = nodes.arguments(
        inner=inner, grid=(3, 4), locality="none", key_norm_eps=eps, requires_grad=True, **DEFAULT
    )
    gate = torch.randn(2, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[1] = False
    out = ttt(*args, gate, **settings, impl=impl, key_mask=mask)
    wanted = torch.zeros_like(out[1])
    if inner in nodes.INNERS:
        wanted = torch.stack(
            [nodes.F_W[inner](q, *w) for q, *w in zip(args[0][1], *args[3], strict=True)]
        )
    close(out[1, :, 1:-1], wanted[:, 1:-1], **EXACT)
    assert not out[1][:, [0, -1]].any()  # near attention alone
    for gradient in gradients(out.sum(), [*nodes.tensors(args), gate], None):
        assert gradient.isfinite().all()


def test_what_does_not_count_may_be_anything():
    args, settings = nodes.arguments(grid=(3, 4), **DEFAULT)
    gate, mask = torch.randn(2, dtype=torch.float64), random_mask(2, 14)
    out = ttt(*args, gate, **settings, key_mask=mask)
    others = ~mask[:, None, :, None]
    q, k, v = (
        torch.where(others & torch.tensor(i > 0), 1e3 * torch.randn_like(x), x)
        for i, x in enumerate(args[:3])
    )
    close(ttt(q, k, v, *args[3:], gate, **settings, key_mask=mask), out, **EXACT)


def test_a_mask_is_refused_where_it_does_not_fit():
    args, settings = nodes.arguments(grid=(3, 4))
    for mask in (torch.ones(2, 13) > 0, torch.ones(2, 14), torch.ones(2, 1, 1, 14) > 0):
        with pytest.raises(NodeArgumentError, match=r"key_mask: expected a bool tensor \[2, 14\]"):
            ttt(*args, **settings, key_mask=mask)
    mask = torch.ones(2, 14) > 0
    for changes, message in (
        (DEFAULT, "near attention"),
        ({"key_norm_eps": 0.0}, "key_norm_eps 0"),
    ):
        gate = torch.ones(2) if changes is DEFAULT else None
        with pytest.raises(T5Error, match=f"key_mask.*{message}"):
            ttt(*args, gate, **settings, **changes, impl="triton", key_mask=mask)


def test_the_module_takes_a_mask():
    node = TTT(2, 3, 4, 2, scale=0.5, **DEFAULT)
    q, k, v = torch.randn(2, 2, 14, 3), torch.randn(2, 2, 14, 3), torch.randn(2, 2, 14, 4)
    mask = random_mask(2, 14)
    weights, conv, mixing, _ = node.tensors()
    wanted = ttt(
        *(q, k, v, weights, conv, *mixing),
        scale=0.5,
        grid=(3, 4),
        prefix=1,
        key_mask=mask,
        **DEFAULT,
    )
    close(node(q, k, v, (3, 4), 1, mask), wanted)
