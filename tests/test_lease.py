"""The lease of a GPU, rehearsed on a CPU: every kind of row, and nothing lost to faults."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from t5fx.bench import app, assembler, results, tune
from t5fx.bench.lease import compiling, exactness, plan, records, run, summary, tools
from t5fx.bench.lease.__main__ import main
from t5fx.bench.lease.plan import Item, Step
from t5fx.bench.results import Experiment, Row
from t5fx.errors import T5Error
from t5fx.kernels.triton_kernels import configs

WORKER = (sys.executable, str(Path(__file__).with_name("lease_worker.py")))
COLUMNS = {"device": "GPU", "driver": "1", "torch": "2", "triton": "3", "code": "a"}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(found, step):
    return [line for line in found if line.get("step") == step]


# --- the whole ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The folder of a tiny rehearsal."""
    out = tmp_path_factory.mktemp("lease")
    assert main(["--rehearse", "tiny", "--out", str(out)]) == 0
    return out


def test_every_step_of_a_rehearsal_leaves_rows(rehearsed):
    found = lines(rehearsed / "rows.jsonl")
    steps = [step.name for step in plan.plan("tiny")]
    assert {step.name for step in plan.plan()} >= set(steps)
    for step in ["machine", "compile", *steps]:
        if step == "parity, newer assembler" and assembler.newest() is None:
            continue
        own = said(found, step)
        ends = [line["end"] for line in own if line["kind"] == "end"]
        assert ends and set(ends) == {"ok"}, step
        assert any(line["kind"] == "row" for line in own), step
    rows = records.read(rehearsed / "rows.jsonl")
    assert {row.status for row in rows} == {"ok", "absent"}
    assert {row.suite for row in rows} == {"lease", "kernels", "models"}
    assert {row.contender for row in rows} >= set(configs.HALF) | {"t5fx", "t5, every site"}
    assert all(row.torch == torch.__version__.partition("+")[0] and row.code for row in rows)
    unavailable = {row.contender for row in rows if row.detail.startswith("unavailable")}
    assert unavailable == {"ncu", "compute-sanitizer"}
    text = (rehearsed / "summary.txt").read_text()
    assert "wrong: nothing" in text and all(f"\n{step}: " in text for step in ("headline", "alone"))
    files = list(rehearsed.iterdir())
    assert len(files) <= 8 and all(file.is_file() for file in files)


def test_a_second_call_skips_what_is_done(rehearsed, capsys):
    before = lines(rehearsed / "rows.jsonl")
    assert main(["--rehearse", "tiny", "--out", str(rehearsed), "--steps", "parity", "ncu"]) == 0
    after = lines(rehearsed / "rows.jsonl")[len(before) :]
    assert {line["step"] for line in after if "step" in line} <= {"compile"}
    assert "parity: there already" in capsys.readouterr().out


