"""The lease of a GPU, rehearsed on a CPU: every kind of row, and nothing lost to faults."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from rich.console import Console

from t5fx.bench.gpu import assembler, tune
from t5fx.bench.gpu.lease import compiling, exactness, plan, run, summary, tools
from t5fx.bench.gpu.lease.__main__ import main
from t5fx.bench.gpu.lease.plan import Item, Step
from t5fx.bench.harness import records, results
from t5fx.bench.harness.results import Experiment, Row
from t5fx.errors import T5Error
from t5fx.kernels.triton_kernels import configs
from t5fx_command import main as command

WRONG = (sys.executable, str(Path(__file__).with_name("lease_worker.py")))
FAKE = (sys.executable, str(Path(__file__).with_name("lease_fake.py")))
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
    with mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": str(out.with_name("cache"))}):
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
    assert {line["kind"] for line in after} == {"run"}
    assert "parity: there already" in capsys.readouterr().out


def test_the_report_shows_a_lease(rehearsed, tmp_path, capsys):
    assert command(["bench", "report", str(rehearsed), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    for text in ("query_output", "1 x 1 heads x 16 tokens x 16, forward", "timm/tiny, rehearsal"):
        assert text in page
    assert len(results.read(rehearsed / "rows.jsonl")) > 50


# --- faults -------------------------------------------------------------------------------------


def lease(out, monkeypatch, steps, fault="", command=FAKE):
    """A lease of some steps alone; its exit code, and its lines by step and item."""
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setattr(run, "plan", lambda rehearse: steps)
    monkeypatch.setattr(run, "compiling", lambda rehearse, architecture: [[], []])
    path = out / "rows.jsonl"
    begun = len(path.read_text().splitlines()) if path.exists() else 0
    options = run.Options(out, rehearse="tiny", command=command)
    code = run.run(options, Console(file=io.StringIO()))
    found = [json.loads(line) for line in path.read_text().splitlines()[begun:]]
    return code, {x["item"]: x["end"] for x in found if x["kind"] == "end"}


def item(name, seconds=60.0):
    return Item(name, "machine.ceilings", {}, seconds)


def test_a_wrong_kernel_is_told_and_the_run_goes_on(tmp_path, monkeypatch):
    first, *_ = plan.parity("tiny")
    code, ends = lease(tmp_path, monkeypatch, [first, Step("b", (item("b"),), 60)], command=WRONG)
    assert code == 1
    assert list(ends.values()) == ["ok", "refused", "ok"]
    rows = [r for r in records.read(tmp_path / "rows.jsonl") if r.status == "refused"]
    told = {row.contender: row.detail for row in rows}
    assert "w2': " in told["inner_gradient"] and "prepare" not in told
    assert all("first wrong tensor is w2', of inner_gradient" in why for why in told.values())
    assert "refused: w2'" in (tmp_path / "summary.txt").read_text().partition("machine:")[0]


@pytest.mark.parametrize(("fault", "why"), [("hang", "took more than 2 s"), ("die", "SIGSEGV")])
def test_an_item_that_does_not_end_costs_no_other(fault, why, tmp_path, monkeypatch):
    steps = [Step("some", (item("one"), item("two", 0.5), item("three")), 60)]
    begun = time.monotonic()
    code, ends = lease(tmp_path, monkeypatch, steps, f"{fault} two")
    assert code == 1 and time.monotonic() - begun < 60
    assert ends == {"machine": "ok", "one": "ok", "two": "failed", "three": "ok"}
    rows = records.read(tmp_path / "rows.jsonl")
    (row,) = [r for r in rows if r.status == "failed"]
    assert row.case == "two" and why in row.detail
    assert [r.case for r in rows if r.measure == "latency"] == ["machine", "one", "two", "three"]
    # Without the fault a second call does what failed, and that alone.
    assert lease(tmp_path, monkeypatch, steps) == (0, {"two": "ok"})


def test_what_does_not_fit_is_out_of_time_and_what_does_runs(tmp_path, monkeypatch):
    steps = [
        Step("large", (item("large"),), 1000, least=900),
        Step("slow", (item("slow", 500), item("next")), 0.5, least=0.1),
        Step("small", (item("small"),), 60, least=1),
    ]
    code, ends = lease(tmp_path, monkeypatch, steps, "hang slow")
    late = dict.fromkeys(("large", "slow", "next"), "out of time")
    assert ends == {"machine": "ok", "small": "ok"} | late
    assert code == 0  # nothing was wrong
    text = (tmp_path / "summary.txt").read_text()
    assert "out of time: 3: large; slow; next" in text
    steps[0] = Step("large", (item("large"),), 60)
    assert lease(tmp_path, monkeypatch, steps[:1]) == (0, {"large": "ok"})


#: A lease of one step whose item "two" hangs.
DRIVER = """
import sys
from pathlib import Path
from unittest import mock
from rich.console import Console
from t5fx.bench.gpu.lease import run
from t5fx.bench.gpu.lease.plan import Item, Step
items = tuple(Item(name, "", {}, 500.0) for name in ("one", "two"))
run.plan = lambda rehearse: [Step("some", items, 500)]
run.compiling = lambda rehearse, architecture: [[], []]
run.run(run.Options(Path(sys.argv[1]), rehearse="tiny", command=tuple(sys.argv[2:])), Console())
"""


def test_a_run_that_is_killed_midway_is_taken_up_again(tmp_path, monkeypatch):
    """By a signal that asks nobody; what was done stays done, and its workers end too."""
    monkeypatch.setenv("FAULT", "hang two")
    child = subprocess.Popen([sys.executable, "-c", DRIVER, tmp_path, *FAKE])
    path = tmp_path / "rows.jsonl"
    until = time.monotonic() + 120
    while not (path.exists() and '"item":"two"' in path.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    child.kill()
    child.wait()
    with path.open("a") as file:
        file.write('{"kind":"row","step":"so')  # a line that was cut off, too
    steps = [Step("some", (item("one"), item("two")), 60)]
    code, ends = lease(tmp_path, monkeypatch, steps)
    assert (code, ends) == (0, {"two": "ok"})
    kept = [row.case for row in records.read(path)]
    assert kept == ["machine", "one", "two"]


def test_an_end_that_is_asked_for_leaves_a_summary_and_no_worker(tmp_path, monkeypatch):
    children = []

    def ended(one, step):
        children.extend(one._children)
        raise SystemExit(1)

    monkeypatch.setattr(run.Lease, "step", ended)
    with pytest.raises(SystemExit):
        lease(tmp_path, monkeypatch, [])
    assert children and not any(child.alive for child in children)
    assert "wrong: nothing" in (tmp_path / "summary.txt").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such call")
def test_workers_end_with_the_lease():
    own = "from t5fx.bench.gpu.lease import child; child.end_with_parent(); print(1, flush=1);"
    code = (
        "import os, signal, subprocess, sys\n"
        f"own = [sys.executable, '-c', '{own} import time; time.sleep(600)']\n"
        "child = subprocess.Popen(own, stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    status = Path("/proc") / said.strip() / "status"
    until = time.monotonic() + 20
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_without_a_gpu_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "cpu")
    with pytest.raises(T5Error, match="expected a CUDA GPU, got none; --rehearse"):
        run.run(run.Options(tmp_path, command=FAKE), Console(file=io.StringIO()))


def test_a_worker_that_does_not_start_is_told(tmp_path):
    sleeps = (sys.executable, "-c", "import time; time.sleep(600)")
    options = run.Options(tmp_path, seconds=4, rehearse="tiny", command=sleeps)
    with pytest.raises(T5Error, match="a worker that starts in time, got none after 2 s of 4"):
        run.run(options, Console(file=io.StringIO()))


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
    kept.close()
    assert kept.outcome("step", "item").done


def test_a_later_attempt_that_fails_leaves_what_an_earlier_one_measured(tmp_path):
    kept = records.Records(tmp_path / "rows.jsonl")
    kept.start(COLUMNS)

    def attempt(end, **values):
        kept.begin("step", "item")
        for contender, value in values.items():
            status = "failed" if value is None else "ok"
            row = Row(
                "lease", "item", 0, 1, "", "", contender, "latency", value=value, status=status
            )
            kept.row("step", "item", records.columns_of(row))
        kept.end("step", "item", end, 1.0)
        return {row.contender: row.value for _, row in kept.rows()}

    assert attempt("failed", softmax=1.0, t5=None) == {"softmax": 1.0, "t5": None}
    assert attempt("failed", t5=None) == {"softmax": 1.0, "t5": None}
    assert attempt("ok", t5=2.0) == {"t5": 2.0}
    kept.close()


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
    order = [
        "parity",
        "widths",
        "headline",
        "alone",
        "inductor",
        "model",
        "ncu",
        "sanitizer",
        "long",
    ]
    assert [name for name in names if name in order] == order
    first = steps[: names.index("long")]
    planned = sum(step.seconds for step in first) + run.MACHINE.seconds / 4 + run.COMPILE_SECONDS
    assert planned <= 650  # a budget is the most that a step may take, not what it takes
    for step in steps:
        assert len({item.name for item in step.items}) == len(step.items), step.name
    (alone,) = [step for step in steps if step.name == "alone"]
    assert {item.arguments["kernel"] for item in alone.items} == set(configs.HALF)


def test_kernels_are_compiled_as_a_launch_would(rehearsed):
    """Into Triton's cache, whose key tells assemblers apart."""
    cache = rehearsed.with_name("cache")
    before = len(list(cache.glob("*/prepare.cubin")))
    assert before == 2  # with the settings in use and with a candidate's
    other = assembler.newest() or assembler.found(Path(assembler.own().path).with_name("ptxas"))
    if other.version == assembler.own().version:
        pytest.skip("there is one assembler only")
    code = (
        "from t5fx.bench.gpu.lease import compiling, worker\n"
        "kind = {'products': 'bfloat16', 'dim': 16, 'architecture': 'sm_90', 'kernel': 'prepare'}\n"
        "print(*compiling.case(worker.Context(), 'case', **kind))\n"
    )
    own = dict.fromkeys(assembler.VARIABLES, other.path) | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
    assert "seconds: prepare" in child.stdout, child.stderr
    assert len(list(cache.glob("*/prepare.cubin"))) == before + 1


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
        for i in range(3):
            one.records.begin(step, str(i))
            one.records.end(step, str(i), "refused" if i < count else "ok", 0.0)
    one.choose()
    one.close()
    assert one.chosen.path == chosen
    rows = [row for _, row in one.records.rows()]
    assert [row.value for row in rows] == list(map(float, wrong))
    assert [("goes on" in row.detail) for row in rows] == [chosen == "own", chosen == "newer"]
    assert one.environment(one.chosen)["TRITON_PTXAS_PATH"] == chosen


