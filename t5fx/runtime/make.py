"""Making the forms of owners."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from t5fx.errors import CaptureError, T5Error
from t5fx.frontend.capture import first_line
from t5fx.frontend.copies import duplicate
from t5fx.frontend.owners import hint
from t5fx.frontend.record import Recorded
from t5fx.rewrite.forms import Form, Verdict, build, constants_of, flatten
from t5fx.runtime.owned import call_of, current_flags
from t5fx.runtime.state import Kind, Runtime
from t5fx.runtime.templates import bare, clean_thread


def calls_of(
    recorded: Recorded, name: str, module: nn.Module
) -> frozenset[tuple[str, tuple[Any, ...]]]:
    """The kinds of calls of a module that a call of the model contains."""
    return frozenset(call_of(module, *call) for call in recorded.calls.get(name, []))


def make_forms(runtime: Runtime, template: nn.Module, recorded: Recorded, kind: Kind) -> None:
    """Build the forms of each owner's calls; owners that are alike share theirs.

    Raises `CaptureError` for an owner that cannot be traced by itself.
    """
    made: dict[Any, list[Form]] = {}
    for name, verdict in kind.verdicts.items():
        module = template.get_submodule(name)
        flags = kind.flags[name]
        for call in recorded.calls.get(name, []):
            try:
                forms = _forms(runtime, module, name, verdict, flags, call, made)
            except T5Error:
                raise
            except Exception as error:
                raise CaptureError(
                    f"expected '{name}' ({type(module).__name__}), whose attention is to be "
                    f"rewritten, to be a module that can be traced by itself, got "
                    f"{type(error).__name__}: {first_line(error)}; leave it out with "
                    f"exclude=({name!r},)"
                ) from error
            for form in forms:
                runtime.keep_form(name, form)


def _forms(
    runtime: Runtime,
    module: nn.Module,
    name: str,
    verdict: Verdict,
    flags: tuple[Any, ...],
    call: tuple[Any, Any],
    made: dict[Any, list[Form]],
) -> list[Form]:
    """The forms of an owner's call, which are in `made` where one of an owner that is alike is.

    Where the code knows a size of one from others, an example of one gets a form of its own.
    """
    structure, spec, leaves = flatten(*call)
    alike = (type(module), repr(module), structure, constants_of(leaves), flags, verdict)
    key = (*alike, tuple(_about(leaf) for leaf in leaves), _tensors(module))
    if key in made:
        return made[key]
    forms: list[Form] = []
    about = (module, structure, leaves, spec, verdict, runtime.config.at(name), name)
    examples = [_example(leaf) for leaf in leaves]
    single = any(1 in e.shape for e in examples if isinstance(e, torch.Tensor))
    for ones in (False, True):
        try:
            form = build(*about, flags, trusted=True, traced=True, ones=ones)
        except Exception:
            if ones or not single:
                raise
            continue  # code that is another one for a size of one than for two
        forms.append(form)
        given = [examples[i] for i in form.positions]
        if form.guards.accept(given, typed=False) is not None:
            break
    if not any(form.own for form in forms):
        made[key] = forms
    return forms


def _example(leaf: Any) -> Any:
    """A leaf of a traced call, with the sizes that it has in the example."""
    if isinstance(leaf, torch.Tensor):
        return torch.empty([hint(n) for n in leaf.shape], dtype=leaf.dtype, device="meta")
    return hint(leaf) if isinstance(leaf, torch.SymInt) else leaf


def _about(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (tuple(map(str, leaf.shape)), leaf.dtype, leaf.device)
    return None


def _tensors(module: nn.Module) -> tuple[Any, ...]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return tuple((name, t.shape, t.dtype, t.device) for name, t in named)


def extend(
    runtime: Runtime,
    module: nn.Module,
    name: str,
    structure: str,
    spec: Any,
    leaves: list[Any],
    kind: Kind,
    trusted: bool,
    inside: bool,
) -> None:
    """Build the form for another kind of call of an owner, on a bare copy of it, and keep it.

    trusted, inside: as in `t5fx.rewrite.forms.build`.
    """
    config = runtime.config.at(name)
    verdict = kind.verdicts[name]
    flags = current_flags(module, verdict, runtime.forms.get(name, ()))

    def work() -> Any:
        template = bare(duplicate(module, share=True))
        return build(
            *(template, structure, leaves, spec, verdict, config, name, flags),
            trusted=trusted,
            inside=inside,
            traced=not kind.guards.symbols,
        )

    runtime.keep_form(name, clean_thread(work))
