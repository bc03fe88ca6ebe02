"""The coverage suite: its counter of executed attentions, its table, and some of its models."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from t5fx.bench.coverage import suite as coverage
from t5fx.bench.coverage.cases import Case, parse, show
from t5fx.bench.coverage.executed import Executed, count

DOCS = Path(__file__).parents[2] / "docs"
X = torch.randn(2, 9, 8)


class Attention(nn.Module):
    """Three projections of [B, N, 8] tokens and what to do with them."""

    def __init__(self, attend):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.mix = nn.Linear(2, 2)
        self.table = nn.Parameter(torch.randn(9, 8))
        self.attend = attend

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        return self.attend(self, q, k, v)


def mixed(m, t):
    return m.mix(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def sliced(m, q, k, v):
    scores = q @ k.mT
    scores[:, :, 1:] += 1.0
    return scores.softmax(-1) @ v


SPELLINGS = {
    "fused": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v),
    "fused with a mask": lambda m, q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.ones(9, 9, dtype=torch.bool).tril()
    ),
    "fused without heads": lambda m, q, k, v: F.scaled_dot_product_attention(
        q[:, 0], k[:, 0], v[:, 0]
    ),
    "spelled": lambda m, q, k, v: (0.5 * q @ k.mT).softmax(-1) @ v,
    "einsum": lambda m, q, k, v: torch.einsum(
        "bhij,bhjd->bihd", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v
    ),
    "with a bias": lambda m, q, k, v: (q @ k.mT + q @ m.table.view(2, 9, 4).mT).softmax(-1) @ v,
    "keys first": lambda m, q, k, v: ((k @ q.mT).softmax(-2)).mT @ v,
    "talking heads": lambda m, q, k, v: mixed(m, mixed(m, q @ k.mT).softmax(-1)) @ v,
    "in place": sliced,
    "read twice": lambda m, q, k, v: (lambda p: (p @ v, p @ k))((q @ k.mT).softmax(-1)),
    "channels": lambda m, q, k, v: (q.mT @ k).softmax(-1) @ v.mT,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_attention_is_counted_once(spelling):
    executed, outputs = count(Attention(SPELLINGS[spelling]), (X,))
    assert (executed.attentions, executed.look_alikes) == (1, 0)
    assert outputs is not None


OTHERS = {
    "classifier": (lambda m, q, k, v: m.q(X).softmax(-1), 0),
    "router": (lambda m, q, k, v: m.q(X).softmax(-1).topk(2).values, 0),
    "gate": (lambda m, q, k, v: m.k(m.q(X).softmax(-1) * m.v(X)), 0),
    "product alone": (lambda m, q, k, v: q @ k.mT @ v, 0),
    "values of a table": (lambda m, q, k, v: m.v(X).softmax(-1) @ m.table.T, 0),
    "outlook": (lambda m, q, k, v: q[..., :1].expand(-1, -1, -1, 9).softmax(-1) @ v, 1),
    "linear": (lambda m, q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v), 2),
    "scores alone": (lambda m, q, k, v: (q @ k.mT).softmax(-1), 1),
    "after an attention": (
        lambda m, q, k, v: m.q(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        ).softmax(-1),
        0,
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_softmaxes_are_no_attention(kind):
    function, look_alikes = OTHERS[kind]
    executed, _ = count(Attention(function), (X,))
    assert executed.spelled == 0
    assert executed.fused == (kind == "after an attention")
    assert executed.look_alikes == look_alikes


def test_multihead_attention_is_seen_off_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert count(layer, (X,))[0].attentions == 1
    assert torch.backends.mha.get_fastpath_enabled()
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    assert count(attention, (X, X, X))[0] == Executed(spelled=1)


def test_expectations_are_written_and_read_alike():
    counts = Counter({"1+4x6+0": 2, "causal": 1})
    assert parse(show(counts)) == counts
    assert parse("") == Counter()
    with pytest.raises(ValueError, match="expected a reason"):
        parse("1 because")


@pytest.mark.parametrize("library", coverage.LIBRARIES)
def test_the_lists_are_in_the_table(library):
    cases = coverage.cases(library)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    rows = {
        row.model: row for row in coverage.read(DOCS / "coverage.csv") if row.library == library
    }
    assert set(rows) == set(names)
    for case in cases:
        assert rows[case.name].expected == show(parse(case.expected))


def test_the_page_is_what_the_csv_renders_to():
    rows = coverage.read(DOCS / "coverage.csv")
    assert coverage.merge(rows, []) == rows
    assert coverage.render(rows) == (DOCS / "coverage.md").read_text(encoding="utf-8")


def test_a_row_survives_the_csv(tmp_path):
    rows = [
        coverage.Finding("timm", "a", 1, 0, 1, "1 0+2x2+0", "1 causal", "miss", "a, 'b'", "no", 0.5)
    ]
    coverage.write(tmp_path / "a.csv", rows)
    assert coverage.read(tmp_path / "a.csv") == rows
    assert "**miss**: a, 'b' (expected 1 causal)" in coverage.render(rows)


@pytest.mark.filterwarnings("ignore")
def test_a_library_as_rows(monkeypatch):
    """Two models really run; what is in docs/ stays."""
    monkeypatch.setattr(coverage, "_save", lambda *args: pytest.fail("saved"))
    experiments = coverage.experiments(small=True)
    assert [one.case for one in experiments] == list(coverage.LIBRARIES)
    found = {row.measure: row for row in experiments[0].run(experiments[0])}
    first = coverage.cases("timm")[:2]
    matched = [row for row in coverage.read(DOCS / "coverage.csv") if row.result == "match"]
    assert {case.name for case in first} <= {row.model for row in matched}
    values = [found[name].value for name in ("models", "matches", "exactly right")]
    assert values == [2, 2, 1]
    assert found["sites found"].value >= found["attentions"].value > 0


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(coverage.importlib.util, "find_spec", lambda name: None)
    experiment = coverage.experiments()[2]
    (row,) = experiment.run(experiment)
    assert (row.status, row.detail) == ("absent", "needs diffusers: pip install diffusers")


def test_rows_are_merged_as_they_come(tmp_path, monkeypatch):
    case, other = coverage.cases("timm")[:2]
    gone = coverage.Finding("timm", "no such model", 1)
    coverage.write(tmp_path / "coverage.csv", [gone, coverage.Finding("timm", other.name, 7)])
    rows = [coverage.Finding("timm", case.name, 2)]
    monkeypatch.setattr(coverage, "run", lambda chosen, fast, limit: iter(rows))
    found = coverage.update(["timm"], [case], tmp_path, fast=True, limit=1.0)
    assert next(found) == rows[0]
    assert gone in coverage.read(tmp_path / "coverage.csv")
    assert not list(found)
    names = [row.model for row in coverage.read(tmp_path / "coverage.csv")]
    assert sorted(names) == sorted([case.name, other.name])


def test_another_place_for_results_has_the_findings_too(tmp_path, monkeypatch):
    (name, *_), folders = [case.name for case in coverage.cases("timm")], []

    def update(libraries, chosen, out, fast, limit):
        folders.append(out)
        yield coverage.Finding("timm", name, 1, result="match")

    monkeypatch.setattr(coverage, "update", update)
    experiment = coverage.experiments()[0]
    for one in (experiment, replace(experiment, folder=tmp_path)):
        list(one.run(one))
    assert folders == [Path("docs"), tmp_path]


SUBSET = {
    "timm": (
        *("vit_small_patch16_dinov3", "vit_base_patch16_siglip_224", "cait_xxs24_224"),
        *("xcit_nano_12_p16_224", "beit_base_patch16_224", "visformer_tiny"),
    ),
    "transformers": ("CLIPModel", "ViTModel eager", "YolosModel"),
    "diffusers": ("SD3Transformer2DModel", "WanTransformer3DModel", "FluxTransformer2DModel"),
}


def check(row):
    assert row.result == "match", f"{row.model}: {row.cause}; {row.outcome}"
    assert row.outcome == row.expected
    assert row.attentions <= row.found <= row.attentions + row.look_alikes


@pytest.mark.parametrize(
    ("library", "name"), [(library, name) for library in SUBSET for name in SUBSET[library]]
)
@pytest.mark.filterwarnings("ignore")
def test_models_are_read_right(library, name):
    case = next(case for case in coverage.cases(library) if case.name == name)
    check(coverage.examine(case, fast=True, batch=1))


def test_a_call_is_made_for_one_item_or_two():
    def build():
        return nn.Identity(), (torch.ones(2, 3),), {"ids": torch.ones(6, 3), "sides": [(1, 4)] * 2}

    case = Case("timm", "a", build, "", batch=2)
    for batch in (1, 2):
        _, (x,), kwargs = case.call(batch)
        assert (len(x), len(kwargs["ids"]), len(kwargs["sides"])) == (batch, 6, batch)
    case = Case("timm", "a", lambda: (nn.Identity(), (torch.ones(1, 3),), {}), "")
    assert [len(case.call(batch)[1][0]) for batch in (None, 1, 2)] == [1, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("library", coverage.LIBRARIES)
def test_what_matched_still_matches(library, batch):
    matched = {r.model for r in coverage.read(DOCS / "coverage.csv") if r.result == "match"}
    cases = [case for case in coverage.cases(library) if case.name in matched]
    for row in coverage.run(cases, fast=True, limit=120.0, batch=batch):
        check(row)
