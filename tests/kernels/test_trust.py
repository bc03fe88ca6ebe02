"""impl="auto" on a GPU: the kernels once a check has passed, else why not. Needs no GPU."""

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
import types
import warnings

import numpy
import pytest
import torch
import triton
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from vits import Shape

import t5fx
from t5fx.analysis import measure as measure
from t5fx.analysis import policy as policy
from t5fx.analysis.measure import Cost, Spread
from t5fx.backend import compile as backend
from t5fx.errors import SlowNodeWarning
from t5fx.kernels import TTT, NodeArgumentError, choice, trust, ttt
from t5fx.kernels.trust import Question, Verdict
from t5fx.kernels.variant import Variant

GPU = torch.device("cuda", 0)
NODE = Variant().settings()
QUESTION = Question("float16", 16, 1, "forward", choice.settings_of(NODE))
#: 101 tokens, heads of 16: more than 4.5 D, fewer than 12 times as many.
SHAPE = Shape(depth=3, heads=2, head_dim=16, grid=(10, 10))
PASSED = {"status": "passed", "reason": "8 cases are right"}
FAILED = {"status": "failed", "reason": "bfloat16, 4290 tokens: out is 9 off"}


def said(result, returncode=0, err=""):
    """A checking process that has ended."""
    out = "" if result is None else f"\n{trust.MARK}{json.dumps(result)}\n"
    return subprocess.CompletedProcess([], returncode, out, err)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that answers questions about itself alone; checks on it give `.result`."""
    monkeypatch.setenv("T5FX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(trust, "_known", {})
    monkeypatch.setattr(trust, "_warned", set())
    monkeypatch.setattr(trust, "gpu_of", lambda device: trust.Gpu("NVIDIA H100", (9, 0)))
    monkeypatch.setattr(trust, "assembler", lambda capability: ["/ptxas", "12.8"])
    state = types.SimpleNamespace(result=said(PASSED), asked=[], folder=tmp_path / "cache")

    def ask(question, device):
        state.asked.append((question, device))
        return state.result

    monkeypatch.setattr(trust, "_ask", ask)
    return state


@pytest.fixture
def as_gpu(gpu, monkeypatch):
    """CPU tensors are taken for a GPU's by what chooses."""
    monkeypatch.setattr(choice, "is_gpu", lambda device: True)
    return gpu


