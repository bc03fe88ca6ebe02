"""The node against a slow twin, its derivatives, its invariances, its dtypes and strides."""

import nodes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t5fx.kernels import INNER_MODELS, flops, inner_model, ttt

close = torch.testing.assert_close


def assert_equals_naive(args, settings):
    """Outputs and the gradients of all tensors, in float64."""
    inputs = nodes.tensors(args)
    out, expected = ttt(*args, **settings), nodes.naive(args, **settings)
    close(out, expected, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, cotangent, materialize_grads=True)
    wanted = torch.autograd.grad(expected, inputs, cotangent, materialize_grads=True)
    close(grads, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("key_norm", nodes.KEY_NORMS)
@pytest.mark.parametrize("inner_loss", nodes.LOSSES)
@pytest.mark.parametrize("inner", nodes.INNERS)
def test_closed_form_is_the_gradient_step(inner, inner_loss, key_norm):
    args, settings = nodes.arguments(
        inner=inner, inner_loss=inner_loss, key_norm=key_norm, key_norm_eps=0.3, requires_grad=True
    )
    assert_equals_naive(args, settings)


@pytest.mark.parametrize("locality", ["dwc_qk", "dwc_v", "none"])
@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (2, 0), (0, 3), (1, 2)])
@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
def test_grids_prefix_and_suffix(grid, prefix, suffix, locality):
    args, settings = nodes.arguments(
        batch=2, grid=grid, prefix=prefix, suffix=suffix, locality=locality, requires_grad=True
    )
    assert_equals_naive(args, settings)


@pytest.mark.parametrize("key_norm", nodes.KEY_NORMS)
def test_one_token(key_norm):
    args, settings = nodes.arguments(
        grid=(1, 1), prefix=0, suffix=0, key_norm=key_norm, requires_grad=True
    )
    assert_equals_naive(args, settings)


@pytest.mark.parametrize("inner", nodes.INNERS + nodes.LINEAR)
def test_gradcheck(inner):
    grid = (2,) if inner in nodes.INNERS else (3,)
    args, settings = nodes.arguments(
        batch=1, head_dim=2, value_dim=2, grid=grid, suffix=0, inner=inner, requires_grad=True
    )

    def flat(q, k, v, *rest):
        count = len(args[3])
        return ttt(q, k, v, rest[:count], rest[count:], **settings)

    inputs = nodes.tensors(args)
    assert torch.autograd.gradcheck(flat, inputs, fast_mode=True)
    settings["impl"] = "reference"
    assert torch.autograd.gradgradcheck(flat, inputs, fast_mode=True)


sizes = st.integers(1, 4)
inners = st.sampled_from(nodes.INNERS)
losses = st.sampled_from(nodes.LOSSES)
key_norms = st.sampled_from(nodes.KEY_NORMS)


@given(
    grid=st.lists(sizes, min_size=1, max_size=3),
    prefix=st.integers(0, 2),
    inner=inners,
    key_norm=st.sampled_from(["instance", "instance_center"]),
    inner_loss=losses,
)
def test_shifting_all_keys_changes_nothing(grid, prefix, inner, key_norm, inner_loss):
    (q, k, v, *rest), settings = nodes.arguments(
        grid=grid, prefix=prefix, inner=inner, key_norm=key_norm, inner_loss=inner_loss
    )
    shift = 10 * torch.randn_like(k[:, :, :1])
    close(ttt(q, k + shift, v, *rest, **settings), ttt(q, k, v, *rest, **settings))


@given(inner=inners, inner_loss=losses, key_norm=key_norms, item=st.integers(0, 2))
def test_batch_items_do_not_mix(inner, inner_loss, key_norm, item):
    (q, k, v, *rest), settings = nodes.arguments(
        batch=3, inner=inner, inner_loss=inner_loss, key_norm=key_norm
    )
    alone = [x[item : item + 1] for x in (q, k, v)]
    close(ttt(*alone, *rest, **settings), ttt(q, k, v, *rest, **settings)[item : item + 1])


@given(tokens=st.integers(1, 6), inner=inners, inner_loss=losses, key_norm=key_norms)
def test_permuting_tokens_permutes_outputs_without_convolutions(
    tokens, inner, inner_loss, key_norm
):
    (q, k, v, weights, conv), settings = nodes.arguments(
        grid=(tokens,), inner=inner, inner_loss=inner_loss, key_norm=key_norm
    )
    conv = [torch.zeros_like(c) for c in conv]
    order = torch.randperm(q.shape[2])
    permuted = [x[:, :, order] for x in (q, k, v)]
    out = ttt(q, k, v, weights, conv, **settings)
    close(ttt(*permuted, weights, conv, **settings), out[:, :, order])


