"""Options come from dataclasses and functions: names, types, choices, defaults and help."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

import t5fx
from t5fx.cli.flags import add_flags, given, help_texts


@dataclass
class Sample:
    """A sample.

    count: how many,
        on two lines.
    rate, ratio: two at once, 5% or so.
    mode: which.
    """

    data: Iterable[Any]
    count: int = 3
    rate: float | None = None
    ratio: float = 1.0
    mode: Literal["a", "b"] = "a"
    quick: bool = False
    state: str | Path | None = None
    loss: str | Callable[..., Any] = "mean"
    names: Sequence[str] | None = None
    grid: tuple[int, ...] | Callable[..., Any] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    several: Sequence[Mapping[str, Any]] = ()
    hook: Callable[..., Any] | None = None
    result: int = field(default=0, init=False)


def function(model: object, *, count: int = 3, data: Iterable[Any] = ()) -> None:
    """A function.

    Args:
        model: what.
        count: as for `LinearizeConfig`, or not.
    """


def parser(*sources, **settings):
    made = argparse.ArgumentParser(prog="t", exit_on_error=False)
    for source in sources:
        add_flags(made, source, **settings)
    return made


def parsed(text, **settings):
    return given(parser(Sample, **settings).parse_args(text.split()), Sample)


def test_only_what_stands_on_the_command_line_is_given():
    assert parsed("") == {}
    assert parsed("--count 4 --rate 0.5 --mode b --quick") == {
        **{"count": 4, "rate": 0.5, "mode": "b", "quick": True}
    }


def test_every_kind_of_value():
    assert parsed("--no-quick --rate none --state a/b --loss cosine") == {
        **{"quick": False, "rate": None, "state": "a/b", "loss": "cosine"}
    }
    assert parsed("--names a b --grid 3 4") == {"names": ("a", "b"), "grid": (3, 4)}
    assert parsed("--names") == {"names": ()}
    assert parsed('--more {"x":1} --several [{"y":2}]') == {"more": {"x": 1}, "several": [{"y": 2}]}


def test_a_field_without_a_form_is_no_option():
    text = parser(Sample).format_help()
    for name in ("--data", "--hook", "--result"):
        assert name not in text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("--count x", "invalid int value"),
        ("--rate x", "invalid float value"),
        ("--mode c", "invalid choice"),
        ("--more {", "expected JSON"),
    ],
)
def test_values_that_do_not_fit_are_refused(text, complaint):
    with pytest.raises(argparse.ArgumentError, match=complaint):
        parsed(text)


def test_help_is_the_docstring_s_and_names_the_default():
    text = " ".join(parser(Sample).format_help().split())
    assert "--count INT how many, on two lines. (default: 3)" in text
    assert "--rate FLOAT two at once, 5% or so." in text
    assert "--ratio FLOAT two at once, 5% or so. (default: 1.0)" in text


def test_help_as_for_another_is_the_other_s():
    found = help_texts(function)
    assert found["count"].startswith("as for")  # which has no field of that name
    assert help_texts(t5fx.Distill)["warmup"] == help_texts(t5fx.FineTune)["warmup"]


def test_a_field_without_an_entry_has_the_one_that_mentions_it():
    def mentions(*, rate: float = 1.0, ratio: float = 2.0) -> None:
        """A function.

        rate: a rate; others get 1/`ratio` of it.
        """

    assert help_texts(mentions)["ratio"] == "a rate; others get 1/`ratio` of it."


def test_a_name_that_is_taken_gets_a_prefix():
    made = argparse.ArgumentParser()
    made.add_argument("--count")
    add_flags(made, Sample)
    options = made.parse_args(["--count", "own", "--sample-count", "5"])
    assert options.count == "own" and given(options, Sample) == {"count": 5}


def test_two_sources_with_equal_names_are_kept_apart_by_prefixes():
    made = argparse.ArgumentParser()
    add_flags(made, Sample, prefix="sample-")
    add_flags(made, function, prefix="other-")
    options = made.parse_args(["--sample-count", "1", "--other-count", "2"])
    assert given(options, Sample) == {"count": 1} and given(options, function) == {"count": 2}


def test_supplied_fields_are_left_out():
    assert "--count" not in parser(Sample, supplied=("count",)).format_help()


SOURCES = [
    *(t5fx.LinearizeConfig, t5fx.Align, t5fx.Distill, t5fx.FineTune),
    *(t5fx.search, t5fx.save_pretrained, t5fx.diagnose),
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.__name__)
def test_every_option_of_t5fx_has_help(source):
    made = parser(source)
    actions = [a for a in made._actions if not isinstance(a, argparse._HelpAction)]
    assert actions
    for action in actions:
        words = (action.help or "").partition("(default")[0]
        assert len(words) > 8, f"{source.__name__}: {action.option_strings[0]} has no help"


def test_options_of_the_configuration_are_its_fields():
    """Each field has an option, and the values come out as the dataclass takes them."""
    made = parser(t5fx.LinearizeConfig)
    names = {a.dest.partition(".")[2] for a in made._actions} - {""}
    assert names == {f.name for f in dataclasses.fields(t5fx.LinearizeConfig)}
    text = (
        "--inner mlp2 --inner-loss l2 --key-norm none --qk-affine --grid 4 4 --min-tokens 0 "
        '--include a b --overrides {"a":{"coarse":0}} --no-dynamic --key-norm-eps 0.5'
    )
    config = t5fx.LinearizeConfig(**given(made.parse_args(text.split()), t5fx.LinearizeConfig))
    assert config == t5fx.LinearizeConfig(
        **{"inner": "mlp2", "inner_loss": "l2", "key_norm": "none", "qk_affine": True},
        **{"grid": (4, 4), "min_tokens": 0, "include": ("a", "b"), "dynamic": False},
        **{"overrides": {"a": {"coarse": 0}}, "key_norm_eps": 0.5},
    )
