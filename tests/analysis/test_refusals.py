"""What must never be rewritten, and the reason that each case gets."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import t5fx
from t5fx.kernels import TTT
from t5fx.reports import REASONS, Site

ALL = t5fx.LinearizeConfig(min_tokens=0)
X = torch.randn(2, 3, 8, 8)


class Attention(nn.Module):
    """One attention on 16 patch tokens, spelled by the function that it is given."""

    def __init__(self, attend, other=False):
        super().__init__()
        self.embed, self.embed_other = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(3, 8, 2, 2)
        self.bias = nn.Parameter(torch.zeros(2, 16, 16))
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))
        self.mix = nn.Linear(2, 2)
        self.register_buffer("factor", torch.tensor(0.5))
        self.attend = attend

    def tokens(self, embed, x):
        x = embed(x).flatten(2).transpose(1, 2)
        return x.reshape(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)

    def forward(self, x):
        return self.attend(self, self.tokens(self.embed, x), x)


def soft(scores, v):
    return scores.softmax(-1) @ v


def mixed(m, t):
    return m.mix(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def pair(frames):
    return F.scaled_dot_product_attention(frames[0], frames[1], frames[1])


def blinded():
    mask = torch.zeros(16, 16)
    mask[:, 0] = -math.inf
    return mask


TRIANGLE = [[key <= query for key in range(16)] for query in range(16)]


def triangle():
    return torch.tensor([[0.0 if seen else -math.inf for seen in row] for row in TRIANGLE])


def twice(p, t):
    return p @ t, p.mean(1)


def keys(x):
    return x.flatten(1)[:, :16] > 0


def crossed(x, join, later=0):
    """A mask of the queries' tokens and the keys'."""
    rows, columns = keys(x), x.flatten(1)[:, later : later + 16] > 0
    return join(rows[:, None, :, None], columns[:, None, None])


LEAST = torch.finfo(torch.float32).min

#: Masks of whole tokens as models write them, of `keys(x)`.
KEY_MASKS = {
    "of keys": lambda t, m: F.scaled_dot_product_attention(t, t, t, attn_mask=m[:, None, None]),
    "expanded": lambda t, m: F.scaled_dot_product_attention(
        t, t, t, attn_mask=m[:, None, None].expand(-1, 1, 16, -1)
    ),
    "repeated": lambda t, m: F.scaled_dot_product_attention(
        t, t, t, attn_mask=m[:, None, None].repeat(1, 1, 16, 1)
    ),
    "for both tokens": lambda t, m: F.scaled_dot_product_attention(
        t, t, t, attn_mask=m[:, None, None] & m[:, None, :, None]
    ),
    "as a product": lambda t, m: F.scaled_dot_product_attention(
        t, t, t, attn_mask=m[:, None, None] * m[:, None, :, None]
    ),
    "filled in place": lambda t, m: F.scaled_dot_product_attention(t, t, t, attn_mask=filled(m)),
    "added": lambda t, m: soft(0.5 * (t @ t.mT) + (1 - m[:, None, None].float()) * LEAST, t),
    "added twice": lambda t, m: soft(
        0.5 * (t @ t.mT) + torch.where(m[:, None, None], 0.0, -torch.inf) + torch.zeros(16, 16), t
    ),
    "inverted": lambda t, m: soft(0.5 * (t @ t.mT) + inverted(m), t),
    "filling scores": lambda t, m: soft(
        0.5 * (t @ t.mT).masked_fill(~m[:, None, None], -torch.inf), t
    ),
    "choosing scores": lambda t, m: soft(
        torch.where(m[:, None, None], 0.5 * (t @ t.mT), torch.tensor(-torch.inf)), t
    ),
    "keys first": lambda t, m: (
        (0.5 * (t @ t.mT)).masked_fill(~m[:, None, :, None], -1e9).softmax(-2).mT @ t
    ),
    "by product of flat heads": lambda t, m: flat(t, m),
}


def filled(m):
    both = (m.unsqueeze(-1) & m.unsqueeze(1)).unsqueeze(1)
    mask = torch.zeros_like(both, dtype=torch.float32)
    mask.masked_fill_(~both, LEAST)
    return mask


def inverted(m):
    hidden = 1.0 - m[:, None, None].expand(-1, 1, 16, -1).float()
    return hidden.masked_fill(hidden.to(torch.bool), LEAST)


def flat(t, m):
    scores = torch.bmm(0.5 * t.flatten(0, 1), t.flatten(0, 1).mT)
    scores = scores.view(t.shape[0], 2, t.shape[2], t.shape[2])
    scores = (scores + filled(m)).flatten(0, 1).softmax(-1)
    return torch.bmm(scores, t.flatten(0, 1)).view(t.shape)


@pytest.mark.parametrize("case", KEY_MASKS)
def test_masks_of_whole_tokens_are_the_nodes(case):
    core = KEY_MASKS[case]
    model = Attention(lambda m, t, x: core(t, keys(x))).eval()
    lin = t5fx.linearize(model, (X,), config=ALL)
    assert "hides" in t5fx.report(lin).rewritten[0].detail
    (node,) = (module for module in lin.modules() if isinstance(module, TTT))
    given = []
    hook = node.register_forward_pre_hook(lambda _, args, kw: given.append(kw), with_kwargs=True)
    lin(X)
    hook.remove()
    assert torch.equal(given[0]["key_mask"], keys(X))


CASES = {
    "cross-attention": lambda m, t, x: F.scaled_dot_product_attention(
        t, m.tokens(m.embed_other, x), t
    ),
    "cross-attention values": lambda m, t, x: soft(t @ t.mT, t.flip(2)),
    "cross-attention rolled": lambda m, t, x: soft(t @ t.roll(1, 2).mT, t.roll(1, 2)),
    "cross-attention pooled": lambda m, t, x: F.scaled_dot_product_attention(
        t, t[:, :, ::2], t[:, :, ::2]
    ),
    "cross-attention one": lambda m, t, x: F.scaled_dot_product_attention(t[:, :, :1], t, t),
    "cross-attention halves": lambda m, t, x: F.scaled_dot_product_attention(t[:1], t[1:], t[1:]),
    "cross-attention frames": lambda m, t, x: pair(t.unflatten(0, (2, 1)).unbind(0)),
    "cross-attention next": lambda m, t, x: F.scaled_dot_product_attention(t, t.roll(1, 0), t),
    "cross-attention heads": lambda m, t, x: F.scaled_dot_product_attention(
        t, t.transpose(0, 1), t.transpose(0, 1)
    ),
    "cross-attention steps": lambda m, t, x: F.scaled_dot_product_attention(
        t, torch.cat([t, t], 2)[:, :, ::2], t
    ),
    "causal": lambda m, t, x: F.scaled_dot_product_attention(t, t, t, is_causal=True),
    "causal mask": lambda m, t, x: F.scaled_dot_product_attention(
        t, t, t, attn_mask=torch.ones(16, 16, dtype=torch.bool).tril()
    ),
    "causal fill": lambda m, t, x: soft(
        (t @ t.mT).masked_fill(torch.ones(16, 16).triu(1) > 0, -math.inf), t
    ),
    "causal positions": lambda m, t, x: soft(
        torch.where(torch.arange(16)[:, None] >= torch.arange(16), t @ t.mT, -math.inf), t
    ),
    "causal constant": lambda m, t, x: soft(
        torch.where(torch.tensor(TRIANGLE), t @ t.mT, -math.inf), t
    ),
    "causal constant added": lambda m, t, x: soft(t @ t.mT + triangle(), t),
    "masked by a learned layer": lambda m, t, x: F.scaled_dot_product_attention(
        t, t, t, attn_mask=(t @ m.bias[:, :4] > 0).any(1, keepdim=True)
    ),
    "masked by it, in numbers": lambda m, t, x: soft(
        t @ t.mT + torch.zeros(2, 2, 16, 16).masked_fill(t @ m.bias[:, :4] > 0, -math.inf), t
    ),
    "masked": lambda m, t, x: F.scaled_dot_product_attention(
        t, t, t, attn_mask=(x.flatten(1)[:, None, :16, None] > x.flatten(1)[:, None, None, :16])
    ),
    "masked differently by head": lambda m, t, x: F.scaled_dot_product_attention(
        t, t, t, attn_mask=(x.flatten(1)[:, :32] > 0).view(2, 2, 1, 16)
    ),
    "masked by rows": lambda m, t, x: F.scaled_dot_product_attention(
        t, t, t, attn_mask=(x.flatten(1)[:, :16] > 0)[:, None, :, None].expand(-1, 1, -1, 16)
    ),
    "masked for one of two": lambda m, t, x: F.scaled_dot_product_attention(
        t, t, t, attn_mask=crossed(x, torch.logical_or)
    ),
    "masked by other tokens": lambda m, t, x: F.scaled_dot_product_attention(
        t, t, t, attn_mask=crossed(x, torch.logical_and, later=3)
    ),
    "masked a little": lambda m, t, x: soft(t @ t.mT - 5.0 * keys(x)[:, None, None].float(), t),
    "masked in place": lambda m, t, x: soft(t @ t.mT + blinded(), t),
    "masked fill": lambda m, t, x: soft(
        (t @ t.mT).masked_fill((x.flatten(1)[:, :16] > 0)[:, None, None], -1.0), t
    ),
    "masked in the dtype of a bias": lambda m, t, x: soft(
        t @ t.mT - 5.0 * keys(x)[:, None, None].type_as(m.bias), t
    ),
    "additive-bias": lambda m, t, x: F.scaled_dot_product_attention(t, t, t, attn_mask=m.bias),
    "additive-bias sum": lambda m, t, x: soft(t @ t.mT + m.bias, t),
    "scores-changed talking": lambda m, t, x: soft(mixed(m, t @ t.mT), t),
    "scores-changed cap": lambda m, t, x: soft(5 * torch.tanh(t @ t.mT / 5), t),
    "scores-changed data": lambda m, t, x: soft((t @ t.mT) * x.mean(), t),
    "scores-changed floor": lambda m, t, x: soft(
        torch.div(t @ t.mT, 2.0, rounding_mode="floor"), t
    ),
    "scores-changed integers": lambda m, t, x: soft((t @ t.mT).to(torch.int32).float(), t),
    "probabilities-used detached": lambda m, t, x: (t @ t.mT).softmax(-1).detach() @ t,
    "probabilities-used values": lambda m, t, x: (lambda p: p @ (p @ t))((t @ t.mT).softmax(-1)),
    "probabilities-used talking": lambda m, t, x: mixed(m, (t @ t.mT).softmax(-1)) @ t,
    "probabilities-used twice": lambda m, t, x: (lambda p: (p @ t, p.mean(1)))(
        (t @ t.mT).softmax(-1)
    ),
    "not-attention axis": lambda m, t, x: (t @ t.mT).softmax(1) @ t,
    "not-attention channels": lambda m, t, x: t @ (t.mT @ t).softmax(-1),
    "not-attention linear": lambda m, t, x: t.softmax(-1) @ (t.softmax(-2).mT @ t),
    "grid-unknown": lambda m, t, x: (lambda u: F.scaled_dot_product_attention(u, u, u))(
        t[:, :, torch.randperm(16)]
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_reason(case):
    report = t5fx.explain(Attention(CASES[case]).eval(), (X,), config=ALL)
    assert report.rewritten == []
    assert case.split()[0] in {s.reason for s in report.sites}, [
        (s.reason, s.detail) for s in report.sites
    ]
    assert all(len(site.detail) > 20 for site in report.sites)


HARMLESS = {
    "0-d buffer": lambda m, t, x: soft((t @ t.mT) * m.factor, t),
    "both roots": lambda m, t, x: soft((t * 0.5**0.5) @ (t * 0.5**0.5).mT, t),
    "division": lambda m, t, x: soft(t @ (t / 2).mT, t),
    "fused on a scaled query": lambda m, t, x: F.scaled_dot_product_attention(
        t * 2, t, t, scale=0.25
    ),
    "before the layout": lambda m, t, x: soft((t.transpose(1, 2) * 0.5).transpose(1, 2) @ t.mT, t),
    "keys first": lambda m, t, x: ((t @ t.mT) * 0.5).softmax(-2).mT @ t,
    "square root of a tensor": lambda m, t, x: soft((t @ t.mT) / torch.sqrt(torch.tensor(4.0)), t),
    "a full tensor": lambda m, t, x: soft((t @ t.mT) / torch.full([], 4.0**0.5), t),
    "scores added": lambda m, t, x: soft(((t @ t.mT) * 0.5).add(torch.zeros(1)), t),
    "empty masks": lambda m, t, x: soft((t @ t.mT) * 0.5 + torch.zeros(16, 16), t),
    "true masks": lambda m, t, x: F.scaled_dot_product_attention(
        t, t, t, attn_mask=torch.arange(16)[None] >= 0
    ),
    "casts": lambda m, t, x: soft(((t @ t.mT) * 0.5).double(), t.double()).float(),
    "a constant added": lambda m, t, x: soft((t @ t.mT) * 0.5 + 3.0, t),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_spellings_equal_the_fused_one(case):
    model = Attention(HARMLESS[case]).eval()
    lin = t5fx.linearize(model, (X,), config=ALL)
    twin = Attention(lambda m, t, x: F.scaled_dot_product_attention(t, t, t)).eval()
    twin.load_state_dict(model.state_dict())
    expected = t5fx.linearize(twin, (X,), config=ALL)(X)
    torch.testing.assert_close(lin(X), expected, rtol=1e-5, atol=1e-6)


def test_a_learned_temperature_stays_in_the_query():
    model = Attention(lambda m, t, x: soft((t @ t.mT) * 0.5 * m.temperature.exp(), t)).eval()
    twin = Attention(
        lambda m, t, x: F.scaled_dot_product_attention(t * m.temperature.exp(), t, t)
    ).eval()
    twin.load_state_dict(model.state_dict())
    a, b = (t5fx.linearize(m, (X,), config=ALL) for m in (model, twin))
    torch.testing.assert_close(a(X), b(X), rtol=1e-5, atol=1e-6)
    a(X).sum().backward()
    assert a.temperature.grad.abs().sum() > 0


def test_calls_of_one_module_are_rewritten_all_or_none():
    class Model(nn.Module):
        def __init__(self, scales):
            super().__init__()
            self.attention, self.scales = Attention(lambda m, t, x: t), scales
            self.attention.forward = lambda x, s: F.scaled_dot_product_attention(x, x, x, scale=s)

        def forward(self, x):
            t = self.attention.tokens(self.attention.embed, x)
            return [self.attention(t, s) for s in self.scales]

    assert len(t5fx.explain(Model((0.5, 0.5)), (X,), config=ALL).rewritten) == 2
    report = t5fx.explain(Model((0.5, 0.25)), (X,), config=ALL)
    assert [s.reason for s in report.sites] == ["scores-changed"] * 2


HEADS = {
    "heads first": lambda m, x: m.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 3, 0, 1, 4),
    "batch and heads flat": lambda m, x: (
        m.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).reshape(3, -1, x.shape[1], 4)
    ),
    "tokens first": lambda m, x: (
        m.qkv(x.transpose(0, 1))
        .reshape(x.shape[1], x.shape[0], 3, 8)
        .permute(2, 0, 1, 3)
        .reshape(3, x.shape[1], -1, 4)
        .transpose(1, 2)
    ),
    "one head": lambda m, x: m.qkv(x).reshape(*x.shape[:2], 3, 8).permute(2, 0, 1, 3),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads_are_found_wherever_they_are(case, monkeypatch):
    """With the node replaced by softmax, the rewritten model is the original again."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.qkv = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = HEADS[case](self, self.embed(x).flatten(2).transpose(1, 2)).unbind(0)
            return soft((q @ k.transpose(-2, -1)) * 0.3, v)

    x = torch.randn(3, 3, 8, 8)
    model = Model().eval()
    lin = t5fx.linearize(model, (x,), config=ALL)
    (site,) = t5fx.report(lin).sites
    assert (site.num_heads, site.grid) == ((1 if case == "one head" else 2), (4, 4))
    monkeypatch.setattr(
        TTT, "forward", lambda self, q, k, v, **layout: soft(self.scale * q @ k.mT, v)
    )
    torch.testing.assert_close(lin(x), model(x))


