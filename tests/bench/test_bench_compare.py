"""`bench compare`: what is a regression between two tables of results, and what is none."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from t5fx.bench.harness import compare
from t5fx.bench.harness.results import Row, write
from t5fx.errors import T5Error

MACHINE = {"device": "GPU A", "threads": 4, "torch": "2.15.0", "code": "aaaa"}


def speedup(value, half=0.01, case="ViT 518 px", **more) -> Row:
    """A ratio of which more is better, with quartiles `half` of the value away."""
    own = {"suite": "models", "contender": "t5, measured", "measure": "speed-up", "unit": "x"}
    own |= {"better": "higher", "value": value, "low": value * (1 - half), **MACHINE}
    own |= {"high": value * (1 + half), "tokens": 1370, "batch": 1, "dtype": "float32"}
    return Row(case=case, **{"mode": "inference", **own, **more})


def ratio(value, **more) -> Row:
    """A ratio of which less is better, measured once."""
    own = {"measure": "compile over softmax", "better": "lower", "low": None, "high": None}
    return speedup(value, **{**own, **more})


def latency(value, **more) -> Row:
    return speedup(value, **{"measure": "latency", "unit": "s", "better": "lower", **more})


def without_value(row: Row, status: str, detail: str, **more) -> Row:
    return replace(row, value=None, low=None, high=None, status=status, detail=detail, **more)


def verdicts(before: list[Row], after: list[Row]) -> list[str]:
    return [change.verdict for change in compare.compare(before, after)]


@pytest.fixture
def told(tmp_path):
    """Runs it on two lists of rows; returns the exit code and the text, without a table's lines."""

    def run(before: list[Row], after: list[Row], rerun=None) -> tuple[int, str]:
        paths = tmp_path / "a.csv", tmp_path / "b.csv"
        for path, rows in zip(paths, (before, after), strict=True):
            write(path, rows)
        console = Console(file=io.StringIO(), width=300)
        code = compare.run(*paths, console, rerun)
        return code, " ".join(re.sub("[│┃]", " ", console.file.getvalue()).split())

    return run


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (speedup(1.5), speedup(1.5), "unchanged"),
        (speedup(1.5), speedup(1.3), "worse"),
        (speedup(1.5), speedup(1.8), "better"),
        (speedup(1.5), speedup(1.44), "unchanged"),  # beyond the spread, but within 5 %
        (speedup(1.5, 0.2), speedup(1.3, 0.2), "uncertain"),
        (speedup(1.5, 0.2), speedup(1.7, 0.2), "unchanged"),
        (ratio(1.0), ratio(1.05), "unchanged"),  # exactly 5 %
        (ratio(1.0), ratio(1.06), "worse"),  # no quartiles: no spread
        (ratio(1.06), ratio(1.0), "better"),
        (ratio(0.0), ratio(0.1), "worse"),
        (ratio(0.0), ratio(0.0), "unchanged"),
        (speedup(-0.2, measure="agreement"), speedup(-0.3, measure="agreement"), "worse"),
        (ratio(0.9, unit="share", better="higher"), ratio(0.8, unit="share"), "worse"),
        (ratio(0.9, better=""), ratio(0.1, better=""), "moved"),  # neither is better
        (latency(1.0), latency(9.0), "moved"),  # another machine, or its mood
        (latency(1.0), latency(1.015), "unchanged"),
    ],
)
def test_one_row(before, after, verdict, told):
    assert verdicts([before], [after]) == [verdict]
    code, text = told([before], [after])
    assert code == (verdict == "worse")
    assert (verdict == "unchanged") == (before.measure not in text)


@pytest.mark.parametrize(
    ("again", "verdict"),
    [
        ([speedup(1.3, 0.2)], "worse"),  # the same loss once more, still within the spread
        ([speedup(1.3)], "worse"),
        ([speedup(1.45, 0.2)], "unconfirmed"),
        ([speedup(1.8)], "unconfirmed"),
        ([without_value(speedup(1.3), "refused", "outputs differ")], "lost"),
        ([without_value(speedup(1), "failed", "", contender="", measure="")], "lost"),
        ([], "lost"),
    ],
)
def test_a_loss_within_the_spread_counts_when_a_rerun_confirms_it(again, verdict, told):
    before = [speedup(1.5, 0.2), speedup(1.5, case="other")]
    after = [speedup(1.3, 0.2), speedup(1.5, case="other")]
    asked = []

    def rerun(suite, case):
        asked.append((suite, case))
        return again

    code, _ = told(before, after)
    assert (code, asked) == (0, [])
    code, text = told(before, after, rerun)
    assert asked == [("models", "ViT 518 px")]  # and nothing whose verdict is certain
    assert code == (verdict != "unconfirmed")
    assert text.count(verdict) >= 1
    changes = compare.confirmed(compare.compare(before, after), rerun)
    assert [change.verdict for change in changes] == [verdict, "unchanged"]


