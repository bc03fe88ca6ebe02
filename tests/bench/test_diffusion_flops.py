"""The count of what nodes save in diffusion transformers, against nodes that run; its tables."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import t5fx
from t5fx.bench.diffusion import __main__ as command
from t5fx.bench.diffusion import sizes
from t5fx.bench.diffusion.counting import Count, count
from t5fx.bench.harness.files import read_rows
from t5fx.errors import T5Error
from t5fx.runtime.lookup import nodes_in

pytestmark = pytest.mark.extras


def test_the_count_is_that_of_a_converted_model_that_runs():
    case = sizes.dit(512, tiny=True)
    found = count(case)
    model, inputs = case.build(1, False)
    config = t5fx.LinearizeConfig(dynamic=False, impl="reference")
    lin = t5fx.linearize(model, (), inputs, config=config)
    ran = []
    for one in (model, lin):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one(**inputs)
        ran.append(counter.get_total_flops())
    assert found.softmax == ran[0]
    assert found.nodes == sum(site.flops_after for site in t5fx.report(lin).sites)
    assert found.t5 == pytest.approx(ran[1], rel=0.1)  # the reference's convolutions count there
    assert (found.tokens, found.sites, found.rewritten) == (1024, 2, 2)
    assert found.attention == found.rewritable == 2 * 4 * 2 * 1024**2 * 16
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.new == sum(p.numel() for n in nodes_in(lin).values() for p in n.parameters())
    assert 1 < found.ratio < found.bound


def test_what_does_not_pay_stays_softmax():
    found = count(sizes.dit(64, tiny=True))
    assert (found.sites, found.rewritten, found.new) == (2, 0, 0)
    assert found.ratio == found.bound == 1 and found.t5 == found.softmax
    assert found.reasons == "2 x below-break-even"


def test_every_model_is_counted_and_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "measure", lambda *_: None)
    asked = ["--tiny", "--out", str(tmp_path)]
    command.main([*asked, "--models", "FLUX.1", "Wan2.1-14B"])
    some = read_rows(tmp_path / "diffusion-flops.csv", Count)
    assert [one.model for one in some] == ["FLUX.1", "Wan2.1-14B"]
    command.main([*asked, "--models", "SD3.5-Medium", "SD3.5-Large", "DiT-XL/2", "Qwen-Image"])
    counts = {one.model: one for one in read_rows(tmp_path / "diffusion-flops.csv", Count)}
    rewritten = {name: (one.rewritten, one.sites) for name, one in counts.items()}
    assert rewritten == {
        **{"FLUX.1": (2, 2), "Wan2.1-14B": (1, 2), "SD3.5-Medium": (3, 3)},
        **{"SD3.5-Large": (1, 1), "DiT-XL/2": (2, 2), "Qwen-Image": (1, 1)},
    }
    table = (tmp_path / "diffusion-flops.md").read_text()
    lines = [line for line in table.splitlines() if "px |" in line or "frames" in line]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == list(
        dict.fromkeys(case.model for case in sizes.cases(tiny=True))
    )
    capsys.readouterr()


def test_the_papers_figures_stand_beside_ours():
    ours = [Count("SD3.5-Medium", f"{px} px", 1, 1, 1, 4, 2, 2, 1, 1, 1) for px in (1024, 2048)]
    rows = command.flops_table([ours[1], ours[0]]).rows
    assert [(row[1], *row[-3:]) for row in rows] == [
        ("1024 px", "1.33x", "2.00x", "1.32x"),
        ("2048 px", "1.33x", "2.00x", "1.47x"),
    ]


def test_a_case_that_fails_is_a_row_that_says_why(tmp_path):
    def build(batch, short=False):
        raise T5Error("no such model")

    results = command.Results(tmp_path / "times.csv")
    command.measure(sizes.Case("broken", "1 px", build), 2, results)
    (row,) = results.rows
    assert (row.status, row.detail, row.batch) == ("refused", "no such model", 2)
    (line,) = command.times_table(results.rows).rows
    assert line[:2] == ("broken 1 px, batch 2", "no such model")


def test_tiny_models_do_not_overwrite_the_manual(capsys):
    with pytest.raises(SystemExit):
        command.main(["--tiny"])
    assert "give --out another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tiny_model_is_timed(tmp_path):
    command.main(["--tiny", "--models", "DiT-XL/2", "--out", str(tmp_path)])
    rows = command.Results(tmp_path / "diffusion-times.csv").rows
    assert {row.status for row in rows} == {"ok"}
    table = (tmp_path / "diffusion-flops.md").read_text()
    (line,) = (line for line in table.splitlines() if "DiT-XL/2 512 px, batch 1" in line)
    speed_up = float(line.split(" | ")[-1].rstrip("x |"))
    softmax, ours = (float(line.split(" | ")[i]) for i in (2, 5))
    assert speed_up == pytest.approx(softmax / ours, rel=0.05)