def on_cuda(dtype=torch.bfloat16, shape=SHAPE):
    """(model, images) on a CUDA device that need not be there: fake tensors."""
    model, images = shape.model(), shape.images()

    def moved(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cuda")

    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(moved(parameter))
        return model, moved(images)


#: A node whose cost the comments know: without near attention.
PLAIN = t5fx.LinearizeConfig(neighborhood=0, coarse=0)


def explained(config=PLAIN, dtype=torch.bfloat16, shape=SHAPE):
    model, images = on_cuda(dtype, shape)
    return t5fx.explain(model, (images,), config=config)


def explained_often(gpu, config):
    """Two models, and another GPU of the kind."""
    report, _ = explained(config), explained(config)
    trust.verdict(gpu.asked[0][0], torch.device("cuda", 1))
    return report


class TestExplain:
    def test_triton_with_a_passed_check(self, gpu):
        report = explained()
        assert {(s.status, s.impl) for s in report.sites} == {("rewritten", "triton")}
        assert report.sites[0].impl_reason == "checked on this GPU: 8 cases are right"
        assert "rewritten: triton" in str(report)
        assert "impl triton (3): checked on this GPU: 8 cases are right" in str(report)
        assert json.loads(json.dumps(report.to_dict()))["sites"][0]["impl"] == "triton"
        ((question, device),) = gpu.asked  # once for three sites
        assert (question.dtype, question.width, question.axes) == ("bfloat16", 16, 2)
        assert (question.direction, device) == ("forward", GPU)

    def test_the_reference_with_a_failed_one_and_one_warning(self, gpu):
        gpu.result = said(FAILED)
        always = t5fx.LinearizeConfig(min_tokens=0)
        with pytest.warns(SlowNodeWarning) as caught:
            report = explained_often(gpu, always)
        (warning,) = [w for w in caught if w.category is SlowNodeWarning]
        for part in ("reference", "check failed: bfloat16, 4290", "T5FX_TRITON=0", str(gpu.folder)):
            assert part in str(warning.message)
        assert {s.impl for s in report.sites} == {"reference"}
        wanted = f"the check of the Triton kernels failed: {FAILED['reason']}"
        assert {s.impl_reason for s in report.sites} == {wanted}
        assert len(gpu.asked) == 1

    def test_a_model_in_training_asks_for_the_backward(self, gpu):
        model, images = on_cuda()
        t5fx.explain(model.train(), (images,), config=PLAIN)
        assert [question.direction for question, _ in gpu.asked] == ["backward"]

    def test_break_even_knows_the_implementation(self, gpu):
        """101 tokens pay with the kernels, 864 are needed without: 12 times 4.5 D."""
        assert explained().rewritten
        trust._known.clear()
        (path,) = gpu.folder.glob("trust-*.json")
        path.unlink()
        gpu.result = said(FAILED)
        with pytest.warns(SlowNodeWarning):
            report = explained()
        assert {s.reason for s in report.sites} == {"below-break-even"}
        detail = report.sites[0].detail
        assert "from 864 on" in detail and "estimated to take 12 times" in detail
        assert "'reference'" in detail and FAILED["reason"] in detail
        assert report.sites[0].flops_after < report.sites[0].flops_before

    def test_no_check_where_nothing_would_be_rewritten(self, gpu):
        small = Shape(depth=1, heads=2, head_dim=16, grid=(5, 5))
        assert not explained(shape=small).rewritten
        assert not explained(t5fx.LinearizeConfig(exclude=("*",))).rewritten
        assert not explained(t5fx.LinearizeConfig(min_tokens=1000)).rewritten
        assert not gpu.asked

    def test_float32_keeps_the_reference(self, gpu):
        report = explained(dtype=torch.float32)
        assert {s.impl for s in report.rewritten} == {"reference"} and not gpu.asked
        assert "no measurement shows the kernels to be faster" in report.sites[0].impl_reason

    def test_switched_off(self, gpu, monkeypatch):
        monkeypatch.setenv("T5FX_TRITON", "0")
        report = explained(t5fx.LinearizeConfig(min_tokens=0))
        assert {(s.impl, s.impl_reason) for s in report.sites} == {
            ("reference", "switched off by T5FX_TRITON")
        }
        assert not gpu.asked

    @pytest.mark.parametrize("impl", ["triton", "reference"])
    def test_asked_for(self, gpu, impl):
        report = explained(t5fx.LinearizeConfig(min_tokens=0, impl=impl))
        assert {(s.impl, s.impl_reason) for s in report.sites} == {(impl, "asked for")}
        assert not gpu.asked

    def test_other_nodes(self, gpu):
        report = explained(t5fx.LinearizeConfig(min_tokens=0, inner="mlp2"))
        assert report.sites[0].impl == "reference"
        assert "no kernels for inner='mlp2'" in report.sites[0].impl_reason
        assert not gpu.asked

    def test_a_cpu(self, gpu):
        config = t5fx.LinearizeConfig(min_tokens=0)
        (site, *_) = t5fx.explain(SHAPE.model(), (SHAPE.images(),), config=config).sites
        assert (site.impl, "a CPU" in site.impl_reason) == ("c++", True)
        model, images = SHAPE.model().double(), SHAPE.images().double()
        assert t5fx.explain(model, (images,), config=config).sites[0].impl == "reference"
        assert t5fx.explain(model.train(), (images,), config=config).sites[0].impl == "written-out"

    def test_meta(self, gpu):
        with torch.device("meta"):
            model = SHAPE.model()
        config = t5fx.LinearizeConfig(min_tokens=0)
        (site, *_) = t5fx.explain(model, (SHAPE.images().to("meta"),), config=config).sites
        assert site.impl == "reference" and "meta" in site.impl_reason


class TestVerdicts:
    def test_kept_for_other_processes(self, gpu, monkeypatch):
        assert trust.verdict(QUESTION, GPU) == Verdict(**PASSED)
        monkeypatch.setattr(trust, "_known", {})
        assert trust.verdict(QUESTION, GPU) == Verdict(**PASSED)
        assert len(gpu.asked) == 1

    @pytest.mark.parametrize("damage", ["", "{", "[]", '{"status": "passed"}', None])
    def test_a_damaged_file_is_checked_again(self, gpu, monkeypatch, damage):
        trust.verdict(QUESTION, GPU)
        (path,) = gpu.folder.glob("trust-*.json")
        changed = json.loads(path.read_text()) | {"status": "perhaps"}
        path.write_text(json.dumps(changed) if damage is None else damage)
        monkeypatch.setattr(trust, "_known", {})
        assert trust.verdict(QUESTION, GPU).passed
        assert len(gpu.asked) == 2
        assert json.loads(path.read_text())["status"] == "passed"

    def test_what_was_impossible_is_tried_again_by_the_next_process(self, gpu, monkeypatch):
        gpu.result = said({"status": "impossible", "reason": "no compiler"})
        with pytest.warns(SlowNodeWarning, match="check was impossible: no compiler"):
            assert trust.verdict(QUESTION, GPU).status == "impossible"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trust.verdict(QUESTION, GPU)
        assert len(gpu.asked) == 1 and not list(gpu.folder.glob("trust-*.json"))
        monkeypatch.setattr(trust, "_known", {})
        gpu.result = said(PASSED)
        assert trust.verdict(QUESTION, GPU).passed

    def test_a_driver_that_says_no(self, gpu, monkeypatch):
        def fail(device):
            raise RuntimeError("no driver")

        monkeypatch.setattr(trust, "gpu_of", fail)
        with pytest.warns(SlowNodeWarning, match="impossible: RuntimeError: no driver"):
            assert not trust.verdict(QUESTION, GPU).passed

    @pytest.mark.parametrize(
        "change",
        [
            {"gpu_of": lambda device: trust.Gpu("NVIDIA A100", (9, 0))},
            {"gpu_of": lambda device: trust.Gpu("NVIDIA H100", (8, 0))},
            {"assembler": lambda capability: ["/ptxas", "12.9"]},
            {"assembler": lambda capability: ["/other/ptxas", "12.8"]},
            {"code_digest": lambda: "other"},
            {"torch": "9.9"},
            {"triton": "9.9"},
            {"dtype": "bfloat16"},
            {"width": 32},
            {"axes": 2},
            {"direction": "backward"},
            *({"node": {**NODE, **new}} for new in (
                {"locality": "none"}, {"key_norm_eps": 1e-5}, {"inner": "mlp2"},
                {"inner_loss": "l2"}, {"key_norm": "rms"}, {"window": 5}, {"neighborhood": 7},
                {"coarse": 4}, {"mix": "half"}, {"qk_affine": True},
            )),
        ],
        ids=lambda change: next(iter(change)),
    )  # fmt: skip
    def test_each_part_of_the_key_counts(self, gpu, monkeypatch, change):
        before = trust.key_of(QUESTION, GPU)
        question = vars(QUESTION)
        for name, value in change.items():
            if name == "torch":
                monkeypatch.setattr(torch, "__version__", value)
            elif name == "triton":
                monkeypatch.setattr(trust.importlib.metadata, "version", lambda name: "9.9")
            elif name == "node":
                question = question | {"node": choice.settings_of(value)}
            elif name in question:
                question = question | change
            else:
                monkeypatch.setattr(trust, name, value)
        assert trust.key_of(Question(**question), GPU) != before

    def test_several_processes_make_one_check(self, gpu, monkeypatch):
        """flock keeps two openings of a file apart, of one process too."""
        ask = trust._ask

        def slow(*about):
            time.sleep(0.5)
            return ask(*about)

        monkeypatch.setattr(trust, "_ask", slow)
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(trust._find(QUESTION, GPU)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [verdict for verdict, _ in found] == [Verdict(**PASSED)] * 3 and len(gpu.asked) == 1

    def test_the_assembler_is_tritons_own(self, monkeypatch, tmp_path):
        """The version is asked of the one that is really taken."""
        path, version = trust.assembler((9, 0))
        assert path.endswith(("ptxas", "ptxas-blackwell")) and version.startswith("1")


def near(coarse):
    """The settings of a node with near attention, with so many cells along each axis."""
    return choice.settings_of({**NODE, "scale": 1.0, "neighborhood": 7, "coarse": coarse})


class TestTheChoice:
    """As an argument in the graph."""

    def call(self, **changes):
        about = {
            "device": GPU, "dtype": torch.bfloat16, "widest": torch.float32, "head_dim": 64,
            "value_dim": 64, "axes": 2, "trained": False,
            "node": choice.settings_of({**NODE, "scale": 1.0}),
        }  # fmt: skip
        return choice.Call(**about | changes)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"node": choice.settings_of({**NODE, "window": 5})}, "no kernels for .*window=5"),
            ({"node": choice.settings_of({"inner": "swiglu"})}, "no kernels for"),
            ({"dtype": None}, "differ in dtype"),
            ({"widest": torch.float64}, "parameters of float64"),
            ({"head_dim": 512}, "more than 256 channels"),
            ({"node": near(12), "axes": 2}, "more than 128 coarse cells .* 64 channels: 144"),
            ({"node": near(6), "head_dim": 200}, "more than 32 coarse cells .* 256 channels: 36"),
        ],
    )
    def test_what_is_unknown_is_untrusted(self, gpu, changes, reason):
        found = choice.choose("auto", self.call(**changes))
        assert found.impl == "reference" and not gpu.asked
        assert re.search(reason, found.reason)
        assert choice.choose("auto", self.call()).impl == "triton"

    def test_near_attention_is_asked_for(self, gpu):
        """With all that decides its machine code; the grid is read without a convolution too."""
        assert choice.choose("auto", self.call(node=near(8))).impl == "triton"
        plain = choice.settings_of({**NODE, "locality": "none", "neighborhood": 7, "scale": 1.0})
        assert choice.choose("auto", self.call(node=plain)).impl == "triton"
        both = [(question.axes, dict(question.node)) for question, _ in gpu.asked]
        assert [axes for axes, _ in both] == [2, 2]
        assert [(node["neighborhood"], node["coarse"]) for _, node in both] == [(7, 8), (7, 0)]

    def test_trained_without_the_kernels(self, gpu):
        call = self.call(trained=True, dtype=torch.float32)
        assert choice.choose("auto", call).impl == "written-out"

    @pytest.mark.parametrize(("dims", "width"), [((3, 4), 16), ((64, 64), 64), ((72, 64), 128)])
    def test_width(self, dims, width):
        call = self.call(head_dim=dims[0], value_dim=dims[1])
        assert choice._question(call).width == width

    def graphs(self, function, *inputs):
        kept = []

        def keep(gm, example_inputs):
            kept.append(gm)
            return gm.forward

        torch._dynamo.reset()
        # The kernels themselves want a GPU.
        with torch.no_grad(), contextlib.suppress(NodeArgumentError):
            torch.compile(function, backend=keep, fullgraph=True)(*inputs)
        return kept

    def impls(self, graph):
        return [n.kwargs["impl"] for n in graph.graph.nodes if n.target is torch.ops.t5fx.ttt]

    @pytest.mark.parametrize(("result", "impl"), [(PASSED, "trusted"), (FAILED, "auto")])
    @pytest.mark.filterwarnings("ignore:impl=.auto. runs the PyTorch reference")
    def test_stands_in_dynamos_graph(self, as_gpu, result, impl):
        as_gpu.result = said(result)
        node = TTT(2, 16, 16, 2, scale=0.25).bfloat16().requires_grad_(False)
        q = torch.randn(1, 2, 12, 16, dtype=torch.bfloat16)
        (graph,) = self.graphs(lambda q: node(q, q, q, (3, 4)), q)
        assert self.impls(graph) == [impl]
        weights, conv, *_ = node.tensors()
        (graph,) = self.graphs(lambda q: ttt(q, q, q, weights, conv, scale=1.0, grid=(3, 4)), q)
        assert self.impls(graph) == [impl]

    @pytest.mark.filterwarnings("ignore:impl=.auto. runs the PyTorch reference")
    def test_compilers_caches_tell_the_graphs_apart(self, as_gpu):
        """AOTAutograd's key is of the graph with the node undecomposed."""
        node = TTT(2, 16, 16, 2, scale=0.25).bfloat16().requires_grad_(False)
        q = torch.randn(1, 2, 12, 16, dtype=torch.bfloat16)
        codes = []
        for result in (PASSED, FAILED, FAILED):
            trust._known.clear()
            for path in as_gpu.folder.glob("trust-*.json"):
                path.unlink()
            as_gpu.result = said(result)
            (graph,) = self.graphs(lambda q: node(q, q, q, (3, 4)), q)
            codes.append(graph.code)  # what is pickled of a graph for the key
        assert codes[0] != codes[1] == codes[2]

    @pytest.mark.parametrize(("result", "impl"), [(PASSED, "trusted"), (FAILED, "auto")])
    @pytest.mark.filterwarnings("ignore:impl=.auto. runs the PyTorch reference")
    @pytest.mark.filterwarnings("ignore::t5fx.errors.UntrainedWarning")
    def test_stands_in_the_backends_graph(self, as_gpu, monkeypatch, result, impl):
        as_gpu.result = said(result)
        kept = []

        def keep(gm, example_inputs):
            kept.append(gm)
            return lambda *_: [torch.zeros(())]

        monkeypatch.setattr(backend, "_inductor", lambda options, more: keep)
        shape = Shape(depth=1, heads=2, head_dim=16, grid=(10, 10))
        model = shape.model().bfloat16().requires_grad_(False)
        fast = torch.compile(model, backend="t5", options={"min_tokens": 0})
        with torch.no_grad():
            fast(shape.images().bfloat16())
        nodes = [n for g in kept for n in g.graph.nodes if n.target is backend._TTT]
        assert [n.kwargs["impl"] for n in nodes] == [impl]
        assert len(as_gpu.asked) == 1  # of plan and graph together

    def test_what_is_exported_stays_auto(self, as_gpu):
        node = TTT(2, 16, 16, 1, scale=0.25).bfloat16()

        class Call(nn.Module):
            def __init__(self):
                super().__init__()
                self.node = node

            def forward(self, q):
                return self.node(q, q, q, (12,))

        q = torch.randn(1, 2, 12, 16, dtype=torch.bfloat16)
        program = torch.export.export(Call(), (q,), strict=False)
        nodes = [n for n in program.graph.nodes if "ttt" in str(n.target)]
        assert [n.kwargs.get("impl", "auto") for n in nodes] == ["auto"]
        assert not as_gpu.asked

    def test_trusted_is_the_kernels_but_in_transforms(self):
        """torch.func wants to see ordinary operators."""
        node = TTT(1, 8, 8, 1, scale=0.25)
        tensors = node.tensors()
        settings = node.settings() | {"impl": choice.TRUSTED, "grid": [4]}
        q = torch.randn(2, 1, 4, 8)

        def call(q, impl=choice.TRUSTED):
            given = settings | {"impl": impl}
            return torch.ops.t5fx.ttt(q, q, q, *tensors, **given)

        with pytest.raises(NodeArgumentError, match="expected a GPU"):
            call(q)
        found = torch.func.grad(lambda q: call(q).sum())(q)
        wanted = torch.func.grad(lambda q: call(q, "reference").sum())(q)
        torch.testing.assert_close(found, wanted)

    def test_training_is_asked_for_where_a_gradient_is_recorded(self, as_gpu):
        tensors = [torch.randn(1, 2, 12, 16, dtype=torch.bfloat16) for _ in "qkv"]
        parameter = torch.ones(3, requires_grad=True)
        node = {**NODE, "scale": 1.0}
        assert choice.resolved("auto", *tensors, [parameter], 1, node) == "trusted"
        with torch.no_grad():
            choice.resolved("auto", *tensors, [parameter], 1, node)
        choice.resolved("auto", *tensors, [parameter.detach()], 1, node)
        directions = [question.direction for question, _ in as_gpu.asked]
        assert directions == ["backward", "forward"]


