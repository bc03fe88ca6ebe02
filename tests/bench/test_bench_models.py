"""The `models` suite on a tiny model: all contenders, checked before they are timed."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn

import t5fx
from t5fx.bench.suites import models
from t5fx.bench.suites.zoo import entries
from t5fx.errors import T5Error


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(models, "BUDGET", 0.05)


def run(training):
    experiment = models.experiments(small=True)[training]
    assert experiment.mode == ("training" if training else "inference")
    return experiment, list(experiment.run(experiment))


def measured(rows, contender, measure):
    (row,) = [r for r in rows if (r.contender, r.measure) == (contender, measure)]
    return row


def test_inference(monkeypatch):
    """One run, for it compiles six times; `short` keeps the rounds few."""
    # Empty caches would be filled with the compiler's own headers, twice, for half a minute.
    monkeypatch.setattr(models, "fresh_inductor_cache", contextlib.nullcontext)
    rows = run(training=False)[1]
    every_contender_has_times_memory_and_a_ratio(rows)
    compilation_is_counted_and_timed(rows)
    flops_are_those_of_the_node(rows)


CONTENDERS = (
    *("softmax, eager", "softmax, FLASH", "softmax, MATH"),
    *("t5, every site", "t5, measured", "attention removed"),
)


def every_contender_has_times_memory_and_a_ratio(rows):
    for contender in CONTENDERS:
        latency = measured(rows, contender, "latency")
        assert 0 < latency.low <= latency.value <= latency.high
        assert latency.rounds >= 3
        assert measured(rows, contender, "speed-up").value > 0
        assert measured(rows, contender, "peak memory").value > 0
    speed_ups = [measured(rows, name, "speed-up") for name in CONTENDERS[1:3]]
    assert 1.0 in [row.value for row in speed_ups]  # the rival itself
    assert {row.tokens for row in rows} == {65}


def test_backends_are_kept_apart():
    """Dynamo, and Inductor's caches, take the same model with another SDPA backend for the same."""
    experiment, entry = models.experiments(small=True)[0], entries(gpu=False, small=True)[0]
    bench = models.Bench(entry, experiment, False, torch.float32)
    bench.model, bench.inputs = bench._build()
    calls = []
    with torch.no_grad():
        for backend in bench.backends:
            call = bench._run(bench._inductor(bench.model))
            with models._only(backend):
                call()
            calls.append(call)
        fused = []
        for backend, call in zip(bench.backends, calls, strict=True):
            with models._only(backend), torch.profiler.profile() as profile:
                call()
            fused.append(any("flash" in event.key for event in profile.key_averages()))
    assert dict(zip([b.name for b in bench.backends], fused, strict=True)) == {
        "FLASH_ATTENTION": True,
        "MATH": False,
    }


def compilation_is_counted_and_timed(rows):
    for contender in CONTENDERS[1:]:
        assert measured(rows, contender, "graphs").value == 1
        assert measured(rows, contender, "graph breaks").value == 0
        assert measured(rows, contender, "recompiles").value == 0
    cold, warm = (
        measured(rows, "t5, every site", f"{kind} compile").value for kind in ("cold", "warm")
    )
    assert cold > warm > 0


def flops_are_those_of_the_node(rows):
    """18 N D^2 for each head, and near attention, in the place of 4 N^2 D."""
    before = measured(rows, "softmax, eager", "FLOPs").value
    after = measured(rows, "t5, every site", "FLOPs").value
    tokens, heads, dim = 65, 8, 4
    convolutions = 2 * 2 * 9 * 64 * heads * dim  # of q and k, on the 8 x 8 grid
    node = 18 * tokens * dim**2 * heads
    pairs = 64 * (25 + 64 + 1) + tokens  # of the window, the cells, the class token; its query
    near = 4 * pairs * dim * heads
    assert after - before == node + near + convolutions - 4 * tokens**2 * dim * heads


@pytest.mark.slow
def test_training():
    rows = run(training=True)[1]
    assert measured(rows, "t5, every site", "speed-up").value > 0
    assert measured(rows, "t5, every site", "error").value < 1e-3


def wrong(model):
    return lambda **inputs: 1.1 * model(**inputs)


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(models.Bench, "_time", None)  # nothing may come that far
    monkeypatch.setattr(models.Bench, "_inductor", lambda self, model: model)
    monkeypatch.setattr(models.Bench, "_t5", lambda self, options: wrong(self.model))
    monkeypatch.setattr(models.Bench, "_compile_rows", lambda self: [])
    experiment = models.experiments(small=True)[0]
    with pytest.raises(T5Error, match=r"'t5, every site' within 0\.001"):
        list(experiment.run(experiment))


def test_a_softmax_that_is_wrong_is_refused_alone(monkeypatch):
    monkeypatch.setattr(models.Bench, "_inductor", lambda self, model: wrong(model))
    monkeypatch.setattr(models.Bench, "_t5", lambda self, options: self.model)
    experiment, entry = models.experiments(small=True)[0], entries(gpu=False, small=True)[0]
    entry = replace(entry, options={"neighborhood": 0, "coarse": 0})  # else it would be right
    bench = models.Bench(entry, experiment, False, torch.float32)
    bench.model, bench.inputs = bench._build()
    rest = []
    with torch.no_grad(), pytest.raises(T5Error, match="'t5, every site'"):
        list(bench._contenders(rest))
    assert [(row.contender, row.status) for row in rest] == [
        ("softmax, FLASH", "refused"),
        ("softmax, MATH", "refused"),
    ]


def test_attention_that_hardly_matters_is_enlarged():
    experiment, entry = models.experiments(small=True)[0], entries(gpu=False, small=True)[0]
    bench = models.Bench(entry, experiment, False, torch.float32)
    bench.model, bench.inputs = bench._build()
    attention = bench.model.blocks[0].attn
    with torch.no_grad():
        attention.proj.weight *= 0.2
        next(bench._contenders([]))
        lin = t5fx.linearize(
            bench.model, (), bench.inputs, config=t5fx.LinearizeConfig(min_tokens=0)
        )
        difference = models.relative_difference(
            models._without_attention(lin)(**bench.inputs), bench.model(**bench.inputs)
        )
    assert difference >= models.MATTERS


def test_a_model_that_does_not_show_its_attention_is_refused(monkeypatch):
    entry = entries(gpu=False, small=True)[0]

    def blind():
        model, inputs = entry.build()
        nn.init.zeros_(model.blocks[0].attn.proj.weight)
        return model, inputs

    monkeypatch.setattr(models, "entries", lambda gpu, small: [models.Entry(entry.name, blind)])
    (experiment,) = models.experiments(small=True)
    with pytest.raises(T5Error, match="depends on its attention"):
        list(experiment.run(experiment))


def test_peak_memory_counts_what_lives_at_one_time():
    def call():
        torch.ones(1000)
        torch.ones(3000)

    assert 4 * 3000 <= models.peak_memory(call, torch.device("cpu")) < 4 * 3500


@pytest.mark.parametrize("gpu", [False, True])
def test_names_are_unique(gpu):
    names = [entry.name for entry in entries(gpu)]
    assert len(set(names)) == len(names)
