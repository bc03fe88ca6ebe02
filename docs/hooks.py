"""What mkdocs does beside reading the pages: those that are made of files elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def on_files(files: Any, config: Any) -> Any:
    """The front page is the README, and the tutorial a script."""
    from mkdocs.structure.files import File

    pages = {
        "index.md": "---\nhide: [navigation]\n---\n"
        + relinked((ROOT / "README.md").read_text(encoding="utf-8")),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "contributing.md": relinked((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")),
        "tutorial.md": tutorial((ROOT / "docs" / "tutorial.py").read_text(encoding="utf-8")),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def relinked(text: str) -> str:
    """A page of the repository's root as one of the manual: links into docs/ are its own, and those
    to other files are plain text."""
    text = text.replace("](docs/tutorial.py)", "](tutorial.md)").replace("](docs/", "](")
    text = text.replace("](CONTRIBUTING.md)", "](contributing.md)")
    return re.sub(r"\[([^\]]*)\]\([A-Z][A-Za-z.]*\)", r"\1", text)


def tutorial(script: str) -> str:
    """A script in the percent format (`# %%` begins code, `# %% [markdown]` text) as Markdown."""
    parts = []
    for cell in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        if kind.strip() == "[markdown]":
            parts.append(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
        else:
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(parts) + "\n"
