"""What `t5fx.diagnose` found: `Diagnosis`, its table, its files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional

from t5fx.diagnostics.places import Layout
from t5fx.errors import T5Error
from t5fx.training.nodes import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Maps:
    """Where some queries of the first batch item look, in every head.

    Attributes:
        queries: Q positions of tokens.
        softmax: attention probabilities [H, Q, N], on the CPU, in float32 or wider.
        node: the TTT node's implicit attention on the same queries, keys and values, alike.
    """

    queries: tuple[int, ...]
    softmax: Tensor
    node: Tensor

    @property
    def cosine(self) -> float:
        """How alike the two are: cosine over the tokens, mean over heads and queries, -1 to 1."""
        return float(functional.cosine_similarity(self.softmax, self.node, dim=-1).mean())


@dataclass(frozen=True)
class SiteDiagnosis:
    """One attention site.

    Attributes:
        key: of its TTT node in the (linearized) model, or the name of the module that owns an
            attention that has none.
        reason: why it was not measured, one of `t5fx.reports.REASONS` or "not run in this call";
            "" where it was.
        layout: its tokens; None where it was not measured.
        key_shift: of each head, the mean over the batch and over the runs of the site.
        maps: None where none were asked for.
    """

    key: str
    reason: str = ""
    layout: Layout | None = None
    key_shift: tuple[float, ...] = ()
    maps: Maps | None = None

    @property
    def mean_key_shift(self) -> float | None:
        """The mean over the heads."""
        return sum(self.key_shift) / len(self.key_shift) if self.key_shift else None


@dataclass(frozen=True)
class Diagnosis:
    """The attention sites of a model in one call, in the order in which they ran.

    Attributes:
        model: the name of its class.
        linearized: whether it ran with TTT nodes, or with softmax attention.
        sites: those that were not measured come last.
    """

    model: str
    linearized: bool
    sites: tuple[SiteDiagnosis, ...] = field(default_factory=tuple)

    def __getitem__(self, key: str) -> SiteDiagnosis:
        """A site by its key, or by the name of the module that owns it."""
        for site in self.sites:
            if key in (site.key, site.key.rpartition(".")[0]):
                return site
        raise T5Error(
            f"expected one of {', '.join(repr(site.key) for site in self.sites)}, got {key!r}"
        )

    @property
    def measured(self) -> tuple[SiteDiagnosis, ...]:
        return tuple(site for site in self.sites if site.key_shift)

    @property
    def mapped(self) -> tuple[SiteDiagnosis, ...]:
        return tuple(site for site in self.sites if site.maps is not None)

    def __str__(self) -> str:
        columns = ["site", "tokens", "key shift", "of heads", "softmax ~ node"]
        rows = []
        for site in self.measured:
            assert site.layout is not None
            low, high = min(site.key_shift), max(site.key_shift)
            cosine = f"{site.maps.cosine:.3f}" if site.maps is not None else ""
            row = [site.key, f"{site.layout.tokens}", f"{site.mean_key_shift:.3f}"]
            rows.append([*row, f"{low:.3f} - {high:.3f}", cosine])
        ran = "TTT nodes" if self.linearized else "softmax attention"
        lines = [table(f"{self.model}, run with its {ran}", columns, rows)]
        left_out = Counter(site.reason for site in self.sites if site.reason)
        if left_out:
            counts = ", ".join(f"{count} x {reason}" for reason, count in left_out.items())
            lines.append(f"not measured: {counts}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; of maps the queries, and how much of them goes where."""
        return {
            "model": self.model,
            "linearized": self.linearized,
            "sites": [_plain(site) for site in self.sites],
        }

    def draw_key_shift(self) -> Figure:
        """A picture of the key shift of every head, and the mean, site by site.

        Raises `T5Error` without matplotlib.
        """
        from t5fx.diagnostics.draw import draw_key_shift

        return draw_key_shift(self.measured, self.model)

    def draw_maps(
        self, image: Tensor | None = None, *, heads: int | Sequence[int] | None = None
    ) -> Figure:
        """A picture of the maps, softmax beside node, for every query of every site with maps.

        Args:
            image: [3, H, W] in 0..1, what the first batch item shows, to lay the queries over.
            heads: whose maps, one or the mean of several; None is the mean of all.

        Raises `T5Error` without matplotlib, where there are no maps or no such head, and for an
        image of another shape.
        """
        from t5fx.diagnostics.draw import draw_maps

        return draw_maps(self.mapped, self.model, image, heads)

    def save(self, folder: str | Path, *, image: Tensor | None = None) -> tuple[Path, ...]:
        """Write diagnosis.json and key_shift.png, and where there are maps maps.safetensors
        (`<key>.softmax` and `<key>.node`) and maps.png, into a folder that is made if need be.

        image: as for `draw_maps`. Returns the files. Raises `T5Error` without matplotlib, which
        only the pictures need: the other files are written then.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "diagnosis.json"]
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        files[0].write_text(text + "\n", encoding="utf-8")
        tensors = {}
        for site in self.mapped:
            assert site.maps is not None
            tensors[f"{site.key}.softmax"] = site.maps.softmax.contiguous()
            tensors[f"{site.key}.node"] = site.maps.node.contiguous()
        if tensors:
            files.append(folder / "maps.safetensors")
            save_file(tensors, str(files[-1]))
        pictures = {"key_shift.png": self.draw_key_shift}
        if tensors:
            pictures["maps.png"] = lambda: self.draw_maps(image)
        for name, draw in pictures.items():
            files.append(folder / name)
            draw().savefig(files[-1], dpi=120)
        return tuple(files)


def _plain(site: SiteDiagnosis) -> dict[str, Any]:
    found: dict[str, Any] = {"key": site.key, "reason": site.reason}
    if site.layout is not None:
        layout = site.layout
        found["num_tokens"] = layout.tokens
        found |= {"prefix": layout.prefix, "grid": list(layout.grid), "suffix": layout.suffix}
        found["key_shift"] = list(site.key_shift)
        found["mean_key_shift"] = site.mean_key_shift
    if site.maps is not None and site.layout is not None:
        maps = site.maps
        found["maps"] = {
            "queries": list(maps.queries),
            "cosine": maps.cosine,
            "softmax": _sums(maps.softmax, site.layout),
            "node": _sums(maps.node, site.layout),
        }
    return found


def _sums(rows: Tensor, layout: Layout) -> dict[str, list[list[float]]]:
    """What goes to prefix, grid and suffix, each [H][Q], of rows [H, Q, N]."""
    sizes = (layout.prefix, layout.cells, layout.suffix)
    parts = zip(("prefix", "grid", "suffix"), rows.split(sizes, dim=-1), strict=True)
    return {name: part.sum(-1).tolist() for name, part in parts}
