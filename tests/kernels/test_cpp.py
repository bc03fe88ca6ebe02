"""The node's C++ for CPUs against the reference in float64: any sizes, layouts and dtypes."""

import contextlib
import os
import platform
import subprocess
import sys
from concurrent.futures import Future

import nodes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t5fx.errors import SlowNodeWarning
from t5fx.kernels import NodeArgumentError, cpp, explicit, ttt
from t5fx.kernels.cpp import library
from t5fx.kernels.reference import reference

close = torch.testing.assert_close

DEFAULT = {"inner": "swiglu", "inner_loss": "dot", "key_norm": "instance"}
# One vector and less, whole vectors, and what lies between; the widths of real heads.
widths = st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 72, 80, 88, 96, 128]))
layouts = st.sampled_from(["head-major", "token-major", "flipped", "shared heads"])


def laid_out(x, layout):
    """x, or one with the same shape, in another memory layout."""
    if layout == "token-major":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "flipped":
        return x.mT.contiguous().mT
    if layout == "shared heads":
        return x[:, :1].expand_as(x)
    return x


def arguments(dtype=torch.float32, *, scale_by=1.0, **sizes):
    """As `nodes.arguments`: q, k, v in dtype, float32 parameters of usual sizes."""
    (q, k, v, weights, conv), settings = nodes.arguments(dtype=torch.float32, **sizes)
    weights = [w * (scale_by * w.shape[1] ** -0.5) for w in weights]
    conv = [0.2 * c for c in conv]
    return [q.to(dtype), k.to(dtype), v.to(dtype), weights, conv], settings


def exact(args, settings, grad=None, dtype=torch.float64):
    """The reference's output on the same values; given its gradient, all others."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in nodes.tensors(args)]
    known = DEFAULT | {"key_norm_eps": 1.0} | settings
    with torch.enable_grad():
        out = reference(*leaves[:3], leaves[3:6], leaves[6:], **known)
    return out.detach() if grad is None else torch.autograd.grad(out, leaves, grad.to(dtype))


def plain(settings):
    """What the C++ takes of a node's settings."""
    names = {name: settings[name] for name in ("scale", "grid", "prefix")}
    return names | {"eps": settings.get("key_norm_eps", 1.0)}


def run(args, settings):
    """The C++ itself: output and W'."""
    return cpp.forward(*args, **plain(settings))


def agree(result, expected, dtype=torch.float32, noisy=None):
    """One rounding to the dtype; the rest is float32 noise: of terms of size 1, and as the
    reference has it."""
    noise = 1e-6 + 5e-6 * expected.abs().max().item()
    if noisy is not None:
        noise += 8 * (noisy.double() - expected).abs().max().item()
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 2e-6
    assert result.dtype == dtype
    close(result.double(), expected, rtol=rounding, atol=noise)


def check(args, settings, layout="head-major"):
    """Output, W' and all gradients."""
    out, updated = run(args, settings)
    assert out.transpose(1, 2).is_contiguous()
    agree(out, exact(args, settings), out.dtype, exact(args, settings, dtype=torch.float32))
    doubles = [[x.double() for x in group] for group in (args[:3], *args[3:])]
    _, wanted = explicit.forward(*doubles[0], *doubles[1:], **plain(settings))
    for result, expected in zip(updated, wanted, strict=True):
        agree(result, expected)
    grad = laid_out(torch.randn_like(out), layout)
    grads = cpp.backward(grad, *args, updated, **plain(settings))
    wanted = exact(args, settings, grad)
    noisy = exact(args, settings, grad, torch.float32)
    for x, *results in zip(nodes.tensors(args), grads, wanted, noisy, strict=True):
        agree(results[0], results[1], x.dtype, results[2])


