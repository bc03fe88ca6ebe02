"""`Linearized`: the nn.Module that `t5fx.linearize` returns for a model."""

from __future__ import annotations

import copy
import inspect
import math
import sys
import threading
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from t5fx.blocks import AutocastState
from t5fx.calls import Guards, Signature
from t5fx.canon import View
from t5fx.capture import CONSTANTS, Capture, capture, first_line
from t5fx.config import LinearizeConfig
from t5fx.errors import CaptureError, RefusedCallError
from t5fx.kernels import TTT
from t5fx.policy import Plan, plan
from t5fx.report import Report, Tried
from t5fx.rewrite import rewrite, settings
from t5fx.tree import Block, Mode, adopt, distribute, mirror

#: Tracing swaps a model's tensors for fake ones: one capture at a time.
_CAPTURING = threading.RLock()

#: What the graph of a call says of a node, apart from the options.
_OF_THE_CALL = ("num_heads", "head_dim", "value_dim", "scale", "locality", "grid_ndim")

_PLAIN = (bool, int, float, str, type(None))


@dataclass
class Variant:
    """One captured and rewritten form of the model, and the calls that it serves.

    structure: names (and nesting) of the arguments; constants: those that are not tensors; mode:
    number of the combination of train/eval flags and dtypes that it was captured in; autocast: the
    devices whose autocast mode it sets for a while; nodes: keys of the TTT nodes it runs.
    """

    structure: Any
    constants: tuple[Any, ...]
    mode: int
    guards: Guards
    out_spec: Any
    piece: int
    autocast: tuple[str, ...]
    nodes: frozenset[str]

    def serves(self, structure: Any, leaves: list[Any], mode: int) -> bool:
        if self.mode != mode or self.structure != structure:
            return False
        return self.constants == _constants(leaves) and self.guards.accept(leaves)


class Captures:
    """What a linearized model keeps of its captures; they are not pickled, but made again."""

    def __init__(self, config: LinearizeConfig, signature: Signature) -> None:
        self.config = config
        self.signature = signature
        self.variants: list[Variant] = []
        self.modes: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "variants": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> Captures:
        new = Captures(self.config, self.signature)
        new.variants, new.modes = list(self.variants), list(self.modes)
        return new