class TestMeasured:
    """policy="measure" times the kernels and the reference."""

    CONFIG = t5fx.LinearizeConfig(policy="measure")

    def costs(self, monkeypatch, kernels, reference, difference=0.0):
        given = {
            "triton": Cost(1.0, kernels, Spread(2, 2, 2), difference, 0.05),
            "reference": Cost(1.0, reference, Spread(1.5, 1.5, 1.5)),
        }
        asked = []

        def cost(shape, settings, device):
            asked.append(settings["impl"])
            return given.get(settings["impl"], given["reference"])

        monkeypatch.setattr(policy, "cost", cost)
        return asked

    @pytest.mark.parametrize(
        ("kernels", "reference", "impl"), [(1, 2, "triton"), (2, 1, "reference")]
    )
    def test_the_faster_is_taken(self, gpu, monkeypatch, kernels, reference, impl):
        asked = self.costs(monkeypatch, kernels / 1e3, reference / 1e3)
        report = explained(self.CONFIG)
        assert set(asked) == {"triton", "reference"}
        site = report.sites[0]
        assert (site.impl, site.status) == (impl, "rewritten")
        assert "measured: Triton" in site.impl_reason
        assert site.seconds_after == min(kernels, reference) / 1e3

    def test_results_that_differ(self, gpu, monkeypatch):
        self.costs(monkeypatch, 1e-3, 2e-3, difference=0.2)
        with pytest.warns(SlowNodeWarning, match="differ from the reference's by 20 %"):
            report = explained(self.CONFIG)
        assert {s.impl for s in report.sites} == {"reference"}
        assert "20 %" in report.sites[0].impl_reason

    def test_an_untrusted_kernel_is_not_timed(self, gpu, monkeypatch):
        gpu.result = said(FAILED)
        asked = self.costs(monkeypatch, 1e-3, 2e-3)
        with pytest.warns(SlowNodeWarning):
            report = explained(self.CONFIG)
        assert set(asked) == {"auto"} and report.sites[0].impl == "reference"

    def test_the_choice_reaches_the_node(self, as_gpu, monkeypatch):
        self.costs(monkeypatch, 2e-3, 1e-3)
        config = t5fx.LinearizeConfig(policy="measure", dynamic=False)
        model, images = SHAPE.model().bfloat16(), SHAPE.images().bfloat16()
        lin = t5fx.linearize(model, (images,), config=config)
        assert {m.impl for m in lin.modules() if isinstance(m, TTT)} == {"reference"}
        lin(images)

    @pytest.mark.slow  # a minute, and what it holds is held by the tests of each part
    @pytest.mark.filterwarnings("ignore::t5fx.errors.UntrainedWarning")
    def test_the_choice_stays_in_a_compiled_model(self, as_gpu, monkeypatch):
        """For graphs of other sizes too, which nothing is measured for."""
        asked = self.costs(monkeypatch, 2e-3, 1e-3)
        shape = Shape(depth=1, heads=2, head_dim=16, grid=(10, 10))
        model, images = shape.model().bfloat16().requires_grad_(False), shape.images().bfloat16()
        fast = torch.compile(model, backend="t5", dynamic=False, options={"policy": "measure"})
        with torch.no_grad():
            fast(images)
            assert asked.count("triton") == 1
            fast(torch.cat([images, images]))
        assert asked.count("triton") == 1
        assert {m.impl for m in t5fx.adapter(model).modules() if isinstance(m, TTT)} == {
            "reference"
        }

    def test_results_are_compared(self):
        exact = [torch.ones(4) for _ in range(6)]
        off = [torch.ones(4), 1.25 * torch.ones(4), *exact[2:4], *(7 * t for t in exact[4:])]
        assert measure._difference(exact, exact) == 0
        assert measure._difference(off, exact) == pytest.approx(0.25)
        assert measure._difference([torch.nan * exact[0]], exact[:1]) == float("inf")
        assert not Cost(1, 1, Spread(1, 1, 1), 0.25, 0.05).agrees


