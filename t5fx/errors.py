"""Every error that t5fx raises on purpose derives from :class:`T5Error`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


class T5Error(Exception):
    """Base of all errors of t5fx; the message says what was expected and what was got."""


class CaptureError(T5Error):
    """The model could not be traced into one graph, or its shapes are unknown."""


class ConfigError(T5Error, ValueError):
    """A `LinearizeConfig` field has an unknown name or a value outside its domain."""


class NothingRewrittenError(T5Error):
    """`linearize` found no attention that can be rewritten and is worth rewriting."""


class AlreadyLinearizedError(T5Error):
    """`linearize` was given a model that is linearized already."""


class RefusedCallError(T5Error):
    """A call of a linearized model needs attention that the TTT nodes cannot compute."""


class LayoutUnknownError(T5Error):
    """A rewritten attention is called on tokens whose grid is not known in this call."""


class MeasureError(T5Error):
    """The cost of a site could not be measured, or ranks could have measured it differently."""


class GraphSpecError(T5Error):
    """A rewritten graph breaks an invariant that `t5fx.rewrite.verify` checks (a bug)."""


class AdapterError(T5Error):
    """The new parameters of a compiled model do not exist, do not fit, or are not unique."""


class CheckpointError(T5Error):
    """A checkpoint is missing, damaged, of an unknown version, or of another model."""


class TrainingError(T5Error):
    """Training cannot begin or continue, for example because the loss is not finite."""


class HookError(T5Error):
    """A fine-tune hook failed, or returned something that is not a module.

    Attributes:
        module: the linearized model as it was left, so that nothing that was trained is lost.
    """

    def __init__(self, message: str, module: nn.Module) -> None:
        super().__init__(message)
        self.module = module


class UntrainedWarning(UserWarning):
    """A model runs with new parameters that nobody has trained or loaded."""


class SlowNodeWarning(UserWarning):
    """A node runs in a slower implementation than the one that is made for this device."""


class NothingRewrittenWarning(UserWarning):
    """backend="t5" rewrote nothing in a graph, and compiled it as it is."""
