"""`bench report`: every row is in it, with its unit or with the reason why it was not measured."""

import io
import re

import pytest
from rich.console import Console

from t5fx.analysis.measure import Spread
from t5fx.bench.harness import units
from t5fx.bench.harness.results import Row, write
from t5fx.bench.report import report
from t5fx.bench.report.promise import Promise
from t5fx.errors import T5Error

REASON = 'differs by <b>0.3</b> | "really" & truly'
GPU = {
    "device": "GPU <A>",
    "driver": "570.1",
    "threads": 16,
    "torch": "2.15.0",
    "date": "2025-01-02",
    "commit": "abc",
}
CPU = GPU | {"device": "CPU B", "driver": ""}


def row(contender, measure, value=None, unit="", better="", **more) -> Row:
    if isinstance(value, Spread):
        more |= {"low": value.low, "high": value.high}
        value = value.median
    if value is None:
        more = {"status": "refused", "detail": REASON} | more
    of = {"suite": "models", "case": "timm/ViT 518 px", "tokens": 1370, "batch": 1}
    of |= {"dtype": "float32", "mode": "inference", **GPU}
    own = {"contender": contender, "measure": measure, "value": value}
    return Row(**{**of, **own, "unit": unit, "better": better, **more})


def around(value: float) -> Spread:
    return Spread(0.98 * value, value, 1.02 * value)


def models(measured: float = 1.4, **more) -> list[Row]:
    """A case: latencies, speed-ups, memory and sites."""
    seconds = {"softmax, eager": 0.01, "softmax, MATH": 0.05, "softmax, FLASH": 0.02}
    rows = [row(who, "latency", around(s), "s", "lower", **more) for who, s in seconds.items()]
    speedups = {"t5, every site": 1.5, "t5, measured": measured, "attention removed": 2.0}
    for who, speedup in speedups.items():
        rows.append(row(who, "latency", around(0.02 / speedup), "s", "lower", **more))
        rows.append(row(who, "speed-up", around(speedup), "x", "higher", **more))
        rows.append(row(who, "cold compile", 30.0, "s", "lower", **more))
        rows.append(row(who, "warm compile", 3.0, "s", "lower", **more))
    rows.append(row("t5, measured", "share of bound", 0.7, "share", "higher", **more))
    rows.append(row("t5, measured", "sites", 12.0, "count", **more))
    rows.append(row("t5, measured", "sites rewritten", 9.0, "count", **more))
    rows.append(row("softmax, FLASH", "peak memory", 2.0**31, "bytes", "lower", **more))
    rows.append(row("t5, measured", "peak memory", 2.0**30, "bytes", "lower", **more))
    return rows


def peers() -> list[Row]:
    rows = []
    for tokens in (256, 1024, 4096):
        own = {"suite": "peers", "case": f"1 x 6 heads x {tokens} tokens x 64", "tokens": tokens}
        rows += [
            row("t5", "latency", around(tokens * 1e-7), "s", "lower", **own),
            row(
                "softmax", "latency", around(tokens**2 * 1e-9), "s", "lower", **own, detail="FLASH"
            ),
            row("peer", "latency", **own, status="absent", detail="pip install peer"),
        ]
    return rows


def coverage() -> list[Row]:
    own = {"suite": "coverage", "mode": "", "tokens": 0, **CPU}
    return [
        row("t5fx", measure, value, unit, case=library, **own)
        for library in ("timm", "diffusers")
        for measure, value, unit in (("models", 249.0, "count"), ("exactly right", 0.996, "share"))
    ]


@pytest.fixture
def written(tmp_path):
    """Runs it on lists of rows, a file each; returns the exit code, the text and the folder."""

    def run(*files: list[Row]):
        paths = [tmp_path / f"{index}.csv" for index in range(len(files))]
        for path, rows in zip(paths, files, strict=True):
            write(path, rows)
        console = Console(file=io.StringIO(), width=300)
        code = report.run(paths, tmp_path / "out" / "bench", console)
        return code, console.file.getvalue(), tmp_path / "out" / "bench"

    return run