class Linearized(Block):
    """A model whose attentions are TTT nodes: call it like the original.

    Parameters and buffers have the original's names; each rewritten site adds its own under
    `<owner>.t5`. A call whose arguments, sizes, dtypes or train/eval flags no captured graph serves
    is captured on first use, on the same parameters. `report` says what was rewritten.

    Threads that need the same capture wait for one another. A capture is no time for other threads
    to run models, though: torch.export patches `nn.Module` for the whole process.
    """

    def __init__(
        self, template: nn.Module, config: LinearizeConfig, nodes: Mapping[str, TTT] | None = None
    ) -> None:
        super().__init__(template, Mode())
        self._captures = Captures(config, Signature(template.forward))
        self.report = Report(type(template).__name__)
        self.__class__ = _with_signature(self._captures.signature)
        mirror(template, self)
        adopt(self, nodes or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__class__ = _with_signature(self._captures.signature)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original's forward takes and returns."""
        captures = self._captures
        args, kwargs = captures.signature.bind(args, kwargs)
        structure, leaves = _flatten(args, kwargs)
        mode = self._mode()
        for variant in captures.variants:
            if variant.serves(structure, leaves, mode):
                break
        else:
            variant = self.capture(args, kwargs, mode)
        enabled = torch.is_grad_enabled()
        watched = variant.autocast and not torch.compiler.is_compiling()
        autocast = AutocastState(variant.autocast) if watched else None
        try:
            outputs = super().forward(*leaves, piece=variant.piece)
        except BaseException:
            if autocast is not None:
                autocast.restore()
            raise
        finally:
            if torch.is_grad_enabled() != enabled:
                torch._C._set_grad_enabled(enabled)
        return pytree.tree_unflatten(outputs, variant.out_spec)

    def _mode(self) -> int:
        """Number of the present combination of train/eval flags, dtypes and devices."""
        cell, modes = self._t5.mode, self._captures.modes
        if cell.number is None:
            blocks = [m for m in self.modules() if isinstance(m, Block)]
            tensors = tuple(
                (t.dtype, t.device)
                for b in blocks
                for t in (*b._parameters.values(), *b._buffers.values())
                if t is not None
            )
            flags = (tuple(b.training for b in blocks), tensors)
            if flags not in modes:
                modes.append(flags)
            cell.number = modes.index(flags)
        return cell.number

    @torch.compiler.disable(
        reason="no captured graph of this linearized model serves this call: call the model once "
        "without torch.compile, in this train/eval mode and with arguments like these, then "
        "compile it"
    )
    @torch.inference_mode(False)
    def capture(self, args: tuple[Any, ...], kwargs: dict[str, Any], mode: int) -> Variant:
        """Trace and rewrite the model for a call that no variant serves yet.

        Raises `RefusedCallError` where the call needs attention that was rewritten to do what a
        TTT node cannot, such as to mask keys.
        """
        structure, leaves = _flatten(args, kwargs)
        with _CAPTURING:
            for variant in self._captures.variants:  # of another thread, in the meantime
                if variant.serves(structure, leaves, mode):
                    return variant
            return self._capture(args, kwargs, structure, leaves)

    def _capture(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], structure: Any, leaves: list[Any]
    ) -> Variant:
        captures = self._captures
        config = resolve(captures.config, args, kwargs)
        seconds = 0.0 if config.gives_layout else config.capture_seconds
        captured, view, plans, tried = self._look(config, args, kwargs, seconds)
        if captured.dynamic and _lacks_proofs(plans):
            again = self._look(config, args, kwargs, 0.0)
            if not _lacks_proofs(again[2]):
                captured, view, plans, tried = again
                captured.note = "static sizes (with dynamic ones nothing could be proved)"
        existing = self._nodes()
        refuse_calls(view, plans, existing)
        if not self.report.sites:
            self.report.sites, self.report.patterns = [entry.site for entry in plans], tried
            self.report.capture = captured.note
        modules = rewrite(view, plans, existing)
        for key, module in modules.items():
            module.train(self.get_submodule(key.rpartition(".")[0]).training)
        self._keep_constants(captured, len(captures.variants))
        piece = distribute(captured.graph, self, modules)
        variant = Variant(
            *(structure, _constants(leaves), self._mode(), captured.guards),
            *(captured.out_spec, piece, AutocastState.devices(captured.graph)),
            frozenset(modules),
        )
        captures.variants.append(variant)
        return variant

    def _look(
        self, config: LinearizeConfig, args: tuple[Any, ...], kwargs: dict[str, Any], seconds: float
    ) -> tuple[Capture, View, list[Plan], dict[str, Tried]]:
        """Capture a call and judge its attentions; also what each pattern tried."""
        template, existing = self._t5.source, self._nodes()
        captured = self._trace(template, args, kwargs, seconds)
        view = View(captured.graph, template, captured.constants)
        tried: dict[str, Tried] = {}
        plans = plan(view, config, lambda m: m.key in existing if existing else None, tried=tried)
        return captured, view, plans, tried

    def _trace(
        self, template: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seconds: float
    ) -> Capture:
        """`capture`; once a first call was captured, a failure is about the call, not the model."""
        stand_ins: dict[int, Any] = {}
        self._bind_template(lambda tensor: _whole(tensor, stand_ins))
        try:
            return capture(template, args, kwargs, seconds)
        except CaptureError as error:
            cause = error.__cause__
            if not self.report.sites or cause is None:
                raise
            raise CaptureError(
                f"this call of {type(template).__name__} could not be captured: expected arguments "
                f"that the model takes, got {type(cause).__name__} from it: {first_line(cause)}"
            ) from cause
        finally:
            if stand_ins:
                self._bind_template(lambda tensor: tensor)

    def _nodes(self) -> dict[str, TTT]:
        return {n: m for n, m in self.named_modules() if isinstance(m, TTT)}

    def _bind_template(self, seen_as: Callable[[Any], Any]) -> None:
        """Make the original's code see this module's tensors and train/eval flags."""
        for module in self.modules():
            if isinstance(module, Block):
                source = module._t5.source
                tensors: list[tuple[Any, Any]] = [
                    (source._parameters, module._parameters),
                    (source._buffers, module._buffers),
                ]
                for theirs, ours in tensors:
                    theirs.update({n: seen_as(ours[n]) for n in theirs if n in ours})
                source.training = module.training

    def _keep_constants(self, captured: Capture, number: int) -> None:
        if not captured.constants:
            return
        mode = self._t5.mode
        if CONSTANTS not in self._modules:
            self.add_module(CONSTANTS, Block(nn.Module(), mode))
        holder = Block(nn.Module(), mode)
        self.get_submodule(CONSTANTS)._modules[f"v{number}"] = holder
        for target, value in captured.constants.items():
            name = target.rpartition(".")[2]
            if isinstance(value, torch.Tensor):
                holder.register_buffer(name, value, persistent=False)
            else:
                for node in value.graph.nodes if isinstance(value, fx.GraphModule) else ():
                    node.meta.clear()
                setattr(holder, name, value)
        for node in captured.graph.nodes:
            if node.op == "get_attr" and node.target in captured.constants:
                node.target = str(node.target).replace(".", f".v{number}.", 1)

    @property
    def linearize_config(self) -> LinearizeConfig:
        """The options that it was made with."""
        return self._captures.config

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the first floating-point parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(p.device for p in self.parameters())

    def _get_name(self) -> str:
        return f"Linearized[{self.report.model}]"


