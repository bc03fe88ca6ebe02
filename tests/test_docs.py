"""What the README says of results is what the result files say."""

import shutil
from pathlib import Path

import pytest

from t5fx.bench import report, results
from t5fx.errors import T5Error

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def rows():
    files = sorted((DOCS / "bench").glob("*.csv"))
    return report.merged([results.read(path) for path in files])[0]


def test_the_readme_shows_what_was_measured(tmp_path):
    """The benchmarks, what the pass costs, both demos and the coverage suite."""
    copy = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", copy)
    report.fill_all(copy, rows(), DOCS)
    assert copy.read_text() == (ROOT / "README.md").read_text(), "run `t5fx bench report`"


def test_a_readme_without_a_place_for_it_is_refused(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text().replace("<!-- coverage -->", ""))
    with pytest.raises(T5Error, match="<!-- coverage -->"):
        report.fill_all(copy, rows(), DOCS)


def test_the_page_is_that_of_the_results():
    page = (DOCS / "bench" / "index.html").read_text()
    for row in rows():
        assert row.device in page and row.code in page


@pytest.mark.parametrize("demo", ["demo", "classify"])
def test_the_readme_shows_the_demos_pictures(demo):
    assert f"](docs/{demo}.png)" in (ROOT / "README.md").read_text()
    assert (DOCS / f"{demo}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
