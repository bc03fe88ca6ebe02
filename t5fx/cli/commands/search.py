"""Find by measuring which attention should become which node under a budget (t5fx.search).

The command writes a configuration, which the other commands read with --config.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path

import t5fx
from t5fx.cli.arguments import add_config, add_model, add_output, check_writable, config_of
from t5fx.cli.flags import add_flags, given
from t5fx.cli.images import add_data, listed
from t5fx.cli.models import load
from t5fx.cli.running import Result, UsageError, doing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, batch=1)
    parser.usage = (
        "%(prog)s MODEL --data FOLDER --out FILE (--budget SHARE | --loss LOSS) [OPTION ...]"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", required=True, help="the configuration found, as JSON"
    )
    parser.add_argument("--draw", type=Path, metavar="FILE", help="a picture of the frontier")
    parser.add_argument(
        "--batches",
        type=int,
        default=8,
        help="how many batches of photographs the candidates are compared on (default: 8)",
    )
    add_output(parser)
    add_data(parser, required=True)
    add_flags(parser, t5fx.search, supplied=("args", "kwargs", "config"))
    add_config(parser)


def run(options: argparse.Namespace) -> Result:
    if options.out.is_dir():
        raise UsageError(f"--out: expected a file for JSON, got the folder {options.out}")
    check_writable(options.out)
    if options.batches < 1:
        raise UsageError(f"--batches: expected 1 or more, got {options.batches}")
    if len(given(options, t5fx.search).keys() & {"budget", "loss"}) != 1:
        raise UsageError("expected one of --budget and --loss, got neither or both")
    config = config_of(options)
    folder = listed(options)
    loaded = load(options)
    pictures = loaded.photographs(options, folder)
    with doing("searching"):
        found = t5fx.search(
            loaded.model,
            loaded.args,
            loaded.kwargs,
            data=list(itertools.islice(pictures.training, options.batches)),
            inputs=loaded.call,
            config=config,
            **given(options, t5fx.search),
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(found.config.to_json(), encoding="utf-8")
    shown = [found, f"saved: {options.out}"]
    if options.draw is not None:
        found.draw(options.draw)
        shown.append(f"saved: {options.draw}")
    points = [
        {**dataclasses.asdict(p), "config": p.config.to_dict(), "fits": p.config == found.config}
        for p in found.points
    ]
    data = {
        "model": str(options.model),
        "config": found.config.to_dict(),
        "points": points,
        "softmax": found.softmax,
        "unit": found.unit,
        "out": str(options.out),
    }
    return Result(data, tuple(shown))
