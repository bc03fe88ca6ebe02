"""backend="t5" where a model, or what its user does, is out of the ordinary."""

from __future__ import annotations

import pytest
import torch
import vits
from safetensors.torch import save_file
from test_backend import ALL, agree, compiled, linearized, results, trained
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.exc import BackendCompilerFailed
from vits import Shape

import t5fx
from t5fx.backend import adapters as adapters
from t5fx.backend import compile as backend

pytestmark = [
    pytest.mark.filterwarnings("ignore::t5fx.errors.UntrainedWarning"),
    # Dynamo of itself, where a graph's input is another graph's output
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

SHAPE = Shape(class_token=False)
APART = {**ALL, "grid": SHAPE.grid, "prefix": 0}


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setattr(backend, "_inductor", lambda options, more: aot_eager)


def as_linearized(model, images, options=ALL):
    """Outputs and gradients with parameters that matter."""
    lin = linearized(model, images, options)
    fast = compiled(model, options)
    fast(images)
    new = trained(t5fx.adapter(model))
    assert new.nodes().keys() == t5fx.adapter(lin).nodes().keys()
    lin.load_state_dict(new.state_dict(), strict=False)
    agree(results(fast, images, model, new), results(lin, images, lin), 1e-4)
    return fast, lin


def changed(forward):
    """A ViT with another forward."""
    model = SHAPE.model()
    model.__class__ = type("Changed", (vits.ViT,), {"forward": forward})
    return model


def with_attention(attention):
    model = SHAPE.model()
    for block in model.blocks:
        block.attn = attention(SHAPE)
    return model.eval()


@pytest.mark.parametrize("change", [torch.clamp_, torch.Tensor.__itruediv__])
def test_effects_of_nodes_that_nobody_reads_stay(change):
    def forward(self, x):
        x = self.patch_embed(x).flatten(2).mT * 1.0
        change(x[:, :5], 0.5)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    as_linearized(changed(forward), SHAPE.images())


def test_parameters_that_nothing_reads_keep_their_place():
    def forward(self, x):
        x = self.patch_embed(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        x @ self.w
        return (x @ self.w1) @ self.w2

    model = changed(forward)
    model.norm = None
    for name in ("w", "w1", "w2"):
        setattr(model, name, nn.Parameter(torch.randn(16, 16)))
    images = SHAPE.images()
    fast, lin = compiled(model), linearized(model, images)
    fast(images)
    lin.load_state_dict(trained(t5fx.adapter(model)).state_dict(), strict=False)
    torch.testing.assert_close(fast(images), lin(images))
    fast(images).sum().backward()
    assert model.w.grad is None or not model.w.grad.any()
    assert model.w2.grad.any()


def test_gradients_taken_inside():
    model, images = Shape(spelling="eager").model(), Shape().images()
    lin = linearized(model, images)
    loss = lambda x: torch.func.grad(lambda y: model(y).square().sum())(x)  # noqa: E731
    found = compiled(loss)(images)
    expected = images.clone().requires_grad_()
    lin(expected).square().sum().backward()
    torch.testing.assert_close(found, expected.grad)


@pytest.mark.parametrize("train", [False, True])
def test_multi_head_attention_module(train):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 4, 4)
            self.attn, self.mean, self.each = (
                nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(3)
            )
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

        def forward(self, x):
            x = self.embed(x).flatten(2).mT
            x = self.attn(x, x, x, need_weights=False)[0]
            x, _ = self.mean(x, x, x)  # nobody reads the weights that it returns
            x, _ = self.each(x, x, x, average_attn_weights=False)
            return self.layers(x)

    torch.manual_seed(0)
    fast, _ = as_linearized(Model().train(train), SHAPE.images())
    assert len(t5fx.adapter(fast).nodes()) == 4


@pytest.mark.parametrize("read", [False, True])
def test_what_is_computed_from_probabilities_in_vain(read):
    class Attention(vits.Attention):
        def attend(self, q, k, v):
            p = ((q @ k.mT) * self.head_dim**-0.5).softmax(-1)
            entropy = -(p * p.log()).sum(-1, keepdim=True)
            torch.bernoulli(p)
            nn.functional.dropout(p @ p, 0.5)
            return p @ v + entropy if read else p @ v

    model = with_attention(Attention)
    if read:
        sites = t5fx.explain(model, (SHAPE.images(),), config=t5fx.LinearizeConfig(**ALL)).sites
        assert {s.reason for s in sites} == {"probabilities-used"}
    else:
        as_linearized(model, SHAPE.images())


class BufferScale(vits.Attention):
    def __init__(self, shape):
        super().__init__(shape)
        self.register_buffer("factor", torch.tensor(shape.head_dim**-0.5))

    def attend(self, q, k, v):
        return ((q @ k.mT) * self.factor).softmax(-1) @ v


class AttributeScale(vits.Attention):
    def __init__(self, shape):
        super().__init__(shape)
        self.root = torch.tensor(float(shape.head_dim)) ** 0.5

    def attend(self, q, k, v):
        return ((q @ k.mT) / self.root).softmax(-1) @ v


@pytest.mark.parametrize("attention", [BufferScale, AttributeScale])
def test_scales_kept_as_tensors(attention):
    torch.manual_seed(0)
    fast, lin = as_linearized(with_attention(attention), SHAPE.images())
    assert [s.status for s in t5fx.report(lin).sites] == ["rewritten"] * 2
    if attention is BufferScale:
        fast._orig_mod.blocks[0].attn.factor.mul_(2)
        with pytest.raises(t5fx.T5Error, match=r"constant 0\.35.*got 0\.70"):
            fast(SHAPE.images())


def test_parameters_read_in_one_mode_only():
    class Attention(vits.Attention):
        def __init__(self, shape):
            super().__init__(shape)
            self.aux = nn.Linear(16, 16)

        def forward(self, x):
            return super().forward(x + 0.1 * self.aux(x) if self.training else x)

    model, images = with_attention(Attention), SHAPE.images()
    lin = linearized(model, images)
    fast = compiled(model.train())
    fast(images)
    lin.load_state_dict(trained(t5fx.adapter(model)).state_dict(), strict=False)
    model.eval()
    torch.testing.assert_close(fast(images), lin(images))
    assert len(t5fx.adapter(model).nodes()) == 2


def test_parameters_put_in_the_place_of_others():
    model, images = SHAPE.model(), SHAPE.images()
    fast = compiled(model)
    fast(images)
    trained(t5fx.adapter(model))
    expected = fast(images)
    values = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(values, assign=True)
    torch.testing.assert_close(fast(images), expected)


def test_one_module_under_two_names():
    model, images = SHAPE.model(), SHAPE.images()
    model.blocks[1] = model.blocks[0]
    fast = compiled(model)
    fast(images)
    new = trained(t5fx.adapter(model))
    assert list(new.nodes()) == ["blocks.0.attn.t5"]
    lin = linearized(model, images)
    assert new.nodes()["blocks.0.attn.t5"].name == lin.blocks[0].attn.t5.name
    lin.load_state_dict(new.state_dict(), strict=False)
    torch.testing.assert_close(fast(images), lin(images))


def test_modules_that_look_up_their_attributes_themselves():
    """As diffusers' models do; newer versions of Dynamo read these from the module's `__dict__`."""

    def look_up(module, name):
        return nn.Module.__getattr__(module, name)

    model = SHAPE.model()
    for module in (model, *model.blocks, model.blocks[1].attn):
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), {"__getattr__": look_up})
    as_linearized(model, SHAPE.images())