def test_the_report_shows_a_lease(rehearsed, tmp_path, capsys):
    assert app.main(["report", str(rehearsed), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    for text in ("query_output", "1 x 1 heads x 16 tokens x 16, forward", "timm/tiny, rehearsal"):
        assert text in page
    assert len(results.read(rehearsed / "rows.jsonl")) > 50


# --- faults -------------------------------------------------------------------------------------


def lease(tmp_path, monkeypatch, steps, fault="", seconds=300.0):
    """A lease of some steps alone; its exit code and its lines."""
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setattr(run, "plan", lambda rehearse: steps)
    monkeypatch.setattr(run, "compiling", lambda rehearse, architecture: [[], []])
    options = run.Options(tmp_path, seconds, "tiny", command=WORKER)
    code = run.run(options, Console(file=io.StringIO()))
    return code, lines(tmp_path / "rows.jsonl")


def graph(name, seconds=60.0):
    """A quick item."""
    return Item(name, "machine.ceilings", {}, seconds)


def test_a_wrong_kernel_is_told_and_the_run_goes_on(tmp_path, monkeypatch):
    first, *_ = plan.parity("tiny")
    steps = [first, Step("after", (graph("after"),), 60)]
    code, found = lease(tmp_path, monkeypatch, steps, "wrong w2'")
    assert code == 1
    (row,) = [r for r in records.read(tmp_path / "rows.jsonl") if r.status == "refused"]
    assert row.contender == "inner_gradient"
    assert "first wrong tensor is w2', of inner_gradient" in row.detail
    assert [line["end"] for line in said(found, "after") if line["kind"] == "end"] == ["ok"]
    assert "refused" in (tmp_path / "summary.txt").read_text().partition("machine:")[0]


def test_an_item_that_hangs_is_killed_and_one_that_dies_is_told(tmp_path, monkeypatch):
    names = ("one", "two", "three")
    for fault, why in (("hang two", "took more than"), ("die two", "SIGSEGV")):
        out = tmp_path / fault
        steps = [Step("some", tuple(graph(n, 2.0 if n == "two" else 60) for n in names), 60)]
        begun = time.monotonic()
        code, found = lease(out, monkeypatch, steps, fault)
        assert code == 1 and time.monotonic() - begun < 60
        ends = {x["item"]: x["end"] for x in said(found, "some") if x["kind"] == "end"}
        assert ends == {"one": "ok", "two": "failed", "three": "ok"}
        (row,) = [r for r in records.read(out / "rows.jsonl") if r.status == "failed"]
        assert row.case == "two" and why in row.detail
        # Without the fault a second call does what failed, and that alone.
        code, again = lease(out, monkeypatch, steps)
        assert code == 0
        assert {x["item"] for x in said(again[len(found) :], "some")} == {"two"}


def test_what_does_not_fit_is_out_of_time_and_what_does_runs(tmp_path, monkeypatch):
    steps = [
        Step("large", (graph("large"),), 1000, least=900),
        Step("slow", (graph("slow", 500), graph("next")), 3, least=1),
        Step("small", (graph("small"),), 60, least=1),
    ]
    code, found = lease(tmp_path, monkeypatch, steps, "hang slow")
    ends = {x["item"]: x["end"] for x in found if x["kind"] == "end"}
    late = dict.fromkeys(("large", "slow", "next"), "out of time")
    assert ends == {"machine": "ok", "small": "ok"} | late
    assert code == 0  # nothing was wrong
    text = (tmp_path / "summary.txt").read_text()
    assert "out of time: 3: large; slow; next" in text
    code, again = lease(tmp_path, monkeypatch, [Step("large", (graph("large"),), 60)])
    assert [x["end"] for x in said(again, "large") if x["kind"] == "end"] == ["out of time", "ok"]


def test_a_run_that_is_killed_midway_is_taken_up_again(tmp_path):
    """By a signal that asks nobody; what was done stays done, and its workers end too."""
    command = [sys.executable, "-m", "t5fx.bench.lease", "--rehearse", "tiny", "--out", tmp_path]
    steps = ["--steps", "parity", "ncu"]
    child = subprocess.Popen([*command, *steps], stdout=subprocess.DEVNULL, start_new_session=True)
    path = tmp_path / "rows.jsonl"
    ended = '"kind":"end","step":"machine"'
    until = time.monotonic() + 120
    while not (path.exists() and ended in path.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    child.kill()
    child.wait()
    before = path.read_text()
    assert ended in before and '"step":"ncu"' not in before
    path.write_text(before + '{"kind":"row","step":"par')  # a line that was cut off, too
    if sys.platform == "linux":
        workers = [p for p in Path("/proc").glob("[0-9]*/environ") if _is_of(p, child.pid)]
        until = time.monotonic() + 20
        while any(p.exists() and _alive(p) for p in workers) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(p.exists() and _alive(p) for p in workers)
    assert main([*map(str, command[3:]), *steps]) == 0
    after = path.read_text().splitlines()[len(before.splitlines()) :]
    found = [json.loads(line) for line in after if line.endswith("}")]
    assert not said(found, "machine")
    assert [x["end"] for x in said(found, "ncu") if x["kind"] == "end"] == ["ok"]


def _is_of(environ, pid):
    try:
        return f"T5FX_LEASE_PARENT={pid}".encode() in environ.read_bytes()
    except OSError:
        return False


def _alive(environ):
    try:
        return "\nState:\tZ" not in environ.with_name("status").read_text()
    except OSError:
        return False


def test_without_a_gpu_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["--out", str(tmp_path)]) == 2
    assert "expected a CUDA GPU, got none; --rehearse" in " ".join(capsys.readouterr().out.split())


# --- its parts ----------------------------------------------------------------------------------


def test_rows_of_another_code_do_not_count(tmp_path):
    path = tmp_path / "rows.jsonl"
    for code in "ab":
        kept = records.Records(path)
        kept.start(COLUMNS | {"code": code})
        assert not kept.outcome("step", "item").done
        kept.begin("step", "item")
        row = Row("lease", "item", 0, 1, "", "", "who", "latency", value=1.0)
        kept.row("step", "item", records.columns_of(row))
        kept.end("step", "item", "ok", 1.0)
        kept.close()
    assert [row.code for row in records.read(path)] == ["b"]
    kept = records.Records(path)
    kept.start(COLUMNS | {"code": "a"})
    assert kept.outcome("step", "item").done


def test_a_later_attempt_that_fails_leaves_what_an_earlier_one_measured(tmp_path):
    kept = records.Records(tmp_path / "rows.jsonl")
    kept.start(COLUMNS)

    def attempt(end, **values):
        kept.begin("step", "item")
        for contender, value in values.items():
            status = "failed" if value is None else "ok"
            row = Row("lease", "item", 0, 1, "", "", contender, "latency", value=value, status=status)
            kept.row("step", "item", records.columns_of(row))
        kept.end("step", "item", end, 1.0)
        return {row.contender: row.value for _, row in kept.rows()}

    assert attempt("failed", softmax=1.0, t5=None) == {"softmax": 1.0, "t5": None}
    assert attempt("failed", t5=None) == {"softmax": 1.0, "t5": None}
    assert attempt("ok", t5=2.0) == {"t5": 2.0}


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"kind":"row","step":"a","item":"b","row":{}}\n')
    with pytest.raises(T5Error, match="expected the lines of a lease"):
        records.read(path)


def test_every_kernel_has_a_tensor_of_its_own():
    assert set(exactness.KERNELS.values()) == set(configs.HALF)
    assert exactness.kernel_of("w2'") == "inner_gradient"
    assert exactness.kernel_of("dconv_k.bias") == "convolution_gradient"


def test_the_plan_is_in_the_order_of_worth_and_fits():
    steps = plan.plan()
    names = [step.name for step in steps]
    order = ["parity", "widths", "headline", "alone", "inductor", "model", "ncu", "sanitizer", "long"]
    assert [name for name in names if name in order] == order
    first = steps[: names.index("long")]
    planned = sum(step.seconds for step in first) + run.MACHINE.seconds / 4 + run.COMPILE_SECONDS
    assert planned <= 650  # a budget is the most that a step may take, not what it takes
    for step in steps:
        assert len({item.name for item in step.items}) == len(step.items), step.name
    (alone,) = [step for step in steps if step.name == "alone"]
    assert {item.arguments["kernel"] for item in alone.items} == set(configs.HALF)


def test_kernels_are_compiled_as_a_launch_would(tmp_path):
    """In a process without a GPU; an assembler that does not exist is told."""
    code = (
        "from t5fx.bench.lease import compiling, worker\n"
        "kind = {'products': 'bfloat16', 'dim': 16, 'architecture': 'sm_90', 'kernel': 'prepare'}\n"
        "for row in compiling.case(worker.Context(), 'case', **kind):\n"
        "    print(row.status, row.contender, row.detail)\n"
    )

    def compiled(**more):
        child = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **more},
            capture_output=True,
            text=True,
        )
        assert child.returncode == 0, child.stderr
        return child.stdout

    assert compiled().startswith("ok Triton seconds: prepare")
    kernels = list(tmp_path.glob("*/prepare.cubin"))
    assert len(kernels) == 1
    compiled()
    assert list(tmp_path.glob("*/prepare.cubin")) == kernels
    newer = assembler.newest()
    if newer is not None:
        compiled(TRITON_PTXAS_PATH=newer.path)
        assert len(list(tmp_path.glob("*/prepare.cubin"))) == 2


