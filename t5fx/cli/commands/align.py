"""Train each new node to reproduce the attention that it replaces (t5fx.Align)."""

from __future__ import annotations

import argparse

import t5fx
from t5fx.cli.flags import add_flags
from t5fx.cli.running import Result
from t5fx.cli.training import add_road, hook_of, travel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_road(parser, data=True, checkpoint=True)
    add_flags(parser, t5fx.Align)


def run(options: argparse.Namespace) -> Result:
    return travel(options, {"aligned": hook_of(options, t5fx.Align)})