def test_modules_that_share_a_parameter():
    model, images = SHAPE.model(), SHAPE.images()
    model.blocks[1].attn.proj = model.blocks[0].attn.proj
    for block in model.blocks:
        block.compile(backend="t5", options=APART)
    model(images)
    assert len(t5fx.adapter(model).nodes()) == 2


def test_blocks_compiled_apart_from_an_adapter(tmp_path):
    model, images = SHAPE.model(), SHAPE.images()
    lin = linearized(model, images, APART)
    save_file(trained(t5fx.adapter(lin)).state_dict(), tmp_path / "adapter.safetensors")
    for block in model.blocks:
        options = {**APART, "adapter": tmp_path / "adapter.safetensors"}
        block.compile(backend="t5", options=options)
    torch.testing.assert_close(model(images), lin(images))


def test_options_that_tell_apart_what_runs_one_graph():
    model, images = SHAPE.model(), SHAPE.images()
    for block in model.blocks:
        block.compile(backend="t5", options={**APART, "exclude": ("blocks.1.*",)})
    with pytest.raises(t5fx.T5Error, match=r"blocks\.1\.attn.*another module with the same code"):
        model(images)


def test_selection_in_a_graph_of_two_models():
    one, two = SHAPE.model(), SHAPE.model()
    compiled(lambda x: one(x) + two(x), {**ALL, "exclude": ("blocks.0.*",)})(SHAPE.images())
    for model in (one, two):
        assert list(t5fx.adapter(model).nodes()) == ["blocks.1.attn.t5"]


