"""The suite of peers: rows on a CPU, what is absent named, what is wrong refused and not timed."""

import pytest
import torch
import torch.nn.functional as F

from t5fx.bench.suites import attentions, peers
from t5fx.bench.suites.attentions import (
    PEERS,
    Call,
    CausalLinear,
    Fp8,
    Linear,
    Merging,
    Neighbourhood,
    Peer,
    Sage,
    Shape,
    Softmax,
)
from t5fx.errors import T5Error

TINY = Shape(1, 2, 8, 16, torch.float32, "cpu", False)
TINY_TRAINED = Shape(1, 2, 8, 16, torch.float32, "cpu", True)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(peers, "BUDGET", 0)
    monkeypatch.setattr(peers, "ROUNDS", (3, 3))


def run(experiment):
    rows = list(experiment.run(experiment))
    assert {(row.suite, row.case) for row in rows} == {("peers", experiment.case)}
    return rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU has")
def test_every_peer_has_rows_or_a_reason():
    forward, both = peers.experiments(small=True)
    assert forward.case == "1 x 2 heads x 1024 tokens x 64, forward"
    assert (forward.mode, both.mode) == ("inference", "training")
    assert (forward.tokens, forward.batch, forward.dtype) == (1024, 1, "float32")
    for experiment in (forward, both):
        rows = run(experiment)
        assert {row.contender for row in rows} == {kind.name for kind in PEERS}
        ok = [row for row in rows if row.status == "ok"]
        assert {row.measure for row in ok} == {"latency", "speed-up"}
        assert all(row.rounds == 3 and row.low <= row.value <= row.high for row in ok)
        assert next(r for r in ok if r.measure == "speed-up").value == 1
        named = {"softmax, SDPA", "TTT", "linear attention"}
        assert named <= {row.contender for row in ok}
        gone = {row.contender: row.detail for row in rows if row.status != "ok"}
        assert all(row.status == "absent" for row in rows if row.contender in gone)
        assert "CUDA GPU" in gone["TTT, Triton"]
        for kind in (CausalLinear, Neighbourhood):
            assert "CUDA GPU" in gone[kind.name] and kind.install in gone[kind.name]
    assert "no backward pass on a CPU" in gone["window of radius 8, flex_attention"]
    assert gone[Sage.name] == "has no backward pass"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(Merging, "source", ("no_such_module", "name"))
    assert Merging.absent(TINY) == "needs no_such_module: pip install tomesd"
    # What is installed under the name, but empty, is not there either.
    monkeypatch.setattr(Merging, "source", ("t5fx", "no_such_name"))
    assert "pip install tomesd" in Merging.absent(TINY)


def tiny(shape):
    def measure(experiment):
        return peers.measure(shape, experiment)

    return peers.Experiment("peers", str(shape), measure)


@pytest.mark.parametrize("shape", [TINY, TINY_TRAINED])
def test_what_is_wrong_is_refused_and_not_timed(monkeypatch, shape):
    class Wrong(Linear):
        name, compiled = "wrong", False

        def attend(self, q, k, v):
            return super().attend(q, k, 1.01 * v)

    monkeypatch.setattr(peers, "PEERS", [Softmax, Wrong])
    monkeypatch.setattr(peers, "in_turn", lambda *args: pytest.fail("timed"))
    with pytest.raises(T5Error, match=r"wrong, 1 x 2 heads x 64 .* not timed"):
        run(tiny(shape))


def test_a_wrong_gradient_is_refused(monkeypatch):
    class Wrong(Softmax):
        def attend(self, q, k, v):
            return super().attend(q, k, 0.9 * v + 0.1 * v.detach())

    with pytest.raises(T5Error, match=r"relative errors .*0\.1"):
        peers.prepare(Wrong, TINY_TRAINED)


def test_a_package_that_breaks_has_a_row_of_its_own(monkeypatch):
    class Broken(Peer):
        name = "broken"

        def attend(self, q, k, v):
            raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(peers, "PEERS", [Softmax, Broken])
    rows = run(tiny(TINY))
    (broken,) = [row for row in rows if row.contender == "broken"]
    assert (broken.status, broken.detail) == ("failed", "RuntimeError: no kernel image")
    assert len(rows) == 3
    monkeypatch.setattr(peers, "PEERS", [Broken, Softmax])
    with pytest.raises(RuntimeError, match="no kernel image"):
        run(tiny(TINY))