def test_the_target_has_what_a_launch_asks_for():
    target = compiling.Target("sm_100")
    assert target.get_current_target().arch == 100


@pytest.mark.parametrize(
    ("wrong", "chosen"), [((0, 0), "own"), ((1, 0), "newer"), ((1, 1), "own"), ((2, 1), "newer")]
)
def test_the_assembler_that_holds_is_taken(wrong, chosen, tmp_path):
    own, newer = (assembler.Assembler(n, (13, i)) for i, n in enumerate(("own", "newer")))
    one = run.Lease(run.Options(tmp_path), Console(file=io.StringIO()))
    one.own, one.newer = own, newer
    one.records.start(COLUMNS)
    for step, count in zip(("parity", "parity, newer assembler"), wrong, strict=True):
        for i in range(count):
            one.records.begin(step, str(i))
            one.records.end(step, str(i), "refused", 0.0)
    one.choose()
    assert one.chosen.path == chosen
    rows = [row for _, row in one.records.rows()]
    assert [row.value for row in rows] == list(map(float, wrong))
    assert [("goes on" in row.detail) for row in rows] == [chosen == "own", chosen == "newer"]
    assert one.environment(one.chosen)["TRITON_PTXAS_PATH"] == chosen


def test_assemblers_at_hand(tmp_path, monkeypatch):
    mine = assembler.own()
    assert mine is not None and mine.version >= (12, 8)

    def program(version):
        path = tmp_path / f"ptxas-{version}"
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 99, V{version}'\n")
        path.chmod(0o755)
        return str(path)

    monkeypatch.setenv(assembler.VARIABLE, program("99.1.2"))
    newest = assembler.newest()
    assert newest is not None and newest.version == (99, 1, 2) and str(newest) == "ptxas 99.1.2"
    monkeypatch.setenv(assembler.VARIABLE, program("11.0.1"))
    other = assembler.newest()
    assert other is None or other.version > mine.version
    assert assembler.newest(program("11.0.1")).version == (11, 0, 1)
    assert assembler.found(tmp_path / "nothing") is None
    assert assembler.found(__file__) is None


