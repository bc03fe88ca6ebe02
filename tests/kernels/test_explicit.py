"""The operators of the written-out node against the reference in float64, and what they keep."""

import math

import nodes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t5fx.errors import T5Error
from t5fx.kernels import explicit, ttt

close = torch.testing.assert_close
forward = torch.ops.t5fx.ttt_forward.default

sizes = st.integers(1, 4)
grids = st.lists(sizes, min_size=1, max_size=3)
localities = st.sampled_from(["dwc_qk", "none"])
# Elements of a block: one head and few tokens at a time, some heads, several batch items, all.
blocks = st.sampled_from([1, 10, 40, 200, 2**17])


def exact(args, settings):
    """The reference in float64 on leaves with the same values; the leaves too."""
    leaves = [x.detach().double().requires_grad_() for x in nodes.tensors(args)]
    count = 3 + len(args[3])
    doubles = (*leaves[:3], leaves[3:count], leaves[count:])
    return ttt(*doubles, **settings, impl="reference"), leaves


def strided(x, kind):
    """A leaf and a view of it, equal to x, in another memory layout."""
    if kind == "token-major":
        leaf = x.transpose(1, 2).contiguous().requires_grad_()
        return leaf, leaf.transpose(1, 2)
    if kind == "flipped":
        leaf = x.mT.contiguous().requires_grad_()
        return leaf, leaf.mT
    leaf = x.clone().requires_grad_()
    return leaf, leaf


layouts = st.sampled_from(["head-major", "token-major", "flipped"])


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    widths=st.tuples(sizes, sizes),
    grid=grids,
    ends=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    locality=localities,
    eps=st.sampled_from([1.0, 1e-2]),
    layout=st.tuples(layouts, layouts, layouts, layouts),
    block=blocks,
)
def test_output_and_gradients_equal_the_reference(
    batch, heads, widths, grid, ends, locality, eps, layout, block
):
    args, settings = nodes.arguments(
        batch=batch,
        heads=heads,
        head_dim=widths[0],
        value_dim=widths[1],
        grid=grid,
        prefix=ends[0],
        suffix=ends[1],
        locality=locality,
        key_norm_eps=eps,
    )
    expected, wanted = exact(args, settings)
    pairs = [strided(x, kind) for x, kind in zip(args[:3], layout, strict=False)]
    rest = [[x.requires_grad_() for x in group] for group in args[3:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explicit, "BLOCK", block)
        out = ttt(*(view for _, view in pairs), *rest, **settings)
        _, cotangent = strided(torch.randn_like(expected), layout[3])
        cotangent = cotangent.detach()
        views = [view for _, view in pairs]
        grads = torch.autograd.grad(out, [*views, *rest[0], *rest[1]], cotangent)
    close(out, expected, rtol=1e-10, atol=1e-10)
    close(grads, torch.autograd.grad(expected, wanted, cotangent), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [300, 2**17])
def test_narrow_dtypes_compute_in_float32(dtype, block, monkeypatch):
    monkeypatch.setattr(explicit, "BLOCK", block)
    args, settings = nodes.arguments(
        head_dim=8, value_dim=8, grid=(4, 5), dtype=dtype, requires_grad=True
    )
    with torch.no_grad():
        for w in args[3]:
            w *= 0.25
    expected, wanted = exact(args, settings)
    out = ttt(*args, **settings)
    cotangent = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, nodes.tensors(args), cotangent)
    exact_grads = torch.autograd.grad(expected, wanted, cotangent.double())
    results = zip((out, *grads), (expected, *exact_grads), strict=True)
    for result, wanted_result in results:
        assert result.dtype == dtype
        # One rounding to the dtype; the rest is float32 noise.
        noise = 1e-5 * wanted_result.abs().max().item()
        close(result.double(), wanted_result, rtol=torch.finfo(dtype).eps, atol=noise)


