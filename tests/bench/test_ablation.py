"""The ablation: its rows, a tiny run that is taken up again, its tables and its picture."""

import dataclasses

import pytest
import torch

import t5fx
from t5fx.bench.ablation import __main__ as ablation
from t5fx.bench.ablation import rows, show
from t5fx.bench.ablation.classifier import RATE, _optimizer
from t5fx.bench.ablation.cpe import encodings, with_encodings
from t5fx.bench.demos.vit import new_vit
from t5fx.bench.harness.results import Row
from t5fx.errors import T5Error

pytestmark = pytest.mark.extras


def test_rows_are_configurations_of_their_own():
    names = [one.name for one in rows.variants()]
    different = {(str(one.config()), one.encoded) for one in rows.variants()}
    assert len(set(names)) == len(names) == len(different)
    assert set(rows.SMALL) <= set(names)
    twice = [one for one in rows.VARIANTS if one.name == "convolved queries and keys"]
    assert len(twice) == 2 and twice[0].config() == twice[1].config()


def test_a_run_is_taken_up_where_it_stopped(tmp_path, capsys, monkeypatch):
    asked = ["--small", "--parts", "classifier", "--seeds", "1", "--out", str(tmp_path)]
    ablation.main([*asked, "--rows", "linear"])
    first = (tmp_path / "ablation.csv").read_text()
    measured = {row.measure: row.value for row in ablation.Results(tmp_path / "ablation.csv").rows}
    assert set(measured) == {f"{what}, seed 0" for what in ("converted", "freeze", "full")}
    assert measured["converted, seed 0"] == measured["freeze, seed 0"]  # it has nothing to train
    capsys.readouterr()
    ablation.main(asked)
    said = capsys.readouterr().out
    assert "classifier: linear: there already" in said
    assert (tmp_path / "ablation.csv").read_text().startswith(first.rstrip())
    table = (tmp_path / "ablation.md").read_text()
    assert all(f"| {name} |" in table for name in rows.SMALL)
    assert "Performer" not in table
    assert (tmp_path / "ablation.png").stat().st_size > 10_000


def test_encodings_stand_in_front_of_blocks_and_learn_fast():
    model = new_vit().eval()
    encoded = with_encodings(model)
    images = torch.randn(2, 1, 28, 28)
    found = encodings(encoded)
    assert len(found) == 2 * len(model.blocks) and not encodings(model)
    assert not torch.equal(encoded(images), model(images))
    with torch.no_grad():
        for parameter in found:
            parameter.zero_()
        torch.testing.assert_close(encoded(images), model(images))
        x = torch.randn(2, 50, 96)
        found[1].fill_(1.0)  # the first one's bias: on patches alone
        moved = encoded.blocks[0][0](x) - x
    assert not moved[:, 0].any() and torch.allclose(moved[:, 1:], torch.ones(1))
    (variant,) = [one for one in rows.variants() if one.encoded]
    lin = t5fx.linearize(encoded, (images,), config=variant.config())
    groups = _optimizer(encodings(lin), t5fx.param_groups(lin, RATE, lr_ratio=20)).param_groups
    own = set(map(id, encodings(lin)))
    rates = {group["lr"] for group in groups for p in group["params"] if id(p) in own}
    assert rates == {RATE}
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted({id(p) for p in lin.parameters()})


def _row(case, measure, value):
    status = "ok" if value is not None else "failed"
    base = Row("ablation", case, 0, 1, "float32", "training", "", measure, value=1.0)
    return dataclasses.replace(base, value=value, status=status, device="a machine", threads=2)


def test_tables_have_means_spreads_and_what_diverged(tmp_path):
    found = [
        *(_row("classifier: SwiGLU", f"full, seed {i}", v) for i, v in enumerate((0.5, 0.6, 0.7))),
        _row("dinov2: no norm", "patches, converted, seed 0", 0.25),
        _row("dinov2: no norm", "error, aligned, seed 0", None),
    ]
    inner, local, norm = show.tables(found)
    assert inner.rows == local.rows
    assert inner.rows == (("SwiGLU", "67.33", "69.25", "-", "-", "60.0 ± 10.0", "-", "-", "-"),)
    assert norm.rows == (("no norm", "-", "0.37", "-", "-", "-", "0.250", "-", "diverged"),)
    assert "of the seeds, 3 at most, on a machine, 2 threads" in norm.note
    show.draw(tmp_path / "picture.png", found)
    assert (tmp_path / "picture.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--small"], "--small: expected --out FOLDER"),
        (["--rows", "linear", "SwiGLUU"], "--rows: expected some of .* got 'SwiGLUU'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(T5Error, match=message):
        ablation.main(arguments)


def test_no_results_are_no_tables():
    with pytest.raises(T5Error, match="expected results of some row, got none"):
        show.tables([])


def test_a_peer_of_the_table_is_a_window_alone():
    (window,) = [one for one in rows.VARIANTS if "CLEAR" in one.name]
    assert window.config() == t5fx.LinearizeConfig(
        **{"inner": "none", "key_norm": "none", "locality": "none", "neighborhood": 5},
        **{"coarse": 0, "min_tokens": 0},
    )
