"""Near attention's Triton kernels in Triton's interpreter, on a CPU. Run by test_triton.py, in a
process of its own, as triton_interpreted.py is."""

from unittest import mock

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from triton_cases import poisoned

from t5fx.bench.gpu.interpreter import mended
from t5fx.bench.gpu.races import recorded
from t5fx.kernels import TTT, NodeArgumentError, near
from t5fx.kernels.choice import TRUSTED
from t5fx.kernels.triton_kernels import check, near_launch, near_parity, parity
from t5fx.kernels.triton_kernels.near_launch import near_forward
from t5fx.kernels.triton_kernels.near_parity import NearCase

#: Of what weighs nothing: 0 comes out, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.fixture(autouse=True)
def _mended():
    """Small blocks and chunks, so that there are several of each."""
    small = dict.fromkeys(near_launch.BLOCKS, near_launch.Block(16, 16, 4))
    with mended(), mock.patch.multiple(near_launch, BLOCKS=small, WIDE_BLOCKS=small, CHUNK=16):
        yield


def assert_right(case):
    """Output and all gradients against the reference in float64."""
    tensors, keywords, grad = given = near_parity.arguments(case, "cpu")
    with poisoned():
        results = near_parity.run(*given)
    dtypes = [grad.dtype, *(t.dtype for t in tensors)]
    assert [r.dtype for r in results.values()] == dtypes
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    out = near.reference(*leaves[:4], leaves[4:], **keywords)
    grads = torch.autograd.grad(out, leaves, grad.double(), materialize_grads=True)
    wanted = dict(zip(near_parity.NAMES, [out.detach(), *grads], strict=False))
    for name, (error, allowed) in near_parity.errors_in(results, wanted, given, case).items():
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@examples(3)
@given(
    grid=st.one_of(
        st.tuples(st.integers(1, 20)),
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    ),
    sees=st.sampled_from([(3, 0), (3, 2), (0, 2), (0, 3), (5, 0), (5, 3)]),
    prefix=st.integers(0, 2),
    suffix=st.integers(0, 2),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([16, 24]),
    value_dim=st.sampled_from([16, 20]),
    layout=st.sampled_from(parity.LAYOUTS),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    mix=st.sampled_from(["gate", "half"]),
)
def test_equals_the_reference(sees, **case):
    neighborhood, coarse = sees
    if len(case["grid"]) == 3:
        neighborhood = min(neighborhood, 3)
    assert_right(NearCase(batch=1, neighborhood=neighborhood, coarse=coarse, **case))


SMALL = {"head_dim": 16, "value_dim": 16, "batch": 1, "heads": 1}