def test_a_large_shape_is_checked_on_a_small_one(monkeypatch):
    seen = []
    monkeypatch.setattr(peers, "CHECKED", 4)
    monkeypatch.setattr(peers, "check", lambda peer, call: seen.append(peer.shape.side) or 0.0)
    peer, call = peers.prepare(Softmax, TINY)
    assert seen == [4]
    assert peer.shape == TINY and call()[0].shape == (1, 2, 64, 16)


# --- packages that need a GPU, played by their documentation ------------------------------------


def chunk_linear_attn(q, k, v, normalize):
    """fla's: [B, N, H, D], causal, and a state that is not read."""
    assert normalize
    states = (k[..., None] * v[..., None, :]).cumsum(1)
    out = (q[..., None, :] @ states).squeeze(-2)
    return out / (q * k.cumsum(1)).sum(-1, keepdim=True), None


def na2d(q, k, v, kernel_size):
    """natten's: [B, X, Y, H, D]; each query sees a whole square, the nearest to it."""
    _, rows, columns, _, dim = q.shape
    out = torch.empty_like(q)
    for x in range(rows):
        for y in range(columns):
            top = min(max(x - kernel_size // 2, 0), rows - kernel_size)
            left = min(max(y - kernel_size // 2, 0), columns - kernel_size)
            near = (slice(None), slice(top, top + kernel_size), slice(left, left + kernel_size))
            keys, values = (t[near].flatten(1, 2) for t in (k, v))
            weights = (torch.einsum("bhd,bnhd->bhn", q[:, x, y], keys) / dim**0.5).softmax(-1)
            out[:, x, y] = torch.einsum("bhn,bnhd->bhd", weights, values)
    return out


def flash_attn_func(q, k, v, q_descale, k_descale, v_descale):
    """flash-attention 3's: [B, N, H, D] in e4m3, a factor [B, H] for each."""
    assert q.dtype == k.dtype == v.dtype == torch.float8_e4m3fn
    factors = (q_descale, k_descale, v_descale)
    wide = (
        t.float().transpose(1, 2) * factor[..., None, None]
        for t, factor in zip((q, k, v), factors, strict=True)
    )
    return F.scaled_dot_product_attention(*wide).transpose(1, 2)


def sageattn(q, k, v, tensor_layout, is_causal):
    assert (tensor_layout, is_causal) == ("HND", False)
    k -= k.mean(2, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("kind", "library", "trained"),
    [
        (CausalLinear, chunk_linear_attn, False),
        (CausalLinear, chunk_linear_attn, True),
        (Neighbourhood, na2d, False),
        (Fp8, flash_attn_func, False),
        (Sage, sageattn, False),
    ],
)
def test_peers_of_a_gpu_agree_with_their_definitions(monkeypatch, kind, library, trained):
    monkeypatch.setattr(attentions.torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(kind, "found", classmethod(lambda cls: library))
    side = 20 if kind is Neighbourhood else 8
    peer = kind(Shape(2, 2, side, 16, torch.float32, "cpu", trained))
    peers.check(peer, Call(peer))


def test_merging_keeps_half_the_tokens(monkeypatch):
    """A stand-in for tomesd that merges neighbours in pairs, so that the core tests need it not."""

    def matching(metric, w, h, sx, sy, r, generator):
        assert (w, h, sx, sy, r) == (8, 8, 2, 2, 32) and metric.shape == (1, 64, 32)
        return lambda x: x.unflatten(1, (-1, 2)).mean(2), lambda x: x.repeat_interleave(2, 1)

    seen = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(Merging, "found", classmethod(lambda cls: matching))
    monkeypatch.setattr(
        attentions.F,
        "scaled_dot_product_attention",
        lambda q, k, v: (seen.append(q.shape), original(q, k, v))[1],
    )
    peer = Merging(TINY_TRAINED)
    peers.check(peer, Call(peer))
    assert seen == [(1, 2, 32, 16)]


@pytest.mark.extras
def test_tomesd_merges_as_its_definition():
    pytest.importorskip("tomesd")
    peer, _ = peers.prepare(Merging, TINY_TRAINED)
    assert "relative error" in peer.detail