@pytest.fixture
def threads():
    """Sets the number of threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    head_dim=widths,
    value_dim=widths,
    grid=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    ends=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    locality=st.sampled_from(["dwc_qk", "none"]),
    eps=st.sampled_from([1.0, 1e-2]),
    layout=st.tuples(layouts, layouts, layouts, layouts),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_output_and_gradients_equal_the_reference(
    batch, heads, head_dim, value_dim, grid, ends, locality, eps, layout, dtype
):
    args, settings = arguments(
        dtype,
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        value_dim=value_dim,
        grid=grid,
        prefix=ends[0],
        suffix=ends[1],
        locality=locality,
        key_norm_eps=eps,
    )
    args[:3] = map(laid_out, args[:3], layout)
    check(args, settings, layout[3])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("pairs", [(1, 1), (1, 5), (2, 20)])
def test_any_number_of_threads_shares_any_number_of_heads(count, pairs, threads):
    threads(count)
    args, settings = arguments(
        batch=pairs[0], heads=pairs[1], head_dim=24, value_dim=20, grid=(19, 23)
    )
    check(args, settings)


def test_runs_are_equal_bit_by_bit(threads):
    threads(3)
    args, settings = arguments(heads=4, head_dim=64, value_dim=64, grid=(30, 31))
    grad = torch.randn(2, 4, 932, 64)

    def both():
        out, updated = run(args, settings)
        return out, *updated, *cpp.backward(grad, *args, updated, **plain(settings))

    first = both()
    for _ in range(5):
        close(both(), first, rtol=0, atol=0)


def test_large_and_long(threads):
    threads(2)
    args, settings = arguments(batch=1, heads=1, head_dim=256, value_dim=256, grid=(70, 71))
    check(args, settings)


def test_keys_far_from_zero_keep_their_digits():
    args, settings = arguments(head_dim=16, value_dim=16, grid=(20, 20))
    shifted = [args[0], args[1] + 512, *args[2:]]
    # The mean has 24 bits like everything, nine of which stand for 512.
    expected = exact(shifted, settings)
    worst = (run(shifted, settings)[0] - expected).abs().max() / expected.abs().max()
    assert worst < 2.0 ** (9 - 24 + 2)


def test_silu_far_from_zero():
    args, settings = arguments(head_dim=16, value_dim=16, scale_by=40.0)
    check(args, settings)


def test_what_is_not_finite_stays_visible_and_in_its_place():
    args, settings = arguments(heads=2, head_dim=20, value_dim=20, grid=(9, 9), locality="none")
    args[4] = []
    wanted = run(args, settings)[0]
    args[0] = args[0].clone()
    args[0][0, 1, 4, 3] = torch.nan
    out = run(args, settings)[0]
    assert out[0, 1, 4].isnan().all()
    out[0, 1, 4] = wanted[0, 1, 4]
    close(out, wanted, rtol=0, atol=0)
    args[1] = args[1].clone()
    args[1][1, 0, 0, 0] = torch.inf
    out = run(args, settings)[0]
    assert out[1, 0].isnan().all() and not out[1, 1].isnan().any()


def run_alone(code, **environment):
    """Runs code, which gets this folder as its argument, in a process of its own."""
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
    environment = {**os.environ, **environment}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_nothing_is_read_before_it_is_written():
    """In a process whose allocations are full of huge numbers."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_cpp, torch\n"
        "torch.use_deterministic_algorithms(True)\n"  # fills torch.empty with NaN
        "for sizes in ((1, 1, 5, 3), (2, 3, 72, 40), (1, 3, 64, 64)):\n"
        "    names = dict(zip(('batch', 'heads', 'head_dim', 'value_dim'), sizes))\n"
        "    args, settings = test_cpp.arguments(**names, grid=(11, 13))\n"
        "    test_cpp.check(args, settings)\n"
    )
    run_alone(code, MALLOC_PERTURB_="128")


def _supported(flag):
    """Whether this processor runs what the flag lets a compiler use."""
    return {
        "-march=x86-64": True,
        "-march=x86-64-v3": torch.cpu._is_avx2_supported(),
        "-march=x86-64-v4": torch.cpu._is_avx512_supported(),
    }[flag]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("flag", ["-march=x86-64", "-march=x86-64-v3", "-march=x86-64-v4"])
