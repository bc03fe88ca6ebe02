"""What was found and what was done: `Site`, `Report` and their table."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from t5fx.tables import as_text, table

#: The closed set of reasons for which a site is left as it is, each with its general meaning.
REASONS = {
    "cross-attention": "queries, keys and values come from different token sets",
    "causal": "each token may see only earlier ones",
    "masked": "a mask hides some keys",
    "additive-bias": "a bias is added to the scores",
    "probabilities-used": "the attention probabilities are read elsewhere or changed",
    "grid-unknown": "the spatial grid of the tokens could not be proved",
    "scores-changed": "the scores are changed between the product and the softmax",
    "sliced": "it is computed in slices of batch and heads, each an attention of its own",
    "below-break-even": "too few tokens: softmax costs less than the node",
    "head-dim": "the size of a head is unsupported",
    "dropout-active": "dropout of the probabilities that cannot be kept",
    "excluded": "left out by the configuration",
    "graph-break": "a graph break of torch.compile separates it from its tokens",
    "not-attention": "looks like attention over tokens, and is not",
}


@dataclass
class Site:
    """One softmax over scores, found in the graph.

    Numbers are those at the example's sizes.

    Attributes:
        fqn: name of the module that owns the attention.
        status: "rewritten" or "skipped".
        reason: why it was skipped, one of `t5fx.reports.REASONS`; None where it was rewritten.
        detail: a sentence on the reason, on a mask of keys, or on what was measured.
        pattern: name of the pattern that recognised it.
        num_tokens: N.
        num_heads: H.
        head_dim: D, the channels of a query's head.
        prefix: tokens before the grid.
        grid: sizes of its axes; None where they are unknown or were not judged.
        suffix: tokens after the grid.
        flops_before: of softmax; a multiply-add is two; forward, the whole batch, all heads.
        flops_after: of the node, counted alike.
        seconds_before: of softmax, where both forms were measured (policy "measure").
        seconds_after: of the node.
        impl: what computes the node on the example's device: "triton", "c++", "written-out" (one
            operator in PyTorch with its own backward) or "reference"; None where no node was
            considered.
        impl_reason: why it is that one.
    """

    fqn: str
    status: str
    reason: str | None = None
    detail: str = ""
    pattern: str = ""
    num_tokens: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    prefix: int | None = None
    grid: tuple[int, ...] | None = None
    suffix: int | None = None
    flops_before: int | None = None
    flops_after: int | None = None
    seconds_before: float | None = None
    seconds_after: float | None = None
    impl: str | None = None
    impl_reason: str = ""

    def __post_init__(self) -> None:
        if self.reason is not None and self.reason not in REASONS:
            raise ValueError(f"reason: expected one of {', '.join(REASONS)}, got {self.reason!r}")


@dataclass
class Tried:
    """What one pattern did on a graph: anchors tried, of them bound to an attention, refused with a
    reason, and how long that took."""

    anchors: int = 0
    bound: int = 0
    refused: int = 0
    seconds: float = 0.0


@dataclass
class Report:
    """The sites of a model and how it was captured.

    Attributes:
        model: name of its class.
        sites: in the order of the graph.
        capture: whether sizes are dynamic or static, and why.
        trainable: number of trainable parameters.
        total: number of all parameters.
        opaque: operators of other libraries that may be attention, where no site was found.
        patterns: what each pattern did, by its name.
    """

    model: str
    sites: list[Site] = field(default_factory=list)
    capture: str = ""
    trainable: int | None = None
    total: int | None = None
    opaque: list[str] = field(default_factory=list)
    patterns: dict[str, Tried] = field(default_factory=dict)

    @property
    def rewritten(self) -> list[Site]:
        """The sites that were or would be rewritten."""
        return [site for site in self.sites if site.status == "rewritten"]

    @property
    def skipped(self) -> list[Site]:
        """The sites that stay softmax."""
        return [site for site in self.sites if site.status == "skipped"]

    def counts(self) -> dict[str, int]:
        """Number of skipped sites by reason."""
        return dict(Counter(site.reason or "" for site in self.skipped))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    @property
    def parameters(self) -> str:
        """PEFT's line on parameters."""
        if self.trainable is None or not self.total:
            return ""
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
            f"trainable%: {100 * self.trainable / self.total:.4f}"
        )

    def __str__(self) -> str:
        return as_text(self, width=120)

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.text import Text

        verb = f"{len(self.rewritten)} of {len(self.sites)} attention sites rewritten"
        numbers = ("tokens", "heads x dim", "prefix + grid + suffix", "GFLOP", "to")
        rows = [
            (
                site.fqn or "(root)",
                site.pattern,
                _show(site.num_tokens),
                f"{_show(site.num_heads)} x {_show(site.head_dim)}",
                _layout(site),
                _giga(site.flops_before),
                _giga(site.flops_after),
                _status(site),
            )
            for site in self.sites
        ]
        columns = ("site", "pattern", *numbers, "status")
        yield table(f"{self.model}: {verb}", columns, rows, numbers=numbers, whole=True)
        for reason, count in self.counts().items():
            details = list(dict.fromkeys(s.detail for s in self.skipped if s.reason == reason))
            more = f" (and {len(details) - 1} other details)" if len(details) > 1 else ""
            sentence = details[0] or REASONS[reason]
            yield Text(f"{reason} ({count}): {sentence}{more}")
        measured = Counter(s.detail for s in self.rewritten if s.detail)
        for detail, count in measured.items():
            yield Text(f"rewritten ({count}): {detail}")
        chosen = Counter((s.impl, s.impl_reason) for s in self.rewritten if s.impl is not None)
        for (impl, reason), count in chosen.items():
            yield Text(f"impl {impl} ({count}): {reason}")
        used = {name: tried for name, tried in self.patterns.items() if tried.anchors}
        if used:
            parts = (
                f"{name} {tried.bound} of {tried.anchors} ({1e3 * tried.seconds:.0f} ms)"
                for name, tried in used.items()
            )
            yield Text(f"candidates that were attention, by pattern: {', '.join(parts)}")
        if self.opaque:
            yield Text(f"found none{_opaque(self.opaque)}")
        if self.capture:
            yield Text(f"capture: {self.capture}")
        if self.parameters:
            yield Text(self.parameters)


