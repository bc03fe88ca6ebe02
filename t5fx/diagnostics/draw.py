"""The pictures of a diagnosis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t5fx.diagnostics.places import Layout
from t5fx.diagnostics.result import SiteDiagnosis
from t5fx.errors import T5Error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, INK = "#0072B2", "#333333"

#: The side of a map in inches, and of it the gap between queries.
SIDE, GAP = 1.9, 0.08

#: The most sites whose names are written along an axis, instead of their numbers.
NAMED = 16

#: Attention is drawn in multiples of 1/N, up to this many.
MOST = 100.0


def draw_key_shift(sites: Sequence[SiteDiagnosis], model: str) -> Figure:
    """The key shift of every head as a dot, the mean of a site as a line.

    Raises `T5Error` without matplotlib.
    """
    figure = _figure(8.0, 4.4)
    axes = figure.subplots()
    places = [index for index, site in enumerate(sites) for _ in site.key_shift]
    shifts = [shift for site in sites for shift in site.key_shift]
    axes.scatter(places, shifts, s=22, color=BLUE, alpha=0.35, linewidths=0, label="one head")
    means = [sum(site.key_shift) / len(site.key_shift) for site in sites]
    axes.plot(range(len(sites)), means, "o-", color=BLUE, label="mean of the heads")
    tokens = [site.layout.tokens for site in sites if site.layout is not None]
    independent = [count**-0.5 for count in tokens]
    label = "keys without a shift: 1/√N"
    axes.plot(range(len(sites)), independent, ":", color=INK, label=label)
    names = [site.key.removesuffix(".t5") for site in sites]
    if len(sites) <= NAMED:
        axes.set_xticks(range(len(sites)), names, rotation=35, ha="right", fontsize=9)
    else:
        axes.set_xlabel("attention site, in the order in which they run")
    axes.set(ylim=(0, 1.03), ylabel="key shift  |mean k| / mean |k|")
    axes.set_title(f"{model}: how far keys are shifted", fontsize=12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_maps(
    sites: Sequence[SiteDiagnosis],
    model: str,
    image: Tensor | None,
    heads: int | Sequence[int] | None,
) -> Figure:
    """A row a site, two maps a query; one colour scale for all, linear up to 1/N and then log.

    Raises `T5Error` without matplotlib, without sites, for an image of another shape, and where a
    site has no such head.
    """
    if not sites:
        raise T5Error("expected sites with maps, got none: diagnose(..., sites=...) chooses them")
    if image is not None and (image.dim() != 3 or image.shape[0] != 3):
        raise T5Error(f"image: expected [3, H, W] in 0 to 1, got a shape {tuple(image.shape)}")
    rows = [_values(site, heads) for site in sites]
    count = max(len(row) for row in rows)
    widths = [1.0, GAP] * (image is not None) + [1.0, 1.0, GAP] * count
    figure = _figure(SIDE * sum(widths) + 1.0, (SIDE + 0.66) * len(sites) + 0.6)
    spec = figure.add_gridspec(len(sites), len(widths), width_ratios=widths)
    scale = _scale(signed=min(float(map.min()) for row in rows for map in row) < -0.1)
    drawn: list[Axes] = []
    for index, (site, row) in enumerate(zip(sites, rows, strict=True)):
        assert site.maps is not None and site.layout is not None
        column = 0
        if image is not None:
            drawn.append(figure.add_subplot(spec[index, 0]))
            _show_image(drawn[-1], image, site.layout, site.maps.queries)
            column = 2
        left = drawn[-1] if image is not None else None
        for query, pair in zip(site.maps.queries, row, strict=True):
            for offset, name in enumerate(("softmax", "TTT node")):
                drawn.append(figure.add_subplot(spec[index, column + offset]))
                shown = _show_map(drawn[-1], pair[offset], site.layout, query, scale)
                drawn[-1].set_title(f"{name}\nfrom {_name(query, site.layout)}", fontsize=9)
                left = left or drawn[-1]
            column += 3
        assert left is not None
        left.set_ylabel(site.key.removesuffix(".t5"), fontsize=10)
    bar = figure.colorbar(
        shown, ax=drawn, location="right", aspect=35, pad=0.01, extend="max", format="{x:g}"
    )
    bar.set_label("attention, in multiples of 1/N", fontsize=10)
    which = "mean of the heads" if heads is None else f"head {heads}"
    figure.suptitle(f"{model}: where queries look, {which}", fontsize=13)
    return figure


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    try:
        # The class, not pyplot: it needs no display and leaves the caller's figures alone.
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise T5Error(
            "drawing a diagnosis: expected the package matplotlib, got none: pip install matplotlib"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _values(site: SiteDiagnosis, heads: int | Sequence[int] | None) -> list[Tensor]:
    """For each query softmax and node, [2, N], in multiples of 1/N; the mean over some heads."""
    assert site.maps is not None
    both = torch.stack([site.maps.softmax, site.maps.node])  # [2, H, Q, N]
    if heads is not None:
        chosen = [heads] if isinstance(heads, int) else list(heads)
        if not chosen or not all(0 <= head < both.shape[1] for head in chosen):
            raise T5Error(
                f"heads: expected some of 0 to {both.shape[1] - 1} for '{site.key}', got {heads!r}"
            )
        both = both[:, chosen]
    return list((both.shape[-1] * both.mean(1)).unbind(1))


def _scale(signed: bool) -> dict[str, Any]:
    """How numbers become colours: from 0, or where there are negative ones on both sides of it."""
    from matplotlib.colors import SymLogNorm

    norm = SymLogNorm(1, vmin=-MOST if signed else 0, vmax=MOST, base=10)
    return {"norm": norm, "cmap": "RdBu_r" if signed else "magma"}


def _name(query: int, layout: Layout) -> str:
    place = layout.place(query)
    if place is None:
        return (
            f"prefix token {query}" if layout.grid and query < layout.prefix else f"token {query}"
        )
    axes = ("frame", "row", "column")[-len(place) :] if len(place) > 1 else ("place",)
    return ", ".join(f"{axis} {index}" for axis, index in zip(axes, place, strict=True))


def _show_map(axis: Axes, values: Tensor, layout: Layout, query: int, scale: Any) -> Any:
    """The grid's part of values [N] as an image, and in words how much goes where."""
    before, on_grid, after = values.split((layout.prefix, layout.cells, layout.suffix))
    picture, mark = (on_grid, layout.place(query)) if layout.grid else (before, (query,))
    shown = axis.imshow(_flat(picture, layout.grid).numpy(), interpolation="nearest", **scale)
    axis.set(xticks=[], yticks=[])
    if len(layout.grid) <= 1:
        axis.set_aspect("auto")
    if mark is not None:
        _mark(axis, *_flat_place(mark, layout.grid))
    if layout.grid:
        parts = {"grid": on_grid, "prefix": before, "suffix": after}
        words = [f"{n} {float(p.sum()) / layout.tokens:.2f}" for n, p in parts.items() if len(p)]
        axis.set_xlabel(", ".join(words), fontsize=9)
    return shown