@given(tokens=st.integers(1, 6), inner=inners, inner_loss=losses, key_norm=key_norms)
def test_duplicating_tokens_changes_nothing_without_convolutions(
    tokens, inner, inner_loss, key_norm
):
    (q, k, v, weights, conv), settings = nodes.arguments(
        grid=(tokens,), inner=inner, inner_loss=inner_loss, key_norm=key_norm
    )
    conv = [torch.zeros_like(c) for c in conv]
    twice = [torch.cat([x, x], dim=2) for x in (q, k, v)]
    out = ttt(q, k, v, weights, conv, **settings)
    close(ttt(*twice, weights, conv, **settings), torch.cat([out, out], dim=2))


@given(prefix=st.integers(0, 2), suffix=st.integers(0, 2), grid=st.tuples(sizes, sizes))
def test_prefix_and_suffix_bypass_the_convolution_of_queries(prefix, suffix, grid):
    (q, k, v, weights, conv), settings = nodes.arguments(grid=grid, prefix=prefix, suffix=suffix)
    conv = [*conv[:2], torch.zeros_like(conv[2]), torch.zeros_like(conv[3])]
    out = ttt(q, k, v, weights, conv, **settings)
    without = ttt(q, k, v, weights, [torch.zeros_like(c) for c in conv], **settings)
    differs = (out != without).any(dim=(0, 1, 3))
    inside = torch.arange(q.shape[2])
    assert torch.equal(differs, (inside >= prefix) & (inside < q.shape[2] - suffix))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", nodes.INNERS)
def test_dtypes_compute_in_float32_and_return_the_queries_dtype(inner, dtype):
    args, settings = nodes.arguments(head_dim=8, value_dim=8, grid=(4, 4), inner=inner, dtype=dtype)
    q, k, v, weights, conv = args
    weights[:] = [w * 0.25 for w in weights]
    out = ttt(*args, **settings)
    q, k, v = q.double(), k.double(), v.double()
    exact = ttt(q, k, v, [w.double() for w in weights], [c.double() for c in conv], **settings)
    assert out.dtype == dtype
    # One rounding to the output's dtype; the rest is float32 noise.
    noise = 2e-6 * exact.abs().max().item()
    close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=noise)


def test_mixed_dtypes_compute_in_the_widest():
    (q, k, v, weights, conv), settings = nodes.arguments()
    exact = ttt(q.float().double(), k, v, weights, conv, **settings)
    out = ttt(q.float(), k, v, weights, conv, **settings)
    assert torch.equal(out, exact.float())


def test_autocast_does_not_narrow_the_node():
    args, settings = nodes.arguments(dtype=torch.float32, requires_grad=True)
    exact = ttt(*args, **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ttt(*args, **settings)
    assert torch.equal(out, exact)


@pytest.mark.parametrize("prefix", [0, 1])
def test_strided_views_of_a_packed_projection(prefix):
    (_, _, _, *rest), settings = nodes.arguments(value_dim=3, prefix=prefix, suffix=0)
    qkv = torch.randn(2, prefix + 4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    views = qkv.permute(2, 0, 3, 1, 4).unbind()
    copies = [x.contiguous() for x in views]
    assert not any(x.is_contiguous() for x in views)
    out, expected = ttt(*views, *rest, **settings), ttt(*copies, *rest, **settings)
    close(out, expected)
    cotangent = torch.randn_like(out)
    close(torch.autograd.grad(out, qkv, cotangent), torch.autograd.grad(expected, qkv, cotangent))


def test_expanded_and_flipped_inputs():
    args, settings = nodes.arguments(value_dim=3)
    (q, _, _, *rest) = args
    views = q.mT.contiguous().mT, q[:1].expand_as(q), q[:, :1].expand_as(q)
    copies = [x.contiguous() for x in views]
    close(ttt(*views, *rest, **settings), ttt(*copies, *rest, **settings))


@pytest.mark.parametrize("inner_loss", nodes.LOSSES)
@pytest.mark.parametrize("inner", nodes.INNERS)
def test_flops_are_those_of_the_matrix_products(inner, inner_loss):
    args, settings = nodes.arguments(
        heads=3, head_dim=4, value_dim=6, inner=inner, inner_loss=inner_loss, locality="none"
    )
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        ttt(*args, **settings)
    tokens = args[0].shape[2]
    counted = flops(tokens, 4, 6, inner=inner, inner_loss=inner_loss, num_heads=3, batch=2)
    assert counted == counter.get_total_flops()


def test_flops_of_the_default_model():
    assert flops(1000, 64) == inner_model("swiglu").flops(1000, 64, 64) == 18 * 1000 * 64**2


def test_inner_models_are_found_by_file():
    assert set(INNER_MODELS) == {*nodes.F_W, *nodes.SIMILARITY, "none"}
    assert all(inner_model(name).name == name for name in INNER_MODELS)
