"""The code of the README and of the manual's pages runs, in order, and prints what they show."""

from pathlib import Path

import pages
import pytest

ROOT = Path(__file__).parent.parent

#: Pretrained weights come from a hub; two blocks and a step do where twelve and a hundred stand.
SMALL = {"pretrained=True": "pretrained=False, depth=2"}
PAGES = {
    "README.md": {"pretrained=True": "pretrained=False"},
    "docs/quickstart.md": SMALL | {"518": "252", "1370": "325", "37x37": "18x18", "steps=100": "steps=1"},
    "docs/convert.md": SMALL,
    "docs/compile.md": {},
    "docs/training.md": SMALL | {"steps=100": "steps=1", "steps=50": "steps=1"},
    "docs/diffusion.md": {},
    "docs/how-it-works.md": SMALL,
    "docs/extending.md": {},
}


@pytest.mark.extras
@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages.run(ROOT / page, PAGES[page])
