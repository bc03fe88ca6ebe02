"""What the demos say while they work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from rich.console import Console


@contextmanager
def step(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Shows what is being done, on a terminal only, and then how long it took.

    Yields a function that changes the text shown meanwhile.
    """
    start = perf_counter()
    with console.status(text) as status:
        yield status.update
    console.print(f"{text}: {perf_counter() - start:.1f} s", style="dim", highlight=False)
