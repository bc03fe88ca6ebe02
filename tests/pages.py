"""Runs the code of a page of Markdown, in order, and holds what it prints against the page."""

import contextlib
import doctest
import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from t5fx.errors import UntrainedWarning

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
#: Before a block of Python that needs what is not here, such as a hub of models.
NOT_RUN = "<!-- not run -->\n"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, its first line and the heading above it."""

    language: str
    text: str
    line: int
    section: str


def blocks(path: Path, replace: Mapping[str, str] | None = None) -> list[Block]:
    """The blocks of a page, those that are not to be run left out.

    replace: other text for parts of the page, each of which has to be in it: fewer steps, no
    download.
    """
    page = path.read_text(encoding="utf-8")
    for old, new in (replace or {}).items():
        assert old in page, f"{path.name}: expected {old!r} in the page"
        page = page.replace(old, new)
    headings = [(found.start(), found[1]) for found in _HEADING.finditer(_blanked(page))]
    return [
        Block(
            found[1],
            found[2],
            page.count("\n", 0, found.start()) + 2,
            next((title for at, title in reversed(headings) if at < found.start()), ""),
        )
        for found in _FENCE.finditer(page)
        if not page.endswith(NOT_RUN, 0, found.start())
    ]


def _blanked(page: str) -> str:
    """Without its blocks, in which a # begins a comment; every other character in its place."""
    return _FENCE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), page)


def run(
    path: Path, replace: Mapping[str, str] | None = None, names: dict[str, object] | None = None
) -> dict[str, object]:
    """Runs the Python blocks in one namespace, which it returns.

    A block of text right after one of Python is what that prints, "..." standing for anything.
    """
    names = {"__name__": path.stem} if names is None else names
    printed = ""
    for block in blocks(path, replace):
        if block.language == "python":
            printed = execute(path, block, names)
        elif block.language == "text" and printed:
            check(path, block, printed)
            printed = ""
    return names


def execute(path: Path, block: Block, names: dict[str, object]) -> str:
    """Runs a block; returns what it prints."""
    code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        exec(code, names)
    return out.getvalue()


def check(path: Path, block: Block, printed: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    same = doctest.OutputChecker().check_output(block.text, printed, flags)
    assert same, f"{path.name}, line {block.line}: expected\n{block.text}\ngot\n{printed}"
