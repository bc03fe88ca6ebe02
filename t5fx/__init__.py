"""Rewrite the softmax attention of any PyTorch model into linear-time TTT nodes."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("t5fx.kernels") is None:
    raise ImportError(
        f"expected t5fx as it is installed, got {__path__[0]}, a part of its source, which Python "
        f"imports when it is started in a checkout: start it in another folder, or install the "
        f"checkout with `pip install -e .`"
    )

# It registers the operators of the node, for programs that were exported or traced and saved.
from t5fx.kernels import op as _op  # noqa: F401

if TYPE_CHECKING:
    from t5fx.api import example_inputs, explain, linearize, report, softmax
    from t5fx.backend.adapters import adapter
    from t5fx.checkpoint.pretrained import from_pretrained, save_pretrained
    from t5fx.config import LinearizeConfig
    from t5fx.diagnostics.diagnose import diagnose
    from t5fx.diagnostics.result import Diagnosis
    from t5fx.errors import (
        AdapterError,
        AlreadyLinearizedError,
        CaptureError,
        CheckpointError,
        ConfigError,
        GraphSpecError,
        HookError,
        LayoutUnknownError,
        MeasureError,
        NothingRewrittenError,
        NothingRewrittenWarning,
        RefusedCallError,
        SlowNodeWarning,
        T5Error,
        TrainingError,
        UntrainedWarning,
    )
    from t5fx.reports import Report, Site
    from t5fx.training.align import Align
    from t5fx.training.distill import Distill
    from t5fx.training.finetune import FineTune
    from t5fx.training.groups import freeze, param_groups
    from t5fx.training.search import search
    from t5fx.training.trajectory import trajectory_inputs

    __version__: str

__all__ = [
    "AdapterError",
    "Align",
    "AlreadyLinearizedError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "Diagnosis",
    "Distill",
    "FineTune",
    "GraphSpecError",
    "HookError",
    "LayoutUnknownError",
    "LinearizeConfig",
    "MeasureError",
    "NothingRewrittenError",
    "NothingRewrittenWarning",
    "RefusedCallError",
    "Report",
    "Site",
    "SlowNodeWarning",
    "T5Error",
    "TrainingError",
    "UntrainedWarning",
    "adapter",
    "diagnose",
    "example_inputs",
    "explain",
    "freeze",
    "from_pretrained",
    "linearize",
    "param_groups",
    "report",
    "save_pretrained",
    "search",
    "softmax",
    "trajectory_inputs",
]

_ERRORS = (
    "T5Error",
    "CaptureError",
    "ConfigError",
    "NothingRewrittenError",
    "AlreadyLinearizedError",
    "RefusedCallError",
    "LayoutUnknownError",
    "MeasureError",
    "GraphSpecError",
    "AdapterError",
    "CheckpointError",
    "TrainingError",
    "HookError",
    "UntrainedWarning",
    "SlowNodeWarning",
    "NothingRewrittenWarning",
)

_HOMES = {
    "Align": "training.align",
    "Diagnosis": "diagnostics.result",
    "diagnose": "diagnostics.diagnose",
    "Distill": "training.distill",
    "FineTune": "training.finetune",
    "freeze": "training.groups",
    "param_groups": "training.groups",
    "from_pretrained": "checkpoint.pretrained",
    "save_pretrained": "checkpoint.pretrained",
    "adapter": "backend.adapters",
    "linearize": "api",
    "explain": "api",
    "report": "api",
    "search": "training.search",
    "softmax": "api",
    "trajectory_inputs": "training.trajectory",
    "example_inputs": "api",
    "LinearizeConfig": "config",
    "Report": "reports",
    "Site": "reports",
    **dict.fromkeys(_ERRORS, "errors"),
}


def __getattr__(name: str) -> Any:
    """Import public names on first use: what `import t5fx` adds to that of torch is little."""
    if name == "__version__":
        return importlib.metadata.version("t5fx")
    if name in _HOMES:
        return getattr(importlib.import_module(f"t5fx.{_HOMES[name]}"), name)
    raise AttributeError(f"module 't5fx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
