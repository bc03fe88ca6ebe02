"""What the fine-tune hooks have in common: nodes, batches as calls, schedule, progress, tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from t5fx import tables
from t5fx.backend.adapters import adapter
from t5fx.errors import AdapterError, TrainingError
from t5fx.kernels import TTT
from t5fx.runtime.lookup import is_linearized, nodes_in
from t5fx.training.batches import placed
from t5fx.training.sharding import reshard
from t5fx.wrappers import uncompiled


def nodes_of(module: nn.Module) -> dict[str, TTT]:
    """The TTT nodes of a linearized module, or of one compiled with backend="t5", by key."""
    inner = uncompiled(module)
    if is_linearized(inner):
        return nodes_in(inner)
    try:
        return adapter(module).nodes()
    except AdapterError as error:
        raise TrainingError(f"nothing to train: {error}") from error


def device_of(module: nn.Module) -> torch.device:
    """Where the nodes of a model are; where these have no parameters, where the model is."""
    of_nodes = (p for node in nodes_of(module).values() for p in node.parameters())
    first = next(of_nodes, None)
    return (next(module.parameters()) if first is None else first).device


def as_call(
    batch: Any, device: torch.device, inputs: Callable[[Any], Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call of a model that a batch stands for, its tensors on `device`.

    inputs: what of the batch that is. A mapping is keyword arguments, a tuple or list positional
    ones, anything else the only one.
    """
    batch = placed(batch if inputs is None else inputs(batch), device)
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def warm_cosine(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate at step 0..steps-1: linear rise over a fraction `warmup` of the
    steps, then half a cosine down to almost zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - rise) / (steps + 1 - rise)))


@contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """Puts train/eval flags and requires_grad back as they were.

    Parameters are found by name: FSDP2 puts others in their places meanwhile.
    """
    reshard(module)
    flags = [(m, m.training) for m in module.modules()]
    wanted = {name: p.requires_grad for name, p in module.named_parameters()}
    try:
        yield
    finally:
        reshard(module)
        for each, training in flags:
            if each.training != training:
                each.training = training
        for name, parameter in module.named_parameters():
            if name in wanted:
                parameter.requires_grad_(wanted[name])


@contextmanager
def progress(text: str, steps: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal, of which `done` steps are done, and nothing elsewhere.

    Yields a function to call after each step, with what to show beside the bar.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    note = TextColumn("{task.fields[note]}")
    with Progress(
        *columns, note, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=steps, completed=done, note="")
        yield lambda note: bar.update(task, advance=1, note=note)


def table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """A text table, names on the left and numbers on the right."""
    return tables.as_text(tables.table(title, columns, rows), width=100)


def check_count(**values: int) -> None:
    """Raise `TrainingError` for a value that is not a whole number above zero."""
    _check(values, "a whole number above 0", lambda x: isinstance(x, int) and x > 0)


def check_share(**values: float) -> None:
    """Raise `TrainingError` for a value that is not a number from 0 to 1."""
    _check(values, "a fraction, 0 to 1", lambda x: 0 <= x <= 1)


def check_not_negative(**values: float) -> None:
    """Raise `TrainingError` for a value that is not a finite number, or below zero."""
    _check(values, "a number of at least 0", lambda x: 0 <= x < math.inf)


def check_positive(**values: float) -> None:
    """Raise `TrainingError` for a value that is not a finite number above zero."""
    _check(values, "a number above 0", lambda x: 0 < x < math.inf)


def _check(values: Mapping[str, Any], wanted: str, fits: Callable[[Any], bool]) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
            raise TrainingError(f"{name}: expected {wanted}, got {value!r}")
