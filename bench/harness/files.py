"""Files of rows: CSV whose columns are the fields of a dataclass of text and numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from t5fx.atomic import replacing
from t5fx.errors import T5Error

R = TypeVar("R")

#: How pandas reads the fields of each type, by the type's text.
_TYPES = {"str": "object", "int": "int64", "int | None": "Int64", "float | None": "Float64"}


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """The rows of a file that `write_rows` wrote.

    Raises `T5Error` for a file that cannot be read or has other columns or values.
    """
    import pandas

    types = _types(kind)
    missing = {name: [""] for name, of in types.items() if of != "object"}
    try:
        frame = pandas.read_csv(
            path,
            dtype=types,
            keep_default_na=False,
            na_values=missing,
        )
        if set(frame.columns) != set(types):
            differing = sorted(map(str, set(frame.columns) ^ set(types)))
            raise ValueError(f"other columns: {', '.join(differing)}")
        cut = [name for name, of in types.items() if of == "object" and frame[name].isna().any()]
        if cut:
            raise ValueError(f"rows without {', '.join(cut)}")
        plain = frame.astype(object).where(frame.notna(), None)
        return [kind(**values) for values in plain.to_dict("records")]
    except (OSError, ValueError, TypeError, T5Error) as error:
        raise T5Error(
            f"{path}: expected a CSV file that `t5fx bench` wrote, got {type(error).__name__}: "
            f"{error}"
        ) from error


def write_rows(path: Path, rows: Iterable[Any], kind: type) -> None:
    """Replaces the file at once or not at all. Numbers have six digits: a file that many runs merge
    into stays small and readable.
    """
    import pandas

    frame = pandas.DataFrame(map(asdict, rows), columns=list(_types(kind)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        frame.to_csv(scratch, index=False, lineterminator="\n", float_format="%.6g")


def _types(kind: type) -> dict[str, str]:
    return {field.name: _TYPES[str(field.type)] for field in fields(kind)}