@pytest.mark.parametrize(
    ("grid", "neighborhood", "coarse"),
    [
        ((1,), 3, 0),  # one token, which is all of its window
        ((2,), 3, 4),  # shorter than window and cells
        ((17,), 7, 1),  # one cell, and more than a chunk of queries
        ((13,), 7, 3),  # a token that all windows hold
        ((2, 7), 5, 3),  # one axis shorter, one longer
        ((7, 1), 3, 2),
        ((2, 2, 3), 3, 2),  # nothing is left of any cell
    ],
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_grids(grid, neighborhood, coarse, dtype):
    assert_right(
        NearCase(
            **SMALL, dtype=dtype, grid=grid, neighborhood=neighborhood, coarse=coarse, prefix=1
        )
    )


@pytest.mark.parametrize(
    "sees", [(3, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((0, 2), (3, 0)))]
)
def test_many_tokens_off_the_grid(sees):
    """Several blocks of them, of those before the grid and behind it."""
    neighborhood, coarse = sees
    assert_right(
        NearCase(
            **SMALL, dtype="float32", grid=(2, 3), prefix=19, suffix=15, neighborhood=neighborhood,
            coarse=coarse,
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_small_gradients(dtype):
    """Which would lose digits in float16."""
    assert_right(NearCase(**SMALL, dtype=dtype, grid=(3, 4), suffix=1, gradient=2**-13))


def test_large_cells_in_float16():
    """The sums of their tokens would be infinite in float16."""
    case = NearCase(**SMALL, dtype="float16", grid=(2, 9), neighborhood=0, coarse=1, prefix=0)
    tensors, keywords, grad = near_parity.arguments(case, "cpu")
    tensors[1:3] = (t + 5000 for t in tensors[1:3])  # sums of 90 000
    results = near_parity.run(tensors, keywords, grad)
    wanted = near_parity.run_reference(tensors, keywords, grad)
    for name in ("out", "dv"):
        error = (results[name].double() - wanted[name]).norm()
        assert error <= 2e-3 * wanted[name].norm(), name


def test_dtypes_may_differ():
    tensors, keywords, grad = near_parity.arguments(NearCase(**SMALL, grid=(5,)), "cpu")
    mixed = [
        t.to(d) for t, d in zip(tensors, [torch.float16, torch.float32] + [torch.bfloat16] * 3,
                                strict=True)
    ]  # fmt: skip
    found = near_parity.run(mixed, keywords, grad)
    wanted = near_parity.run_reference(mixed, keywords, grad)
    assert [found[n].dtype for n in ("dq", "dk", "dv", "dbase")] == [
        torch.float16, torch.float32, torch.bfloat16, torch.float16,
    ]  # fmt: skip
    for name, (error, allowed) in parity.errors_of(found, wanted, 2**-7).items():
        assert error <= allowed, name


@pytest.mark.parametrize(
    ("impl", "mix"),
    [("triton", "gate"), pytest.param(TRUSTED, "half", marks=pytest.mark.slow)],
)
def test_the_node_with_near_attention(mix, impl):
    """Through the node's operator and autograd."""
    node = TTT(1, 16, 16, 1, scale=0.25, neighborhood=3, coarse=2, mix=mix)
    tensors = node.tensors()
    leaves = [tensor for some in tensors for tensor in some]
    q, k, v = (torch.randn(1, 1, 6, 16, requires_grad=True) for _ in "qkv")
    grad = torch.randn(1, 1, 6, 16)
    results = []
    for one in (impl, "reference"):
        settings = node.settings() | {"impl": one, "grid": [4], "prefix": 1}
        out = torch.ops.t5fx.ttt(q, k, v, *tensors, **settings)
        results.append([out, *torch.autograd.grad(out, [q, k, v, *leaves], grad)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_parameters_alone_may_be_trained():
    """Then the attention is computed again, without its backward."""
    tensors, keywords, grad = near_parity.arguments(
        NearCase(**SMALL, dtype="float32", grid=(5,), suffix=1), "cpu"
    )
    wanted = near_parity.run_reference(tensors, keywords, grad)
    base, gate = (t.requires_grad_() for t in tensors[3:])
    out, *_ = torch.ops.t5fx.near_triton_forward(*tensors[:3], base, [gate], *keywords.values())
    refused = mock.patch.object(near_launch, "near_query_gradient", None)
    with refused:
        found = torch.autograd.grad(out, [base, gate], grad)
    torch.testing.assert_close(found[0].double(), wanted["dbase"])
    torch.testing.assert_close(found[1].double(), wanted["dgate"], rtol=1e-4, atol=1e-5)


def test_opcheck():
    """But for what traces the launches, which the interpreter's cannot be: that wants a GPU."""
    case = NearCase(**SMALL, dtype="float32", grid=(2,), coarse=1, prefix=0, suffix=1)
    (q, k, v, base, gate), keywords, grad = near_parity.arguments(case, "cpu")
    rest = [list(x) if isinstance(x, tuple) else x for x in keywords.values()]
    operators = torch.ops.t5fx
    _, *saved = operators.near_triton_forward(q, k, v, base, [gate], *rest)
    leaves = [t.detach().requires_grad_() for t in (q, k, v, base)]
    for operator, args in (
        (operators.near_triton_forward, (*leaves, [gate.requires_grad_()])),
        (operators.near_triton_backward, (grad, q, k, v, [gate.detach()], saved)),
    ):
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
        results = torch.library.opcheck(
            operator.default, (*args, *rest), test_utils=utilities, raise_exception=True
        )
        assert set(results.values()) == {"SUCCESS"}


def test_parity_and_trials():
    """What a GPU is asked before the kernels are trusted, the smallest of it here."""
    node = {
        "inner": "swiglu", "inner_loss": "dot", "key_norm": "instance", "key_norm_eps": 1.0,
        "locality": "dwc_qk", "neighborhood": 3, "coarse": 2, "mix": "half",
    }  # fmt: skip
    question = {
        "dtype": "float16", "width": 16, "axes": 2, "direction": "backward",
        "node": sorted(node.items()),
    }  # fmt: skip
    trials = [t for t in check.trials(question) if isinstance(t.case, NearCase)]
    assert len(check.trials(question)) > len(trials) == 5
    assert {(t.case.neighborhood, t.case.coarse, t.case.mix) for t in trials} == {(3, 2, "half")}
    found = near_parity.compare(trials[1].case, "cpu", repeats=2)
    assert found.ok and list(found.errors) == ["out", "dq", "dk", "dv", "dbase"]

    def wrong(*args, **keywords):
        out, saved = near_forward(*args, **keywords)
        return out * 1.1, saved

    with mock.patch.object(near_parity, "near_forward", wrong):
        assert near_parity.compare(trials[1].case, "cpu", training=False).first_wrong == "out"
    with pytest.raises(NodeArgumentError, match="compiled: expected None in Triton's interpreter"):
        near_parity.compare(trials[1].case, "cpu", compiled="static")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"dtype": "float64"}, "q: expected float32, float16 or bfloat16"),
        ({"head_dim": 264}, "at most 256 channels"),
        ({"grid": (20, 20), "coarse": 12}, "more than 128 coarse cells .*: 144"),
        ({"grid": (20, 20), "coarse": 6, "head_dim": 256}, "more than 32 coarse cells .*: 36"),
        ({"batch": 0}, "at least one batch item"),
    ],
)
def test_what_the_kernels_cannot_take(changes, complaint):
    case = NearCase(**{**SMALL, "dtype": "float32", "grid": (2,), **changes})
    tensors, keywords, _ = near_parity.arguments(case, "cpu")
    with pytest.raises(NodeArgumentError, match=complaint):
        near_parity.run(tensors, keywords, tensors[3], training=False)


@pytest.mark.parametrize("backwards", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_races(backwards):
    case = NearCase(**{**SMALL, "heads": 2}, dtype="float16", grid=(4, 5), prefix=1, suffix=1)
    tensors, keywords, grad = near_parity.arguments(case, "cpu")
    with recorded(backwards=backwards) as record:
        results = near_parity.run(tensors, keywords, grad)
    assert not record.faults
    assert sorted(set(record.kernels)) == [
        "near_exact", "near_exact_gradient", "near_key_gradient", "near_means", "near_queries",
        "near_query_gradient", "near_shared_gradient",
    ]  # fmt: skip
    assert all(result.isfinite().all() for result in results.values())
