"""The error that a wrong argument of the node raises."""

from collections.abc import Collection

from t5fx.errors import T5Error


class NodeArgumentError(T5Error, ValueError):
    """An argument of the TTT node has a wrong rank, shape, dtype or name.

    The message says what was expected and what was got.
    """


def require_name(kind: str, value: str, valid: Collection[str]) -> None:
    """Raise NodeArgumentError unless ``value`` is one of ``valid``; ``kind`` names the argument."""
    if value not in valid:
        names = ", ".join(repr(name) for name in valid)
        raise NodeArgumentError(f"{kind}: expected one of {names}; got {value!r}")