def test_assemblers_at_hand(tmp_path, monkeypatch):
    mine = assembler.own()
    assert mine is not None and mine.version >= (12, 8) and assembler.used() == mine

    def program(version):
        path = tmp_path / f"ptxas-{version}"
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 99, V{version}'\n")
        path.chmod(0o755)
        return str(path)

    monkeypatch.setenv(assembler.VARIABLES[0], program("99.1.2"))
    newest = assembler.newest()
    assert newest is not None and newest.version == (99, 1, 2) and str(newest) == "ptxas 99.1.2"
    monkeypatch.setenv(assembler.VARIABLES[0], program("11.0.1"))
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
    monkeypatch.setattr(tune.assembler, "used", lambda: used)
    tune.most_stages.cache_clear()
    try:
        stages = {c.stages for c in tune.neighbours(configs.Config(64, 64, 4, 1, 2))}
        assert max(stages) == min(most, 2)
    finally:
        tune.most_stages.cache_clear()


PROFILE = """==PROF== Connected to process 7
"ID","Kernel Name","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"
"0","inner_gradient","(132, 1, 1)","GPU Speed Of Light Throughput","Duration","us","1,234.5"
"0","inner_gradient","(132, 1, 1)","Occupancy","Achieved Occupancy","%","12.5"
"0","inner_gradient","(132, 1, 1)","Occupancy","Something","%","1"
"1","inner_gradient","(64, 1, 1)","GPU Speed Of Light Throughput","Duration","us","7"
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
    kept.close()
    assert summary.costliest(kept) == ["b", "c"]