def _show(value: int | None) -> str:
    return "?" if value is None else f"{value}"


def _status(site: Site) -> str:
    more = site.reason or site.impl
    return site.status if more is None else f"{site.status}: {more}"


def _layout(site: Site) -> str:
    if site.grid is None:
        return "?"
    return f"{_show(site.prefix)} + {'x'.join(map(str, site.grid))} + {_show(site.suffix)}"


def _giga(flops: int | None) -> str:
    return "?" if flops is None else f"{flops / 1e9:.3g}"


#: What would change the outcome, for reasons where a setting can.
_SETTINGS = {
    "below-break-even": "LinearizeConfig(min_tokens=0), or an example with more tokens",
    "grid-unknown": "LinearizeConfig(grid=..., prefix=...), or locality='none'",
    "excluded": "`include` and `exclude`",
    "sliced": "attention at once, which needs no more memory where it is rewritten (in diffusers "
    "pipe.disable_attention_slicing(), or AttnProcessor2_0)",
    "graph-break": "take the break away (TORCH_LOGS=graph_breaks shows all), or t5fx.linearize the "
    "model first, which reads it whole",
}


def _opaque(names: list[str]) -> str:
    if not names:
        return ""
    return (
        f", but {', '.join(names)}, which may be attention that another library computes: switch "
        f"to PyTorch's own scaled_dot_product_attention for the conversion (transformers: "
        f"set_attn_implementation('sdpa'); diffusers: set_attention_backend('native'))"
    )


def why_nothing(report: Report) -> str:
    """Why no site was rewritten: counts by reason, the nearest miss, and what would change it."""
    if not report.sites:
        return (
            f"expected at least one attention in {report.model}, found none: no "
            f"scaled_dot_product_attention and no softmax between two products in its graph"
            + _opaque(report.opaque)
        )
    counts = ", ".join(f"{n} x {reason}" for reason, n in report.counts().items())
    ranked = sorted(report.skipped, key=lambda s: s.reason not in _SETTINGS)
    nearest = ranked[0]
    setting = _SETTINGS.get(nearest.reason or "", "")
    if nearest.seconds_before is not None:
        setting = "policy='flops' with min_tokens=0, or an example with more tokens"
    advice = f"; to change that: {setting}" if setting else ""
    return (
        f"rewrote none of {len(report.sites)} attention sites of {report.model} ({counts}). "
        f"Nearest: '{nearest.fqn}', {nearest.reason}: {nearest.detail}{advice}"
    )
