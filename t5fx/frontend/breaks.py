"""Graph breaks of Dynamo: where they are, and what they cut apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._dynamo.symbolic_convert import InstructionTranslator

_RESUMED = re.compile(r"torch_dynamo_resume_in_(?P<function>.+)_at_(?P<line>\d+)$")


@dataclass(frozen=True)
class Break:
    """A place in a model's code at which Dynamo ended a graph, and why."""

    file: str
    line: int
    function: str
    why: str

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        return f"the graph break in {self.function}, {self.file}:{self.line}{why}"


#: The latest break by file and line, of itself or of a call that led to it.
_seen: dict[tuple[str, int], Break] = {}


def breaks(gm: fx.GraphModule) -> tuple[Break | None, Break | None]:
    """The breaks that a Dynamo graph begins and ends at; None where it is the code's own end.

    To be called while Dynamo compiles the graph.
    """
    return _begin(), _end(gm)


def _begin() -> Break | None:
    code: Any = InstructionTranslator.current_tx().output.root_tx.f_code
    resumed = _RESUMED.match(code.co_name)
    if resumed is None:
        return None
    line = int(resumed["line"])
    known = _seen.get((code.co_filename, line))
    return known or Break(code.co_filename, line, resumed["function"], "")


def _end(gm: fx.GraphModule) -> Break | None:
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break or not reason.user_stack:
        return None
    last = reason.user_stack[-1]
    resumed = _RESUMED.match(last.name)
    function = resumed["function"] if resumed else last.name
    said = [line.strip() for line in str(reason.reason).splitlines() if line.strip()]
    found = Break(last.filename, last.lineno or 0, function, said[0].rstrip(".") if said else "")
    for frame in reason.user_stack:
        _seen[frame.filename, frame.lineno or 0] = found
    return found
