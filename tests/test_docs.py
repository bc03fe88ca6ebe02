"""What the README says of results is what the result files say; the manual has all, and holds."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import t5fx
from t5fx.bench.harness import results
from t5fx.bench.report import overview, report
from t5fx.errors import T5Error

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def rows():
    files = sorted((DOCS / "bench").glob("*.csv"))
    return report.merged([results.read(path) for path in files])[0]


def test_the_readme_shows_what_was_measured(tmp_path):
    """The benchmarks, the recipe and the coverage suite."""
    copy = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", copy)
    report.fill_all(copy, rows(), [DOCS])
    assert copy.read_text() == (ROOT / "README.md").read_text(), "run `t5fx bench report`"


def test_a_readme_without_a_place_for_it_is_refused(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text().replace("<!-- coverage -->", ""))
    with pytest.raises(T5Error, match="<!-- coverage -->"):
        report.fill_all(copy, rows(), [DOCS])


def test_the_report_is_that_of_the_results():
    page = (DOCS / "bench" / "report.md").read_text()
    for row in rows():
        assert row.device in page and row.code in page


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_readmes_picture_is_of_the_results():
    trained, searched = overview.trained(DOCS, "patches"), overview.searched(DOCS, "patches")
    assert [point.name for point in trained] == ["224 px", "518 px", "1036 px"]
    assert all(0.5 < point.before < 1 and point.after < 1 for point in (*trained, *searched))
    assert (DOCS / "overview.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_picture_needs_its_tables(tmp_path):
    (tmp_path / "frontier.md").write_text("**Another table**\n\n| a |\n| --- |\n| 1 |\n")
    with pytest.raises(T5Error, match="expected a table with the title 'What a search finds'"):
        overview.searched(tmp_path, "patches")


@pytest.mark.extras
def test_the_picture_is_drawn(tmp_path):
    overview.draw(tmp_path / "a.png", DOCS)
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_every_public_name_is_in_the_reference():
    named = re.findall(r"^::: t5fx\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(t5fx.__all__)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_lead_to_files(page):
    """Those of the manual's pages are checked by its strict build."""
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    for link in links:
        if not link.startswith(("https://", "#")):
            assert (ROOT / link.partition("#")[0]).exists(), link


@pytest.mark.extras
def test_the_manual_is_built_without_a_warning(tmp_path):
    """Links, anchors, the navigation, the names and the sections of docstrings."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    for page in ("index", "tutorial", "reasons", "api"):
        assert (tmp_path / "site" / f"{page}.html").exists()
    reference = (tmp_path / "site" / "api.html").read_text()
    for name in t5fx.__all__:
        assert f'id="t5fx.{name}"' in reference
    fields = [field.name for field in dataclasses.fields(t5fx.LinearizeConfig)]
    for name in fields:  # a list of attributes, not a paragraph
        assert f"<code>{name}</code>" in reference or f">{name}</" in reference, name
