"""Measure what t5fx does for models on this machine, and render or compare what was measured."""

from __future__ import annotations

import argparse

from t5fx.bench import app


def add_arguments(parser: argparse.ArgumentParser) -> None:
    app.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    return app.start(options)
