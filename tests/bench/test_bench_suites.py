"""The suites of the pass and of the kernels, on a CPU."""

import pytest
import torch

from t5fx.bench.harness.timing import Spread
from t5fx.bench.suites import kernels, pass_cost, peers
from t5fx.errors import T5Error


def values(experiment):
    rows = list(experiment.run(experiment))
    assert all((row.suite, row.case) == (experiment.suite, experiment.case) for row in rows)
    return {(row.contender, row.measure): row for row in rows}


# --- pass ---------------------------------------------------------------------------------------


def test_each_stage_of_the_pass_is_timed(monkeypatch):
    monkeypatch.setattr(pass_cost, "cold_compile", lambda depth: 100.0)
    (experiment,) = pass_cost.experiments(small=True)
    assert (experiment.suite, experiment.case) == ("pass", "ViT-Ti, 2 blocks")
    found = values(experiment)
    stages = [contender for contender, measure in found if measure == "time"]
    assert stages == ["capture", "match", "layout", "plan", "rewrite"]
    nodes = found["plan and rewrite", "nodes"].value
    per_node = found["plan and rewrite", "time per node"]
    assert nodes > 20 and 0 < per_node.value < 0.1
    share = found["plan and rewrite", "share of cold compile"]
    assert share.value == pytest.approx(per_node.value * nodes / 100)
    assert found["Inductor", "cold compile"].value == 100


def test_cases_of_the_pass(monkeypatch):
    cases = [one.case for one in pass_cost.experiments()]
    assert cases[0] == "ViT-Ti, 6 blocks" and cases[-1] == "Flux, 57 attentions"
    monkeypatch.setattr(pass_cost.importlib.util, "find_spec", lambda name: None)
    ((row,),) = [list(one.run(one)) for one in pass_cost.experiments()[-1:]]
    assert row.status == "absent" and "pip install diffusers" in row.detail


def test_a_site_that_is_not_rewritten_is_an_error():
    images = {"x": torch.randn(1, 3, 64, 64)}
    with pytest.raises(T5Error, match="expected 3 rewritten sites, got 1"):
        pass_cost.measure(pass_cost.vit(1), images, pass_cost.EVERY_SITE, 3)


# --- kernels ------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU has")
def test_rows_of_the_kernels_on_a_cpu(monkeypatch):
    seconds = [[4.0, 4.0, 4.0], [3.0, 6.0, 2.0], [8.0, 8.0, 8.0], [1.0, 2.0, 2.0]]
    monkeypatch.setattr(peers, "interleave", lambda calls, *_: seconds[: len(calls)])
    forward, both = kernels.experiments(small=True)
    assert forward.case == "1 x 2 heads x 64 tokens x 16, forward"
    assert (forward.tokens, forward.mode, both.mode) == (64, "inference", "training")
    assert len(kernels.experiments()) == 5
    found = values(forward)
    everyone = {"softmax, SDPA", "TTT", "reference, Inductor", "its matrix products alone"}
    for measure in ("latency", "speed-up"):
        assert {name for name, what in found if what == measure} == everyone
    assert found["TTT", "latency"].value == 3 and found["TTT", "speed-up"].value == 4 / 3
    assert found["TTT", "times its products"].spread == (2.0, 3.0, 3.0)
    assert found["reference, Inductor", "times its products"].value == 4
    # The products of the backward pass are not there to compare with.
    assert not any(what == "times its products" for _, what in values(both))