INTERPRETED = pytest.mark.skipif(
    triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
    reason="the interpreter of triton 3.6 takes arrays of one number for numbers, numpy 2.4 not",
)
#: The checking process with one small case, and whatever else stands before.
SMALL = """
from t5fx.kernels.triton_kernels import check, parity
every = check.trials
check.trials = lambda question: every(question)[1:2]
{before}
check.main()
"""
BROKEN = """
right = parity.forward
def forward(*args, **keywords):
    out, saved = right(*args, **keywords)
    return out * 1.5, saved
parity.forward = forward
"""


class TestTheCheckingProcess:
    """Started for real, in Triton's interpreter."""

    @pytest.fixture(autouse=True)
    def _interpreter(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")

    def asked(self, monkeypatch, code, question=QUESTION):
        monkeypatch.setattr(trust, "_command", lambda: [sys.executable, "-P", "-c", code])
        return trust._outcome(trust._ask(question, torch.device("cpu")))

    @INTERPRETED
    def test_right_kernels(self, monkeypatch):
        found = self.asked(monkeypatch, SMALL.format(before=""))
        assert found == Verdict("passed", "1 cases are right")

    @INTERPRETED
    def test_a_wrong_kernel(self, monkeypatch):
        found = self.asked(monkeypatch, SMALL.format(before=BROKEN))
        assert found.status == "failed"
        assert found.reason.startswith(
            "float16, 1 tokens, heads of 16 and 16, eager: out has an error of "
        )

    @INTERPRETED
    def test_an_error_in_a_kernel(self, monkeypatch):
        broken = "def fail(*_, **__): raise RuntimeError('an illegal memory access')\n"
        found = self.asked(monkeypatch, SMALL.format(before=f"{broken}parity.forward = fail"))
        assert found.status == "failed" and "RuntimeError: an illegal memory access" in found.reason

    def test_a_crash(self, monkeypatch):
        found = self.asked(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
        assert found.status == "failed" and "ended by SIGSEGV" in found.reason

    def test_too_long(self, monkeypatch):
        monkeypatch.setattr(trust, "LIMIT", 0.5)
        begin = time.monotonic()
        found = self.asked(monkeypatch, "import time; time.sleep(60)")
        assert found == Verdict("failed", "not done after 0 s")
        assert time.monotonic() - begin < 30

    def test_no_triton(self, monkeypatch):
        module = "t5fx.kernels.triton_kernels.check"
        code = (
            "import runpy, sys; sys.modules['triton'] = None; "
            f"runpy.run_module({module!r}, run_name='__main__')"
        )
        found = self.asked(monkeypatch, code)
        assert found.status == "impossible" and "triton" in found.reason

    def test_no_process(self, monkeypatch):
        monkeypatch.setattr(trust, "_command", lambda: ["/no/such/python"])
        found = trust._outcome(trust._ask(QUESTION, torch.device("cpu")))
        assert found.status == "impossible" and "no process could be started" in found.reason

    def test_an_end_without_a_word(self):
        found = trust._outcome(said(None, 3, "Traceback\nKeyError: 'x'"))
        assert found == Verdict("impossible", "the checking process ended with 3: KeyError: 'x'")


@INTERPRETED
@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (torch.OutOfMemoryError("x"), True),
        (ImportError("x"), True),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), True),
        (RuntimeError("an illegal memory access was encountered"), False),
    ],
)
def test_what_says_nothing_of_the_kernels(error, lacks):
    from t5fx.kernels.triton_kernels import check

    assert check._lacks_means(error) == lacks


