"""Near attention's C++ for CPUs against its reference in float64: any sizes, layouts and dtypes."""

import math
import platform
from concurrent.futures import Future

import nodes
import pytest
import test_cpp
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from test_cpp import agree, laid_out, layouts, widths

from t5fx.errors import SlowNodeWarning
from t5fx.kernels import NodeArgumentError, cpp, near_explicit, ttt
from t5fx.kernels.cpp import library
from t5fx.kernels.near import reference

close = torch.testing.assert_close
threads = test_cpp.threads

SETTINGS = ("scale", "grid", "prefix", "neighborhood", "coarse")


def arguments(
    dtype=torch.float32,
    *,
    batch=2,
    heads=2,
    head_dim=5,
    value_dim=6,
    grid=(4, 5),
    ends=(1, 1),
    neighborhood=3,
    coarse=2,
    gated=True,
):
    """q, k, v, base in dtype, the float32 gate if any, and the settings."""
    tokens = sum(ends) + math.prod(grid)
    q, k, v, base = (
        torch.randn(batch, heads, tokens, width).to(dtype)
        for width in (head_dim, head_dim, value_dim, value_dim)
    )
    mixing = [torch.randn(heads)] if gated else []
    values = (head_dim**-0.5, list(grid), ends[0], neighborhood, coarse)
    return [q, k, v, base, mixing], dict(zip(SETTINGS, values, strict=True))


def tensors(args):
    return [*args[:4], *args[4]]


def exact(args, settings, grad=None, dtype=torch.float64):
    """The reference's output on the same values; given its gradient, all others."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors(args)]
    with torch.enable_grad():
        out = reference(*leaves[:4], leaves[4:], **settings)
    if grad is None:
        return out.detach()
    found = torch.autograd.grad(out, leaves, grad.to(dtype), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def backward(grad, args, settings):
    return cpp.near_backward(grad, *args[:3], args[4], **settings)


def check(args, settings, layout="head-major"):
    """Output and all gradients."""
    out = cpp.near_forward(*args, **settings)
    assert out.transpose(1, 2).is_contiguous()
    agree(out, exact(args, settings), out.dtype, exact(args, settings, dtype=torch.float32))
    grad = laid_out(torch.randn_like(out), layout)
    grads = backward(grad, args, settings)
    wanted = exact(args, settings, grad)
    noisy = exact(args, settings, grad, torch.float32)
    for x, *results in zip(tensors(args), grads, wanted, noisy, strict=True):
        agree(results[0], results[1], x.dtype, results[2])
    for result in grads[:4]:
        assert result.transpose(1, 2).is_contiguous()


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    head_dim=widths,
    value_dim=widths,
    grid=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    ends=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    neighborhood=st.sampled_from([0, 3, 5, 7]),
    coarse=st.integers(0, 9),
    gated=st.booleans(),
    layout=st.tuples(*[layouts] * 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    counted=st.sampled_from([None, 0.8, 0.3]),
)
def test_output_and_gradients_equal_the_reference(layout, dtype, counted, **sizes):
    assume(sizes["neighborhood"] or sizes["coarse"])
    args, settings = arguments(dtype, **sizes)
    if counted is not None:
        settings["key_mask"] = torch.rand(args[0].shape[::2]) < counted
    args[:4] = map(laid_out, args[:4], layout)
    check(args, settings, layout[4])


@given(
    grid=st.lists(st.integers(1, 20), min_size=2, max_size=2),
    ends=st.tuples(st.integers(0, 150), st.integers(0, 150)),
    neighborhood=st.sampled_from([3, 5, 7]),
    coarse=st.integers(0, 12),
)
def test_many_tokens_on_and_off_the_grid(**sizes):
    check(*arguments(batch=1, heads=1, head_dim=16, value_dim=24, **sizes))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("pairs", [(1, 1), (1, 5), (2, 20)])
def test_any_number_of_threads_shares_any_number_of_heads(count, pairs, threads):
    threads(count)
    check(
        *arguments(
            batch=pairs[0],
            heads=pairs[1],
            head_dim=24,
            value_dim=20,
            grid=(13, 17),
            ends=(20, 9),
            neighborhood=5,
            coarse=4,
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_one_projection(dtype):
    args, settings = arguments(dtype, head_dim=64, value_dim=64, grid=(9, 10), coarse=3)
    qkv = torch.stack([x.transpose(1, 2) for x in args[:3]], dim=2)
    args[:3] = qkv.permute(2, 0, 3, 1, 4)
    assert not args[0].is_contiguous()
    check(args, settings, "token-major")


def test_runs_are_equal_bit_by_bit_and_threads_change_roundings_only(threads):
    args, settings = arguments(
        heads=3, head_dim=64, value_dim=64, grid=(30, 31), neighborhood=5, coarse=8
    )
    grad = torch.randn(2, 3, 932, 64)

    def both():
        return cpp.near_forward(*args, **settings), *backward(grad, args, settings)

    threads(4)
    first = both()
    for _ in range(5):
        close(both(), first, rtol=0, atol=0)
    for count in (1, 2, 3):
        threads(count)
        close(both(), first, rtol=1e-5, atol=1e-5)


def test_logits_far_from_zero():
    args, settings = arguments(head_dim=16, value_dim=16, grid=(9, 9), coarse=3)
    args[0] = args[0] * 60
    check(args, settings)


def test_what_is_not_finite_stays_visible_and_in_its_place():
    args, settings = arguments(head_dim=20, value_dim=20, grid=(9, 9), neighborhood=3, coarse=0)
    wanted = cpp.near_forward(*args, **settings)
    args[0] = args[0].clone()
    args[0][0, 1, [0, 4], 3] = torch.nan
    out = cpp.near_forward(*args, **settings)
    assert out[0, 1, [0, 4]].isnan().all()
    out[0, 1, [0, 4]] = wanted[0, 1, [0, 4]]
    close(out, wanted, rtol=0, atol=0)
    args[1] = args[1].clone()
    args[1][1, 0, 1, 0] = torch.nan  # a corner of the grid
    out = cpp.near_forward(*args, **settings)
    assert out[1, 0, 1].isnan().all() and not out[1, 1].isnan().any()


def test_nothing_is_read_before_it_is_written():
    """In a process whose allocations are full of huge numbers."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_near_cpp, torch\n"
        "torch.use_deterministic_algorithms(True)\n"  # fills torch.empty with NaN
        "for sizes in ((1, 1, 5, 3), (2, 3, 72, 40), (1, 3, 64, 64)):\n"
        "    names = dict(zip(('batch', 'heads', 'head_dim', 'value_dim'), sizes))\n"
        "    test_near_cpp.check(*test_near_cpp.arguments(**names, grid=(11, 13), coarse=3))\n"
    )
    test_cpp.run_alone(code, MALLOC_PERTURB_="128")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.slow  # compiles all of it twice more
