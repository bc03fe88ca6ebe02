"""Say which attentions of a model would be rewritten, at what cost, and why not the others.

The command changes no model and writes no file.
"""

from __future__ import annotations

import argparse

import t5fx
from t5fx.cli.arguments import add_config, add_model, add_output, config_of
from t5fx.cli.models import linearized, load
from t5fx.cli.running import Result, doing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, batch=1, checkpoint=True)
    add_output(parser)
    add_config(parser)


def run(options: argparse.Namespace) -> Result:
    config = config_of(options)
    loaded = load(options)
    if options.checkpoint is not None:
        report = t5fx.report(linearized(loaded, options, config))
    else:
        with doing("tracing and matching"):
            report = t5fx.explain(loaded.model, loaded.args, loaded.kwargs, config=config)
    return Result({"model": str(options.model), "report": report.to_dict()}, (report,))
