"""The command `t5fx`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

USAGE = """usage: t5fx bench COMMAND ...

  bench   measure what t5fx does for a model on this machine: `t5fx bench --help`
"""

#: What `t5fx bench` imports and `pip install t5fx` does not bring.
_EXTRAS = {"timm", "transformers", "diffusers", "matplotlib", "numpy", "accelerate", "onnx"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 where something was refused or got worse, 2 for wrong usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] != ["bench"]:
        asked = given[:1] in (["-h"], ["--help"])
        print(USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        app = importlib.import_module("t5fx.bench.app")
        return app.main(given[1:])
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        print(
            f"t5fx bench: expected the package {error.name}, got none: pip install 't5fx[bench]'",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
