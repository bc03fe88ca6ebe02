"""Fine-tune hooks: what `linearize` hands its result to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from t5fx.errors import ConfigError, HookError
from t5fx.reports import Report

#: Trains a linearized module in place (and returns None), or returns another module.
Hook = Callable[[nn.Module, Report], nn.Module | None]


def hooks_of(finetune: Hook | Sequence[Hook] | None) -> list[Hook]:
    """The option `finetune` as a list. Raises `ConfigError` for what cannot be called."""
    if finetune is None:
        return []
    hooks: list[Any] = list(finetune) if isinstance(finetune, list | tuple) else [finetune]
    for hook in hooks:
        if not callable(hook):
            raise ConfigError(
                f"finetune: expected a callable (module, report) -> module, or a sequence of such, "
                f"got a {type(hook).__name__}"
            )
    return hooks


def run(hooks: Sequence[Hook], module: nn.Module, report: Report) -> nn.Module:
    """Call hooks in turn, each with what the one before returned.

    Raises `HookError`, from the hook's own error, with the module in its present state, which an
    interrupt from the keyboard gets too.
    """
    for hook in hooks:
        name = getattr(hook, "__name__", type(hook).__name__)
        try:
            result = hook(module, report)
        except KeyboardInterrupt as error:
            error.module = module  # type: ignore[attr-defined]
            error.add_note(
                f"The fine-tune hook {name} was interrupted; the linearized model, as it left it, "
                f"is this exception's `.module` (in an interactive session sys.last_value.module)."
            )
            raise
        except Exception as error:
            raise HookError(
                f"the fine-tune hook {name} failed with {type(error).__name__}: {error}; the "
                f"linearized model, as the hook left it, is this error's `.module`",
                module,
            ) from error
        if result is not None and not isinstance(result, nn.Module):
            raise HookError(
                f"the fine-tune hook {name}: expected an nn.Module, or None for one that was "
                f"changed in place, got a {type(result).__name__}; the linearized model is this "
                f"error's `.module`",
                module,
            )
        module = module if result is None else result
    return module
