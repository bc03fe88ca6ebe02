"""`diagnose` on models: which sites, which tensors, and what is refused."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import fx, nn
from torch._dynamo.backends.debugging import aot_eager
from vits import Attention, Shape

import t5fx
from t5fx.backend import compile as backend
from t5fx.diagnostics.attention import key_shift, node_attention, softmax_attention
from t5fx.diagnostics.places import Layout
from t5fx.errors import ConfigError, NothingRewrittenError, T5Error
from t5fx.kernels import TTT

close = torch.testing.assert_close

SHAPE = Shape(depth=3, grid=(4, 5))
#: The reference needs no compiler.
CONFIG = t5fx.LinearizeConfig(min_tokens=0, impl="reference")


def linearized(model, images):
    """With nodes whose own part is as large as their near attention."""
    lin = t5fx.linearize(model, (images,), config=CONFIG)
    with torch.no_grad():
        for name, parameter in lin.named_parameters():
            if ".t5.w" in name:
                parameter.copy_(torch.randn_like(parameter))
    return lin


def seen(model, images):
    """Queries, keys and values of a softmax model, by layer."""
    model, found = copy.deepcopy(model), []
    for block in model.blocks:
        attend = block.attn.attend
        block.attn.attend = lambda q, k, v, f=attend: (found.append((q, k, v)), f(q, k, v))[1]
    with torch.no_grad():
        model(images)
    return found


def nodes(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, TTT)}


def test_an_untouched_model_is_measured_with_its_softmax():
    model, images = SHAPE.model().train(), SHAPE.images()
    before = copy.deepcopy(model.state_dict())
    found = t5fx.diagnose(model, (images,), queries=[0, -1, (0.5, 0.99)])
    assert not found.linearized
    assert [site.key for site in found.measured] == [f"blocks.{i}.attn.t5" for i in range(3)]
    inputs = seen(model, images)
    fresh = nodes(t5fx.linearize(model, (images,), config=CONFIG))
    tokens = (0, 20, 1 + 2 * 5 + 4)
    for site, (q, k, v) in zip(found.sites, inputs, strict=True):
        close(torch.tensor(site.key_shift), key_shift(k).mean(0))
        assert site.mean_key_shift == pytest.approx(sum(site.key_shift) / 2)
        assert site.layout == Layout(21, 1, (4, 5)) and site.layout.suffix == 0
        assert site.maps.queries == tokens
        close(site.maps.softmax, softmax_attention(q, k, 8**-0.5, tokens)[0])
        wanted = node_attention(fresh[site.key], q, k, v, tokens, grid=(4, 5), prefix=1)[0]
        close(site.maps.node, wanted)
    # The model is as it was.
    assert all(module.training for module in model.modules()) and not nodes(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_a_linearized_model_is_measured_as_it_runs():
    """Later sites get what the nodes before them made, not what softmax would have."""
    model, images = SHAPE.model(), SHAPE.images()
    lin = linearized(model, images)
    output = lin(images)
    found, before = t5fx.diagnose(lin, (images,)), t5fx.diagnose(model, (images,))
    assert found.linearized and len(found.mapped) == 3
    keys = []
    node = nodes(lin)["blocks.2.attn.t5"]
    handle = node.register_forward_pre_hook(lambda _, args, kw: keys.append(args), with_kwargs=True)
    assert torch.equal(lin(images), output)
    handle.remove()
    ((q, k, v),) = keys
    close(torch.tensor(found.sites[2].key_shift), key_shift(k).mean(0))
    close(found["blocks.0.attn"].key_shift, before["blocks.0.attn"].key_shift)
    assert found["blocks.2.attn"].key_shift != before["blocks.2.attn.t5"].key_shift
    maps = found.sites[2].maps
    assert maps.queries == (0, 1 + 2 * 5 + 2, 1 + 1 * 5 + 1)
    close(maps.softmax, softmax_attention(q, k, 8**-0.5, maps.queries)[0])
    close(maps.node, node_attention(node, q, k, v, maps.queries, grid=(4, 5), prefix=1)[0])
    assert -1 < maps.cosine < 0.9


def test_a_model_compiled_with_the_backend_is_measured_with_its_own_nodes(monkeypatch):
    monkeypatch.setattr(backend, "_inductor", lambda options, more: aot_eager)
    model, images = Shape(depth=1).model(), Shape().images()
    fast = torch.compile(model, backend="t5", options={"min_tokens": 0, "impl": "reference"})
    with pytest.warns(t5fx.UntrainedWarning):
        fast(images)
    lin = linearized(model, images)
    t5fx.adapter(model).load_state_dict(
        {name: value for name, value in lin.state_dict().items() if ".t5." in name}
    )
    found, wanted = t5fx.diagnose(fast, (images,)), t5fx.diagnose(lin, (images,))
    assert found.linearized
    for one, two in zip(found.sites, wanted.sites, strict=True):
        close(one.key_shift, two.key_shift)
        close(one.maps.node, two.maps.node)


def test_a_graph_is_measured_like_the_model_that_it_is_of():
    model, images = Shape(depth=1).model(), Shape().images()
    found = t5fx.diagnose(fx.symbolic_trace(model), (images,), queries=[3], config=CONFIG)
    wanted = t5fx.diagnose(model, (images,), queries=[3], config=CONFIG)
    close(found["blocks.0.attn"].key_shift, wanted["blocks.0.attn"].key_shift)
    close(found["blocks.0.attn"].maps.node, wanted["blocks.0.attn"].maps.node)


def test_maps_of_chosen_sites_only():
    images = Shape().images()
    lin = t5fx.linearize(Shape(depth=5).model(), (images,), config=CONFIG)
    found = t5fx.diagnose(lin, (images,), queries=[2])
    assert [site.key for site in found.mapped] == [f"blocks.{i}.attn.t5" for i in (0, 2, 4)]
    assert found.mapped[0].maps.node.shape == (2, 1, 13)
    found = t5fx.diagnose(lin, (images,), sites="blocks.[13].attn", queries=[2])
    assert [site.key for site in found.mapped] == ["blocks.1.attn.t5", "blocks.3.attn.t5"]
    found = t5fx.diagnose(lin, (images,), sites=())
    assert not found.mapped and len(found.measured) == 5


class Twice(nn.Module):
    """One attention, called twice, and one that a causal mask keeps from being rewritten."""

    def __init__(self):
        super().__init__()
        self.shared, self.causal = (Attention(Shape(spelling="fused")) for _ in range(2))
        self.causal.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        self.embed = nn.Conv2d(3, 16, 4, 4)

    def forward(self, images):
        x = self.embed(images).flatten(2).mT
        x = x + self.shared(x)
        x = self.shared(3 * x + 1)
        return self.causal(x)


def test_a_shared_site_is_one_and_what_is_skipped_is_named():
    model, images = Twice().eval(), Shape().images()
    keys = []
    attend = model.shared.attend
    model.shared.attend = lambda q, k, v: (keys.append(k), attend(q, k, v))[1]
    with torch.no_grad():
        model(images)
    model.shared.attend = attend
    found = t5fx.diagnose(model, (images,), sites=())
    assert [(site.key, site.reason) for site in found.sites] == [
        ("shared.t5", ""),
        ("causal", "causal"),
    ]
    wanted = torch.stack([key_shift(k).mean(0) for k in keys]).mean(0)
    close(torch.tensor(found["shared"].key_shift), wanted)
    assert found["causal"].mean_key_shift is None
    assert "not measured: 1 x causal" in str(found)


def test_table_and_data():
    found = t5fx.diagnose(SHAPE.model(), (SHAPE.images(),), sites="blocks.1.attn", queries=[0, 8])
    text = str(found)
    assert "ViT, run with its softmax attention" in text and "blocks.2.attn.t5" in text
    assert f"{found.sites[1].mean_key_shift:.3f}" in text
    assert f"{found.sites[1].maps.cosine:.3f}" in text
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["model"] == "ViT" and data["linearized"] is False
    first, second, _ = data["sites"]
    assert first["key_shift"] == list(found.sites[0].key_shift) and "maps" not in first
    assert (second["prefix"], second["grid"], second["suffix"]) == (1, [4, 5], 0)
    assert second["maps"]["queries"] == [0, 8]
    sums = second["maps"]["softmax"]
    total = torch.tensor(sums["prefix"]) + torch.tensor(sums["grid"])
    close(total, torch.ones(2, 2))
    close(torch.tensor(sums["prefix"]), found.sites[1].maps.softmax[..., 0])


def test_numbers_are_saved_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    found = t5fx.diagnose(Shape(depth=1).model(), (Shape().images(),))
    with pytest.raises(T5Error, match="pip install matplotlib"):
        found.save(tmp_path / "new" / "folder")
    data = json.loads((tmp_path / "new" / "folder" / "diagnosis.json").read_text())
    assert data == json.loads(json.dumps(found.to_dict()))
    maps = load_file(tmp_path / "new" / "folder" / "maps.safetensors")
    assert torch.equal(maps["blocks.0.attn.t5.node"], found.sites[0].maps.node)
    assert torch.equal(maps["blocks.0.attn.t5.softmax"], found.sites[0].maps.softmax)


def test_what_is_refused():
    model, images = Shape(depth=1).model(), Shape().images()
    lin = t5fx.linearize(model, (images,), config=CONFIG)
    with pytest.raises(T5Error, match="expected the position of one of 13 tokens, got 13"):
        t5fx.diagnose(lin, (images,), queries=[13])
    with pytest.raises(T5Error, match="at least one token"):
        t5fx.diagnose(lin, (images,), queries=[])
    with pytest.raises(T5Error, match=r"sites: expected .*'blocks.0.attn', got 'block.0.attn'"):
        t5fx.diagnose(lin, (images,), sites=["block.0.attn"])
    with pytest.raises(ConfigError, match="config: expected none"):
        t5fx.diagnose(lin, (images,), config=CONFIG)
    with pytest.raises(NothingRewrittenError, match="excluded"):
        t5fx.diagnose(model, (images,), config=t5fx.LinearizeConfig(exclude=("*",)))
    with pytest.raises(T5Error, match=r"expected one of 'blocks.0.attn.t5', got 'blocks.9'"):
        t5fx.diagnose(lin, (images,), sites=())["blocks.9"]


def test_places_and_tokens():
    layout = Layout.of(2 + 24 + 3, (2, 3, 4), 2)
    assert (layout.prefix, layout.cells, layout.suffix) == (2, 24, 3)
    for token in range(2, 26):
        place = layout.place(token)
        assert token == 2 + (place[0] * 3 + place[1]) * 4 + place[2]
        middle = tuple((i + 0.5) / n for i, n in zip(place, layout.grid, strict=True))
        assert layout.token(middle) == token
    assert layout.place(1) is None and layout.place(26) is None
    assert layout.token((1.0, 1.0, 1.0)) == 25 and layout.token(-1) == 28
    for wrong in (29, -30, True, (0.5, 0.5), (0.5, 0.5, 1.5), "class"):
        with pytest.raises(T5Error, match=r"queries: expected .*, got"):
            layout.token(wrong)
    assert layout.defaults[0] == 0 and Layout.of(6, (2, 3), 0).defaults[0] == (0.5, 0.5)
    unknown = Layout.of(9, (), 0)
    assert unknown.prefix == 9 and unknown.defaults == (0, 4)