class Clock:
    """Stands for a GPU: each call is made, and takes a second longer than the one before; one has
    no memory left."""

    def __init__(self, too_large=None):
        self.seconds, self.too_large = 0.0, too_large

    def __call__(self, call):
        call()
        self.seconds += 1
        if self.seconds == self.too_large:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto")
        return Spread(self.seconds, 2 * self.seconds, 4 * self.seconds)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The suite, with the reference in place of the kernels."""

    def as_the_kernels(tensors, settings, grad_out):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = kernels.reference(*kernels.node(leaves), **kernels.NAMES, **settings)
        return [out, *(torch.autograd.grad(out, leaves, grad_out) if grad_out is not None else ())]

    def on_a_cpu(*sizes, original=kernels.arguments):
        return original(*sizes, device="cpu")

    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "ceilings", lambda: (1e9, 1e12))
    monkeypatch.setattr(kernels, "arguments", on_a_cpu)
    monkeypatch.setattr(kernels, "replayed", Clock())
    monkeypatch.setattr(kernels, "check", lambda tensors, settings: None)
    monkeypatch.setattr(kernels, "kernels", as_the_kernels)
    monkeypatch.setattr(kernels.torch, "compile", lambda function: function)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.filterwarnings("ignore")  # of softmax's backends that a CPU has not
def test_rows_of_the_kernels(as_on_a_gpu, both):
    experiment = kernels.experiments(small=True)[both]
    assert experiment.case == "1 x 12 heads x 256 tokens x 64, forward" + " and backward" * both
    everything = [experiment.case for experiment in kernels.experiments()]
    assert len(set(everything)) == 2 * 2 * 2 * 6
    assert everything[0] == "8 x 16 heads x 4096 tokens x 128, forward"  # what matters most
    found = values(experiment)
    assert found["machine", "copy bandwidth"].value == 1e9
    assert found["machine", "matrix product"].value == 1e12
    assert found["CUDNN_ATTENTION", "latency"].status == "absent"
    for second, name in enumerate(("t5fx", "reference, Inductor", "FLASH_ATTENTION"), 1):
        assert found[name, "latency"].spread == (second, 2 * second, 4 * second)
        assert found[name, "speed-up"].value == pytest.approx(3 / second)
        share = found[name, "share of roofline"]
        moved = 12 * 256 * 64 * 2 * (11 if both else 4)
        arithmetic = 12 * 18 * 256 * 64**2 * (1 + 23 / 9 if both else 1)
        floor = max(moved / 1e9, arithmetic / 1e12)
        assert share.value == pytest.approx(floor / (2 * second))
        assert share.low < share.value < share.high


@pytest.mark.filterwarnings("ignore")  # of softmax's backends that a CPU has not
def test_a_rival_without_memory_costs_no_other_figures(as_on_a_gpu, monkeypatch):
    experiment = kernels.experiments(small=True)[0]
    monkeypatch.setattr(kernels, "replayed", Clock(too_large=2))
    found = values(experiment)
    assert found["reference, Inductor", "latency"].status == "failed"
    assert found["reference, Inductor", "latency"].detail == "CUDA out of memory. Tried"
    assert found["t5fx", "speed-up"].value == pytest.approx(3)
    monkeypatch.setattr(kernels, "replayed", Clock(too_large=1))
    with pytest.raises(torch.OutOfMemoryError):  # the kernels themselves
        values(experiment)


@pytest.mark.parametrize("name", list(kernels.OTHERS))
@pytest.mark.filterwarnings("ignore")  # of softmax's backends that a CPU has not
def test_rivals_of_other_packages(name):
    """Absent without their package; refused where they do not compute their equations."""
    tensors, settings = kernels.arguments(1, 2, 64, 16, device="cpu")
    module, _, call, exact = kernels.OTHERS[name]
    found = dict(kernels.contenders(tensors, settings, False))
    assert f"PYTHONPATH needs {module}" in found[name]

    leaves = tensors[:3] if call is kernels.fla else tensors[:6]
    want = exact(*(t.float() for t in leaves))
    kernels.check_other(name, lambda *_: want, exact, leaves)
    with pytest.raises(T5Error, match=rf"{name}: expected errors up to 0\.03; got"):
        kernels.check_other(name, lambda *_: 1.1 * want, exact, leaves)


def test_a_wrong_kernel_is_refused(monkeypatch):
    tensors, settings = kernels.arguments(1, 2, 64, 16, device="cpu")
    zeros = [torch.zeros(()), *map(torch.zeros_like, tensors)]
    monkeypatch.setattr(kernels, "kernels", lambda *args: zeros)
    with pytest.raises(T5Error, match=r"expected errors up to 0\.03; got 1"):
        kernels.check(tensors, settings)
