"""The root of the command: its help costs no import of torch, its errors are one line."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import t5fx.cli.commands
from t5fx.cli import running
from t5fx.errors import T5Error
from t5fx_command import commands, main

ROOT = Path(__file__).parent.parent.parent

LIGHT = """
import contextlib, io, json, sys
from t5fx_command import main
out, err = io.StringIO(), io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    codes = [main(["--help"]), main(["--version"]), main([]), main(["explian"])]
heavy = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "rich", "t5fx"})
print(json.dumps([codes, out.getvalue(), err.getvalue(), heavy]))
"""


@pytest.fixture
def command(monkeypatch):
    """A command `env` that does what a test says; it runs the whole of `main` but that."""

    def install(function):
        from t5fx.cli.commands import env

        monkeypatch.setattr(env, "run", function)
        return lambda *arguments: main(["env", *arguments])

    return install


def test_help_and_wrong_usage_need_no_torch():
    said = subprocess.run([sys.executable, "-c", LIGHT], check=True, capture_output=True, text=True)
    codes, out, err, heavy = json.loads(said.stdout)
    assert codes == [0, 0, 2, 2]
    assert heavy == []
    assert t5fx.__version__ in out
    assert "invalid choice: 'explian'" in err and "expected a command" in err
    for name in commands():
        assert f"\n    {name} " in out


def test_every_module_of_the_folder_is_a_command_with_a_line_of_help():
    folder = Path(t5fx.cli.commands.__file__).parent
    assert set(commands()) == {p.stem for p in folder.glob("*.py")} - {"__init__"}
    assert {"explain", "convert", "align", "distill", "search", "finetune", "bench", "env"} <= set(
        commands()
    )
    for name, text in commands().items():
        first = text.partition("\n")[0]
        assert first.endswith(".") and len(first) <= 95, name


@pytest.mark.extras  # t5fx.bench imports what the benchmarks need
@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_has_help(name, capsys):
    assert main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: t5fx {name}")
    assert commands()[name].partition("\n")[0] in said


def test_an_unknown_option_is_usage_of_the_command(capsys):
    assert main(["env", "--colour"]) == 2
    assert "t5fx env: error: unrecognized arguments: --colour" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (T5Error("expected a,\n  got b"), 1, "t5fx env: expected a, got b\n"),
        (
            ModuleNotFoundError("No module named 'timm.layers'", name="timm.layers"),
            1,
            "t5fx env: expected the package timm, found none: pip install timm\n",
        ),
        (KeyboardInterrupt(), 130, "t5fx env: interrupted\n"),
    ],
)
def test_what_fails_is_one_line_without_a_traceback(command, capsys, error, code, line):
    def fail(options):
        raise error

    assert command(fail)() == code
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", line)


def test_wrong_usage_that_a_command_finds_is_told_as_argparse_tells_it(command, capsys):
    def refuse(options):
        raise running.UsageError("--a: expected --b beside it")

    assert command(refuse)() == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: t5fx env") and "error: --a: expected --b beside it" in said


def test_a_bug_is_not_hidden(command):
    def fail(options):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        command(fail)()

    def miss(options):
        raise ModuleNotFoundError("No module named 't5fx.nothing'", name="t5fx.nothing")

    with pytest.raises(ModuleNotFoundError):
        command(miss)()


def test_json_is_alone_on_the_standard_output(command, capsys):
    def talk(options):
        print("a library says something")
        return running.Result({"answer": 42}, ("the answer is 42",), code=0)

    assert command(talk)("--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"answer": 42}
    assert said.err == "a library says something\n"
    assert command(talk)() == 0
    assert capsys.readouterr().out == "a library says something\nthe answer is 42\n"


def test_warnings_are_one_line(command, capsys):
    def shown(options):
        text = warnings.formatwarning("something is\nslow", UserWarning, "file.py", 3)
        return running.Result({"text": text}, (text,))

    before = warnings.formatwarning
    assert command(shown)() == 0
    assert "\nt5fx: warning: something is slow\n" in "\n" + capsys.readouterr().out
    assert warnings.formatwarning is before


def test_nothing_is_drawn_where_there_is_no_terminal(command, capsys):
    def work(options):
        with running.doing("working"):
            return running.Result({}, ())

    assert command(work)() == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