def test_reasons_are_a_closed_set():
    with pytest.raises(ValueError, match="expected one of"):
        Site("a", "skipped", reason="because")
    assert {case.split()[0] for case in CASES} <= REASONS.keys()


def test_packed_tokens_need_a_grid_and_take_one():
    class Packed(nn.Module):
        def forward(self, x):
            t = x.unsqueeze(1)
            return F.scaled_dot_product_attention(t, t, t)

    x = torch.randn(2, 20, 8)
    (site,) = t5fx.explain(Packed(), (x,), config=ALL).sites
    assert site.reason == "grid-unknown"
    given = t5fx.LinearizeConfig(min_tokens=0, grid=(3, 6), prefix=2)
    lin = t5fx.linearize(Packed(), (x,), config=given)
    assert (t5fx.report(lin).sites[0].prefix, t5fx.report(lin).sites[0].suffix) == (2, 0)
    called = t5fx.LinearizeConfig(min_tokens=0, grid=lambda x: (x.shape[1] // 2, 2))
    lin = t5fx.linearize(Packed(), (x,), config=called)
    assert t5fx.report(lin).sites[0].grid == (10, 2)
    lin(torch.randn(2, 32, 8))
    assert lin.t5.dwc_q.weight.shape == (8, 1, 3, 3)
    without = t5fx.LinearizeConfig(min_tokens=0, locality="none")
    lin = t5fx.linearize(Packed(), (x,), config=without)
    y = lin(x)
    order = torch.randperm(20)
    torch.testing.assert_close(lin(x[:, order]), y[:, :, order], rtol=1e-4, atol=1e-6)
    wrong = t5fx.LinearizeConfig(min_tokens=0, grid=(5, 5))
    with pytest.raises(t5fx.T5Error, match="20 tokens, got"):
        t5fx.linearize(Packed(), (x,), config=wrong)