def test_other_processors_get_the_same_without_a_warning(flag, tmp_path, monkeypatch):
    from torch._inductor import cpp_builder

    flags = (flag, "-O1", "-Wextra", "-Werror")  # -O1 compiles sooner
    for name in ("forward", "backward"):
        future = Future()
        future.set_result(library._load(name, cpp_builder, tmp_path, flags))
        monkeypatch.setitem(library._started, name, future)
    if not _supported(flag):
        return  # that it compiles is all that can be seen here
    for width in (7, 64, 80):
        for dtype in cpp.DTYPES:
            args, settings = arguments(dtype, head_dim=width, value_dim=width, grid=(6, 5))
            check(args, settings)


@pytest.mark.parametrize(
    "change",
    [
        {"grid": (300, 500)},
        {"grid": (0, 5)},
        {"grid": (1, 1, 1, 1)},
        {"prefix": -1},
        {"k": torch.randn(2, 2, 5, 3)},
        {"v": torch.randn(1, 2, 6, 4)},
        {"weights": [torch.randn(2, 3, 3)] * 2},
        {"conv": [torch.randn(6, 1, 3), torch.randn(6)] * 2},
    ],
)
def test_what_does_not_fit_is_an_error_before_anything_is_read(change):
    """Of the operators themselves, which no function checks for."""
    args, settings = arguments(prefix=1, suffix=1)
    known = dict(zip(("q", "k", "v", "weights", "conv"), args, strict=True)) | plain(settings)
    updated = [torch.zeros(2, *w.shape) for w in args[3]]
    call = list((known | change).values())
    call[6] = list(call[6])
    with pytest.raises(NodeArgumentError, match="expected"):
        torch.ops.t5fx.ttt_forward(*call)
    grad = torch.zeros_like(args[2])
    with pytest.raises(NodeArgumentError, match="expected"):
        torch.ops.t5fx.ttt_backward(grad, *call[:5], updated, *call[5:])


def test_gradients_and_updated_weights_that_do_not_fit_are_errors():
    args, settings = arguments()
    rest = list(plain(settings).values())
    rest[1] = list(rest[1])
    _, *updated = torch.ops.t5fx.ttt_forward(*args, *rest)
    grad = torch.zeros_like(args[2])
    for wrong in ((grad[:1], updated), (grad, updated[:2]), (grad, [u[:1] for u in updated])):
        with pytest.raises(NodeArgumentError, match="expected"):
            torch.ops.t5fx.ttt_backward(wrong[0], *args, wrong[1], *rest)


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators that ran."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def ran(args, settings):
    with Seen() as seen:
        out = ttt(*args, **settings)
    return out, seen.names.count("t5fx::ttt_forward")


@pytest.mark.parametrize(
    ("settings", "calls"),
    [({}, 1), ({"impl": "reference"}, 0), ({"key_norm": "layer"}, 0), ({"inner_loss": "l2"}, 0)],
)
def test_inference_is_one_call_where_the_settings_allow_it(settings, calls):
    args, known = arguments()
    out, count = ran(args, known | settings)
    assert count == calls
    agree(out, exact(args, known | {k: v for k, v in settings.items() if k != "impl"}))


def test_each_input_gets_a_gradient_in_its_own_dtype():
    args, settings = arguments()
    args[0], args[2] = args[0].bfloat16(), args[2].half()
    leaves = [x.requires_grad_() for x in nodes.tensors(args)]
    out, calls = ran(args, settings)
    assert calls == 1
    agree(out.detach(), exact(args, settings), torch.bfloat16)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad)
    wanted = exact(args, settings, grad)
    noisy = exact(args, settings, grad, torch.float32)
    for x, *results in zip(leaves, grads, wanted, noisy, strict=True):
        agree(results[0], results[1], x.dtype, results[2])


