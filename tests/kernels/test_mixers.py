"""What stands in the inner model's place in a comparison: linear attentions, and nothing."""

from typing import get_args

import hypothesis.strategies as st
import nodes
import pytest
import torch
from hypothesis import given

from t5fx.config import Inner
from t5fx.kernels import INNER_MODELS, TTT, NodeArgumentError, flops, inner_model, ttt
from t5fx.kernels.inner import base

close = torch.testing.assert_close


@pytest.mark.parametrize("locality", ["dwc_qk", "dwc_v", "none"])
@pytest.mark.parametrize("key_norm", ["none", "instance"])
@pytest.mark.parametrize("inner", nodes.LINEAR)
def test_linear_attention_is_the_weighted_mean_of_all_pairs(inner, key_norm, locality, monkeypatch):
    monkeypatch.setattr(base, "EPS", 0.0)
    args, settings = nodes.arguments(
        inner=inner, key_norm=key_norm, locality=locality, requires_grad=True
    )
    if inner == "lit":  # else a query may have no key at all
        args[0].data.abs_()
        args[1].data[:, :, :3].abs_()
    inputs = nodes.tensors(args)
    out, expected = ttt(*args, **settings), nodes.naive(args, **settings)
    seen = expected.isfinite()  # with convolutions "lit" may still leave a query without any
    assert seen.float().mean() > 0.5
    close(out, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    cotangent = torch.randn_like(out)
    if seen.all():
        grads = torch.autograd.grad(out, inputs, cotangent, materialize_grads=True)
        wanted = torch.autograd.grad(expected, inputs, cotangent, materialize_grads=True)
        size = max(w.abs().max() for w in wanted)
        close([g / size for g in grads], [w / size for w in wanted], rtol=1e-9, atol=1e-9)


@given(inner=st.sampled_from(nodes.LINEAR), item=st.integers(0, 2))
def test_batch_items_do_not_mix(inner, item):
    (q, k, v, *rest), settings = nodes.arguments(batch=3, inner=inner)
    alone = [x[item : item + 1] for x in (q, k, v)]
    close(ttt(*alone, *rest, **settings), ttt(q, k, v, *rest, **settings)[item : item + 1])


@given(tokens=st.integers(1, 6), inner=st.sampled_from(nodes.LINEAR))
def test_permuting_and_duplicating_tokens_without_convolutions(tokens, inner):
    (q, k, v, weights, _), settings = nodes.arguments(
        grid=(tokens,), inner=inner, locality="none", key_norm="none"
    )
    out = ttt(q, k, v, weights, **settings)
    order = torch.randperm(q.shape[2])
    permuted = [x[:, :, order] for x in (q, k, v)]
    close(ttt(*permuted, weights, **settings), out[:, :, order])
    twice = [torch.cat([x, x], dim=2) for x in (q, k, v)]
    close(ttt(*twice, weights, **settings), torch.cat([out, out], dim=2))


def test_performers_features_approach_softmax():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 10, 8, dtype=torch.float64).unbind()
    exact = (0.3 * q @ k.mT).softmax(-1)

    def error(count):
        weight = torch.randn(1, 8, count, dtype=torch.float64)
        phi_q, phi_k = inner_model("performer").features(q, k, [weight], 0.3)
        pairs = phi_q @ phi_k.mT
        return (pairs / pairs.sum(-1, keepdim=True) - exact).norm() / exact.norm()

    assert error(30_000) < 0.2 < 0.4 < error(50)


def test_performers_draw_is_orthogonal_and_normal_in_length():
    weight = TTT(2, 16, 16, 1, scale=0.25, inner="performer", locality="none").wf.double()
    assert weight.shape == (2, 16, 64)
    for block in weight.split(16, dim=2):
        products = block.mT @ block
        off = products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))
        assert off.abs().max() < 1e-4
    assert abs(weight.square().mean().item() - 1) < 0.2


