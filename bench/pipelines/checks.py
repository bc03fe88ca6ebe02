"""What is measured of a family: one function a column."""

from __future__ import annotations

import copy
import inspect
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import t5fx
from t5fx.frontend.capture import first_line
from t5fx.runtime.lookup import nodes_in

from .family import Setup, families

#: Largest difference of outputs that are to be equal, as a share of the largest value.
SAME = 1e-3
#: The same in half precision.
HALF = 0.1


class Failed(AssertionError):
    """A pipeline did something else than it has to."""


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference as a share of the largest value; infinite where one is not finite."""
    if got.shape != wanted.shape:
        raise Failed(f"expected outputs of shape {tuple(wanted.shape)}, got {tuple(got.shape)}")
    found = float((got - wanted).abs().max() / wanted.abs().max())
    return found if found == found else float("inf")


def same(what: str, got: torch.Tensor, wanted: torch.Tensor, limit: float = SAME) -> float:
    """Their difference, where it is within the limit; raises `Failed` otherwise."""
    found = difference(got, wanted)
    if not found <= limit:
        raise Failed(f"{what}: expected equal outputs, got a difference of {found:.2g}")
    return found


def trained(model: nn.Module) -> nn.Module:
    """Gives the nodes parameters of which the outputs depend on the grid."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".t5." in f".{name}":
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


