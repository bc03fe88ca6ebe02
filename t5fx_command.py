"""The root of the command `t5fx`: which commands there are, and what runs the chosen one.

It is a module beside the package, because importing the package imports torch, which takes seconds:
`t5fx --help` and a misspelled command need nothing of that.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "t5fx.cli.commands"
EPILOG = """exit codes:
  0  done
  1  it failed: one line on stderr says what was expected and what was found
  2  wrong usage

`t5fx COMMAND --help` lists the options of a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, that of this process by default; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    root, parsers = build()
    try:
        if not given or given[0] not in parsers:
            root.parse_args(given)  # prints help, or what is wrong, and exits
            root.error(f"expected a command, one of {', '.join(parsers)}, got none")
        command, parser = importlib.import_module(f"{PACKAGE}.{given[0]}"), parsers[given[0]]
        command.add_arguments(parser)
        options, unknown = root.parse_known_args(given)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        from t5fx.cli.running import run

        return run(command.run, options, parser)
    except SystemExit as exit:  # argparse's, for help and wrong usage
        return exit.code if isinstance(exit.code, int) else 0


def build() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The tree, and the parser of each command by its name, its arguments still to be added."""
    root = argparse.ArgumentParser(
        prog="t5fx",
        description="Rewrite the softmax attention of a pretrained model into linear-time nodes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=importlib.metadata.version("t5fx"))
    subparsers = root.add_subparsers(metavar="COMMAND")
    parsers = {}
    for name, text in commands().items():
        first = text.partition("\n")[0].rstrip(".")
        parsers[name] = subparsers.add_parser(
            name,
            help=first[0].lower() + first[1:],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    return root, parsers


def commands() -> dict[str, str]:
    """The docstring of each command's module by the command's name: one module, one command.

    Read from the files, since an import of any module of t5fx imports torch.
    """
    spec = importlib.util.find_spec("t5fx")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(next(iter(spec.submodule_search_locations)), *PACKAGE.split(".")[1:])
    sources = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("[!_]*.py")}
    return {name: ast.get_docstring(ast.parse(sources[name])) or "" for name in sorted(sources)}


if __name__ == "__main__":
    sys.exit(main())
