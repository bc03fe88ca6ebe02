"""What a module returns of its probabilities, where the model reads it and where nobody does."""

import copy

import pytest
import torch
from torch import fx, nn

import t5fx
from t5fx.errors import NothingRewrittenError, RefusedCallError

#: Without near attention, a converted model differs from its original.
FAR = t5fx.LinearizeConfig(min_tokens=0, dynamic=False, neighborhood=0, coarse=0)
X = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """(output, more): `more` is a function of (module, probabilities, scores), None for nothing.

    first: it is computed before the output.
    """

    def __init__(self, more=None, first=False):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.drop, self.probe = nn.Dropout(0.0), nn.Identity()
        self.register_buffer("places", torch.randn(12, 2))
        self.more, self.first = more, first

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        scores = (q * 8**-0.5) @ k.mT
        p = self.drop(scores.softmax(-1))
        seen = self.more(self, p, scores) if self.more and self.first else None
        out = self.proj((p @ v).transpose(1, 2).flatten(2))
        return out, self.more(self, p, scores) if self.more and not self.first else seen


class Exponentials(Attention):
    """Divided at last, and once more for who wants to see them."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        e = ((q * 8**-0.5) @ k.mT).exp()
        total = e.sum(-1, keepdim=True)
        out = (e @ v) / total
        return self.proj(out.transpose(1, 2).flatten(2)), e / total


class TorchAttention(nn.MultiheadAttention):
    """torch's own, on one tensor."""

    def __init__(self, **options):
        super().__init__(16, 2, batch_first=options.pop("batch_first", True))
        self.options = options

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        out, weights = super().forward(x, x, x, **self.options)
        return out if self.batch_first else out.transpose(0, 1), weights


class Model(nn.Module):
    def __init__(self, attention, read=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attn, self.read = nn.Conv2d(3, 16, 4, 4), attention, read
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, images):
        x = self.embed(images).flatten(2).mT
        out, more = self.attn(x)
        return (x + out, more) if self.read else x + out


def outputs_and_gradients(model):
    out = model(X)
    out.square().sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters()}


def counted(m, p, scores):
    torch.bernoulli(p)
    m.probe(p)
    p.mean(1).max(-1)


UNREAD = {
    "probabilities": Attention(lambda m, p, s: p),
    "mean over the heads": Attention(lambda m, p, s: p.mean(1)),
    "entropy": Attention(lambda m, p, s: -(p * p.clamp_min(1e-9).log()).sum(-1)),
    "several": Attention(lambda m, p, s: {"top": p.topk(3)[1], "max": [p.max(-1)]}),
    "scores": Attention(lambda m, p, s: s),
    "products": Attention(lambda m, p, s: (p @ p).mean(1) @ m.places),
    "a product before": Attention(lambda m, p, s: p @ m.places, first=True),
    "another module": Attention(lambda m, p, s: m.probe(p)),
    "nothing": Attention(counted),
    "exponentials": Exponentials(),
}


@pytest.mark.parametrize("case", UNREAD)
def test_results_that_nobody_reads_are_none(case):
    plain = Exponentials() if case == "exponentials" else Attention()
    model, other = Model(copy.deepcopy(UNREAD[case])), Model(plain)
    seen = []
    lin = t5fx.linearize(model, (X,), config=FAR)
    lin.attn.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    assert [s.status for s in t5fx.report(lin).sites] == ["rewritten"]
    out, gradients = outputs_and_gradients(lin)
    leaves = torch.utils._pytree.tree_leaves(seen)
    assert leaves
    assert all(leaf is None for leaf in leaves)
    with torch.no_grad():
        assert not torch.allclose(out, model(X), rtol=1e-3, atol=1e-3)
    if case != "exponentials":
        expected, others = outputs_and_gradients(t5fx.linearize(other, (X,), config=FAR))
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradients, others)


@pytest.mark.parametrize("case", [c for c in UNREAD if c != "nothing"])
def test_results_that_are_read_leave_the_attention(case):
    report = t5fx.explain(Model(copy.deepcopy(UNREAD[case]), read=True), (X,), config=FAR)
    assert {s.reason for s in report.sites} == {"probabilities-used"}


OPTIONS = [{}, {"average_attn_weights": False}, {"batch_first": False}]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_torchs_attention_returns_no_weights(options, train):
    batch_first = options.get("batch_first", True)
    model = Model(TorchAttention(**options)).train(train)
    other = Model(TorchAttention(batch_first=batch_first, need_weights=False)).train(train)
    lin = t5fx.linearize(model, (X,), config=FAR)
    expected = outputs_and_gradients(t5fx.linearize(other, (X,), config=FAR))
    torch.testing.assert_close(outputs_and_gradients(lin), expected)


def test_torchs_attention_stays_where_its_weights_are_read():
    with pytest.raises(NothingRewrittenError, match="probabilities-used"):
        t5fx.linearize(Model(TorchAttention(), read=True), (X,), config=FAR)


def test_a_module_that_is_called_alone_refuses_to_return_its_probabilities():
    lin = t5fx.linearize(Model(Attention(lambda m, p, s: p.mean(1))), (X,), config=FAR)
    with pytest.raises(RefusedCallError, match="probabilities-used"):
        lin.attn(torch.randn(2, 12, 16))


@pytest.mark.parametrize("kept", [False, True])
def test_nodes_of_a_given_graph_that_nobody_reads(kept):
    """A mean is dropped; a module may be there for something else than what it returns."""

    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.probe = nn.Conv1d(3, 8, 1), nn.Identity()

        def forward(self, x):
            q = self.embed(x).transpose(1, 2).unsqueeze(1)
            p = (q @ q.transpose(-2, -1)).softmax(-1)
            (self.probe if kept else torch.mean)(p)
            return torch.matmul(p, q)

    x = torch.randn(1, 3, 30)
    sites = t5fx.explain(fx.symbolic_trace(Given()), (x,), config=FAR).sites
    assert [s.reason for s in sites] == ["probabilities-used" if kept else None]
    if not kept:
        lin = t5fx.linearize(fx.symbolic_trace(Given()), (x,), config=FAR)
        assert "mean" not in lin.code
        assert lin(x).shape == (1, 1, 30, 8)