@pytest.mark.parametrize(
    ("triton", "version", "most"),
    [("3.6.0", "13.0.1", 1), ("3.9.0", "12.8.93", 1), ("3.9.0", "12.9.86", 4)],
)
def test_compilers_with_reports_get_no_pipeline(triton, version, most, monkeypatch):
    monkeypatch.setattr(tune.triton, "__version__", triton)
    used = assembler.Assembler("ptxas", tuple(map(int, version.split("."))))
    monkeypatch.setattr(tune.assembler, "found", lambda path: used)
    tune.most_stages.cache_clear()
    try:
        stages = {c.stages for c in tune.neighbours(configs.Config(64, 64, 4, 1, 2))}
        assert max(stages) == min(most, 2)
    finally:
        tune.most_stages.cache_clear()


PROFILE = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","inner_gradient","(132, 1, 1)","GPU Speed Of Light Throughput","Duration","us","1,234.5"
"0","7","inner_gradient","(132, 1, 1)","Occupancy","Achieved Occupancy","%","12.5"
"0","7","inner_gradient","(132, 1, 1)","Occupancy","Something","%","1"
"1","7","inner_gradient","(64, 1, 1)","GPU Speed Of Light Throughput","Duration","us","7"
"""


def tool_experiment():
    return Experiment("lease", "tool", lambda experiment: [])


def test_a_profile_is_read():
    rows = list(tools.profiled(tool_experiment(), PROFILE))
    assert [(r.contender, r.measure, r.value, r.unit) for r in rows] == [
        ("inner_gradient, launch 1", "Duration", 1234.5, "us"),
        ("inner_gradient, launch 1", "Achieved Occupancy", 12.5, "%"),
        ("inner_gradient, launch 2", "Duration", 7.0, "us"),
    ]
    refused = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n"
    assert not list(tools.profiled(tool_experiment(), refused))
    assert "ERR_NVGPUCTRPERM" in tools.reason(tools.Ran(1, refused))


@pytest.mark.parametrize(
    ("output", "code", "status", "detail"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "ok", ""),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "ok", ""),
        (
            "========= Invalid __global__ read of size 2 bytes\n========= ERROR SUMMARY: 3 errors",
            9,
            "refused",
            "3 errors, exit code 9: Invalid __global__ read",
        ),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors)", 9, "refused", "2 errors"),
        ("========= Device not supported\n========= ERROR SUMMARY: 1 error", 1, "absent", "Device"),
        ("Traceback: no module", 1, "absent", "unavailable: Traceback"),
    ],
)
def test_what_a_checker_says(output, code, status, detail):
    row = tools.checked(tool_experiment(), tools.Ran(code, output))
    assert row.status == status and detail in row.detail


def test_the_costliest_kernels_are_watched(tmp_path):
    kept = records.Records(tmp_path / "rows.jsonl")
    kept.start(COLUMNS)
    for kernel, seconds in (("a", 1.0), ("b", 3.0), ("c", 2.0)):
        kept.begin("alone", kernel)
        for contender, value in (("in use", seconds), ("warps 8", 9.0)):
            row = Row("lease", f"{kernel}, D = 64", 0, 1, "", "", contender, "latency", value=value)
            kept.row("alone", kernel, records.columns_of(row))
    assert summary.costliest(kept) == ["b", "c"]


def test_a_signal_that_asks_leaves_a_summary(tmp_path):
    command = [sys.executable, "-m", "t5fx.bench.lease", "--rehearse", "tiny", "--out", tmp_path]
    child = subprocess.Popen([*command, "--steps", "ncu"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()  # the first step
    child.send_signal(signal.SIGTERM)
    child.stdout.read()
    assert child.wait(timeout=60) == 1
    assert "rows" in (tmp_path / "summary.txt").read_text()