class TestUnits:
    @pytest.mark.parametrize(
        ("value", "unit", "text"),
        [
            (0.0123456, "s", "12.3 ms"),
            (0.0000123456, "s", "12.3 µs"),
            (12345.6, "s", "12300 s"),
            (1e-12, "s", "0.00000100 µs"),
            (99.96, "x", "100x"),
            (0.9996, "x", "1.00x"),
            (3 * 2.0**30, "bytes", "3.00 GiB"),
            (4.4e12, "FLOP", "4.40 TFLOP"),
            (0.0042, "share", "0.420 %"),
            (123456.0, "count", "123456"),
            (0.0, "share", "0 %"),
            (1234.5, "items/s", "1230 items/s"),
            (-0.5, "share", "-50.0 %"),
        ],
    )
    def test_three_digits_never_scientific(self, value, unit, text):
        assert units.quantity(row("a", "b", value, unit)) == text

    def test_an_error_has_a_power_of_ten(self):
        assert units.quantity(row("a", "error", 3.21e-6)) == "3.2e-06"

    def test_quartiles(self):
        assert units.quantity(row("a", "b", Spread(1.4, 1.5, 2.0), "x")) == "1.50x (1.40-2.00)"


def test_main_table(written):
    code, _, out = written(models())
    assert code == 0
    (line,) = re.findall(r"^\| timm/ViT 518 px \| 1370 .*", (out / "report.md").read_text(), re.M)
    assert line.split(" | ")[2:] == [
        *("20.0 (19.6-20.4)", "FLASH"),  # not the eager one, which is no compiled softmax
        *("13.3 (13.1-13.6)", "1.50x (1.47-1.53)", "1.40x (1.37-1.43)", "9 of 12"),
        *("2.00x (1.96-2.04)", "70.0 %", "0.500x |"),
    ]


def test_plots(written):
    code, _, out = written([*models(), *models(case="timm/ViT 518 px, training", mode="training")])
    assert code == 0
    names = {"speed-up-tokens", "speed-up-cases", "compile"}
    modes = "inference", "training"
    expected = {f"gpu-a-models-{mode}-{name}.png" for mode in modes for name in names}
    assert {path.name for path in out.iterdir()} == expected | {"report.md"}
    text = (out / "report.md").read_text()
    pictures = re.findall(r"!\[(.*)\]\((.*)\)", text)
    assert {name for _, name in pictures} == expected
    assert all("Speed-up" in said or "Seconds" in said for said, _ in pictures)


def test_what_was_not_measured_is_there_with_its_reason(written):
    whole = {"status": "failed", "detail": "out of memory", "case": "timm/Big 518 px"}
    rows = [*models()[:-1], row("peer", "latency"), row("peer", "peak memory"), *peers()]
    _, _, out = written([*rows, row("", "", **whole)])
    text = (out / "report.md").read_text()
    case = "| timm/ViT 518 px | peer | latency, peak memory | refused |"
    assert rf'{case} differs by &lt;b>0.3&lt;/b> \| "really" &amp; truly |' in text
    assert "| timm/Big 518 px | all | all | failed | out of memory |" in text
    assert "| all 3 cases | peer | latency | absent | pip install peer |" in text
    (line,) = re.findall(r"^\| timm/Big 518 px \| 1370 .*", text, re.M)
    assert "failed" in line and "NaN" not in line


def test_a_section_for_each_device(written):
    _, _, out = written([*models(), *coverage()], models(1.1, **CPU))
    text = (out / "report.md").read_text()
    gpu, cpu = text.split("\n## ")[1:]
    assert gpu.startswith("GPU &lt;A>\n") and cpu.startswith("CPU B\n")
    assert "driver 570.1; threads 16; torch 2.15.0" in gpu and "driver" not in cpu
    assert "1.40x (" in gpu and "1.10x (" not in gpu and "1.10x (" in cpu
    assert cpu.index("### models") < cpu.index("### coverage")
    assert "| case | contender | models | exactly right |" in cpu
    assert "| timm | t5fx | 249 | 99.6 % |" in cpu