class Family:
    """A family's pipeline with its converted model, made on first use."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.setup = self.fresh()
        self.original = self.setup.model
        #: Without near attention, which is all but exact on so few tokens.
        self.config = t5fx.LinearizeConfig(
            min_tokens=0, neighborhood=0, coarse=0, **self.setup.config
        )
        self._converted: nn.Module | None = None

    @property
    def converted(self) -> nn.Module:
        """The model that was converted with the pipeline's first call."""
        if self._converted is None:
            self._converted = self.convert(self.setup)
        return self._converted

    def fresh(self) -> Setup:
        """The pipeline anew, with the same weights."""
        torch.manual_seed(0)
        return families()[self.name]()

    def convert(self, setup: Setup, *size: Any, **more: Any) -> nn.Module:
        """The model of a pipeline, converted with the first call that this makes of it."""
        call = t5fx.example_inputs(setup.model, lambda: setup.run(*size, **more))
        return trained(t5fx.linearize(setup.model, *call, config=self.config))

    def run(self, model: nn.Module, *size: Any, **more: Any) -> torch.Tensor:
        """What the pipeline gives with that model in it."""
        self.setup.model = model
        try:
            return self.setup.run(*size, **more)
        finally:
            self.setup.model = self.original

    @property
    def calls(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Of the pipeline that is compiled: guided at every size, then without guidance."""
        yield from (((size,), {}) for size in self.setup.sizes or (None,))
        yield (), self.setup.plain


def explained(family: Family) -> dict[str, Any]:
    """What `t5fx.explain` says of the pipeline's first call."""
    call = t5fx.example_inputs(family.original, family.setup.run)
    report = t5fx.explain(family.original, *call, config=family.config)
    kept = Counter(site.reason for site in report.skipped)
    details = {site.reason: site.detail for site in report.skipped}
    return {
        "rewritten": len(report.rewritten),
        "sites": len(report.sites),
        "kept": ", ".join(f"{n} {reason}" for reason, n in kept.items()),
        "why": "; ".join(f"{reason}: {detail}" for reason, detail in details.items() if detail),
    }


def sizes(family: Family) -> str:
    """Converted once, the pipeline runs at every size as if it had been converted for it."""
    chosen = family.setup.sizes or (None,)
    with ran(family.converted) as counts:
        outputs = [family.run(family.converted, size) for size in chosen]
    idle = [name for name, count in counts.items() if not count]
    if idle:
        raise Failed(f"expected every node to run, {idle[0]!r} did not")
    softmax = family.run(family.original, chosen[0])
    if difference(outputs[0], softmax) < 10 * SAME:
        raise Failed("expected other outputs than those of softmax, got the same")
    found = 0.0
    if len(chosen) > 1:
        other = family.convert(family.setup, chosen[-1])
        found = same("the last size", outputs[-1], family.run(other, chosen[-1]))
    again = same("the first size again", family.run(family.converted, chosen[0]), outputs[0])
    with t5fx.softmax(family.converted):
        same("softmax", family.run(family.converted, chosen[0]), softmax)
    return f"{len(chosen)} sizes, {max(found, again):.0e}"


@contextmanager
def ran(model: nn.Module) -> Iterator[Counter[str]]:
    """Counts the calls of each node."""
    counts = Counter(dict.fromkeys(nodes_in(model), 0))
    handles = []
    for name, node in nodes_in(model).items():

        def note(_module: nn.Module, _args: Any, _out: Any, name: str = name) -> None:
            counts[name] += 1

        handles.append(node.register_forward_hook(note))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def guidance(family: Family) -> str:
    """Without guidance, and for two prompts: batches of other sizes than the example's."""
    calls = (family.setup.plain, family.setup.two, family.setup.plain | family.setup.two)
    found = 0.0
    for about in calls:
        softmax = family.run(family.original, **about)
        if difference(family.run(family.converted, **about), softmax) < 10 * SAME:
            raise Failed("expected other outputs than those of softmax, got the same")
        with t5fx.softmax(family.converted):
            found = max(found, same("softmax", family.run(family.converted, **about), softmax))
    return f"{found:.0e}"


def timesteps(family: Family) -> str:
    """Two items of a batch at time steps of their own, against both at the one and the other."""
    about = family.setup.plain | family.setup.two
    run = lambda: family.setup.run(**about)  # noqa: E731
    args, named = t5fx.example_inputs(family.original, run)
    kwargs = inspect.signature(family.original.forward).bind(*args, **named).arguments
    name = next(n for n in ("timestep", "t") if n in kwargs)
    given = kwargs[name]
    if not isinstance(given, torch.Tensor) or given.dim() == 0:
        given = torch.as_tensor(given).expand(2)
    other = torch.where(given == 0, 0.5, given.float() / 2).to(given.dtype)  # some count from 0
    outputs = []
    for steps in ((given, other), (given, given), (other, other)):
        step = torch.stack([each[i] for i, each in enumerate(steps)])
        with torch.no_grad():
            found = family.converted(**kwargs | {name: step, "return_dict": False})[0]
        outputs.append([x.float() for x in found])
    mixed, first, second = outputs
    if difference(second[0], first[0]) < 1e-6:
        raise Failed("expected outputs that depend on the time step, got the same")
    found = max(same("first item", mixed[0], first[0]), same("second", mixed[1], second[1]))
    return f"{found:.0e}"


def compiled(family: Family) -> dict[str, Any]:
    """Compiled in place, equal to converted, with as many compilations as Inductor alone.

    Inductor generates no code of its own here, which would take most of the time.
    """
    from torch._dynamo.utils import counters

    quick = {"fallback_by_default": True}

    def graphs(backend: str, **options: Any) -> tuple[int, list[torch.Tensor], nn.Module]:
        torch._dynamo.reset()
        counters.clear()
        setup, original = family.setup, family.original
        setup.model = model = copy.deepcopy(original)
        model.compile(backend=backend, **options)
        try:
            outputs = [setup.run(*size, **more) for size, more in family.calls]
        finally:
            setup.model = original
        return counters["stats"]["unique_graphs"], outputs, model

    wanted = [family.run(family.converted, *size, **more) for size, more in family.calls]
    options = {"adapter": family.converted, "inductor": quick}
    ours, outputs, model = graphs("t5", options=options)
    theirs, _, _ = graphs("inductor", options=quick)
    torch._dynamo.reset()
    found = max(same("compiled", *pair) for pair in zip(outputs, wanted, strict=True))
    rewritten = len(t5fx.adapter(model).nodes())
    if rewritten != len(nodes_in(family.converted)):
        raise Failed(f"expected {len(nodes_in(family.converted))} nodes, got {rewritten}")
    return {"compiled": f"{found:.0e}", "graphs": ours, "inductor": theirs}


def lora(family: Family) -> str:
    """A LoRA that is loaded before the conversion, after it, and unloaded."""
    before = family.fresh()
    if not (hasattr(before.pipe, "load_lora_weights") or hasattr(before.model, "add_adapter")):
        return "-"
    without = family.run(family.converted)
    weights = _lora(before.model)
    _load(before, weights)
    before.model = family.convert(before)
    first = before.run()
    if difference(first, without) < 10 * SAME:
        raise Failed("expected a LoRA to change the outputs, they are the same")
    after = family.fresh()
    after.model = copy.deepcopy(family.converted)
    _load(after, weights)
    found = same("loaded after", after.run(), first)
    for setup in (before, after):
        if hasattr(setup.pipe, "unload_lora_weights"):
            setup.pipe.unload_lora_weights()
        else:
            setup.model.delete_adapters("default_0")
        same("unloaded", setup.run(), without)
    return f"{found:.0e}"


def _lora(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of rank two, for every projection to queries and values."""
    generator = torch.Generator().manual_seed(5)
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.search(r"\.(to_q|to_v|to_qkv_mlp_proj)$", name):
            for side, shape in (
                ("lora_A", (2, module.in_features)),
                ("lora_B", (module.out_features, 2)),
            ):
                weight = torch.randn(shape, generator=generator)
                found[f"{name}.{side}.weight"] = weight
    return found


def _load(setup: Setup, weights: dict[str, torch.Tensor]) -> None:
    if hasattr(setup.pipe, "load_lora_weights"):
        setup.pipe.load_lora_weights({f"{setup.part}.{n}": w for n, w in weights.items()})
    else:
        setup.model.load_lora_adapter(weights, prefix=None, adapter_name="default_0")


def offload(family: Family) -> str:
    """`enable_model_cpu_offload`, whose hooks move each component when it is called."""
    setup = family.fresh()
    setup.model = copy.deepcopy(family.converted)
    wanted = setup.run()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setup.pipe.enable_model_cpu_offload(device=device)
    found = same("offloaded", setup.run(), wanted, SAME if device == "cpu" else HALF)
    return f"{device}, {found:.0e}"


def half(family: Family, dtype: torch.dtype) -> str:
    """The pipeline in half precision, against the same in float32; softmax's own difference."""
    found = []
    for model in (family.converted, family.original):
        wanted = family.run(model)
        setup = family.fresh()
        setup.model = copy.deepcopy(model)
        setup.pipe.to(dtype)
        setup.call = {n: _cast(v, dtype) for n, v in setup.call.items()}
        found.append(difference(setup.run(), wanted))
    ours, softmax = found
    if not ours <= max(HALF, 3 * softmax):
        raise Failed(f"expected a difference of about {softmax:.1g}, got {ours:.1g}")
    return f"{ours:.0e} ({softmax:.0e})"


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_cast(one, dtype) for one in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def saved(family: Family) -> str:
    """`pipe.save_pretrained`, its class's `from_pretrained`, and the nodes by ours."""
    setup = family.fresh()
    setup.model = family.converted
    wanted = setup.run()
    with tempfile.TemporaryDirectory() as folder:
        setup.pipe.save_pretrained(folder)
        if not list((Path(folder) / setup.part).glob("*.safetensors")):
            raise Failed(f"expected weights in the folder {setup.part}, got none")
        missing = [name for name, part in setup.pipe.components.items() if part is None]
        setup.pipe = type(setup.pipe).from_pretrained(folder, **dict.fromkeys(missing))
        setup.pipe.set_progress_bar_config(disable=True)
        # Callables are not saved: they are given again.
        config = family.config if family.config.has_callables else None
        setup.model = t5fx.from_pretrained(
            folder, setup.model.eval(), subfolder=setup.part, config=config
        )
    found = same("loaded", setup.run(), wanted)
    return f"{found:.0e}"


#: The checks of a converted pipeline, by column; the one that takes longest is last.
CHECKS: dict[str, Callable[[Family], Any]] = {
    "converted": sizes,
    "guidance": guidance,
    "timesteps": timesteps,
    "lora": lora,
    "offload": offload,
    "bfloat16": lambda family: half(family, torch.bfloat16),
    "float16": lambda family: half(family, torch.float16),
    "saved": saved,
    "compiled": compiled,
}


def message(error: BaseException) -> str:
    """One line on an error, with its type unless it is a check's own."""
    kind = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
    line = re.sub(r"/\S*/site-packages/", "", first_line(error))  # the same on every machine
    return f"{kind}{line}"