def test_trials_cover_what_was_asked():
    from t5fx.kernels.triton_kernels import check

    for axes in (0, 1, 2, 3):
        node = NODE | {"locality": "dwc_qk" if axes else "none"}
        for direction in ("forward", "backward"):
            question = Question("bfloat16", 128, axes, direction, choice.settings_of(node))
            found = check.trials(json.loads(json.dumps(question.__dict__)))
            cases = [trial.case for trial in found]
            assert {len(c.grid) for c in cases} == {max(1, axes)}
            assert {c.locality for c in cases} == {node["locality"]}
            assert {c.dtype for c in cases} == {"bfloat16"}
            assert {trial.compiled for trial in found} == {None, "static", "dynamic"}
            assert any(c.batch == c.heads == 1 for c in cases)
            assert {choice._question(call_of(c)).width for c in cases} == {128}
            assert (min(c.gradient for c in cases) < 1e-3) == (direction == "backward")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_trials_of_near_attention(direction):
    """Beside those of the node without it, on as many axes, in the same widths."""
    from t5fx.kernels.triton_kernels import check, near_parity

    node = NODE | {"locality": "none", "neighborhood": 5, "coarse": 3, "mix": "half"}
    question = Question("bfloat16", 64, 2, direction, choice.settings_of(node))
    found = check.trials(json.loads(json.dumps(question.__dict__)))
    trials = [trial for trial in found if isinstance(trial.case, near_parity.NearCase)]
    cases = [trial.case for trial in trials]
    assert {(c.neighborhood, c.coarse, c.mix) for c in cases} == {(5, 3, "half")}
    assert {(len(c.grid), c.dtype) for c in cases} == {(2, "bfloat16")}
    assert {trial.compiled for trial in trials} == {None, "static", "dynamic"}
    assert {choice._question(call_of(c)).width for c in cases} == {64}
    assert (min(c.gradient for c in cases) < 1e-3) == (direction == "backward")
    plain = Question("bfloat16", 64, 0, direction, choice.settings_of(NODE | {"locality": "none"}))
    rest = len(found) - len(trials)
    assert rest == len(check.trials(json.loads(json.dumps(plain.__dict__))))


def call_of(case):
    """A case as a call."""
    node = choice.settings_of({**NODE, "locality": case.locality})
    dims = case.head_dim, case.value_dim
    return choice.Call(GPU, torch.bfloat16, torch.float32, *dims, 1, False, node)
