"""Run benchmarks on this machine, and write a report of results or compare them."""

from __future__ import annotations

import argparse

from t5fx.bench import app


def add_arguments(parser: argparse.ArgumentParser) -> None:
    app.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    return app.start(options)
