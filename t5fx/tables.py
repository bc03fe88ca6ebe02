"""Tables of text on a terminal, made with rich, which is imported when one is made."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Sequence
from typing import Any


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]] = (),
    *,
    numbers: Collection[str] | None = None,
    whole: bool = False,
    styles: Iterable[str] = (),
) -> Any:
    """A `rich.table.Table` of text that is not read as markup.

    Args:
        title: above it, or "".
        columns: their headers. rows: the cells of each line.
        numbers: columns that stand on the right; by default all but the first.
        whole: numbers and their headers keep to one line.
        styles: of each line; the lines after the last one have none.
    """
    from rich.table import Table
    from rich.text import Text

    numbers = columns[1:] if numbers is None else numbers
    made = Table(title=Text(title) if title else None, title_justify="left")
    for column in columns:
        number = column in numbers
        justify: Any = "right" if number else "left"
        made.add_column(column, justify=justify, overflow="fold", no_wrap=whole and number)
    styles = iter(styles)
    for row in rows:
        made.add_row(*map(Text, row), style=next(styles, None))
    return made


def as_text(renderable: Any, width: int) -> str:
    """What rich prints of it, without colours, in lines of at most `width` characters."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(renderable)
    return text.getvalue().rstrip()