def _lacks_proofs(plans: list[Plan]) -> bool:
    """Whether nothing is rewritten, and something perhaps for sizes that could not be compared."""
    rewritten = any(entry.site.status == "rewritten" for entry in plans)
    sizes = ("grid-unknown", "cross-attention", "head-dim", "not-attention")
    return not rewritten and any(entry.site.reason in sizes for entry in plans)


def _blank() -> Linearized:
    return Linearized.__new__(Linearized)


def _with_signature(signature: Signature) -> type[Linearized]:
    """The class `Linearized` with the original's signature on `forward`.

    `inspect` reads the signature of a method off its class; torch.export and Trainer ask `inspect`.
    """
    original = Linearized.forward
    forward = types.FunctionType(
        original.__code__, original.__globals__, "forward", None, original.__closure__
    )
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    wanted = signature.signature
    forward.__signature__ = wanted.replace(parameters=[itself, *wanted.parameters.values()])  # type: ignore[attr-defined]
    forward.__doc__, forward.__qualname__ = original.__doc__, original.__qualname__
    members = {"forward": forward, "__module__": __name__, "__doc__": Linearized.__doc__}
    return type("Linearized", (Linearized,), members)


def resolve(
    config: LinearizeConfig, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LinearizeConfig:
    """The configuration with its callables of the call's arguments replaced by their values."""
    return config.called(lambda f: f(*args, **kwargs))


def _whole(tensor: Any, stand_ins: dict[int, Any]) -> Any:
    """A tensor, or for one that FSDP has split an empty one of its full size, to trace with.

    Outside the modules whose forward runs FSDP leaves only its own part of a parameter, as a
    DTensor, which does not mix with the whole ones.
    """
    split = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    if not isinstance(tensor, split):
        return tensor
    if id(tensor) not in stand_ins:
        empty = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        parameter = isinstance(tensor, nn.Parameter)
        stand_ins[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
    return stand_ins[id(tensor)]


def refuse_calls(view: View, plans: list[Plan], existing: Mapping[str, TTT]) -> None:
    """Raise where a site that has a node cannot be rewritten to that node in this call."""
    for entry in plans:
        site, node = entry.site, existing.get(entry.match.key)
        if node is None:
            continue
        if site.status != "rewritten":
            raise RefusedCallError(
                f"this call needs '{site.fqn}', which was rewritten, to do what its TTT node "
                f"cannot: {site.reason} ({site.detail}); call it as when it was linearized, or "
                f"linearize again with this call as the example"
            )
        for name, wanted in settings(view, entry).items():
            got = getattr(node, name)
            close = isinstance(got, float) and math.isclose(got, wanted, rel_tol=1e-6)
            if name in _OF_THE_CALL and got != wanted and not close:
                raise RefusedCallError(
                    f"this call needs '{site.fqn}' with {name} {wanted}, and its TTT node was made "
                    f"for {name} {got}"
                )


def _flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Argument structure and leaves, in the order of the captured graph's placeholders."""
    if not args and all(isinstance(v, (torch.Tensor, *_PLAIN)) for v in kwargs.values()):
        return tuple(kwargs), list(kwargs.values())
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return repr(spec), leaves


def _constants(leaves: list[Any]) -> tuple[Any, ...]:
    """The leaves that are not tensors, with their types: 1, 1.0 and True are different calls.

    A NaN, unequal to itself, becomes None: a call with another NaN is the same call.
    """
    return tuple(
        None if isinstance(v, torch.Tensor) else (type(v), None if _is_nan(v) else v)
        for v in leaves
    )


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


def template_of(model: nn.Module, share: bool) -> nn.Module:
    """A copy of a model whose code can be traced; its tensors are copies too, or shared.

    It has none of the model's hooks, which are for the user's data and not for a trace's; but a
    GraphModule, which is transformed and not traced, keeps them. Raises `CaptureError` where a
    model cannot be copied.
    """
    memo: dict[int, Any] = {}
    if share:
        tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
        memo = {id(t): t for t in tensors}
    try:
        template = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"expected a model that copy.deepcopy can copy; {type(model).__name__} failed with "
            f"{type(error).__name__}: {error}; a module that keeps computed tensors, as the old "
            f"torch.nn.utils.weight_norm does, needs remove_weight_norm first, or "
            f"torch.nn.utils.parametrizations"
        ) from error
    for module in () if isinstance(model, fx.GraphModule) else template.modules():
        _remove_hooks(module)
        if "_output_capturing_hooks_installed" in vars(module):
            # transformers puts its hooks for hidden states and attentions there again.
            del module._output_capturing_hooks_installed
    return template


def _remove_hooks(module: nn.Module) -> None:
    """Remove what runs around a forward, but torch's own hooks that compute a weight."""
    own = {
        key
        for key, hook in module._forward_pre_hooks.items()
        if type(hook).__module__.startswith("torch.nn.utils.")
    }
    for name, hooks in vars(module).items():
        if name.startswith(("_forward_", "_backward_")) and "hooks" in name:
            for key in [k for k in hooks if k not in own]:
                del hooks[key]
