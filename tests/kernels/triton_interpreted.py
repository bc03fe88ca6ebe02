"""The Triton kernels in Triton's interpreter, on a CPU. Run by test_triton.py, in a process of its
own: the interpreter is chosen for a whole process, before the kernels are imported."""

import dataclasses
import math

import pytest
import torch
import triton
import triton.language as tl
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import InterpretedFunction
from triton_cases import (
    arguments,
    assert_close,
    check,
    poisoned,
    run,
    run_op,
    run_reference,
    split,
)

from t5fx.bench.gpu import interpreter
from t5fx.bench.gpu.interpreter import mended
from t5fx.errors import T5Error
from t5fx.kernels import TTT, ttt
from t5fx.kernels.errors import NodeArgumentError
from t5fx.kernels.triton_kernels import backward, configs, convolution, forward, launch, op, parity
from t5fx.kernels.triton_kernels import tiles as tiles_of
from t5fx.kernels.triton_kernels.forward import empty_saved, fill_tables
from t5fx.kernels.triton_kernels.query import query_output

#: The sigmoid's, of what is far below zero: 0 comes out, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["BHND", "packed", "channels first", "every other"]


@pytest.fixture(autouse=True)
def _mended():
    with mended():
        yield


sizes = st.integers(1, 4)


def test_this_is_the_interpreter():
    assert isinstance(query_output, InterpretedFunction)


