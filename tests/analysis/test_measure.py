"""policy="measure": what is timed is right, costs are kept, and sites follow them."""

import json
import types
import warnings

import pytest
import torch
import vits
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import t5fx
from t5fx.analysis import measure as measure
from t5fx.analysis import policy as policy
from t5fx.analysis.measure import Cost, Shape, Spread
from t5fx.errors import MeasureError, NothingRewrittenWarning, UntrainedWarning
from t5fx.kernels import TTT, ttt

SETTINGS = {
    "inner": "swiglu",
    "inner_loss": "dot",
    "key_norm": "instance",
    "locality": "dwc_qk",
    "neighborhood": 0,
    "coarse": 0,
    "mix": "gate",
    "qk_affine": False,
    "impl": "auto",
}
SHAPE = Shape(2, 3, 17, 8, 8, 1, (4, 4), "float32", False)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
CPU = torch.device("cpu")
MEASURE = t5fx.LinearizeConfig(policy="measure")
FASTER = Cost(2e-3, 1e-3, Spread(1.9, 2.0, 2.1))
SLOWER = Cost(1e-3, 2e-3, Spread(0.4, 0.5, 0.6))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty place for costs, and nothing in memory."""
    monkeypatch.setenv("T5FX_CACHE_DIR", str(tmp_path / "costs"))
    monkeypatch.setattr(measure, "_known", {})
    return tmp_path / "costs"


@pytest.fixture
def asked(monkeypatch):
    """Costs come from here instead of a clock: by number of tokens."""
    costs, shapes = {}, []

    def cost(shape, settings, device):
        shapes.append((shape, settings, device))
        return costs.get(shape.tokens, FASTER)

    monkeypatch.setattr(policy, "cost", cost)
    return types.SimpleNamespace(costs=costs, shapes=shapes)


def vit():
    return vits.Shape().model()


X = vits.Shape().images()


class TestWhatIsTimed:
    """The compiled calls compute softmax attention and the node, and all gradients."""

    @pytest.mark.parametrize("trained", [False, True])
    def test_softmax(self, trained):
        q, k, v = torch.randn(3, 2, 17, 3, 8).requires_grad_(trained).unbind()
        inputs = [t.detach().requires_grad_(trained) for t in (q, k, v)]
        with torch.set_grad_enabled(trained):
            out, *grads = measure._call(measure._Softmax(0.3), inputs, trained)()
        heads = [t.detach().double().transpose(1, 2).requires_grad_() for t in inputs]
        wanted = scaled_dot_product_attention(*heads, scale=0.3)
        torch.testing.assert_close(out.double(), wanted.transpose(1, 2).flatten(2), **CLOSE)
        if trained:
            wanted.sum().backward()
            for found, leaf in zip(grads, heads, strict=True):
                torch.testing.assert_close(found.double(), leaf.grad.transpose(1, 2), **CLOSE)

    @pytest.mark.parametrize("trained", [False, True])
    def test_node(self, trained):
        node = TTT(3, 8, 8, 2, scale=0.3)
        inputs = [torch.randn(2, 17, 3, 8) for _ in "qkv"]
        weights, conv, *_ = node.tensors()
        leaves = [t.detach().requires_grad_(trained) for t in (*inputs, *weights, *conv)]
        timed = measure._Node(node, (4, 4), 1)
        with torch.set_grad_enabled(trained):
            out, *grads = measure._call(timed, leaves, trained)()
        exact = [t.detach().double().requires_grad_() for t in leaves]
        heads = [t.transpose(1, 2) for t in exact[:3]]
        settings = node.settings() | {"grid": (4, 4), "prefix": 1}
        wanted = ttt(*heads, exact[3:6], exact[6:], **settings)
        torch.testing.assert_close(out.double(), wanted.transpose(1, 2).flatten(2), **CLOSE)
        if trained:
            wanted.sum().backward()
            assert len(grads) == len(exact)
            for found, leaf in zip(grads, exact, strict=True):
                torch.testing.assert_close(found.double(), leaf.grad, **CLOSE)


class TestCosts:
    def test_measured_once_for_a_shape(self, folder, monkeypatch):
        first = measure.cost(SHAPE, SETTINGS, CPU)
        assert first.softmax > 0 and first.ttt > 0 and first.ratio.low <= first.ratio.high
        assert len(list(folder.glob("cost-*.json"))) == 1
        monkeypatch.setattr(measure, "_measure", None)  # another measurement would fail
        assert measure.cost(SHAPE, SETTINGS, CPU) is first
        monkeypatch.setattr(measure, "_known", {})  # as in another process
        assert measure.cost(SHAPE, SETTINGS | {"seed": 3, "scale": 7.0}, CPU) == first

    def test_other_shapes_settings_code_and_threads_are_measured(self, folder, monkeypatch):
        calls = []
        monkeypatch.setattr(measure, "_measure", lambda *about: calls.append(about) or FASTER)
        measure.cost(SHAPE, SETTINGS, CPU)
        other = Shape(2, 3, 17, 8, 8, 1, (4, 4), "float32", True)
        measure.cost(other, SETTINGS, CPU)
        measure.cost(SHAPE, SETTINGS | {"inner": "mlp2"}, CPU)
        monkeypatch.setattr(measure, "code_digest", lambda: "newer")
        measure.cost(SHAPE, SETTINGS, CPU)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
        measure.cost(SHAPE, SETTINGS, CPU)
        assert len(calls) == 5

    @pytest.mark.parametrize("damage", ["", "{", "[]", '{"softmax": "x"}', '{"key": 1}'])
    def test_a_damaged_file_is_measured_again(self, folder, monkeypatch, damage):
        monkeypatch.setattr(measure, "_measure", lambda *about: FASTER)
        measure.cost(SHAPE, SETTINGS, CPU)
        (path,) = folder.glob("cost-*.json")
        path.write_text(damage)
        monkeypatch.setattr(measure, "_known", {})
        assert measure.cost(SHAPE, SETTINGS, CPU) == FASTER
        assert json.loads(path.read_text())["ttt"] == FASTER.ttt

    def test_a_folder_that_cannot_be_written_costs_only_a_warning(self, folder, monkeypatch):
        monkeypatch.setattr(measure, "_measure", lambda *about: FASTER)
        folder.write_text("a file where the folder should be")
        with pytest.warns(UserWarning, match="T5FX_CACHE_DIR"):
            assert measure.cost(SHAPE, SETTINGS, CPU) == FASTER

    def test_the_callers_modes_do_not_matter(self, folder):
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert measure.cost(SHAPE, SETTINGS, CPU).ttt > 0

    def test_random_numbers_are_left_as_they_are(self, folder):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        measure.cost(SHAPE, SETTINGS, CPU)
        assert torch.equal(torch.rand(3), expected)

    def test_settings_of_torch_are_part_of_the_question(self, folder, monkeypatch):
        calls = []
        monkeypatch.setattr(measure, "_measure", lambda *about: calls.append(about) or FASTER)
        measure.cost(SHAPE, SETTINGS, CPU)
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        measure.cost(SHAPE, SETTINGS, CPU)
        assert len(calls) == 2

    def test_other_devices_cannot_be_timed(self, folder):
        with pytest.raises(MeasureError, match="cpu or cuda, got one on mps"):
            measure.cost(SHAPE, SETTINGS, torch.device("mps"))

    def test_no_device(self, folder):
        with pytest.raises(MeasureError, match="meta device"):
            measure.cost(SHAPE, SETTINGS, torch.device("meta"))

    def test_ranks_do_not_decide_on_their_own(self, folder, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True, raising=False)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2, raising=False)
        with pytest.raises(MeasureError, match="ranks"):
            measure.cost(SHAPE, SETTINGS, CPU)

    def test_a_failure_says_which_shape(self, folder, monkeypatch):
        def fail(*about):
            raise RuntimeError("no compiler")

        monkeypatch.setattr(measure, "_measure", fail)
        with pytest.raises(MeasureError, match=r"tokens=17.*no compiler.*policy='flops'"):
            measure.cost(SHAPE, SETTINGS, CPU)

    def test_huge_attention_is_measured_on_fewer_heads(self):
        huge = Shape(4, 16, 2**17, 64, 64, 0, (), "float32", False)
        assert measure._affordable(huge, 2e12) == (1, 1)
        assert measure._affordable(SHAPE, 2e12) == (2, 3)

    def test_only_a_sure_gain_pays(self):
        assert FASTER.pays
        assert not SLOWER.pays
        assert not Cost(1.0, 0.99, Spread(0.98, 1.01, 1.04)).pays


class TestSites:
    def test_rewritten_where_it_is_faster(self, asked):
        lin = t5fx.linearize(vit(), (X,), config=MEASURE)
        site = t5fx.report(lin).rewritten[0]
        assert (site.seconds_before, site.seconds_after) == (2e-3, 1e-3)
        assert "measured: softmax 2 ms, TTT 1 ms" in str(t5fx.report(lin))
        shape, settings, device = asked.shapes[0]
        assert (shape.batch, shape.tokens, shape.trained, device) == (
            2,
            site.num_tokens,
            False,
            CPU,
        )
        assert set(settings) == set(SETTINGS) | {"key_norm_eps"}

    def test_left_where_it_is_slower(self, asked):
        tokens = t5fx.explain(vit(), (X,), config=MEASURE).sites[0].num_tokens
        asked.costs[tokens] = SLOWER
        report = t5fx.explain(vit(), (X,), config=MEASURE)
        assert {s.reason for s in report.sites} == {"below-break-even"}
        with pytest.raises(t5fx.T5Error, match="TTT 2 ms; to change that: policy='flops' with min"):
            t5fx.linearize(vit(), (X,), config=MEASURE)
        model = vit().requires_grad_(False)
        fast = torch.compile(model, backend="t5", options={"policy": "measure"})
        with pytest.warns(NothingRewrittenWarning, match="TTT 2 ms"):
            out = fast(X)
        torch.testing.assert_close(out, model(X), **CLOSE)

    def test_min_tokens_comes_first(self, asked):
        config = t5fx.LinearizeConfig(policy="measure", min_tokens=10_000)
        assert not t5fx.explain(vit(), (X,), config=config).rewritten
        assert not asked.shapes

    def test_a_model_in_training_mode_is_measured_with_its_backward_pass(self, asked):
        t5fx.explain(vit().train(), (X,), config=MEASURE)
        assert all(shape.trained for shape, _, _ in asked.shapes)
        asked.shapes.clear()
        with torch.no_grad():
            t5fx.explain(vit().train(), (X,), config=MEASURE)
        assert not any(shape.trained for shape, _, _ in asked.shapes)

    def test_the_decision_stays(self, asked, tmp_path):
        """Other calls, and a checkpoint on a slower device, keep the sites."""
        model = vit()
        lin = t5fx.linearize(model, (X,), config=MEASURE)
        expected = lin(X)
        t5fx.save_pretrained(lin, tmp_path / "saved")
        for tokens in range(200):
            asked.costs[tokens] = SLOWER
        lin.train()
        lin(X)
        again = t5fx.from_pretrained(tmp_path / "saved", model).eval()
        assert torch.equal(again(X), expected)

    def test_a_compiler_that_measures_inside_of_a_backend(self, folder):
        """Dynamo holds its locks then; in training mode the backward pass is compiled, too."""
        model = vit().train()
        fast = torch.compile(model, backend="t5", options={"policy": "measure"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", (UntrainedWarning, NothingRewrittenWarning))
            fast(X).sum().backward()
        costs = [json.loads(path.read_text()) for path in folder.glob("cost-*.json")]
        assert costs and all('"trained": true' in cost["key"] for cost in costs)

    def test_a_graph_without_its_modules(self, asked):
        """Dynamo's graphs name the modules that operators ran in and have none of them."""
        graphs = []

        def keep(gm, example_inputs):
            graphs.append((gm, example_inputs))
            return gm.forward

        torch.compile(vit().requires_grad_(False), backend=keep)(X)
        (gm, inputs) = graphs[0]
        assert t5fx.explain(gm, tuple(inputs), config=MEASURE).rewritten
        config = t5fx.LinearizeConfig(min_tokens=0)
        assert t5fx.explain(gm, tuple(inputs), config=config).rewritten

    def test_meta(self, folder):
        with torch.device("meta"):
            model = nn.Sequential(vit())
        with pytest.raises(MeasureError, match="meta device"):
            t5fx.explain(model, (X.to("meta"),), config=MEASURE)