def test_contenders_are_columns_in_one_unit(written):
    _, _, out = written(peers())
    text = (out / "report.md").read_text()
    assert "| case | t5 | softmax |" in text
    assert "| 1 x 6 heads x 256 tokens x 64 | 25.6 µs (25.1-26.1) | 65.5 µs (64.2-66.8) |" in text
    assert "| 1 x 6 heads x 4096 tokens x 64 | 0.410 ms (0.401-0.418) | 16.8 ms (" in text
    assert "| all 3 cases | softmax | latency | FLASH |" in text
    assert [path.name for path in out.glob("*.png")] == ["gpu-a-peers-time-tokens.png"]


def test_a_later_file_counts(written):
    _, _, out = written(models(1.4), models(1.6))
    text = (out / "report.md").read_text()
    assert "1.60x (1.57-1.63)" in text and "1.40x" not in text
    assert f"{len(models())} rows of earlier files are left out" in text


def test_the_same_rows_give_the_same_files(written):
    _, _, out = written([*models(), *peers()])
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    written([*models(), *peers()])
    assert first == {path.name: path.read_bytes() for path in out.iterdir()}


def test_nothing_to_report_is_an_error(written, tmp_path):
    code, text, out = written([])
    assert code == 2 and "expected rows of results, got none" in text
    assert not out.exists()
    assert report.run([tmp_path / "no.csv"], out, Console(file=io.StringIO())) == 2


class TestPromise:
    def test_holds(self):
        promise = Promise.of([*models(0.99), *models(1.3, case="b")])
        assert promise.holds is True
        text = (
            "holds in every measured case (2); the worst is timm/ViT 518 px: 0.990x (0.970-1.01)."
        )
        assert str(promise).endswith(text)

    def test_each_violation_is_named(self, written):
        rows = [*models(0.97), *models(0.985, case="b"), *models(0.5, case="c, training")]
        promise = Promise.of(rows)
        assert promise.holds is False
        assert [row.case for row in promise.violated] == ["c, training", "timm/ViT 518 px"]
        assert "does not hold in 2 of 3 measured cases: c, training: 0.500x" in str(promise)
        _, _, out = written(rows)
        assert str(promise) in (out / "report.md").read_text()

    def test_what_was_not_measured_does_not_hold_it(self):
        refused = [row("t5, measured", "speed-up", case="b")]
        promise = Promise.of([*models(1.3), *refused])
        assert promise.holds is None
        assert str(promise).endswith("Not measured: b.")
        assert "measured in no case" in str(Promise.of(refused))

    def test_devices_are_told_apart(self):
        text = str(Promise.of([*models(0.9), *models(0.9, **CPU)]))
        assert "ViT 518 px on GPU <A>: 0.900x" in text and "ViT 518 px on CPU B: 0.900x" in text


class TestReadme:
    def test_summary(self):
        text = report.summary([*models(), *models(0.9, **CPU), *coverage()])
        line = (
            "| timm/ViT 518 px | 1370 | 20.0 (19.6-20.4) | 14.3 (14.0-14.6) | 1.40x (1.37-1.43) |"
        )
        assert text.count(line) == 1 and text.count("| timm/ViT 518 px | 1370 |") == 2
        assert "**Speed, on GPU &lt;A>, torch 2.15.0, float32**" in text
        assert "**Speed, on CPU B, " in text
        assert text.count("Medians, first to third quartile") == 1
        assert text.endswith("Measured on 2025-01-02, at commit abc.\n")

    def test_summary_without_models(self):
        with pytest.raises(T5Error, match="expected rows of the suite models"):
            report.summary(coverage())

    def test_fill(self, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text("a\n<!-- bench -->\nold\n<!-- /bench -->\nz\n")
        for _ in range(2):
            report.fill(readme, "bench", "| new |\n")
            assert readme.read_text() == "a\n<!-- bench -->\n| new |\n<!-- /bench -->\nz\n"

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "<!-- bench -->",
            "<!-- /bench --> <!-- bench -->",
            2 * "<!-- bench --><!-- /bench -->",
        ],
    )
    def test_fill_without_markers(self, text, tmp_path):
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(T5Error, match="<!-- bench --> and later <!-- /bench -->"):
            report.fill(tmp_path / "README.md", "bench", "new")
        assert (tmp_path / "README.md").read_text() == text
