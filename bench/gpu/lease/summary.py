"""What a lease found, for people."""

from __future__ import annotations

from collections.abc import Iterable

from ...harness.records import Records
from ...harness.results import Row, grouped

#: Measures that are told of all contenders.
TOLD = (
    *("latency", "copy bandwidth", "matrix product", "wrong cases of parity", "equal bits"),
    *("errors", "Duration", "Compute (SM) Throughput", "Memory Throughput"),
)


def wrong(records: Records) -> bool:
    """Whether anything was refused or failed."""
    return any(row.status in ("refused", "failed") for _, row in records.rows())


def ended(records: Records, step: str) -> tuple[int, int]:
    """How many items of a step ended wrong, and how many right."""
    ends = [o.end for (name, _), o in dict(records.outcomes).items() if name == step]
    return sum(end in ("refused", "failed") for end in ends), ends.count("ok")


def costliest(records: Records) -> list[str]:
    """The two kernels that took longest by themselves, as far as that was measured."""
    seconds: dict[str, float] = {}
    for step, row in records.rows():
        if step == "alone" and row.measure == "latency" and row.contender == "in use":
            if row.status == "ok" and row.value is not None:
                kernel = row.case.partition(",")[0]
                seconds[kernel] = max(seconds.get(kernel, 0.0), row.value)
    return sorted(seconds, key=seconds.__getitem__, reverse=True)[:2]


def text(records: Records, seconds: float) -> str:
    """A line for each result that matters; what is wrong first."""
    about = records.columns
    rows = records.rows()
    lines = [
        f"{about.get('device', '?')}, torch {about.get('torch')}, triton {about.get('triton')}, "
        f"commit {about.get('commit')}; {seconds:.0f} s, {len(rows)} rows",
        "",
    ]
    bad = [(step, row) for step, row in rows if row.status in ("refused", "failed")]
    lines.append(f"wrong: {len(bad) or 'nothing'}")
    lines += [f"  {step}: {_name(row)}: {row.status}: {row.detail}" for step, row in bad]
    late = [row.case for _, row in rows if row.detail.endswith("out of time")]
    lines += [f"out of time: {len(late)}: {'; '.join(late)}"] if late else []
    lines.append("")
    for step, own in _by_step(rows):
        lines.append(f"{step}: {len(own)} rows, {sum(r.status == 'ok' for r in own)} ok")
        if step not in ("compile", "alone"):
            lines += _lines(own)
        elif step == "alone":
            lines += _best(own)
    return "\n".join(lines) + "\n"


def _by_step(rows: Iterable[tuple[str, Row]]) -> list[tuple[str, list[Row]]]:
    found: dict[str, list[Row]] = {}
    for step, row in rows:
        found.setdefault(step, []).append(row)
    return list(found.items())


def _lines(rows: list[Row]) -> list[str]:
    lines = []
    for case, own in grouped(rows):
        errors = [r for r in own if r.measure == "error" and r.status == "ok" and r.value]
        said = [_absent(r) for r in own if r.status == "absent" and r.contender]
        said += [_value(r) for r in own if r.status == "ok" and _told(r)]
        if errors:
            worst = max(errors, key=lambda row: row.value or 0.0)
            said.append(f"at most {worst.value:.2g} {worst.unit} ({worst.contender})")
        lines += [f"  {case}: {'; '.join(filter(None, said))}"] if any(said) else []
    return lines


def _told(row: Row) -> bool:
    ours = row.contender.startswith("t5")
    return row.measure in TOLD or (ours and row.measure in ("speed-up", "share of roofline"))


def _absent(row: Row) -> str:
    """A rival, or a tool, that is not there."""
    return "" if row.measure == "error" else f"{row.contender}: {row.detail[:100]}"


def _best(rows: list[Row]) -> list[str]:
    """Of each kernel the settings in use and the fastest."""
    lines = []
    for case, own in grouped(rows):
        times = {r.contender: r.value for r in own if r.measure == "latency" and r.value}
        if "in use" in times:
            best = min(times, key=times.__getitem__)
            gain = times["in use"] / times[best]
            lines.append(f"  {case}: {1e6 * times['in use']:.1f} us; best {best}, {gain:.2f}x")
    return lines


def _name(row: Row) -> str:
    return ", ".join(filter(None, (row.case, row.contender, row.measure)))


def _value(row: Row) -> str:
    assert row.value is not None
    value = (
        f"{1e3 * row.value:.4g} ms" if row.unit == "s" else f"{row.value:.4g} {row.unit}".strip()
    )
    what = "" if row.measure == "latency" else f" {row.measure}"
    return f"{row.contender}{what} {value}"
