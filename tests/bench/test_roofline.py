"""What is counted of the Triton kernels without a GPU."""

import pytest
import torch

from t5fx.bench.gpu import offline, roofline

ALL = ("forward", "backward")
#: Compiles 9 kernels; once is enough, on the newest torch.
counted = pytest.mark.extras


@pytest.fixture(scope="module")
def rows():
    return roofline.kernels(64)


@counted
def test_each_launch_is_counted(rows):
    """All but those whose work does not grow with the tokens of a head."""
    found = offline.launches("sm_90", torch.bfloat16, 64)
    assert set(found) - {row.name for row in rows} == {"key_norm", "sum_matrices"}
    assert [row.name for row in rows] == list(roofline.WORK)


@counted
def test_what_an_element_costs_at_least(rows):
    """A multiply-add for a tap, a conversion for a neighbour. A hidden unit: a tanh."""
    of = {row.name: row for row in rows}
    assert of["second_order_gradient_kept"].instructions < 60
    for name in ("inner_gradient_keys", "query_output", "inner_gradient_queries"):
        assert of[name].instructions > 9 + 4
        assert of[name].special == pytest.approx(1)
    assert of["convolution_gradient_keys"].instructions > 2 * 9 + 4
    assert of["key_norm_gradient"].instructions < 12
    assert of["prepare"].instructions < 8


def test_a_bound_is_the_sum_of_the_highest_floors():
    gpu = roofline.Gpu("round", bandwidth=2.0, products=64.0, multiprocessors=1, clock=1.0)
    config = {
        "instructions": 128.0,
        "spills": 0.0,
        "special": 0.0,
        "serialised": False,
        "config": "",
        "resident": 1,
    }
    one = roofline.Kernel("prepare", 3, 0, **config)
    two = roofline.Kernel("query_output", 1, 9, **config)
    assert one.seconds(64, gpu) == {"memory": 3.0, "products": 0.0, "issue": 1.0}
    seconds, share = roofline.bound([one, two], ("forward",), 64, gpu)
    assert seconds == 3 + 18
    assert share == pytest.approx(max(4, 18) / 21)


def kernel(resident, ahead=False):
    config = {"spills": 0.0, "special": 0.0, "serialised": False, "config": ""}
    return roofline.Kernel("query_output", 2, 3, 192.0, **config, resident=resident, ahead=ahead)


def test_what_is_expected_lies_between_the_sum_and_the_bound():
    """One program does one thing after the other; many fill each other's waits."""
    gpu = roofline.Gpu("round", bandwidth=4.0, products=64.0, multiprocessors=1, clock=1.0)
    one, two, many = (kernel(resident).expected(64, gpu) for resident in (1, 2, 10**9))
    assert kernel(1).seconds(64, gpu) == {"memory": 1.0, "products": 6.0, "issue": 1.5}
    assert one == 8.5
    assert two == (8.5 + 6) / 2
    assert many == pytest.approx(6)
    assert kernel(1, ahead=True).expected(64, gpu) == 7.5
    slow = gpu._replace(bandwidth=0.5)
    assert kernel(1, ahead=True).expected(64, slow) == 8


def test_partial_sums_are_what_is_launched(monkeypatch):
    """Of one weight in float32, 3 D^2, from each program; written once and read once."""
    sums = roofline.partial_bytes(("forward",), 64, 2**14) * roofline.HEADS * 2**14 * 64
    statistics = 2 * 64 * 4 * 2
    programs, rest = divmod(sums, 3 * 64 * 64 * 4 * 2)
    slots = 2 * roofline.H200.multiprocessors
    assert slots // 2 < programs <= 8 * slots
    assert rest % statistics == 0


def test_the_page_has_each_version_of_triton(tmp_path, monkeypatch):
    """What another version gave of other kernels is dropped, of the same kept."""
    monkeypatch.setattr(roofline, "kernels", lambda dim: [kernel(2)])
    path = tmp_path / "counts.json"
    monkeypatch.setattr(roofline.triton, "__version__", "3.6.0")
    assert list(roofline.count(path)) == ["3.6.0"]
    monkeypatch.setattr(roofline.triton, "__version__", "3.10.0")
    found = roofline.tables(roofline.count(path))
    assert list(found) == ["3.10.0", "3.6.0"]
    assert found["3.6.0"][64] == [kernel(2)]
    page = roofline.page(found)
    assert "with Triton 3.10.0 and 3.6.0" in page
    assert page.count("| query_output | 3.6.0 |") == len(roofline.DIMS)
    monkeypatch.setattr(roofline, "digest", lambda: "others")
    assert list(roofline.count(path)) == ["3.10.0"]


@counted
def test_bytes_through_memory(rows):
    """On many tokens the partial sums are nothing: q, v and o once, k twice; to be trained, the
    convolved k is written too.
    """
    assert roofline.bytes_over_least(rows, ("forward",), 64, 2**30) == pytest.approx(5 / 4, 1e-3)
    assert roofline.bytes_over_least(rows, ALL, 64, 2**30) == pytest.approx(22 / 11, 1e-3)


def test_loops():
    """An outer loop over tiles with products, an inner one that loads."""
    code = [
        offline.Instruction(0x00, "MOV", "R1"),
        offline.Instruction(0x10, "IADD3", "R1"),
        offline.Instruction(0x20, "BRA", "0x80", predicated=True),  # a tile off the grid
        offline.Instruction(0x30, "LDG.E.128", "R4"),
        offline.Instruction(0x40, "BRA", "0x60", predicated=True),  # not for this column
        offline.Instruction(0x50, "FFMA", "R4"),
        offline.Instruction(0x60, "BRA", "0x30", predicated=True),
        offline.Instruction(0x70, "BRA", "0x90"),
        offline.Instruction(0x80, "STS", "R4"),
        offline.Instruction(0x90, "HGMMA.64x64x16.F32", "R8"),
        offline.Instruction(0xA0, "BRA", "0x10", predicated=True),
        offline.Instruction(0xB0, "EXIT", ""),
    ]
    assert [len(body) for body in offline.loops(code)] == [4, 10]
    counts = offline.token_loop(code)
    assert counts == {"IADD3": 1, "BRA": 11, "LDG": 4, "FFMA": 3, "HGMMA": 1}