def _flat(values: Tensor, grid: Sequence[int]) -> Tensor:
    """A grid's values as rows and columns: a line of one axis, the frames of three side by side."""
    if len(grid) == 2:
        return values.view(*grid)
    if len(grid) == 3:
        return torch.cat(list(values.view(*grid)), dim=1)
    return values.view(1, -1)


def _flat_place(place: Sequence[int], grid: Sequence[int]) -> tuple[int, int]:
    """Where `_flat` puts a token: (row, column)."""
    if len(grid) == 3:
        return place[1], place[0] * grid[2] + place[2]
    return (0, place[0]) if len(place) == 1 else (place[0], place[1])


def _show_image(axis: Axes, image: Tensor, layout: Layout, queries: Sequence[int]) -> None:
    """The image, with the queries of a grid of two axes."""
    axis.imshow(image.detach().cpu().permute(1, 2, 0).clamp(0, 1).numpy())
    axis.set(xticks=[], yticks=[])
    if len(layout.grid) != 2:
        return
    for query in queries:
        place = layout.place(query)
        if place is not None:
            sizes = zip(place, layout.grid, image.shape[1:], strict=True)
            _mark(axis, *((index + 0.5) * pixels / cells for index, cells, pixels in sizes))


def _mark(axis: Axes, row: float, column: float) -> None:
    axis.plot(column, row, "+", color="white", markersize=11, markeredgewidth=3.5)
    axis.plot(column, row, "+", color="black", markersize=9, markeredgewidth=1.5)