@examples(3)
@given(
    grid=st.lists(sizes, min_size=1, max_size=3).map(tuple),
    prefix=st.integers(0, 2),
    suffix=st.integers(0, 2),
    head_dim=st.sampled_from([16, 24]),
    value_dim=st.sampled_from([16, 20]),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
def test_equals_the_reference(grid, prefix, suffix, head_dim, value_dim, layout, dtype):
    check(
        batch=1, heads=2, grid=grid, prefix=prefix, suffix=suffix, head_dim=head_dim,
        value_dim=value_dim, layout=layout, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("grid", [(1,), (7,), (7, 9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_counts(grid, dtype):
    check(batch=1, heads=1, head_dim=16, value_dim=16, grid=grid, prefix=0, suffix=0, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [(37,), (5, 9)])
def test_what_is_loaded_ahead_changes_no_bit(grid, dtype, monkeypatch):
    """Several chunks of several tiles, and tiles off the grid before and behind them."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    tensors, keywords, _ = arguments(
        batch=1, heads=1, head_dim=24, value_dim=16, grid=grid, prefix=3, suffix=17, dtype=dtype,
        layout="packed",
    )  # fmt: skip
    q, k, v, weights, conv = split(tensors)
    results = []
    for ahead in range(3):
        row = interpreter.SMALL._replace(ahead=ahead)
        rows = {"query_output": dict.fromkeys(configs.WIDTHS, row)}
        for name in ("HALF", "SMALL", "WIDE"):
            monkeypatch.setattr(configs, name, getattr(configs, name) | rows)
        torch.manual_seed(0)  # of the tanh that is off
        with poisoned():
            results.append(forward(q, k, v, weights, conv, **keywords)[0])
    assert results[0].isfinite().all()
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_without_convolution(layout):
    check(
        batch=2, heads=2, head_dim=16, value_dim=24, grid=(9,), layout=layout, locality="none",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_key_mask(dtype):
    """The kernels get operands for which they compute what the reference does with the mask."""
    tensors, keywords, grad = arguments(
        batch=2, heads=1, head_dim=16, value_dim=16, grid=(2, 3), dtype=dtype
    )
    mask = torch.arange(8) < torch.tensor([[8], [5]])
    case = (tensors, keywords | {"key_mask": mask}, grad)
    results = run_op(*case)
    assert_close(results, run_reference(*case), parity.TOLERANCE[dtype])
    whole = run_op(tensors, keywords | {"key_mask": mask[:1].expand(2, -1)}, grad)
    plain = run_op(tensors, keywords, grad)
    assert all(torch.equal(a, b) for a, b in zip(whole, plain, strict=True))
    q, k, v, weights, conv = split(tensors)
    for changes in ({"neighborhood": 3}, {"key_norm_eps": 0.0}):
        gate = torch.ones(1) if "neighborhood" in changes else None
        with pytest.raises(NodeArgumentError, match="key_mask: expected what kernels take"):
            ttt(q, k, v, weights, conv, gate, **keywords | changes, key_mask=mask, impl="triton")


def test_heads_of_72():
    check(batch=1, heads=1, head_dim=72, value_dim=16, grid=(2, 2), prefix=0, dtype=torch.float16)


def test_three_axes():
    check(batch=1, heads=1, head_dim=16, value_dim=16, grid=(2, 2, 3), prefix=0)


@triton.jit
def tile_by_tile(
    x, out, taps, offsets, mean, rstd, quads, stride_b, stride_h, stride_n, stride_d, tiles,
    num_quads, prefix, grid_tokens, num_tokens, g1, g2,
    D: tl.constexpr, NDIM: tl.constexpr, UNIT: tl.constexpr, NORM: tl.constexpr,
    CENTRED: tl.constexpr, UNROLL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the kernels multiply, ``[B, N, H, D]`` float32: one program for each head."""
    group, heads = tl.program_id(0), tl.num_programs(0)
    base = tiles_of.head_base(x, group, heads, stride_b, stride_h, UNIT)
    channels = tl.arange(0, BLOCK_D)
    statistics = (None, None, None, None)
    if NORM:
        statistics = convolution.load_statistics(mean, rstd, group, tl.arange(0, BLOCK_D // 2))
        offsets = convolution.group_offsets(offsets, group, NDIM, BLOCK_D)
    places = (num_quads, prefix, grid_tokens, num_tokens, g1, g2)
    for tile in range(tiles):
        at, known = tiles_of.quad_places(tile, 0, places, BLOCK_N)
        quad = tl.load(quads + at, mask=known, other=0)
        place = tiles_of.tile_place(tile, quad, places, NDIM, BLOCK_N)
        result = convolution.convolved_tile(
            base, quads, place, places, stride_n, stride_d,
            convolution.head_taps(taps, group, NDIM, BLOCK_D), offsets, statistics,
            D, NDIM, NORM, CENTRED, UNIT, UNROLL, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        at, known = tiles_of.quad_places(tile, tl.arange(0, BLOCK_N), places, BLOCK_N)
        quad = tl.load(quads + at, mask=known, other=tiles_of.NONE)
        tokens, exist = tiles_of.tile_tokens(place, quad, places, NDIM, BLOCK_N)
        start = out + (place[2] * heads + group) * D
        tiles_of.store_tile(start, result, tokens, channels, exist, D, heads)


def tables(q, k, v, conv, keywords):
    """What a forward saves, but for W', and its sizes."""
    shape = launch.site(q, k, v, **{n: x for n, x in keywords.items() if n != "scale"})
    eps = keywords["key_norm_eps"]
    saved = empty_saved(q, k, v, conv, keywords["grid"], eps)
    fill_tables(saved, k, conv, shape, eps)
    return saved, shape


def key_norm(k, eps):
    deviations = k - k.mean(2, keepdim=True)
    return deviations / (deviations.square().mean(2, keepdim=True) + eps).sqrt()


def plus_convolved(x, weight, bias, grid, prefix):
    """x + conv(x) of ``[1, H, N, D]``."""
    size, (_, heads, _, dim) = math.prod(grid), x.shape
    image = x[:, :, prefix : prefix + size].mT.reshape(1, heads * dim, *grid)
    convolution = getattr(torch.nn.functional, f"conv{len(grid)}d")
    more = convolution(image, weight, bias, padding=1, groups=heads * dim)
    more = more.reshape(1, heads, dim, size).mT
    return x + torch.nn.functional.pad(more, (0, 0, prefix, x.shape[2] - prefix - size))


@examples(6)
@given(
    grid=st.lists(sizes, min_size=1, max_size=3).map(tuple),
    prefix=st.integers(0, 9),
    suffix=st.integers(0, 9),
    dim=st.sampled_from([8, 17, 20]),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    shift=st.sampled_from([0.0, 4.0]),
    eps=st.sampled_from([1.0, 1e-3]),
    unroll=st.booleans(),
    block_n=st.sampled_from([8, 16]),
)
def test_normed_and_convolved_keys(
    grid, prefix, suffix, dim, layout, dtype, shift, eps, unroll, block_n
):
    """As the kernels see them before they round them for the products."""
    tensors, keywords, _ = arguments(
        batch=1, heads=2, head_dim=dim, value_dim=16, grid=grid, prefix=prefix, suffix=suffix,
        layout=layout, dtype=dtype, shift=shift,
    )  # fmt: skip
    q, k, v, _, conv = split(tensors)
    keywords["key_norm_eps"] = eps
    with poisoned():
        saved, shape = tables(q, k, v, conv, keywords)
        out = k.new_empty(1, k.shape[2], 2, dim, dtype=torch.float32)
    parts = shape.tile_chunks(configs.Config(block_n, 0, 4, 1, 1))
    quads, *places = shape.places(saved.quads)
    unit, steps = launch.strides(k)
    tile_by_tile[(2,)](
        *(k, out, saved.taps[1], saved.offsets, saved.mean, saved.rstd, quads),
        *(*steps, parts.tiles, *places),
        D=dim, NDIM=len(grid), UNIT=unit, NORM=True, CENTRED=shape.centred,
        UNROLL=unroll, BLOCK_N=block_n, BLOCK_D=launch.padded(dim),
    )  # fmt: skip
    weight, bias = (c.double() for c in conv[2:])
    wanted = plus_convolved(key_norm(k.double(), eps), weight, bias, grid, prefix)
    error = (out.transpose(1, 2) - wanted).abs().max()
    assert error <= 2e-5 * (1 + shift) * wanted.abs().max()


def test_the_same_bits_each_time():
    case = arguments(batch=1, heads=2, head_dim=24, value_dim=16, grid=(20,), prefix=0)
    with poisoned():
        first, second = run(*case), run(*case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_shift_of_all_keys_changes_nothing():
    """The shift is as large as float32 can bear: the keys are multiples of 2**-11."""
    sizes = {"batch": 1, "heads": 1, "head_dim": 16, "value_dim": 16, "grid": (6, 6)}
    tensors, keywords, grad_out = arguments(**sizes)
    tensors[1] = (tensors[1] * 2048).round() / 2048
    here = run(tensors, keywords, grad_out)
    tensors[1] = tensors[1] + 1024
    there = run(tensors, keywords, grad_out)
    assert_close(there, [t.double() for t in here], 2e-4)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_keys_far_from_zero(dtype):
    """Of 16 bits they lose their mean after the convolution, at borders and off the grid too."""
    check(
        batch=1, heads=1, head_dim=16, value_dim=16, grid=(3, 5), prefix=1, suffix=1, shift=64.0,
        dtype=dtype,
    )  # fmt: skip


def test_a_constant_channel_and_a_small_epsilon():
    """Nothing divides its large mean but eps: the mean must go before the convolution."""
    tensors, keywords, grad_out = arguments(
        batch=1, heads=1, head_dim=16, value_dim=16, grid=(3, 5), dtype=torch.float16
    )
    tensors[1][..., 3] = 1000.0
    keywords["key_norm_eps"] = 1e-6
    out, _ = forward(*split(tensors), **keywords)
    wanted, *_ = run_reference(tensors, keywords, grad_out)
    assert (out.double() - wanted).norm() <= 4e-3 * wanted.norm()


@pytest.mark.parametrize("keys", [False, True])
def test_tokens_that_do_not_exist_overflow_nothing(keys):
    """Behind the last column of an odd grid, where neighbours with a large tap reach."""
    tensors, keywords, grad_out = arguments(
        batch=1, heads=1, head_dim=16, value_dim=16, grid=(1, 63 if keys else 3), prefix=0,
        suffix=0, dtype=torch.float16,
    )  # fmt: skip
    q, k, *_, weight_q, bias_q, weight_k, bias_k = tensors
    for tensor in (weight_q, bias_q, weight_k, bias_k):
        tensor.zero_()
    if keys:
        keywords |= {"key_norm_eps": 1e-5, "scale": 1e-3}
        k.mul_(0.01)[..., -1, :] = 1.0
        weight_k[:, 0, 1, 0] = 150.0
    else:
        q.zero_()[..., -1, :] = 10.0
        weight_q[:, 0, 1, 0] = 30.0
    assert all(t.isfinite().all() for t in run(tensors, keywords, grad_out))


@pytest.mark.parametrize(
    ("grads", "values", "locality"),
    [
        (1e-7, 1.0, "dwc_qk"),
        (1e-4, 1e-4, "dwc_qk"),
        (1e3, 1e3, "dwc_qk"),
        (1e-7, 1e-4, "none"),
    ],
)
def test_float16_of_any_size(grads, values, locality):
    """What is small or large in all has the errors of what is not, but for those of the dtype of
    the results. A gradient of 0 stays 0.
    """
    tensors, keywords, grad_out = arguments(
        batch=1, heads=2, head_dim=16, value_dim=16, grid=(15,), prefix=1, suffix=1,
        locality=locality, dtype=torch.float16,
    )  # fmt: skip
    tensors[2] = tensors[2] * values
    keywords["scale"] /= max(1.0, values * grads)  # or the gradient of k has no room in float16
    grad_out = grad_out * grads
    if locality == "none":
        grad_out[0, 0] = 0.0
    with poisoned():
        results = run(tensors, keywords, grad_out)
    if locality == "none":
        assert not results[1][0, 0].any()
    for name, got, want in zip(
        parity.NAMES, results, run_reference(tensors, keywords, grad_out), strict=False
    ):
        rounding = 2.0**-25 * want.numel() ** 0.5 if got.dtype == torch.float16 else 0.0
        error = (got.double() - want).norm()
        assert error <= 4e-3 * want.norm() + rounding, f"{name}: {error:.2e} of {want.norm():.2e}"


def test_no_batch_items():
    tensors, keywords, _ = arguments(batch=1, heads=1, head_dim=16, value_dim=16, grid=(2,))
    nothing = [t[:0] for t in tensors[:3]]
    with pytest.raises(NodeArgumentError, match="expected at least one batch item"):
        forward(*nothing, tensors[3:6], tensors[6:], **keywords)


def test_expanded_gradient_of_the_output():
    tensors, keywords, grad_out = arguments(batch=1, heads=1, head_dim=16, value_dim=16, grid=(5,))
    ones = torch.ones((), dtype=grad_out.dtype).expand_as(grad_out)
    expanded, dense = (run(tensors, keywords, g) for g in (ones, ones.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@pytest.mark.parametrize("locality", ["dwc_qk", "none"])
def test_impl_triton_runs_the_kernels(locality):
    case = arguments(
        batch=2, heads=2, head_dim=16, value_dim=24, grid=(3, 3), prefix=0, suffix=0,
        locality=locality, dtype=torch.float16,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(run_op(*case), run(*case), strict=True))


def test_impl_triton_under_checkpointing_and_autocast():
    tensors, keywords, grad_out = arguments(batch=1, heads=1, head_dim=16, value_dim=16, grid=(5,))
    wanted = run_op(tensors, keywords, grad_out)
    leaves = [t.detach().requires_grad_() for t in tensors]

    def call(*leaves):
        return ttt(*split(leaves), **keywords, impl="triton")

    with torch.autocast("cpu", torch.bfloat16):
        out = checkpoint(call, *leaves, use_reentrant=False)
    grads = torch.autograd.grad(out, leaves, grad_out)
    got = [out.detach(), *grads]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_impl_triton_is_differentiable_once():
    tensors, keywords, _ = arguments(batch=1, heads=1, head_dim=16, value_dim=16, grid=(2,))
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = ttt(*split(leaves), **keywords, impl="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(T5Error, match="expected to be differentiated once"):
        grad.sum().backward()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_saved_for_the_backward_pass(dtype, keep, monkeypatch):
    """q, k, v, the parameters, and of each head W' and rows of channels; a word of four tokens; of
    some widths the convolved keys.
    """
    monkeypatch.setattr(configs, "KEPT", (16,) if keep else ())
    tensors, keywords, _ = arguments(
        batch=2, heads=3, head_dim=16, value_dim=16, grid=(30,), dtype=dtype
    )
    leaves = [t.detach().requires_grad_() for t in tensors]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ttt(*split(leaves), **keywords, impl="triton")
    own = {t.data_ptr() for t in leaves}
    rest = [t for t in kept if t.data_ptr() not in own]
    quads = [t for t in rest if t.dtype == torch.int64]
    assert [len(t) for t in quads] == [8]
    keys = [t for t in rest if t.shape == (2, 32, 3, 16)]
    assert len(keys) == keep
    rest = [t for t in rest if t.shape != (2, 32, 3, 16)]
    rows = 2 if dtype == torch.float32 else 2 + 5  # statistics; offsets of five codes
    largest = 0 if dtype == torch.float32 else 1  # magnitude of v
    of_groups = 2 * 3 * (rows * 16 + 3 * 16 * 16 + largest)
    taps = 2 * 3 * (3 + 1) * 16
    assert sum(t.numel() for t in rest) - len(quads[0]) == of_groups + taps
    assert {t.dtype for t in rest} == {torch.float32, dtype, torch.int64}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("locality", "heads"), [("dwc_qk", 2), ("dwc_qk", 1), ("none", 2)])
def test_opcheck(locality, heads, monkeypatch):
    """All but tracing into the launches, which the interpreter's kernels are not made for."""
    monkeypatch.setattr(configs, "KEPT", (32,))
    tensors, keywords, grad = arguments(
        batch=1, heads=heads, head_dim=16, value_dim=20, grid=(2, 2), locality=locality
    )
    rest = (0.7, list(keywords["grid"]), keywords["prefix"], 1.0)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    leaves = [t.requires_grad_() for t in tensors]
    results = torch.library.opcheck(
        torch.ops.t5fx.ttt_triton_forward.default,
        (*split(leaves), *rest, heads == 2),
        test_utils=utils,
    )
    assert set(results.values()) == {"SUCCESS"}
    plain = split([t.detach() for t in tensors])
    _, *saved = torch.ops.t5fx.ttt_triton_forward(*plain, *rest, heads == 2)
    results = torch.library.opcheck(
        torch.ops.t5fx.ttt_triton_backward.default, (grad, *plain, saved, *rest), test_utils=utils
    )
    assert set(results.values()) == {"SUCCESS"}


def test_module_computes_with_the_kernels():
    """Of any impl: the parameters are the same."""
    sizes = {"num_heads": 2, "head_dim": 16, "value_dim": 16, "scale": 0.25, "grid_ndim": 2}
    q, k, v = torch.randn(3, 1, 2, 7, 16).unbind()
    node, same = TTT(**sizes, impl="triton"), TTT(**sizes, impl="reference")
    out, wanted = (m(q, k, v, grid=(2, 3), prefix=1) for m in (node, same))
    torch.testing.assert_close(out, wanted)
    with pytest.raises(NodeArgumentError, match="parameters: expected float32"):
        node.double()(q, k, v, grid=(2, 3), prefix=1)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dtype": torch.float64}, "q: expected float32, float16 or bfloat16"),
        ({"head_dim": 264}, "at most 256 channels"),
        ({"locality": "dwc_v"}, "locality: expected"),
    ],
)
def test_what_the_kernels_cannot_take(change, complaint):
    case = {"batch": 1, "heads": 1, "head_dim": 16, "value_dim": 16, "grid": (2,)} | change
    tensors, keywords, _ = arguments(**case)
    with pytest.raises(NodeArgumentError, match=complaint):
        forward(*tensors[:3], tensors[3:6], tensors[6:], **keywords)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [(9,), (5, 7), (2, 3, 3)])
def test_kept_keys_change_no_result(grid, dtype, monkeypatch):
    """Bit for bit: they are rounded where they were convolved again, too."""
    monkeypatch.setattr(configs, "KEPT", (32,))
    tensors, keywords, grad_out = arguments(
        batch=2, heads=2, head_dim=24, value_dim=20, grid=grid, prefix=1, suffix=2, dtype=dtype,
        layout="packed",
    )  # fmt: skip
    q, k, v, weights, conv = split(tensors)
    results = []
    for training in (False, True):
        with poisoned():
            out, saved = forward(q, k, v, weights, conv, **keywords, training=training)
            assert saved.keeps_keys == training
            *grads, dw, dconv = backward(grad_out, *split(tensors), saved, **keywords)
        results.append([out, *grads, *dw, *dconv])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("grads", "parameters", "kept"),
    [(True, True, True), (True, False, True), (False, True, False)],
)
def test_keys_are_kept_for_what_is_trained(grads, parameters, kept, monkeypatch):
    """Whatever requires a gradient, where gradients are recorded at all."""
    monkeypatch.setattr(configs, "KEPT", (16,))
    seen = []

    def seeing(*args, training, **rest):
        seen.append(training)
        return forward(*args, training=training, **rest)

    monkeypatch.setattr(op, "forward", seeing)
    tensors, keywords, _ = arguments(batch=1, heads=1, head_dim=16, value_dim=16, grid=(5,))
    for tensor in tensors[3:] if parameters else tensors[:1]:
        tensor.requires_grad_()
    with torch.set_grad_enabled(grads):
        ttt(*split(tensors), **keywords, impl="triton")
    with torch.no_grad():
        ttt(*split(tensors), **keywords, impl="triton")
    assert seen == [kept, False]


CASE = parity.Case(dtype="float16", head_dim=16, value_dim=16, grid=(2, 3), batch=1, heads=1)


def test_parity_compares_all_that_is_saved_and_given():
    found = parity.compare(CASE, "cpu", repeats=2)
    assert found.ok and str(found) == "right"
    assert list(found.errors) == [*parity.SAVED, *parity.NAMES]
    assert all(0 <= error <= allowed for error, allowed in found.errors.values())
    plain = dataclasses.replace(CASE, locality="none", dtype="float32", parameters="bfloat16")
    found = parity.compare(plain, "cpu", training=False)
    assert list(found.errors) == ["mean", "rstd", "w1'", "w2'", "w3'", "out"] and found.ok


def test_parity_names_the_first_that_is_wrong(monkeypatch):
    def wrong(*args, **keywords):
        out, saved = forward(*args, **keywords)
        saved.w2.mul_(1.1)
        return out * torch.nan, saved

    monkeypatch.setattr(parity, "forward", wrong)
    found = parity.compare(CASE, "cpu")
    assert (found.first_wrong, found.ok) == ("w2'", False)
    error, allowed = found.errors["out"]
    assert not error <= allowed
    assert str(found).startswith("w2' is ")


def test_parity_of_small_gradients(monkeypatch):
    """They are held to their own size, and not to the output's."""
    small = dataclasses.replace(CASE, gradient=2**-8)
    assert parity.compare(small, "cpu").ok

    def wrong(*args, **keywords):
        dq, *rest = backward(*args, **keywords)
        return dq * 1.1, *rest

    monkeypatch.setattr(parity, "backward", wrong)
    assert parity.compare(small, "cpu").first_wrong == "dq"


def test_parity_sees_other_bits(monkeypatch):
    calls = []

    def unsteady(*args, **keywords):
        calls.append(1)
        out, saved = forward(*args, **keywords)
        return out * (1 + 2**-10 * len(calls)), saved

    monkeypatch.setattr(parity, "forward", unsteady)
    found = parity.compare(CASE, "cpu", training=False, repeats=2)
    assert found.first_wrong is None and not found.same_bits and not found.ok


def test_no_compiler_traces_the_interpreter():
    with pytest.raises(NodeArgumentError, match="compiled: expected None in Triton's interpreter"):
        parity.compare(CASE, "cpu", compiled="static")