def test_two_models_with_similar_names_in_one_graph():
    class Holder:
        pass

    holder = Holder()
    holder.net_x, holder.net = SHAPE.model(), Holder()
    holder.net.x = SHAPE.model()
    compiled(lambda x: holder.net_x(x) - holder.net.x(x))(SHAPE.images())
    nodes = [n for m in (holder.net_x, holder.net.x) for n in t5fx.adapter(m).nodes().values()]
    assert len(set(nodes)) == 4


def test_a_refused_adapter_leaves_nothing(tmp_path):
    model, images = SHAPE.model(), SHAPE.images()
    good = t5fx.adapter(linearized(model, images)).state_dict()
    path = tmp_path / "adapter.safetensors"
    for wrong in (
        {**good, "blocks.7.attn.t5.w1": torch.ones(2)},
        {k: v for k, v in good.items() if k != "blocks.1.attn.t5.w1"},
    ):
        save_file(wrong, path)
        with pytest.raises(BackendCompilerFailed):
            compiled(model, {**ALL, "adapter": path})(images)
        assert not any(adapters._OWNED.get(m) for m in model.modules())
    compiled(model, {**ALL, "adapter": linearized(model, images)})(images)
    assert len(t5fx.adapter(model).nodes()) == 2


def test_inside_of_vmap_attention_is_left():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(1, 2, 0, 3).unbind(0)
            return ((q @ k.mT) * 8**-0.5).softmax(-1) @ v

    model, x = Model(), torch.randn(4, 12, 16)
    fast = compiled(lambda x: torch.vmap(model)(x), {**ALL, "locality": "none"})
    with pytest.warns(t5fx.errors.NothingRewrittenWarning, match=r"torch\.func"):
        output = fast(x)
    torch.testing.assert_close(output, torch.vmap(model)(x))


def test_dtype_of_new_parameters_in_a_mixed_model():
    class Attention(vits.Attention):
        def __init__(self, shape):
            super().__init__(shape)
            self.a_norm = nn.LayerNorm(8)

        def attend(self, q, k, v):
            return super().attend(q, self.a_norm(k.float()).to(k), v)

    model, images = with_attention(Attention).bfloat16(), SHAPE.images(torch.bfloat16)
    for block in model.blocks:
        block.attn.a_norm.float()
    lin = linearized(model, images)
    compiled(model)(images)
    for key, node in t5fx.adapter(model).nodes().items():
        assert node.w1.dtype == lin.get_submodule(key).w1.dtype == torch.bfloat16
