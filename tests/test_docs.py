"""What the README says of results is what the result files say."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("demo", ["demo", "classify"])
def test_the_readme_shows_the_demos_own_tables(demo):
    readme = (ROOT / "README.md").read_text()
    tables = (ROOT / "docs" / f"{demo}.md").read_text().strip()
    assert tables in readme
    assert f"](docs/{demo}.png)" in readme
    assert (ROOT / "docs" / f"{demo}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_readme_shows_the_totals_of_the_coverage_suite():
    totals = (ROOT / "docs" / "coverage.md").read_text().split("**timm**")[0]
    assert totals.removeprefix("# Coverage").strip() in (ROOT / "README.md").read_text()
