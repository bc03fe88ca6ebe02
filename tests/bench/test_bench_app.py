"""`t5fx bench`: cases run once, are kept at once, and what is wrong is refused and said."""

import dataclasses
import subprocess
import sys
import types
from pathlib import Path

import pytest

from t5fx.analysis.measure import Spread
from t5fx.bench import app
from t5fx.bench.harness import results
from t5fx.bench.harness.results import Experiment, Results, Row
from t5fx.errors import T5Error
from t5fx_command import main as command


@pytest.fixture
def suite(monkeypatch):
    """A suite of two cases in the place of "models"; counts how often each ran."""
    state = types.SimpleNamespace(runs=[], error=None, absent=False)

    def run(experiment):
        state.runs.append(experiment.case)
        if state.error is not None and experiment.case == "second":
            raise state.error
        yield experiment.row("t5", "latency", Spread(1.0, 2.0, 3.0), unit="s", better="lower")
        if state.absent:
            yield experiment.row("peer", "latency", status="absent", detail="pip install peer")

    module = types.ModuleType("t5fx.bench.fake")
    module.experiments = lambda small=False: [
        Experiment("models", name, run, tokens=16) for name in ("first", "second")
    ]
    monkeypatch.setitem(sys.modules, "t5fx.bench.fake", module)
    monkeypatch.setitem(app.SUITES, "models", "fake")
    return state


@pytest.fixture
def bench(tmp_path):
    path = tmp_path / "folder" / "results.csv"

    def run(*arguments):
        return command(["bench", "models", "--out", str(path), *arguments])

    run.path = path
    return run


def test_rows_are_written_with_the_machine_and_not_measured_again(suite, bench):
    assert bench() == 0
    rows = results.read(bench.path)
    assert [(r.case, r.tokens, *r.spread) for r in rows] == [
        ("first", 16, 1.0, 2.0, 3.0),
        ("second", 16, 1.0, 2.0, 3.0),
    ]
    assert rows[0].device and rows[0].torch and rows[0].commit and len(rows[0].code) == 16
    assert bench() == 0
    assert suite.runs == ["first", "second"]
    assert bench("--again") == 0
    assert suite.runs == ["first", "second"] * 2
    assert len(results.read(bench.path)) == 2


def test_another_code_or_machine_is_measured_again(suite, bench):
    bench()
    kept = [results.replace(r, code="older") if r.case == "first" else r
            for r in results.read(bench.path)]  # fmt: skip
    results.write(bench.path, kept)
    bench()
    assert suite.runs == ["first", "second", "first"]
    assert {r.code for r in results.read(bench.path)} != {"older"}


def test_changed_results_do_not_make_the_code_dirty(monkeypatch):
    """The commit says "-dirty" where code was changed, not where results were written."""
    said = {"describe": "abc1234", "status": ""}
    asked = []

    def printed(*command):
        asked.append(command)
        return next((text for word, text in said.items() if word in command), "")

    monkeypatch.setattr(results, "_printed", printed)
    assert results.here.__wrapped__()["commit"] == "abc1234"
    status = next(command for command in asked if "status" in command)
    assert "docs" not in status and {"t5fx", "patterns", "kernels", "bench"} < set(status)
    said["status"] = " M kernels/ops/op.py"
    assert results.here.__wrapped__()["commit"] == "abc1234-dirty"


@pytest.mark.parametrize(("value", "code"), [(1.8, 1), (2.0, 0)])
def test_a_rerun_decides_on_a_loss_within_the_spread(suite, tmp_path, monkeypatch, value, code):
    paths = [str(tmp_path / name) for name in ("a.csv", "b.csv")]

    def ratio(median):
        def run(experiment):
            spread = Spread(0.8 * median, median, 1.2 * median)
            yield experiment.row("t5", "speed-up", spread, unit="x", better="higher")

        cases = [Experiment("models", name, run) for name in ("first", "second")]
        monkeypatch.setattr(sys.modules["t5fx.bench.fake"], "experiments", lambda small: cases)

    for path, median in zip(paths, (2.0, 1.8), strict=True):
        ratio(median)
        assert command(["bench", "models", "--out", path]) == 0
    ratio(value)
    assert command(["bench", "compare", *paths]) == 0
    assert command(["bench", "compare", *paths, "--rerun"]) == code


