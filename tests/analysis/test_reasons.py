"""True reasons: slices, graph breaks, operators that nobody can look into."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import t5fx
from t5fx.errors import NothingRewrittenError, NothingRewrittenWarning

CONFIG = t5fx.LinearizeConfig(min_tokens=0)


class Attention(nn.Module):
    """Attention of two heads of 8 channels, whose core is given."""

    def __init__(self, core):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)
        self.core = core

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4)
        out = self.core(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, 16))


class Model(nn.Module):
    def __init__(self, core):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.attention = Attention(core)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        return x + self.attention(x)


def attend(q, k, v):
    return (q @ k.mT * 8**-0.5).softmax(-1) @ v


def in_slices(q, k, v):
    """Of heads and items together, as diffusers' `SlicedAttnProcessor` does."""
    shape = q.shape
    q, k, v = (t.reshape(-1, *shape[2:]) for t in (q, k, v))
    out = torch.zeros_like(q)
    for i in range(len(q)):
        out[i : i + 1] = attend(q[i : i + 1], k[i : i + 1], v[i : i + 1])
    return out.reshape(shape)


def item_by_item(q, k, v):
    """Code that is another one for each size of a batch."""
    return torch.stack([attend(q[i], k[i], v[i]) for i in range(len(q))])


def broken_before(q, k, v):
    torch._dynamo.graph_break()
    return functional.scaled_dot_product_attention(q, k, v)


def broken_before_the_softmax(q, k, v):
    scores = q @ k.mT * 8**-0.5
    torch._dynamo.graph_break()
    return scores.softmax(-1) @ v


def broken_after_the_softmax(q, k, v):
    probabilities = (q @ k.mT * 8**-0.5).softmax(-1)
    torch._dynamo.graph_break()
    return probabilities @ v


def printing(q, k, v):
    print(end="")
    return attend(q, k, v)


@torch.library.custom_op("t5fx_tests::attend", mutates_args=())
def opaque(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend(q, k, v).contiguous()


@opaque.register_fake
def _(q, k, v):
    return q.new_empty(q.shape)


@pytest.mark.parametrize("batch", [1, 2])
def test_slices_of_batch_and_heads_are_told(batch):
    """Each would get parameters of its own, for one item of one size of a batch."""
    model, images = Model(in_slices), torch.randn(batch, 3, 16, 16)
    with pytest.raises(NothingRewrittenError, match=r"sliced.*disable_attention_slicing"):
        t5fx.linearize(model, (images,), config=CONFIG)
    assert set(t5fx.explain(model, (images,), config=CONFIG).counts()) == {"sliced"}


def test_diffusers_slices_are_told():
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import SlicedAttnProcessor

    model = diffusers.DiTTransformer2DModel(
        *(2, 8, 4), num_layers=1, sample_size=8, num_embeds_ada_norm=4, norm_num_groups=4
    )
    model.transformer_blocks[0].attn1.set_processor(SlicedAttnProcessor(1))
    call = {"timestep": torch.tensor([3, 4]), "class_labels": torch.tensor([0, 1])}
    told = t5fx.explain(model, (torch.randn(2, 4, 8, 8),), call, config=CONFIG)
    assert set(told.counts()) == {"sliced"}


def test_code_that_goes_through_a_batch_item_by_item():
    """The number of attentions is that of the items; one item is judged as one, not as two."""
    model, images = Model(item_by_item).eval(), torch.randn(1, 3, 16, 16)
    lin = t5fx.linearize(model, (images,), config=CONFIG)
    assert len(t5fx.report(lin).rewritten) == 1
    same = t5fx.linearize(Model(attend).eval(), (images,), config=CONFIG)
    same.load_state_dict(lin.state_dict())
    torch.testing.assert_close(lin(images), same(images))
    with pytest.raises(t5fx.T5Error, match="needs 2 attentions in 'attention'"):
        lin(images.repeat(2, 1, 1, 1))


@pytest.mark.parametrize(
    "core", [broken_before, broken_before_the_softmax, broken_after_the_softmax, printing]
)
def test_a_graph_break_is_the_reason_and_is_shown(core):
    torch._dynamo.reset()
    fast = torch.compile(Model(core), backend="t5", options={"min_tokens": 0})
    with pytest.warns(NothingRewrittenWarning) as caught:
        fast(torch.randn(1, 3, 16, 16))
    (text,) = [str(one.message) for one in caught if one.category is NothingRewrittenWarning]
    line = core.__code__.co_firstlineno + 1
    near = (f"test_reasons.py:{number}" for number in (line, line + 1))
    assert any(place in text for place in near), text
    assert "graph break" in text and "t5fx.linearize the model first" in text


def test_cross_attention_stays_cross_attention_beside_a_break():
    class Crossed(Model):
        def forward(self, images, text):
            x = self.patches(images).flatten(2).transpose(1, 2)
            q = self.attention.qkv(x)[..., :16].unflatten(-1, (2, 8)).transpose(1, 2)
            k, v = (
                self.attention.qkv(text)[..., a : a + 16].unflatten(-1, (2, 8)).transpose(1, 2)
                for a in (16, 32)
            )
            torch._dynamo.graph_break()
            out = functional.scaled_dot_product_attention(q, k, v)
            return x + self.attention.proj(out.transpose(1, 2).flatten(2))

    torch._dynamo.reset()
    fast = torch.compile(Crossed(attend), backend="t5", options={"min_tokens": 0})
    with pytest.warns(NothingRewrittenWarning, match="1 x cross-attention"):
        fast(torch.randn(1, 3, 16, 16), torch.randn(1, 5, 16))


def test_an_operator_of_another_library_is_named():
    model, images = Model(opaque).requires_grad_(False), torch.randn(2, 3, 16, 16)
    told = "'t5fx_tests::attend' in 'attention', which may be attention"
    with pytest.raises(NothingRewrittenError, match=told):
        t5fx.linearize(model, (images,), config=CONFIG)
    assert told in str(t5fx.explain(model, (images,), config=CONFIG))
    torch._dynamo.reset()
    with pytest.warns(NothingRewrittenWarning, match=told):
        torch.compile(model, backend="t5")(images)


def test_a_wrapper_around_torchs_attention_is_seen_through(monkeypatch):
    own = functional.scaled_dot_product_attention

    def wrapper(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        return own(q, k, v, attn_mask, dropout_p, is_causal, **more)

    core = lambda q, k, v: functional.scaled_dot_product_attention(q, k, v)  # noqa: E731
    monkeypatch.setattr(functional, "scaled_dot_product_attention", wrapper)
    model, images = Model(core).eval(), torch.randn(2, 3, 16, 16)
    lin = t5fx.linearize(model, (images,), config=CONFIG)
    assert len(t5fx.report(lin).rewritten) == 1
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", NothingRewrittenWarning)
        warnings.simplefilter("ignore", t5fx.errors.UntrainedWarning)
        torch.compile(model, backend="t5", options={"min_tokens": 0})(images)
    assert list(t5fx.adapter(model).nodes()) == ["attention.t5"]