def test_a_planted_regression_among_improvements(told):
    cases = [f"case {index}" for index in range(9)]
    before = [speedup(2.0, case=case) for case in cases]
    after = [speedup(1.7 if case == "case 4" else 2.4, case=case) for case in cases]
    code, text = told(before, after)
    assert code == 1
    assert "-15.0 %" in text
    assert text.index("case 4") < text.index("case 0")  # the worst first
    assert "8 better; 1 worse; 0 unchanged" in text


def test_lower_is_better_has_the_sign_of_the_value(told):
    code, text = told([ratio(1.0)], [ratio(1.25)])
    assert code == 1
    assert "1.00x 1.25x +25.0 %" in text


@pytest.mark.parametrize("status", ["refused", "failed"])
def test_what_is_no_longer_measured_is_a_regression(status, told):
    gone = without_value(latency(1.0), status, "outputs differ [by] 0.3")
    assert verdicts([latency(1.0), speedup(2.0)], [gone, speedup(2.0)]) == ["lost", "unchanged"]
    code, text = told([latency(1.0), speedup(2.0)], [gone, speedup(2.0)])
    assert code == 1
    assert f"{status}: outputs differ [by] 0.3" in text


def test_missing_rows(told):
    before = [speedup(2.0), speedup(2.0, case="another"), latency(1.0, case="another")]
    code, text = told(before, before[:1])
    assert code == 1
    assert "lost models another t5, measured speed-up, latency ok missing" in text
    assert "2 missing" in text


def test_a_case_that_failed_says_why_for_each_of_its_rows(told):
    whole = without_value(speedup(2.0), "failed", "out of memory", contender="", measure="")
    other = speedup(2.0, case="another")
    code, text = told([speedup(2.0), other], [whole, other])
    assert code == 1
    assert "lost models ViT 518 px t5, measured speed-up ok failed: out of memory" in text
    assert "0 new; 1 missing" in text


def test_absent_is_no_regression(told):
    absent = without_value(speedup(1.0, contender="peer"), "absent", "not installed")
    there = speedup(1.0, contender="peer")
    assert verdicts([absent, speedup(2.0)], [absent, speedup(2.0)]) == ["unchanged", "unmeasured"]
    code, text = told([there, speedup(2.0)], [absent, speedup(2.0)])
    assert code == 0
    assert "absent: not installed" in text and "1 absent now" in text


def test_new_rows_and_what_is_measured_again():
    refused = without_value(speedup(1.0), "refused", "outputs differ")
    rows = [speedup(2.0), latency(1.0)]
    assert verdicts([refused, latency(1.0)], rows) == ["new", "unchanged"]
    assert verdicts([latency(1.0)], rows) == ["new", "unchanged"]


def test_a_suite_that_was_not_run_again_is_named_and_fails_nothing(told):
    code, text = told([speedup(2.0), speedup(2.0, suite="peers")], [speedup(2.0)])
    assert code == 0
    assert "not run again: peers" in text
    assert "0 missing" in text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([speedup(2.0)], [speedup(2.0, suite="peers")]),
        ([speedup(2.0)], [speedup(2.0, case="another")]),
        ([speedup(2.0)], []),
        ([], []),
        # nothing in it was measured both times
        ([without_value(speedup(2.0), "failed", "")], [speedup(2.0)]),
        ([speedup(2.0)], [without_value(speedup(2.0), "absent", "")]),
    ],
)
def test_nothing_in_common_is_an_error(before, after, told):
    with pytest.raises(T5Error, match="in common"):
        compare.compare(before, after)
    code, text = told(before, after)
    assert code == 2
    assert "expected results with a case in common" in text


def test_a_row_that_is_there_twice_is_an_error():
    with pytest.raises(T5Error, match=r"got 2 of models, ViT 518 px, t5, measured, speed-up"):
        compare.compare([speedup(2.0)], [speedup(2.0), speedup(2.1)])


def test_a_file_that_is_no_table_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    console = Console(file=io.StringIO(), width=300)
    assert compare.run(tmp_path / "a.csv", tmp_path / "b.csv", console) == 2
    assert "expected a CSV file" in console.file.getvalue()


def test_other_circumstances_are_told_first(told):
    other = replace(speedup(2.0), device="GPU B", code="bbbb")
    code, text = told([speedup(2.0)], [other])
    assert code == 0
    assert text.startswith("another device: GPU A -> GPU B another code: aaaa -> bbbb 0 better")
