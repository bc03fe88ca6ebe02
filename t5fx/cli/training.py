"""The road of a model: loaded, converted, trained on photographs, compared, saved."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

import t5fx
from t5fx.cli.arguments import add_config, add_model, add_output, check_out, config_of, made
from t5fx.cli.compared import Agreement, speed
from t5fx.cli.flags import add_flags, given
from t5fx.cli.images import Photographs, add_data, listed
from t5fx.cli.models import Loaded, linearized, load
from t5fx.cli.running import Result, doing

#: Images in a batch where nothing else is said.
BATCH = 8

Hook = Any  # a dataclass with `data` that is called with a linearized model
Numbers = dict[str, Callable[[nn.Module], float]]  # of a model, by name
#: What a hook needs beside its options, once there is a model and there are photographs.
Needs = Callable[[Loaded, Photographs, Agreement], dict[str, Any]]


def add_road(parser: argparse.ArgumentParser, *, data: bool, checkpoint: bool) -> None:
    """MODEL, --data, --out and --measure; the options of the conversion come with `add_config`.

    data: whether --data is required; checkpoint: whether the road may begin at --checkpoint.
    """
    add_model(parser, batch=BATCH, checkpoint=checkpoint)
    parser.usage = f"%(prog)s MODEL {'--data FOLDER ' if data else ''}--out DIR [OPTION ...]"
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="where the model is saved"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also compile the original and the result, and time both in turn",
    )
    add_output(parser)
    add_data(parser, required=data)
    add_config(parser)
    add_flags(parser, t5fx.save_pretrained, supplied=("lin", "directory", "state_dict"))


def hook_of(options: argparse.Namespace, kind: type, **others: Any) -> Hook:
    """A fine-tune hook with the settings on the command line, its data still to be given.

    Raises `UsageError` for settings that it refuses.
    """
    return made(kind, given(options, kind), data=(), **others)


def without_labels(loaded: Loaded, pictures: Photographs, agreement: Agreement) -> dict[str, Any]:
    """What `Align` and `Distill` need, of which each takes what it has a field for."""
    return {
        "data": pictures.training,
        "inputs": loaded.call,
        "held_out": pictures.held_out,
        "evaluate": lambda model: {"agreement": agreement(model)},
    }


def travel(
    options: argparse.Namespace,
    hooks: Mapping[str, Hook],
    needs: Needs = without_labels,
    measures: Callable[[Loaded, Photographs], Numbers] | None = None,
) -> Result:
    """Convert or load a model, train it with each hook in turn, compare, save.

    Args:
        options: the command line.
        hooks: by the name of the stage that each makes; without any no photographs are needed.
        needs: what each hook gets beside its options.
        measures: numbers of a model, by name, beside the agreement with the original.
    """
    check_out(options.out)
    config = config_of(options)
    folder = None if options.data is None else listed(options)
    loaded = load(options)
    data: dict[str, Any] = {"model": str(options.model), "out": str(options.out)}
    shown: list[Any] = []
    if folder is None:
        lin = linearized(loaded, options, config)
        report = t5fx.report(lin)
        shown.append(report)
    else:
        pictures = loaded.photographs(options, folder)
        with doing("running the original"):
            agreement = Agreement(loaded, pictures.held_out)
        numbers: Numbers = {"agreement": agreement}
        numbers |= measures(loaded, pictures) if measures else {}
        lin = linearized(loaded, options, config)
        report = t5fx.report(lin)
        shown.append(report)
        begin = "converted" if getattr(options, "checkpoint", None) is None else "checkpoint"
        stages = {"original": _measured(loaded.model, numbers), begin: _measured(lin, numbers)}
        given_to = needs(loaded, pictures, agreement)
        data["training"] = {}
        for name, hook in hooks.items():
            fields = {field.name for field in dataclasses.fields(hook) if field.init}
            hook = dataclasses.replace(hook, **{n: v for n, v in given_to.items() if n in fields})
            hook(lin, report)
            stages[name] = _measured(lin, numbers)
            data["training"][name] = dataclasses.asdict(hook.result)
            shown.append(hook.result)
        data |= {"photographs": pictures.counts, "stages": stages}
        shown += _told(stages, pictures)
    if options.measure:
        with doing("compiling and timing"):
            faster = speed(loaded, lin)
        data["speed"] = faster._asdict()
        shown.append(
            f"speed: {faster.median:.2f}x the original's ({faster.low:.2f} to {faster.high:.2f}), "
            f"both compiled, batch {options.batch}"
        )
    with doing(f"saving to {options.out}"):
        t5fx.save_pretrained(lin, options.out, **given(options, t5fx.save_pretrained))
    data["report"] = report.to_dict()
    shown.append(f"saved: {options.out}")
    return Result(data, tuple(shown))


def _measured(model: nn.Module, numbers: Numbers) -> dict[str, float]:
    with doing("comparing on the photographs that are held out"):
        return {name: number(model) for name, number in numbers.items()}


def _told(stages: Mapping[str, Mapping[str, float]], pictures: Photographs) -> list[str]:
    """A line for each number: what it was at each stage."""
    count = pictures.counts["held_out"]
    about = {
        "agreement": "agreement with the original (mean cosine of the outputs)",
        "accuracy": "accuracy",
    }
    return [
        f"{about[name]} on {count} held-out photographs: "
        + ", ".join(f"{stage} {found[name]:.3f}" for stage, found in stages.items())
        for name in next(iter(stages.values()))
    ]
