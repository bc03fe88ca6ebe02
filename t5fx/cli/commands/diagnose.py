"""Measure and draw the shift of the keys and the tokens that queries attend to (t5fx.diagnose).

A model that is not linearized is compared with the nodes that it would get.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import t5fx
from t5fx.cli.arguments import add_config, add_model, add_output, check_out, config_of
from t5fx.cli.flags import add_flags, given
from t5fx.cli.models import linearized, load
from t5fx.cli.running import Result, doing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, batch=1, checkpoint=True)
    parser.usage = "%(prog)s MODEL --out DIR [OPTION ...]"
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="where numbers and pictures go"
    )
    add_output(parser)
    add_flags(parser, t5fx.diagnose, supplied=("args", "kwargs", "config"))
    add_config(parser)


def run(options: argparse.Namespace) -> Result:
    check_out(options.out)
    import matplotlib  # noqa: F401  before minutes of measuring: its pictures need it

    config = config_of(options)
    if options.config is None and "min_tokens" not in given(options, t5fx.LinearizeConfig):
        config = dataclasses.replace(config, min_tokens=0)  # every site counts, as in the library
    loaded = load(options)
    model, chosen = loaded.model, config if options.checkpoint is None else None
    if options.checkpoint is not None:
        model = linearized(loaded, options, config)
    with doing("measuring"):
        found = t5fx.diagnose(
            model, loaded.args, loaded.kwargs, config=chosen, **given(options, t5fx.diagnose)
        )
    with doing(f"drawing into {options.out}"):
        files = [str(path) for path in found.save(options.out)]
    data = {"model": str(options.model), "diagnosis": found.to_dict(), "files": files}
    return Result(data, (found, *(f"saved: {file}" for file in files)))