@pytest.mark.parametrize("inner", ["performer", "hedgehog"])
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_exponentials_neither_overflow_nor_vanish(inner, size):
    node = TTT(2, 16, 16, 1, scale=0.25, inner=inner, key_norm="none", locality="none")
    q, k, v = (size * torch.randn(3, 1, 2, 50, 16)).requires_grad_().unbind()
    out = node(q, k, v)
    out.square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in node.parameters())


def test_a_query_that_meets_no_key_gets_nothing():
    q, v = torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2)
    out = ttt(q, -q, v, [], scale=0.5, inner="lit", key_norm="none", locality="none")
    assert torch.equal(out, torch.zeros_like(v))


@pytest.mark.parametrize("inner", ["linear_projqk", "hedgehog"])
def test_projections_start_at_the_identity(inner):
    node = TTT(2, 4, 6, 1, scale=0.5, inner=inner, locality="none")
    weights = list(node.parameters())
    assert len(weights) == 2
    assert all(torch.equal(w, torch.eye(4).expand(2, 4, 4)) for w in weights)


def test_projected_linear_starts_as_linear():
    settings = {"scale": 0.5, "key_norm": "none", "locality": "none"}
    q, k, v = torch.randn(3, 1, 2, 9, 4).unbind()
    plain, projected = (TTT(2, 4, 4, 1, inner=i, **settings) for i in ("linear", "linear_projqk"))
    assert not list(plain.parameters())
    close(projected(q, k, v), plain(q, k, v))


@pytest.mark.parametrize("inner", nodes.LINEAR)
def test_flops_are_those_of_the_matrix_products(inner):
    args, settings = nodes.arguments(heads=3, head_dim=4, value_dim=6, inner=inner, locality="none")
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        ttt(*args, **settings)
    counted = flops(args[0].shape[2], 4, 6, inner=inner, num_heads=3, batch=2)
    assert counted == counter.get_total_flops()


def test_a_sliding_window_alone_is_softmax_where_it_sees_all():
    settings = {"inner": "none", "key_norm": "none", "locality": "none", "coarse": 0}
    node = TTT(2, 8, 6, 2, scale=8**-0.5, neighborhood=5, **settings)
    assert [name for name, _ in node.named_parameters()] == ["gate"]
    q, k = torch.randn(2, 1, 2, 28, 8).unbind()
    v = torch.randn(1, 2, 28, 6)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    close(node(q, k, v, (5, 5), 2), exact)
    far = torch.randn(1, 2, 38, 8), torch.randn(1, 2, 38, 8), torch.randn(1, 2, 38, 6)
    moved = [x.clone() for x in far]
    moved[2][:, :, -1] += 1  # of the last row, which tokens of the first do not see
    first, last = node(*far, (6, 6), 2), node(*moved, (6, 6), 2)
    assert torch.equal(first[:, :, 2], last[:, :, 2])
    assert not torch.equal(first[:, :, -1], last[:, :, -1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner": "linear", "inner_loss": "l2"}, "inner_loss: expected \"dot\", .* got 'l2'"),
        ({"inner": "none"}, "near attention alone: expected .* got key_norm='instance', locality"),
        (
            {"inner": "none", "key_norm": "none", "locality": "none", "mix": "half"},
            "got mix='half'",
        ),
    ],
)
def test_settings_that_are_not_read_are_refused(settings, message):
    with pytest.raises(NodeArgumentError, match=message):
        TTT(2, 4, 4, 1, scale=0.5, **settings)


def test_nothing_needs_near_attention():
    x = torch.randn(1, 2, 5, 4)
    settings = {"inner": "none", "key_norm": "none", "locality": "none"}
    with pytest.raises(NodeArgumentError, match="expected near attention with inner 'none'"):
        ttt(x, x, x, [], scale=0.5, **settings)


def test_the_options_know_every_mixer():
    assert set(get_args(Inner)) == set(INNER_MODELS)
