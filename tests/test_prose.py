"""Phrases that readers stumbled over stay out of the texts, and links have the form of links."""

import functools
import re
from pathlib import Path
from urllib.parse import urlparse

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("t5fx", "patterns", "kernels", "bench", "docs")
#: Each with what to write instead, or what is wrong with it.
PHRASES = {
    r"whatever (code )?spelled": "say how the code may be written",
    r"which (it|the \w+) has not\b": "which ... does not have",
    r"\bgoe?s? when it goes": "is removed with it",
    r"\basks? the clock": "measures",
    r"\bby a reading of": "counted in",
    r"\bwhich tells them": "say what tells whom",
    r"\bwhat makes it fast here": "name what makes it fast",
    r"\bor so on\b": "say which",
    r"\bin earnest\b": "say what to use instead",
    r"\bthe whole road\b": "name the steps",
    r"\bdoes? not mean what": "differ from",
    r"\bsimply\b|\bobviously\b|\bof course\b": "leave it out",
    r"\butili[sz]e": "use",
    r"\bin order to\b": "to",
}


@functools.cache
def texts() -> dict[Path, str]:
    """Everything that a user or a contributor reads, by its path."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("*.cff"), *(ROOT / ".github").rglob("*.*")]
    for folder in FOLDERS:
        for pattern in ("*.py", "*.md"):
            found += (ROOT / folder).rglob(pattern)
    return {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in found}


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_phrase_that_readers_stumbled_over_is_not_used(phrase):
    told = {
        f"{path}: {found[0]!r}: {PHRASES[phrase]}"
        for path, text in texts().items()
        for found in re.finditer(phrase.replace(" ", r"\s+"), text)
    }
    assert not told


def test_links_to_other_sites_have_the_form_of_links():
    for path, text in texts().items():
        for link in re.findall(r"\bhttps?://[^\s\"'`)>\]}]+", text):
            parts = urlparse(link.rstrip(".,;:"))
            assert parts.scheme == "https", f"{path}: {link}"
            assert re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.netloc), f"{path}: {link}"