@pytest.mark.parametrize("flag", ["-march=x86-64", "-march=x86-64-v4"])
def test_other_processors_get_the_same_without_a_warning(flag, tmp_path, monkeypatch):
    from torch._inductor import cpp_builder

    flags = (flag, "-O1", "-Wextra", "-Werror")  # -O1 compiles sooner
    for name in ("near_forward", "near_backward"):
        future = Future()
        future.set_result(library._load(name, cpp_builder, tmp_path, flags))
        monkeypatch.setitem(library._started, name, future)
    if not test_cpp._supported(flag):
        return  # that it compiles is all that can be seen here
    for width in (7, 64, 80):
        for dtype in cpp.DTYPES:
            check(*arguments(dtype, head_dim=width, value_dim=width, grid=(6, 5)))


def call_of(args, settings, **change):
    """Arguments of the operator, some of them changed."""
    names = ("q", "k", "v", "base", "mixing")
    known = dict(zip(names, args, strict=True)) | settings | {"key_mask": None} | change
    return list(known.values())


@pytest.mark.parametrize(
    "change",
    [
        {"grid": [300, 500]},
        {"grid": [0, 5]},
        {"grid": [1, 1, 1, 1]},
        {"prefix": -1},
        {"k": torch.randn(2, 2, 21, 5)},
        {"v": torch.randn(1, 2, 22, 6)},
        {"mixing": [torch.randn(3)]},
        {"mixing": [torch.randn(2)] * 2},
        {"neighborhood": -3},
        {"coarse": -1},
    ],
)
def test_what_does_not_fit_is_an_error_before_anything_is_read(change):
    """Of the operators themselves, which no function checks for."""
    call = call_of(*arguments(), **change)
    with pytest.raises(NodeArgumentError, match="expected"):
        torch.ops.t5fx.near_forward(*call)
    grad = torch.zeros(2, 2, 22, 6)
    with pytest.raises(NodeArgumentError, match="expected"):
        torch.ops.t5fx.near_backward(grad, *call[:3], *call[4:])


