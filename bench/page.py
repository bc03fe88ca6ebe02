"""The report as one page of HTML that needs nothing else: no script, no request, light or dark."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from .tables import Table

if TYPE_CHECKING:
    from .report import Chapter, Device

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #59636e; --line: #d8dee4;
  --back: #ffffff; --band: #f6f8fa; --link: #0069b4; --good: #1a7f37; --bad: #c2410c;
  --blue: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9aa4ae; --line: #30363d;
  --back: #0d1117; --band: #161b22; --link: #58a6ff; --good: #3fb950; --bad: #f0883e;
  --blue: #56a8dc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 80rem; background: var(--back);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.7rem; } h1, h2, h3 { line-height: 1.25; text-wrap: balance; }
h2 { margin: 3rem 0 1rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { margin: 2.2rem 0 .6rem; } a { color: var(--link); }
nav ul { margin: 0; padding-left: 1.2rem; } nav ul ul { display: inline; padding: 0; }
nav ul ul li { display: inline; } nav ul ul li::before { content: " · "; color: var(--dim); }
dl { display: flex; flex-wrap: wrap; gap: .1rem 1.5rem; margin: 0; font-size: .9rem; }
dt, dd { display: inline; margin: 0; overflow-wrap: anywhere; } dt { color: var(--dim); }
.promise { margin: 1rem 0; padding: .6rem 1rem; border-left: .3rem solid var(--dim);
  background: var(--band); } .promise.good { border-color: var(--good); }
.promise.bad { border-color: var(--bad); }
.scroll { overflow-x: auto; margin: .4rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; } td small { display: block; color: var(--dim); }
th { vertical-align: bottom; background: var(--band); white-space: normal; }
th span { white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; text-align: left;
  background: var(--back); } th:first-child { background: var(--band); }
.text th, .text td { text-align: left; vertical-align: top; }
.text td:first-child, .text td:last-child { white-space: normal; min-width: 16rem;
  overflow-wrap: anywhere; }
.title { margin: 1.4rem 0 .2rem; font-weight: 600; }
.note, figcaption { color: var(--dim); font-size: .85rem; max-width: 60rem; }
figure { margin: 1.4rem 0; } figure svg { display: block; width: 100%; min-width: 36rem;
  max-width: 54rem; height: auto; } summary { cursor: pointer; color: var(--link); }
@media (max-width: 40rem) { th:first-child, td:first-child { white-space: normal;
  min-width: 8rem; max-width: 10rem; } .text td:first-child { position: static; } }
"""


def page(title: str, intro: Iterable[str], devices: Iterable[Device]) -> str:
    """The whole page. intro: paragraphs of plain text below the title."""
    devices = list(devices)
    links = "".join(
        f'<li><a href="#{device.slug}">{escape(device.name)}</a><ul>'
        + "".join(f'<li><a href="#{c.slug}">{escape(c.suite)}</a></li>' for c in device.chapters)
        + "</ul></li>"
        for device in devices
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(paragraph)}</p>" for paragraph in intro),
        f"<nav><ul>{links}</ul></nav>",
        *(_device(device) for device in devices),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _device(device: Device) -> str:
    facts = "".join(
        f"<div><dt>{escape(k)}</dt> <dd>{escape(v)}</dd></div>" for k, v in device.facts
    )
    head = f'<h2 id="{device.slug}">{escape(device.name)}</h2>\n<dl>{facts}</dl>'
    return "\n".join([head, *map(_chapter, device.chapters)])


def _chapter(chapter: Chapter) -> str:
    parts = [f'<h3 id="{chapter.slug}">{escape(chapter.suite)}</h3>']
    if chapter.promise is not None:
        verdict = {True: " good", False: " bad", None: ""}[chapter.promise.holds]
        parts.append(f'<p class="promise{verdict}">{escape(str(chapter.promise))}</p>')
    parts += [_table(table) for table in chapter.tables]
    for plot in chapter.plots:
        caption = f"<figcaption>{escape(plot.text)}</figcaption>"
        parts.append(f'<figure><div class="scroll">{plot.svg()}</div>{caption}</figure>')
    inside = [_table(table) for table in chapter.details]
    if chapter.remarks is not None:
        inside.append(_table(chapter.remarks, text=True))
    if inside:
        tables = "\n".join(inside)
        parts.append(f"<details><summary>Details</summary>\n{tables}\n</details>")
    if chapter.missing is not None:
        parts.append(_table(chapter.missing, text=True))
    return "\n".join(parts)


def _table(table: Table, text: bool = False) -> str:
    """text: cells of words, which begin at the left; else numbers, which end at the right."""
    head = "".join(f'<th scope="col">{_head(column)}</th>' for column in table.columns)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{_cell(cell, text)}</td>" for cell in row) + "</tr>"
        for row in table.rows
    )
    note = f'\n<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<p class="title">{escape(table.title)}</p>\n'
        f'<div class="scroll"><table{" class=text" if text else ""}>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>{note}"
    )


def _cell(cell: str, text: bool) -> str:
    """Quartiles stand back behind the median."""
    cell = escape(cell)
    return cell if text else re.sub(r"(\([\d.e-]+\))", r"<small>\1</small>", cell)


def _head(column: str) -> str:
    """May be broken between words, not at a hyphen."""
    return re.sub(r"\S+-\S+", r"<span>\g<0></span>", escape(column))
