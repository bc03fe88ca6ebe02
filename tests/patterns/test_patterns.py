"""Every pattern's own examples and rejects, and all attention that Inductor knows."""

import inspect

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.fx_passes import fuse_attention

import t5fx
from t5fx.backend import compile as backend
from t5fx.patterns import patterns

CONFIG = t5fx.LinearizeConfig(min_tokens=0)
HEADS, WIDTH, GRID = 2, 16, (4, 5)


class Model(nn.Module):
    """One attention on 20 patch tokens, spelled by the function that it is given."""

    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, HEADS * WIDTH, 4, 4)
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.attend = attend

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        qkv = self.qkv(x).unflatten(2, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        return self.attend(*qkv.unbind()).transpose(1, 2).flatten(2)


def plain(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def heads_shared(q, k, v):
    """What the examples of grouped heads compute: all queries read the first head's keys."""
    return plain(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v))


def named(table):
    return [pytest.param(p, n, id=f"{p.name}: {n}") for p in patterns() for n in getattr(p, table)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(("pattern", "name"), named("examples"))
def test_example_is_converted_as_the_fused_call_is(pattern, name):
    """Whatever the spelling, the same canonical queries, keys and scale reach the node."""
    images = torch.randn(2, 3, 16, 20)
    model = Model(pattern.examples[name]).eval().requires_grad_(pattern.name != "flex")
    same = Model(heads_shared if "head" in name and "shared" not in name else plain).eval()
    if "keys first" in name:
        same = Model(plain).eval()
    torch.testing.assert_close(model(images), same(images), rtol=1e-4, atol=1e-5)
    lin, wanted = (t5fx.linearize(m, (images,), config=CONFIG) for m in (model, same))
    (site,) = t5fx.report(lin).sites
    assert (site.status, site.pattern, site.grid) == ("rewritten", pattern.name, GRID)
    torch.testing.assert_close(lin(images), wanted(images), rtol=1e-4, atol=1e-6)
    assert lin.get_submodule("t5").scale == pytest.approx(WIDTH**-0.5)
    other = torch.randn(1, 3, 24, 12)  # of other sizes
    torch.testing.assert_close(lin(other), wanted(other), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.* runs with untrained parameters")
@pytest.mark.parametrize(("pattern", "name"), named("examples"))
def test_example_in_a_graph_of_dynamo(pattern, name, monkeypatch):
    """Where calls are functions and methods, and in-place operators change what others read."""
    monkeypatch.setattr(backend, "_inductor", lambda options, more: aot_eager)
    images = torch.randn(2, 3, 16, 20)
    model = Model(pattern.examples[name]).eval().requires_grad_(False)
    lin = t5fx.linearize(model, (images,), config=CONFIG)
    fast = torch.compile(model, backend="t5", options={"min_tokens": 0}, fullgraph=True)
    torch.testing.assert_close(fast(images), lin(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pattern", "name"), named("rejects"))
def test_reject_is_left_alone_for_its_reason(pattern, name):
    reason, attend = pattern.rejects[name]
    images = torch.randn(2, 3, 16, 20)
    model = Model(attend).eval().requires_grad_(pattern.name != "flex")  # no backward on a CPU
    report = t5fx.explain(model, (images,), config=CONFIG)
    assert not report.rewritten
    assert {site.reason for site in report.sites} == ({reason} if reason else set())


def test_a_part_of_the_scores_changed_in_place_is_seen(monkeypatch):
    """Through a view, in a graph of Dynamo; the model's own result stays what it was."""

    def attend(q, k, v):
        scores = q @ k.mT * WIDTH**-0.5
        scores[..., 0].mul_(0.5)
        return scores.softmax(-1) @ v

    monkeypatch.setattr(backend, "_inductor", lambda options, more: aot_eager)
    images = torch.randn(2, 3, 16, 20)
    model = Model(attend).eval().requires_grad_(False)
    assert not t5fx.explain(model, (images,), config=CONFIG).rewritten
    fast = torch.compile(model, backend="t5", options={"min_tokens": 0})
    with pytest.warns(t5fx.errors.NothingRewrittenWarning):
        torch.testing.assert_close(fast(images), model(images))


def test_report_says_what_each_pattern_did():
    images = torch.randn(2, 3, 16, 20)

    def two(q, k, v):
        return plain(plain(q, k, v), q, k) + (q.exp() @ k.mT).softmax(-1) @ v

    report = t5fx.explain(Model(two).eval(), (images,), config=CONFIG)
    did = {name: (t.anchors, t.bound, t.refused) for name, t in report.patterns.items()}
    assert did == {
        **{"exponential": (1, 0, 0), "flex": (0, 0, 0)},
        **{"fused": (2, 2, 0), "powers of two": (0, 0, 0), "spelled": (1, 1, 0)},
    }
    assert "fused 2 of 2" in str(report)
    lin = t5fx.linearize(Model(two).eval(), (images,), config=CONFIG)
    assert t5fx.report(lin).patterns["fused"].bound == 2
    assert all(tried.seconds >= 0 for tried in t5fx.report(lin).patterns.values())


def test_every_file_of_the_folder_is_found():
    names = ["exponential", "flex", "fused", "powers of two", "spelled"]
    assert [p.name for p in patterns()] == names
    assert all(p.examples and p.rejects for p in patterns())


INDUCTOR = sorted(
    (name for name in vars(fuse_attention) if name.startswith("_sfdp_pattern_")),
    key=lambda name: int(name.rpartition("_")[2]),
)


class OfInductor(Model):
    """One of Inductor's own attention patterns, on the axes that its code expects."""

    def __init__(self, name):
        super().__init__(getattr(fuse_attention, name))
        code = inspect.getsource(self.attend)
        self.names = list(inspect.signature(self.attend).parameters)
        self.token_major = "permute(" in code.split("torch.matmul(query")[0]
        self.flat = "torch.bmm(query" in code
        self.split_scale = "mul.Scalar(q" in code
        tokens = GRID[0] * GRID[1]
        self.register_buffer("causal", torch.ones(1, 1, tokens, tokens).tril().bool())
        self.half = "torch.float16" in code
        self.rooted = "math.sqrt" in code
        self.one_row = ".view((bs, 1, 1, k_len))" in code

    @property
    def scale(self):
        given = {"inv_scale", "scale_factor"} & {*map(self._kind, self.names)}
        return WIDTH**-0.5 if given or self.rooted else 1

    def _kind(self, name):
        return "inv_scale" if name.startswith("inv_scale") else name

    def forward(self, images, mask):
        x = self.embed(images).flatten(2).transpose(1, 2)
        qkv = self.qkv(x).unflatten(2, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        if self.token_major:
            qkv = qkv.transpose(2, 3)
        if self.half:
            qkv = qkv.half()
        if self.flat:
            qkv = qkv.flatten(1, 2)
        values = {
            **dict(zip(("query", "key", "value"), qkv.contiguous().unbind(), strict=True)),
            **dict.fromkeys(
                ("attn_mask", "attention_mask"), mask[:, 0, 0] if self.one_row else mask
            ),
            **{"inv_scale": WIDTH**-0.25 if self.split_scale else WIDTH**0.5},
            **{"scale_factor": WIDTH**-0.5, "causal_mask": self.causal, "dropout_p": 0.1},
        }
        out = self.attend(**{name: values[self._kind(name)] for name in self.names})
        out = out[0] if isinstance(out, tuple) else out
        if self.flat:
            out = out.unflatten(0, (-1, HEADS))
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", INDUCTOR)
def test_inductors_own_patterns(name):
    """All are recognised; masked and causal ones are refused, the others rewritten."""
    model = OfInductor(name).eval()
    tokens = GRID[0] * GRID[1]
    inputs = torch.randn(2, 3, 16, 20), torch.randn(2, 1, tokens, tokens)
    model(*inputs)
    (site,) = t5fx.explain(model, inputs, config=CONFIG).sites
    if "causal_mask" in model.names:
        assert site.reason in ("causal", "masked")
        assert "causal" in site.detail or site.reason == "causal"
    elif model.one_row and {"attn_mask", "attention_mask"} & {*model.names}:
        assert site.status == "rewritten" and "a mask from 'mask'" in site.detail
    elif {"attn_mask", "attention_mask"} & {*model.names}:
        assert site.reason == "masked"
    else:
        assert (site.status, site.grid) == ("rewritten", GRID)
        lin = t5fx.linearize(model, inputs, config=CONFIG)
        assert lin.get_submodule("t5").scale == pytest.approx(model.scale)
        assert lin(*inputs).shape == model(*inputs).shape
        if "dropout_p" in model.names:  # active, and kept
            assert not torch.equal(lin(*inputs), lin(*inputs))


def test_inductor_has_patterns():
    assert len(INDUCTOR) >= 20