# What torch.jit, which forward-mode differentiation imports, warns of about itself.
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_float64_and_transforms_take_the_reference():
    args, settings = arguments()
    wide = [x.double() for x in args[:3]]
    out, count = ran([*wide, *args[3:]], settings)
    assert count == 0 and out.dtype == torch.float64
    tangent = torch.randn_like(args[0])

    def of_q(q):
        return ttt(q, *args[1:], **settings)

    out, slope = torch.func.jvp(of_q, (args[0],), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = of_q(torch.autograd.forward_ad.make_dual(args[0], tangent))
        close(torch.autograd.forward_ad.unpack_dual(dual).tangent, slope)


def test_exported_graphs_hold_operators_that_other_runtimes_know():
    args, settings = arguments()

    class Node(torch.nn.Module):
        def forward(self, q, k, v):
            return ttt(q, k, v, *args[3:], **settings)

    program = torch.export.export(Node(), tuple(args[:3]), strict=False)
    lowered = program.run_decompositions()
    assert "t5fx" not in str(lowered.graph)
    agree(lowered.module()(*args[:3]), exact(args, settings))


def test_without_a_compiler_it_warns_once_and_runs(monkeypatch):
    def fail(*_):
        raise FileNotFoundError("no such file: g++")

    args, settings = arguments()
    monkeypatch.setattr(library, "_load", fail)
    library.forget()
    try:
        with pytest.warns(SlowNodeWarning, match=r"(?s)g\+\+.*CXX"):
            out, count = ran(args, settings)
        agree(out, exact(args, settings))
        assert count == 1
        out, _ = ran(args, settings)  # a second warning would be an error
    finally:
        monkeypatch.undo()
        library.forget()
    agree(ran(args, settings)[0], exact(args, settings))


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(library, "_HERE", tmp_path / "sources")
    library._HERE.mkdir()
    (library._HERE / "forward.cpp").write_text("#error this will not do\n")
    library.forget()
    try:
        with pytest.warns(SlowNodeWarning, match="this will not do"):
            assert not cpp.is_available("forward")
        assert not list((tmp_path / "t5fx").iterdir())
    finally:
        monkeypatch.undo()
        library.forget()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_process_forked_while_its_parent_compiles_compiles_for_itself(tmp_path):
    code = (
        "import os, signal, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import test_cpp\n"
        "test_cpp.torch.set_num_threads(1)\n"
        "args, settings = test_cpp.arguments()\n"
        "assert not test_cpp.library.start('forward').done()\n"
        "child = os.fork()\n"
        "signal.alarm(120)\n"
        "test_cpp.run(args, settings)\n"
        "if not child:\n"
        "    os._exit(0)\n"
        "sys.exit(os.waitpid(child, 0)[1])\n"
    )
    run_alone(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))


def test_a_cache_folder_that_cannot_be_made_and_a_damaged_library(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    args, settings = arguments()
    try:
        for folder in (tmp_path / "file" / "below", tmp_path / "good"):
            library.forget()
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
            if folder.name == "below":
                for _ in range(2):  # the second call must not wait for ever
                    with pytest.warns(SlowNodeWarning) if _ == 0 else contextlib.nullcontext():
                        agree(ran(args, settings)[0], exact(args, settings))
        (folder / "t5fx").mkdir(parents=True)
        monkeypatch.setattr(library, "hashlib", _OneHash)
        (folder / "t5fx" / f"forward-{16 * 'a'}.so").write_bytes(b"")
        agree(run(args, settings)[0], exact(args, settings))
    finally:
        monkeypatch.undo()
        library.forget()


class _OneHash:
    """Stands for hashlib: a library's name is known before it is there."""

    @staticmethod
    def sha256(_):
        return _OneHash

    @staticmethod
    def update(_):
        pass

    @staticmethod
    def hexdigest():
        return 64 * "a"


def test_tensors_on_several_devices_are_an_error():
    args, settings = arguments()
    args[3] = [w.to("meta") for w in args[3]]
    told = "weights: expected tensors on cpu, as q is; got one on meta"
    with pytest.raises(NodeArgumentError, match=told):
        ttt(*args, **settings)


def test_scratch_that_does_not_fit_is_an_error():
    """Few numbers as many tokens, by strides: a buffer of the backward pass is as large."""
    one = torch.zeros(1, 1, 1, 1)
    tokens = 2**45
    q = one.expand(1, 1, tokens, 8)
    weights = [torch.zeros(1, 8, 8)] * 3
    with pytest.raises(MemoryError, match="scratch"):
        cpp.call._run(
            *("backward", (q, q, q), q, weights, []),
            *([w[None] for w in weights], [None, *(one,) * 6], (), 0, 1.0, 1.0),
        )
