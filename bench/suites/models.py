"""Whole models, end to end: softmax with every SDPA backend against t5, compiled against compiled.

The rival is the fastest softmax of the row; "attention removed", where each attention that t5 can
rewrite returns its values and costs nothing, is the most that any replacement could reach.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_inductor_cache
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import t5fx
from t5fx.analysis.clock import clock
from t5fx.analysis.measure import Spread
from t5fx.errors import NothingRewrittenWarning, T5Error, UntrainedWarning
from t5fx.frontend.copies import duplicate
from t5fx.kernels import TTT
from t5fx.reports import Report
from t5fx.runtime.lookup import nodes_in
from t5fx.training.students import instead

from ..harness.results import Experiment, Row
from .zoo import Built, Entry, entries

#: Seconds that the rounds of one contender may take, and how many there are.
BUDGET, ROUNDS = 2.5, (3, 30)

#: The least relative difference of outputs with softmax and with TTT that a check can build on.
MATTERS = 0.2

#: Seconds: what takes longer needs no more than one call to warm up.
WARM = 0.5

#: Largest relative difference (Euclidean) of a compiled from the eager output, and of gradients,
#: which were rounded more often.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
GRADIENT_TOLERANCE = TOLERANCE | {torch.bfloat16: 0.15}

EVERY, MEASURED, REMOVED = "t5, every site", "t5, measured", "attention removed"
TRITON = "t5, every site, Triton"
EAGER, DEFAULT = "softmax, eager", "softmax, default"


def experiments(small: bool = False) -> list[Experiment]:
    """One for each model and size."""
    gpu = torch.cuda.is_available() and not small
    dtype = torch.bfloat16 if gpu else torch.float32
    return [
        Experiment(
            "models",
            entry.name,
            lambda experiment, entry=entry: Bench(entry, experiment, gpu, dtype).rows(),
            dtype=str(dtype).removeprefix("torch."),
            mode="training" if entry.training else "inference",
        )
        for entry in entries(gpu, small)
    ]


@dataclass
class Contender:
    """Something to call, what calling it once gave, and what else is known of it.

    inside: the context in which it is compiled and called. first: seconds of a call, about.
    seconds: of each round.
    """

    name: str
    call: Callable[[], Any]
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext
    facts: dict[str, Any] = field(default_factory=dict)
    first: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def once(self) -> Any:
        with self.inside():
            return self.call()


class Bench:
    """One model at one size."""

    def __init__(self, entry: Entry, experiment: Experiment, gpu: bool, dtype: torch.dtype) -> None:
        self.entry, self.experiment, self.dtype = entry, experiment, dtype
        self.device = torch.device("cuda" if gpu else "cpu")
        # A CPU's default is FLASH; a GPU's depends on versions and shapes.
        flash, math = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
        more = SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
        self.backends = [None, flash, *more, math] if gpu else [flash, math]
        self.gpu = gpu

    def rows(self) -> Iterator[Row]:
        """Raises `T5Error` where a compiled model does not give what the eager one does."""
        self.model, self.inputs = self._build()
        with self._surroundings():
            rest: list[Row] = []
            if self.entry.compiling:
                rest += self._compile_rows()
            torch._dynamo.reset()
            contenders = list(self._contenders(rest))
            self._time(contenders)
            yield from (self._sized(row) for row in self._report(contenders))
            yield from (self._sized(row) for row in rest)

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", (UntrainedWarning, NothingRewrittenWarning))
            stack.enter_context(torch.set_grad_enabled(self.entry.training))
            limits = {"recompile_limit": 32, "fail_on_recompile_limit_hit": True}
            stack.enter_context(torch._dynamo.config.patch(limits))
            yield

    # --- what is run ----------------------------------------------------------------------------

    def _build(self) -> Built:
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                return self.entry.build()
        finally:
            torch.set_default_dtype(default)

    def _contenders(self, rest: list[Row]) -> Iterator[Contender]:
        config = t5fx.LinearizeConfig(min_tokens=0, dynamic=False, **self.entry.options)
        linear = t5fx.linearize(
            duplicate(self.model, share=True), (), self.inputs, config=config, inplace=True
        ).train(self.entry.training)
        self.report: Report = t5fx.report(linear)
        self._make_attention_matter(linear)
        softmax, before = self._counted(self.model)
        node, after = self._counted(linear)
        eager = Contender(EAGER, self._run(self.model))
        eager.facts["FLOPs"] = before
        yield self._compiled(eager, softmax)
        for backend in self.backends:
            name = DEFAULT
            if backend is not None:
                name = f"softmax, {backend.name.removesuffix('_ATTENTION')}"
            contender = Contender(name, self._run(self._inductor(self.model)))
            contender.inside = partial(_only, backend)
            yield from self._tried(contender, softmax, rest)  # the others can still be the best
        ours = {**self.entry.options, "min_tokens": 0}
        contender = Contender(EVERY, self._run(self._t5(ours)))
        yield self._compiled(contender, node)
        contender.facts |= {"FLOPs": after, "sites": len(self.report.sites)}
        contender.facts["sites rewritten"] = len(self.report.rewritten)
        if self.gpu:
            contender = Contender(TRITON, self._run(self._t5({**ours, "impl": "triton"})))
            yield from self._tried(contender, node, rest)
        measuring = {**self.entry.options, "policy": "measure"}
        chosen = t5fx.LinearizeConfig(**measuring, dynamic=False)
        found = t5fx.explain(self.model, (), self.inputs, config=chosen)
        if found.rewritten:
            partly = t5fx.linearize(
                duplicate(self.model, share=True), (), self.inputs, config=chosen, inplace=True
            )
            wanted = self._run(partly.train(self.entry.training))()
        else:
            wanted = softmax
        contender = Contender(MEASURED, self._run(self._t5(measuring)))
        contender.facts |= {"sites": len(found.sites), "sites rewritten": len(found.rewritten)}
        yield self._compiled(contender, wanted)
        removed = _without_attention(linear)
        contender = Contender(REMOVED, self._run(self._inductor(removed)))
        yield self._compiled(contender, self._run(removed)())

    def _tried(self, contender: Contender, wanted: Any, rest: list[Row]) -> Iterator[Contender]:
        """It, compiled, or in ``rest`` a row that says why not."""
        try:
            yield self._compiled(contender, wanted)
        except (T5Error, RuntimeError) as error:
            rest.append(self.experiment.raised(contender.name, error))

    @torch.no_grad()
    def _make_attention_matter(self, linear: nn.Module) -> None:
        """Enlarge the weights around attention until its output shows in the model's.

        With random weights it can be a hundredth of the residual stream, and no check of the output
        would see it go wrong.
        """
        owners = {site.fqn for site in self.report.rewritten}
        modules = [self.model.get_submodule(name) for name in sorted(owners)]
        matrices = {p for module in modules for p in module.parameters() if p.dim() == 2}
        nodes = nodes_in(linear)
        for _ in range(6):
            with instead(nodes, dict.fromkeys(nodes, _Removed().forward)):
                without = linear(**self.inputs)
            difference = relative_difference(without, self.model(**self.inputs))
            if difference >= MATTERS:
                return
            for matrix in matrices:
                matrix *= 1.5
        raise T5Error(
            f"expected a model whose output depends on its attention, got one whose output is, to "
            f"{difference:.2g}, the same with attention as without: no check could tell right "
            f"from wrong"
        )

    def _inductor(self, model: nn.Module) -> nn.Module:
        """A backend of its own: Dynamo runs one compiled code for all that are equal."""

        def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
            return torch._inductor.compile(gm, example_inputs)

        return torch.compile(model, backend=backend, dynamic=False)

    def _t5(self, options: dict[str, Any]) -> nn.Module:
        return torch.compile(self.model, backend="t5", dynamic=False, options=options)

    def _run(self, function: Callable[..., Any]) -> Callable[[], Any]:
        """A forward pass, or a forward and a backward pass whose gradients are the result."""
        if not self.entry.training:
            return lambda: function(**self.inputs)
        parameters = list(self.model.parameters())

        def step() -> list[Tensor]:
            # Squares would not do: those of a layer norm's outputs always have the same sum.
            loss = sum(
                (t.float() * _probe(t.shape, t.device)).mean()
                for t in _tensors(function(**self.inputs))
            )
            assert isinstance(loss, Tensor)
            loss.backward()
            found = [p.grad for p in parameters if p.grad is not None]
            for parameter in parameters:
                parameter.grad = None
            return [loss.detach(), *found]

        return step

    def _compiled(self, contender: Contender, wanted: Any) -> Contender:
        """Compiles it, checks it against the eager result, counts graphs and memory."""
        counters.clear()
        if contender.name != EAGER:
            contender.facts["error"] = self._check(contender.name, contender.once(), wanted)
        graphs = counters["stats"]["unique_graphs"]
        breaks = sum(counters["graph_break"].values())
        start = time.perf_counter()
        contender.facts["peak memory"] = peak_memory(contender.once, self.device)
        contender.first = time.perf_counter() - start
        recompiles = counters["stats"]["unique_graphs"] - graphs
        if contender.name != EAGER:
            counted = {"graphs": graphs, "graph breaks": breaks, "recompiles": recompiles}
            contender.facts |= counted
        return contender

    def _compile_times(self) -> dict[str, dict[str, float]]:
        """Seconds of a first call with empty caches, and again with what that left in them."""
        found = {}
        torch.compile(torch.sin)(torch.ones(3, device=self.device))  # imports the compiler
        every = {**self.entry.options, "min_tokens": 0}
        default = torch.compile(self.model, dynamic=False)
        for name, compiled in ((DEFAULT, default), (EVERY, self._t5(every))):
            call = self._run(compiled)
            with fresh_inductor_cache():
                torch._dynamo.reset()
                cold = clock(call, self.device)
                torch._dynamo.reset()
                found[name] = {"cold compile": cold, "warm compile": clock(call, self.device)}
        return found

    def _check(self, name: str, got: Any, wanted: Any) -> float:
        error = relative_difference(got, wanted)
        most = (GRADIENT_TOLERANCE if self.entry.training else TOLERANCE)[self.dtype]
        if not error <= most:  # a NaN too
            raise T5Error(
                f"expected the compiled result of '{name}' within {most:g} of the eager one, got "
                f"a relative difference of {error:.3g}; what is wrong is not timed"
            )
        return error

    def _counted(self, model: nn.Module) -> tuple[Any, int]:
        """What it gives, and the FLOPs of it."""
        with FlopCounterMode(display=False) as counter:
            result = self._run(model)()
        return result, counter.get_total_flops()

    # --- how it is timed ------------------------------------------------------------------------

    def _time(self, contenders: Sequence[Contender]) -> None:
        """Rounds in which every contender has its turn, in an order that turns; slow ones fewer."""
        counts, repeats = [], []
        for contender in contenders:
            once = contender.first
            if once < WARM:
                once = min(self._clock(contender) for _ in range(2))
            counts.append(int(min(max(BUDGET / once, ROUNDS[0]), ROUNDS[1])))
            repeats.append(max(1, int(1e-2 / once)))
        for index in range(max(counts)):
            order = list(zip(contenders, counts, repeats, strict=True))
            for contender, count, repeat in order if index % 2 else order[::-1]:
                if index < count:
                    contender.seconds.append(self._clock(contender, repeat))

    def _clock(self, contender: Contender, repeats: int = 1) -> float:
        with contender.inside():
            return clock(contender.call, self.device, repeats)

    # --- what is said ---------------------------------------------------------------------------

    def _report(self, contenders: Sequence[Contender]) -> Iterator[Row]:
        rivals = [c for c in contenders if c.name.startswith("softmax") and c.name != EAGER]
        if not rivals:
            raise T5Error("expected one SDPA backend at least that compiles, got none")
        best = min(rivals, key=lambda c: Spread.of(c.seconds).median)
        removed = next((c for c in contenders if c.name == REMOVED), None)
        for contender in contenders:
            row = self._rower(contender)
            latency = Spread.of(contender.seconds)
            yield row("latency", latency, unit="s", better="lower")
            per_item = [self._items() / s for s in contender.seconds]
            yield row("throughput", Spread.of(per_item), unit="items/s", better="higher")
            ratio = _ratio(best, contender)
            # A faster softmax is no regression of the others that are held against it.
            better = "higher" if contender.name in (EVERY, TRITON, MEASURED) else ""
            yield row("speed-up", ratio, unit="x", better=better, detail=f"over {best.name}")
            if better and removed:
                share = _ratio(removed, contender)
                yield row("share of bound", share, unit="share", better="higher")
            for measure, value in contender.facts.items():
                yield row(measure, float(value), **UNITS.get(measure, {}), rounds=1)

    def _compile_rows(self) -> Iterator[Row]:
        times = self._compile_times()
        for name, facts in times.items():
            for measure, seconds in facts.items():
                yield self.experiment.row(name, measure, seconds, unit="s", better="lower")
        ratio = times[EVERY]["cold compile"] / times[DEFAULT]["cold compile"]
        about = {"unit": "x", "detail": f"over {DEFAULT}"}  # one run: nothing to compare runs by
        yield self.experiment.row(EVERY, "compile over softmax", ratio, **about)

    def _rower(self, contender: Contender) -> Callable[..., Row]:
        def row(measure: str, value: Any, **more: Any) -> Row:
            more.setdefault("rounds", len(contender.seconds))
            return self.experiment.row(contender.name, measure, value, **more)

        return row

    def _items(self) -> int:
        return next(t.shape[0] for t in self.inputs.values() if t.dim() > 1)

    def _sized(self, row: Row) -> Row:
        tokens = max((site.num_tokens or 0 for site in self.report.sites), default=0)
        return replace(row, tokens=tokens, batch=self._items())


UNITS = {
    "peak memory": {"unit": "bytes", "better": "lower"},
    "FLOPs": {"unit": "FLOP", "better": "lower"},
    "graph breaks": {"better": "lower"},
    "recompiles": {"better": "lower"},
}


def _ratio(first: Contender, other: Contender) -> Spread:
    """The first one's time over the other's, round by round."""
    return Spread.of([a / b for a, b in zip(first.seconds, other.seconds, strict=False)])


@contextmanager
def _only(backend: SDPBackend | None) -> Iterator[None]:
    """One SDPA backend; torch's caches of compiled code do not know which one it was."""
    if backend is None:
        yield
        return
    tag = torch.compiler.config.cache_key_tag + backend.name
    with sdpa_kernel(backend), torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        yield


class _Removed(nn.Module):
    """Attention that costs nothing: its output is its values."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return v


def _without_attention(linear: nn.Module) -> nn.Module:
    for name, module in list(linear.named_modules()):
        if isinstance(module, TTT):
            linear.set_submodule(name, _Removed())
    return linear


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


@functools.cache
def _probe(shape: torch.Size, device: torch.device) -> Tensor:
    """The weights of a loss."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def relative_difference(got: Any, wanted: Any) -> float:
    """Euclidean, over all tensors of two results together."""
    found, exact = (torch.cat([t.double().flatten() for t in _tensors(r)]) for r in (got, wanted))
    return ((found - exact).norm() / exact.norm()).item()


def peak_memory(call: Callable[[], Any], device: torch.device) -> float:
    """The most bytes that a call has allocated at one time, above what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