def test_a_base_or_a_gradient_that_does_not_fit_is_an_error():
    args, settings = arguments()
    wrong = args[3][:1]
    with pytest.raises(NodeArgumentError, match="base: expected"):
        torch.ops.t5fx.near_forward(*call_of(args, settings, base=wrong))
    call = call_of(args, settings)
    with pytest.raises(NodeArgumentError, match="grad: expected"):
        torch.ops.t5fx.near_backward(wrong, *call[:3], *call[4:])
    with pytest.raises(NodeArgumentError, match="one on meta"):
        cpp.near_forward(*args[:3], args[3].to("meta"), args[4], **settings)


def test_scratch_that_does_not_fit_is_an_error():
    """Few numbers as many tokens, by strides."""
    args, settings = arguments(batch=1, heads=1, grid=(1,), ends=(0, 0))
    args[:4] = (x.expand(1, 1, 2**45, -1) for x in args[:4])
    with pytest.raises(MemoryError, match="scratch"):
        cpp.near_call._run(
            *("near_forward", args[:3], {"base": args[3]}, args[4], {}, None), *settings.values()
        )


def test_the_operators_are_the_c_plus_plus(monkeypatch):
    monkeypatch.delattr(near_explicit, "forward")
    monkeypatch.delattr(near_explicit, "backward")
    args, settings = arguments()
    args[0], args[3] = args[0].bfloat16(), args[3].half()
    args[4] = [args[4][0].bfloat16()]
    leaves = [x.requires_grad_() for x in tensors(args)]
    out = torch.ops.t5fx.near_forward(*call_of(args, settings))
    agree(out.detach(), exact(args, settings), torch.bfloat16)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad)
    wanted = exact(args, settings, grad)
    noisy = exact(args, settings, grad, torch.float32)
    for x, *results in zip(leaves, grads, wanted, noisy, strict=True):
        agree(results[0], results[1], x.dtype, results[2])


def test_float64_takes_the_tensors_operators(monkeypatch):
    monkeypatch.delattr(cpp, "near_forward")
    monkeypatch.delattr(cpp, "near_backward")
    args, settings = arguments()
    args = [*(x.double() for x in args[:4]), args[4]]
    args[1].requires_grad_()
    out = torch.ops.t5fx.near_forward(*call_of(args, settings))
    close(out, exact(args, settings))
    out.sum().backward()
    assert args[1].grad.dtype == torch.float64


def test_files_are_compiled_only_for_nodes_that_have_near_attention():
    args, settings = nodes.arguments(dtype=torch.float32, grid=(3, 4))
    library.forget()
    ttt(*args, **settings)
    assert not any(name.startswith("near_") for name in library._started)
    near = {"neighborhood": 3, "coarse": 2, "mix": "half"}
    with torch.no_grad():
        ttt(*args, **settings, **near)
    assert "near_forward" in library._started and "near_backward" not in library._started
    args[0].requires_grad_()
    ttt(*args, **settings, **near)
    assert "near_backward" in library._started


def test_without_a_compiler_it_warns_once_and_runs(monkeypatch):
    def fail(*_):
        raise FileNotFoundError("no such file: g++")

    args, settings = arguments()
    monkeypatch.setattr(library, "_load", fail)
    library.forget()
    try:
        with pytest.warns(SlowNodeWarning, match=r"near_forward\.cpp"):
            out = torch.ops.t5fx.near_forward(*call_of(args, settings))
        agree(out, exact(args, settings))
        torch.ops.t5fx.near_forward(*call_of(args, settings))  # a second warning would be an error
    finally:
        monkeypatch.undo()
        library.forget()
