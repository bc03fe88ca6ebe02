"""Races and bounds of the Triton kernels, in Triton's interpreter. Run by test_triton.py, in a
process of its own, as triton_interpreted.py is.
"""

import os

import pytest
import torch
import triton
import triton.language as tl
from triton_cases import arguments, poisoned, run

from t5fx.bench.gpu.interpreter import mended
from t5fx.bench.gpu.races import recorded

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")


@pytest.fixture(autouse=True)
def _mended():
    with mended():
        yield


@triton.jit
def each_its_own(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) + 1)


@triton.jit
def all_the_same(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) + 1)


@triton.jit
def from_the_neighbour(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    tl.store(out + at, value + tl.load(out + at + BLOCK, mask=tl.program_id(0) == 0, other=0.0))


@triton.jit
def one_too_many(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at + 1))


@triton.jit
def one_too_early(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at - 1, tl.load(x + at))


@triton.jit
def read_again(x, out, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at))
    if BARRIER:
        tl.debug_barrier()
    other = tl.load(out + tl.program_id(0) * BLOCK + BLOCK - 1 - tl.arange(0, BLOCK))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + at, other)


@triton.jit
def the_last_sums(x, out, count, LAST: tl.constexpr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """One of the programs, which is the last one to come here if LAST, reads what all wrote."""
    lanes = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0) * BLOCK + lanes, tl.load(x + lanes))
    if BARRIER:
        tl.debug_barrier()
    before = tl.atomic_add(count, 1)
    if LAST:
        chosen = before == tl.num_programs(0) - 1
    else:
        chosen = tl.program_id(0) == tl.num_programs(0) - 1
    tl.debug_barrier()
    if chosen:
        total = tl.zeros([BLOCK], tl.float32)
        for program in range(tl.num_programs(0)):
            total += tl.load(out + program * BLOCK + lanes)
        tl.store(x + lanes, total)


NONE = set()
TWO = {"written by two programs"}
OTHER = {"read by one program, written by another"}
AGAIN = {"read after write without a barrier"}


@pytest.mark.parametrize(
    ("kernel", "settings", "kinds"),
    [
        (each_its_own, {}, NONE),
        (all_the_same, {}, TWO),
        (from_the_neighbour, {}, OTHER),
        (one_too_many, {}, {"read out of bounds"}),
        (one_too_early, {}, {"written out of bounds"}),
        (read_again, {"BARRIER": True}, NONE),
        (read_again, {"BARRIER": False}, AGAIN),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_checker_itself(kernel, settings, kinds, backwards, dtype):
    x, _, out, _ = torch.zeros(4, 32, dtype=dtype)  # what lies between is no argument
    with recorded(backwards=backwards) as record:
        kernel[(2,)](x, out, **settings, BLOCK=16)
    assert record.kernels == [kernel.fn.__name__]
    assert {fault.kind for fault in record.faults} == kinds
    units = x.element_size() // 2
    for fault in record.faults:
        one = fault.kind.endswith("bounds")
        assert fault.addresses == units * (1 if one else 32 if kinds == AGAIN else 16)
        assert fault.programs == ((1,) if kernel is one_too_many else fault.programs)


@pytest.mark.parametrize(
    ("last", "barrier", "backwards", "wrong"),
    [
        (True, True, False, False),
        (True, True, True, False),
        (True, False, False, True),
        # The program of the highest number is not the last one in every order.
        (False, True, False, False),
        (False, True, True, True),
    ],
)
def test_order_by_atomics(last, barrier, backwards, wrong):
    x, out, count = torch.zeros(16), torch.zeros(48), torch.zeros(1, dtype=torch.int32)
    with recorded(backwards=backwards) as record:
        the_last_sums[(3,)](x, out, count, LAST=last, BARRIER=barrier, BLOCK=16)
    # x is read by all and written by one of them, which no barrier of the others precedes.
    found = {f.kind for f in record.faults}
    assert found == (OTHER if wrong else NONE)


CASES = {
    "one axis": {"grid": (21,)},
    "two axes": {"grid": (3, 5)},
    "three axes": {"grid": (2, 2, 3)},
    "not convolved": {"grid": (37,), "locality": "none"},
    "centred": {"grid": (3, 5), "dtype": torch.float32},
    "centred, not convolved": {"grid": (37,), "dtype": torch.float32, "locality": "none"},
    "no prefix": {"grid": (4, 4), "prefix": 0, "suffix": 19},
    "no suffix": {"grid": (4, 4), "prefix": 18, "suffix": 0},
    "batch of two": {"grid": (5, 7), "batch": 2},
    "three axes of more": {"grid": (3, 3, 4), "batch": 2},
}
#: What runs each kernel; the others run at night, as three axes take half a minute.
OFTEN = ("one axis", "two axes", "centred, not convolved")
#: Names of kernels that some case launched.
LAUNCHED = set()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.slow) for n in CASES]
)
def test_no_kernel_has_any(name):
    case = {"batch": 1, "heads": 2, "prefix": 3, "suffix": 2, "dtype": torch.bfloat16} | CASES[name]
    with poisoned(), recorded() as record:
        run(*arguments(head_dim=24, value_dim=20, layout="packed", **case))
    assert not record.faults
    LAUNCHED.update(record.kernels)


def test_no_kernel_depends_on_the_order_of_its_programs():
    case = arguments(
        batch=1, heads=2, head_dim=24, value_dim=20, grid=(3, 5), prefix=3, suffix=2,
        dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)  # of the tanh that is off
    with recorded(backwards=True) as record:
        results = run(*case)
    assert not record.faults
    assert all(result.isfinite().all() for result in results)


@pytest.mark.skipif("T5FX_KERNELS" not in os.environ, reason="test_triton.py tells their names")
def test_every_kernel_was_checked():
    assert set(os.environ["T5FX_KERNELS"].split()) <= LAUNCHED