def test_a_rerun_needs_the_code_of_the_results(suite, tmp_path, capsys):
    row = Row("models", "first", 1, 1, "", "", "t5", "speed-up", "x", "higher", 2.0, 1.0, 3.0)
    paths = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    for path, value in zip(paths, (2.0, 1.8), strict=True):
        results.write(Path(path), [dataclasses.replace(row, value=value, threads=1)])
    assert command(["bench", "compare", *paths, "--rerun"]) == 2
    assert "--rerun: expected the device" in capsys.readouterr().out
    assert not suite.runs


def test_only(suite, bench):
    assert bench("--only", "econ") == 0
    assert suite.runs == ["second"]


@pytest.mark.parametrize(
    ("error", "status"), [(T5Error("off by 3"), "refused"), (ZeroDivisionError("x"), "failed")]
)
def test_a_case_that_goes_wrong_has_no_numbers_and_fails_the_run(suite, bench, error, status):
    bench()
    suite.error = error
    assert bench("--again") == 1
    rows = {row.case: row for row in results.read(bench.path)}
    assert rows["first"].status == "ok"
    assert rows["second"].status == status
    assert str(error) in rows["second"].detail
    assert rows["second"].value is None
    suite.error = None
    assert bench() == 0  # only what went wrong is tried again
    assert suite.runs[-1] == "second" and suite.runs.count("first") == 2


def test_an_interrupted_run_is_taken_up(suite, bench):
    suite.error = KeyboardInterrupt()
    assert bench() == 130
    assert [r.case for r in results.read(bench.path)] == ["first"]
    suite.error = None
    assert bench() == 0
    assert suite.runs == ["first", "second", "second"]


def test_absent_peers_are_rows(suite, bench):
    suite.absent = True
    assert bench() == 0
    absent = [r for r in results.read(bench.path) if r.status == "absent"]
    assert [r.detail for r in absent] == ["pip install peer"] * 2
    assert bench() == 0
    assert suite.runs == ["first", "second"]


def test_tiny_runs_stay_out_of_the_results(suite, capsys):
    assert command(["bench", "models", "--small"]) == 2
    assert "--small: expected --out FILE" in capsys.readouterr().err
    assert not suite.runs


def test_a_file_that_is_no_results_is_left_alone(suite, bench, capsys):
    bench.path.parent.mkdir()
    bench.path.write_text("a,b\n1,2\n")
    assert bench() == 1
    assert capsys.readouterr().err.startswith("t5fx bench: ")
    assert bench.path.read_text() == "a,b\n1,2\n"
    assert not suite.runs


def test_values_that_are_no_numbers_are_no_results():
    experiment = Experiment("models", "case", lambda e: [])
    with pytest.raises(T5Error, match="finite"):
        experiment.row("t5", "latency", float("nan"))
    with pytest.raises(T5Error, match="status"):
        experiment.row("t5", "latency", 1.0, status="fine")


def test_results_survive_the_file(tmp_path):
    experiment = Experiment("models", 'a "case", with; signs', lambda e: [])
    rows = [
        experiment.row("t5", "latency", Spread(0.1, 0.2, 0.3), unit="s", rounds=7),
        experiment.row("t5", "count", 3.0),
        experiment.row("peer", "latency", status="absent", detail="two\nlines, é"),
    ]
    results.write(tmp_path / "r.csv", rows)
    assert results.read(tmp_path / "r.csv") == rows
    assert all(isinstance(row, Row) for row in Results(tmp_path / "r.csv").rows)


@pytest.mark.parametrize("module", ["t5fx", "t5fx.bench", "bench"])
def test_the_ways_to_call_it(module, pytestconfig):
    arguments = ["bench"] if module == "t5fx" else []
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments, "--help"],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in (*app.SUITES, "report", "compare"):
        assert name in done.stdout
