"""What the backend says to people."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch._logging import trace_structured

from t5fx.backend import adapters as adapters
from t5fx.config import LinearizeConfig
from t5fx.errors import NothingRewrittenWarning, UntrainedWarning
from t5fx.frontend.dynamo import (
    Region,
    inside_compiled_module,
    model_of,
)
from t5fx.reports import Report, why_nothing


def _once(model: nn.Module | None, what: str) -> bool:
    """Whether this is the first time for a model; True where the model is not known."""
    if model is None:
        return True
    said = _warned.setdefault(model, set())
    first = what not in said
    said.add(what)
    return first


def warn_untrained(anchor: torch.Tensor, count: int, config: LinearizeConfig) -> None:
    model = model_of(anchor)
    if _once(model, f"untrained: {config}"):
        whose = "a model" if model is None else type(model).__name__
        warnings.warn(
            f"{whose} runs with untrained parameters: {count} attentions were rewritten, and their "
            f"outputs differ from those of softmax attention. Train "
            f"t5fx.adapter(model).parameters(), or give trained ones: "
            f"options={{'adapter': path or module}}",
            UntrainedWarning,
            stacklevel=2,
        )


def warn_nothing(report: Report, region: Region) -> None:
    model = next((model_of(t.value) for t in region.tensors.values()), None)
    broken = region.begin or region.end
    if not report.sites and (broken is not None or inside_compiled_module()):
        return  # a stretch between graph breaks
    reasons = ", ".join(sorted(report.counts()))
    if _once(model, f"nothing: {reasons}"):
        report.model = "a graph" if model is None else type(model).__name__
        text = f"{why_nothing(report)}. The graph is compiled as it is"
        if region.ddp:
            text += (
                "; DDP had split it from the code that lays out its tokens: set "
                "torch._dynamo.config.optimize_ddp = False, or linearize the model first"
            )
        warnings.warn(text, NothingRewrittenWarning, stacklevel=2)


def summary_of(report: Report) -> str:
    counts = ", ".join(f"{n} x {reason}" for reason, n in report.counts().items())
    return f"{len(report.rewritten)} attentions rewritten, {len(report.skipped)} left ({counts})"


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """An artifact for tlparse."""
    trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=payload
    )


_warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
