"""What the README says of results is what the result files say."""

from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_readme_shows_the_demos_own_tables():
    readme = (ROOT / "README.md").read_text()
    tables = (ROOT / "docs" / "demo.md").read_text().strip()
    assert tables in readme
    assert "](docs/demo.png)" in readme
    assert (ROOT / "docs" / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
