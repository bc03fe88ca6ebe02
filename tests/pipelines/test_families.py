"""diffusers' pipelines: a fast test for each mechanism, every family's row at night."""

import copy
import dataclasses
import functools
import warnings
from pathlib import Path

import pytest
import torch

import t5fx

pytest.importorskip("diffusers")

from t5fx.bench.pipelines import checks
from t5fx.bench.pipelines.__main__ import measure
from t5fx.bench.pipelines.family import families
from t5fx.bench.pipelines.table import COLUMNS, read, render

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

ROWS = Path(__file__).parents[2] / "docs" / "pipelines.csv"


#: A family is converted once for all its checks, which leave it as it is.
made = functools.cache(checks.Family)


@pytest.mark.parametrize(
    ("family", "check"),
    [
        ("Flux", checks.sizes),  # packed tokens, whose grid their positions tell
        ("PixArt Sigma", checks.guidance),  # beside attention to the prompt, which stays
        ("Flux", checks.lora),  # the projections are wrapped
        ("DiT", checks.timesteps),
        ("DiT", checks.saved),
        ("DiT", checks.offload),
    ],
)
def test_a_mechanism_works(family, check):
    check(made(family))


def test_weights_may_be_stored_in_half_precision_and_brought_from_elsewhere():
    setup = made("Flux").fresh()
    setup.model = copy.deepcopy(made("Flux").converted)
    linear = setup.run()
    half, full = torch.bfloat16, torch.float32
    setup.model.enable_layerwise_casting(storage_dtype=half, compute_dtype=full)
    cast = setup.run()
    torch.testing.assert_close(cast, linear, rtol=0, atol=0.05)
    onload = {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}
    setup.model.enable_group_offload(**onload)
    torch.testing.assert_close(setup.run(), cast)


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_a_family_does_what_its_row_says(family):
    """Where this fails because more works: `python -m t5fx.bench.pipelines` writes the row anew."""
    rows = {row.family: row for row in read(ROWS)}
    assert family in rows, "expected a row of each family: run python -m t5fx.bench.pipelines"
    *_, measured = measure(family)
    assert verdicts(measured) == verdicts(rows[family])


def verdicts(row):
    """What a row says but for numbers that differ from run to run, and messages' texts."""
    found = dataclasses.asdict(row)
    names = ("pipeline", "model", "rewritten", "sites", "kept", "graphs", "inductor")
    works = {
        name: found[name][:3] if found[name][:3] == "no:" else bool(found[name]) for name in COLUMNS
    }
    return {name: found[name] for name in names} | works


def test_the_page_is_that_of_the_rows():
    rows = read(ROWS)
    page = ROWS.with_suffix(".md").read_text(encoding="utf-8")
    assert page == render(rows), "run python -m t5fx.bench.pipelines"


def test_the_first_call_of_a_pipeline_is_left_without_an_answer():
    setup = families()["Stable Diffusion 3.5"]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args, kwargs = t5fx.example_inputs(setup.model, setup.run)
    assert not args and kwargs["hidden_states"].shape == (2, 4, 16, 16)
