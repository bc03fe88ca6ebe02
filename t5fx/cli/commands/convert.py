"""Convert a model and save it; with photographs, also train it without labels.

With --data the command converts the model, trains it, compares it with the original on held-out
photographs, and saves it.
"""

from __future__ import annotations

import argparse

import t5fx
from t5fx.cli.flags import add_flags, given
from t5fx.cli.running import Result, UsageError
from t5fx.cli.training import add_road, hook_of, travel

HOOKS = {"align": t5fx.Align, "distill": t5fx.Distill}
#: What a model is called after each.
STAGES = {"align": "aligned", "distill": "distilled"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_road(parser, data=False, checkpoint=False)
    parser.add_argument(
        "--train",
        nargs="+",
        choices=HOOKS,
        help="with --data: what trains the model, in turn: align (the new parameters, each "
        "attention by itself) or distill (all parameters, end to end, which is slower) "
        "(default: align)",
    )
    for name, kind in HOOKS.items():
        add_flags(parser, kind, prefix=f"{name}-")


def run(options: argparse.Namespace) -> Result:
    if options.data is None and options.train is not None:
        raise UsageError("--train: expected photographs to train on (--data FOLDER), got none")
    chosen = [] if options.data is None else options.train or ["align"]
    for name, kind in HOOKS.items():
        if name not in chosen and given(options, kind):
            raise UsageError(
                f"options of {kind.__name__}: expected --data FOLDER and --train {name} beside them"
            )
    return travel(options, {STAGES[name]: hook_of(options, HOOKS[name]) for name in chosen})