def test_mixed_dtypes_give_each_input_a_gradient_in_its_own():
    (q, k, v, weights, conv), settings = nodes.arguments(dtype=torch.bfloat16, requires_grad=True)
    weights = [w.detach().float().requires_grad_() for w in weights]
    out = ttt(q, k, v, weights, conv, **settings)
    inputs = [q, k, v, *weights, *conv]
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [g.dtype for g in grads] == [x.dtype for x in inputs]


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_does_not_narrow_the_gradients(grad):
    args, settings = nodes.arguments(dtype=torch.float32, requires_grad=True)

    def run():
        out = ttt(*args, **settings)
        return torch.autograd.grad(out.square().sum(), nodes.tensors(args)) if grad else out

    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = run()
    close(narrow, run(), rtol=0, atol=0)


def test_what_is_kept_for_the_backward_pass():
    (q, k, v, weights, conv), settings = nodes.arguments(
        head_dim=4, value_dim=4, grid=(9, 9), prefix=0, suffix=0, requires_grad=True
    )
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ttt(q, k, v, weights, conv, **settings)
    given_ = {x.data_ptr() for x in (q, k, v, *weights, *conv)}
    others = {pointer: size for pointer, size in kept.items() if pointer not in given_}
    # W1', W2', W3' of each batch item and head
    assert sorted(others.values()) == [2 * 2 * 4 * 4] * 3
    assert math.prod(q.shape) > max(others.values())


def test_a_second_derivative_is_refused_with_the_way_out():
    args, settings = nodes.arguments(requires_grad=True)
    (grad,) = torch.autograd.grad(ttt(*args, **settings).sum(), args[0], create_graph=True)
    with pytest.raises(T5Error, match="impl='reference'"):
        grad.square().sum().backward()


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({}, 1),
        ({"locality": "none"}, 1),
        ({"key_norm_eps": 0.1}, 1),
        ({"impl": "reference"}, 0),
        ({"inner": "mlp2"}, 0),
        ({"inner_loss": "l2"}, 0),
        ({"key_norm": "rms"}, 0),
        ({"locality": "dwc_v"}, 0),
        ({"requires_grad": False}, 0),
    ],
)
def test_which_nodes_are_one_call(settings, calls):
    args, settings = nodes.arguments(**({"requires_grad": True} | settings))

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += func is forward
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        ttt(*args, **settings)
        assert counter.seen == calls
        with torch.no_grad():
            ttt(*args, **settings)
    assert counter.seen == calls


# What torch's own checks warn of, about themselves.
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("locality", ["dwc_qk", "none"])
def test_opcheck_of_both_operators(locality):
    (q, k, v, weights, conv), settings = nodes.arguments(locality=locality, requires_grad=True)
    rest = (0.7, list(settings["grid"]), settings["prefix"], 1.0)
    results = torch.library.opcheck(forward, (q, k, v, weights, conv, *rest))
    assert set(results.values()) == {"SUCCESS"}
    tensors = [[x.detach() for x in group] for group in ((q, k, v), weights, conv)]
    (q, k, v), weights, conv = tensors
    out, *updated = forward(q, k, v, weights, conv, *rest)
    backward_args = (torch.randn_like(out), q, k, v, weights, conv, updated, *rest)
    results = torch.library.opcheck(torch.ops.t5fx.ttt_backward.default, backward_args)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("locality", ["dwc_qk", "none"])
def test_flops_of_both_passes(locality):
    args, settings = nodes.arguments(
        heads=3, head_dim=4, value_dim=6, locality=locality, requires_grad=True
    )

    def flops(impl):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            out = ttt(*args, **settings, impl=impl)
            ahead = counter.get_total_flops()
            torch.autograd.grad(out.sum(), nodes.tensors(args))
        return ahead, counter.get_total_flops() - ahead

    batch, _, tokens, _ = args[0].shape
    (ahead, back), (plain_ahead, plain_back) = flops("auto"), flops("reference")
    assert ahead == plain_ahead
    if locality == "none":
        # Computed again: x W1 and x W2 of keys and queries, v W3^T.
        assert back == plain_back + 2 * batch * 3 * tokens * 4 * (4 * 4 + 6)
    else:
        # Two 3 x 3 kernels on 2 x 2 cells, again, for their inputs and for themselves. (torch
        # counts the gradient of a depthwise kernel as that of a full one.)
        products = batch * 3 * tokens * 4 * (32 * 4 + 14 * 6)
        assert back == products + 3 * 2 * (2 * batch * 9 * 4 * (3 * 4))
