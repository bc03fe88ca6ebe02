"""Photographs in a folder: convert, align, distill, finetune and search travel the whole road."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import t5fx
from t5fx.cli.images import Preprocessing
from t5fx_command import main

MODEL = """
import timm, torch

def vit(size=32):
    torch.manual_seed(5)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=4, embed_dim=24, num_heads=2, depth=2,
        num_classes=2,
    )

def own():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = vit()
        def forward(self, scale, *, image):
            return scale * self.vit(image)
    model = Own()
    return model, (2.0,), {"image": torch.randn(2, 3, 32, 32)}

def described():
    model, *call = own()
    model.pretrained_cfg = {"mean": (0.25,) * 3, "std": (0.5,) * 3}
    return (model, *call)
"""
CONVERT = ("--min-tokens", "0", "--batch", "2")


def picture(path, seed):
    """Blobs of colours, of 40 x 50 pixels."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(small).resize((50, 40), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs a command in a folder with model.py, flat/ and classes/{cats,dogs}/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    for folder in ("flat", "classes/cats", "classes/dogs", "empty", "one"):
        (tmp_path / folder).mkdir(parents=True)
    for index in range(5):
        picture(tmp_path / "flat" / f"{index}.png", index)
        picture(tmp_path / "classes" / "cats" / f"{index}.jpg", index)
        picture(tmp_path / "classes" / "dogs" / f"{index}.jpg", index + 50)
    picture(tmp_path / "one" / "1.png", 1)

    def command(*arguments):
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return command


def vit():
    space = {}
    exec(MODEL, space)
    return space["vit"]().eval()


def weights(where):
    """The saved model, and of it the new parameters and the others."""
    state = t5fx.from_pretrained(where, vit()).state_dict()
    new = {name: t for name, t in state.items() if ".t5." in name}
    return new, {name: t for name, t in state.items() if ".t5." not in name}


def test_convert_with_photographs_aligns_compares_and_saves(run, tmp_path):
    given = ["--data", "flat", "--out", "out", *CONVERT, "--align-steps", "3", "--held-out", "0.4"]
    code, out, _ = run("convert", "model.py:vit", *given, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["photographs"] == {"training": 3, "held_out": 2}
    assert list(found["stages"]) == ["original", "converted", "aligned"]
    assert found["stages"]["original"]["agreement"] == pytest.approx(1)
    assert found["training"]["aligned"]["steps"] == 3
    assert found["training"]["aligned"]["samples"] == 6
    assert set(found["training"]["aligned"]["held_out"]) == {"blocks.0.attn.t5", "blocks.1.attn.t5"}
    assert [site["status"] for site in found["report"]["sites"]] == ["rewritten"] * 2
    new, old = weights(tmp_path / "out")
    for name, value in vit().state_dict().items():
        torch.testing.assert_close(old[name], value, rtol=0, atol=0)
    fresh = t5fx.linearize(
        vit(), (torch.randn(2, 3, 32, 32),), config=t5fx.LinearizeConfig(min_tokens=0)
    ).state_dict()
    assert any((new[name] - fresh[name]).abs().max() > 1e-5 for name in new)


def test_the_agreement_is_that_of_the_photographs_that_are_held_out(run, tmp_path):
    """Computed again by hand, with timm's own view of the pictures."""
    given = ["--data", "flat", "--out", "out", *CONVERT, "--align-steps", "2", "--json"]
    found = json.loads(run("convert", "model.py:vit", *given)[1])
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0)).tolist()
    model, lin = vit(), t5fx.from_pretrained(tmp_path / "out", vit()).eval()
    settings = timm.data.resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    view = timm.data.create_transform(**settings)
    path = sorted((tmp_path / "flat").iterdir())[order[0]]
    image = view(Image.open(path).convert("RGB"))[None]
    with torch.no_grad():
        wanted = torch.nn.functional.cosine_similarity(lin(image), model(image)).item()
    assert found["stages"]["aligned"]["agreement"] == pytest.approx(wanted, abs=1e-5)


def test_convert_may_distil_instead_or_after(run):
    given = ["--data", "flat", "--out", "out", *CONVERT, "--json"]
    steps = ["--align-steps", "2", "--distill-steps", "2", "--distill-train", "new"]
    code, out, _ = run("convert", "model.py:vit", *given, "--train", "align", "distill", *steps)
    assert code == 0
    assert list(json.loads(out)["stages"])[1:] == ["converted", "aligned", "distilled"]


def test_the_numbers_come_last_for_people(run):
    given = ["--data", "flat", "--out", "out", *CONVERT, "--align-steps", "2"]
    code, out, _ = run("convert", "model.py:vit", *given)
    lines = out.splitlines()
    assert code == 0 and lines[-1] == "saved: out"
    assert lines[-2].startswith(
        "agreement with the original (mean cosine of the outputs) on 1 held"
    )
    assert "converted" in lines[-2] and "aligned" in lines[-2]


def test_align_begins_at_a_checkpoint_and_another_seed_chooses_other_photographs(run, tmp_path):
    assert run("convert", "model.py:vit", "--out", "first", *CONVERT)[0] == 0
    given = ["--data", "flat", "--batch", "2", "--steps", "2", "--json"]
    code, out, _ = run("align", "model.py:vit", "--checkpoint", "first", "--out", "then", *given)
    assert code == 0
    assert list(json.loads(out)["stages"]) == ["original", "checkpoint", "aligned"]
    before, after = weights(tmp_path / "first")[0], weights(tmp_path / "then")[0]
    assert any((before[name] - after[name]).abs().max() > 1e-5 for name in before)


def test_distill_trains_all_parameters(run, tmp_path):
    given = ["--data", "flat", "--out", "out", *CONVERT, "--steps", "2", "--lr", "1e-3"]
    assert run("distill", "model.py:vit", *given)[0] == 0
    old = weights(tmp_path / "out")[1]
    assert any((old[n] - v).abs().max() > 1e-6 for n, v in vit().state_dict().items())


def test_finetune_learns_classes_and_says_its_accuracy(run, tmp_path):
    given = ["--data", "classes", "--out", "out", *CONVERT, "--steps", "2", "--json"]
    code, out, _ = run("finetune", "model.py:vit", *given, "--protocol", "full")
    assert code == 0
    found = json.loads(out)
    stages = found["stages"]
    assert list(stages) == ["original", "converted", "fine-tuned"]
    for numbers in stages.values():
        assert numbers["accuracy"] in (0, 0.5, 1)  # of two photographs
    history = found["training"]["fine-tuned"]["history"]
    assert history[-1]["step"] == 2 and history[-1]["loss"] > 0
    assert history[-1]["accuracy"] == stages["fine-tuned"]["accuracy"]


def test_search_writes_what_convert_reads(run, tmp_path):
    given = ["--data", "flat", "--out", "found.json", "--loss", "2", "--points", "2"]
    candidates = ["--candidates", '[{"neighborhood": 3, "coarse": 0}]', "--batches", "1"]
    code, out, _ = run("search", "model.py:vit", *given, *candidates, "--draw", "f.png", "--json")
    assert code == 0
    found = json.loads(out)
    config = t5fx.LinearizeConfig.from_json((tmp_path / "found.json").read_text())
    assert found["config"] == json.loads(config.to_json()) and found["unit"] == "FLOP"
    assert sum(point["fits"] for point in found["points"]) == 1
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    assert run("explain", "model.py:vit", "--config", "found.json")[0] == 0


def test_measure_times_both(run, monkeypatch):
    """The models are compiled by a backend of the test's, and the clock is the test's."""
    from t5fx.cli import compared

    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    monkeypatch.setattr(compared, "interleave", lambda calls, rounds, device: [[4.0], [2.0]])
    given = ["--out", "out", *CONVERT, "--measure"]
    code, out, _ = run("convert", "model.py:vit", *given)
    assert code == 0 and "speed: 2.00x the original's (2.00 to 2.00)" in out
    factors = iter([1.0, 1.5])  # what is compiled second gives something else
    monkeypatch.setattr(
        torch, "compile", lambda model, **settings: lambda *args: next(factors) * model(*args)
    )
    code, _, err = run("convert", "model.py:vit", *given)
    assert code == 1 and "compiled with 't5' to give the output of the eager one" in err


def test_a_model_of_one_s_own_says_how_its_photographs_are_normalised(run):
    given = ["--data", "flat", "--out", "out", *CONVERT, "--align-steps", "1", "--json"]
    code, _, err = run("convert", "model.py:own", *given)
    assert code == 1 and "give it an attribute pretrained_cfg" in err
    code, out, _ = run("convert", "model.py:described", *given)
    assert code == 0 and json.loads(out)["stages"]["original"]["agreement"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("command", "options", "code", "words"),
    [
        ("convert", ["--data", "nowhere"], 1, "expected a folder of photographs, found none"),
        ("convert", ["--data", "empty"], 1, "expected photographs (.jpg"),
        ("convert", ["--data", "one"], 1, "expected two photographs or more"),
        ("convert", ["--data", "flat", "--held-out", "1"], 2, "--held-out: expected a share"),
        ("convert", ["--data", "flat", "--workers", "-1"], 2, "--workers: expected 0 or more"),
        ("convert", ["--train", "align"], 2, "--train: expected photographs to train on"),
        ("convert", ["--align-steps", "2"], 2, "options of Align: expected --data FOLDER"),
        ("convert", ["--data", "flat", "--distill-steps", "2"], 2, "--train distill beside"),
        ("align", [], 2, "the following arguments are required: --data"),
        ("align", ["--data", "flat", "--steps", "0"], 2, "steps: expected a whole number"),
        ("finetune", ["--data", "flat"], 1, "expected a subfolder of photographs for each class"),
        ("search", ["--data", "flat"], 2, "expected one of --budget and --loss"),
    ],
)
def test_what_is_wrong_with_photographs_and_options(run, command, options, code, words):
    got, out, err = run(command, "model.py:vit", "--out", "out", *options)
    assert (got, out) == (code, "") and words in err.splitlines()[-1]


def test_a_classifier_of_another_number_of_classes_is_refused(run, tmp_path):
    (tmp_path / "classes" / "birds").mkdir()
    picture(tmp_path / "classes" / "birds" / "a.png", 9)
    code, _, err = run("finetune", "model.py:vit", "--data", "classes", "--out", "out", *CONVERT)
    assert code == 1 and "for each of the model's 2 classes, got 3" in err


def test_a_file_that_is_no_photograph_is_named(run, tmp_path):
    (tmp_path / "flat" / "zero.png").write_text("nothing")
    given = ["--data", "flat", "--out", "out", *CONVERT, "--align-steps", "4"]
    code, _, err = run("convert", "model.py:vit", *given)
    assert code == 1 and "expected a photograph in flat/zero.png, got none" in err


def test_crops_are_random_and_normalised():
    view = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), evaluate=None)
    grey = Image.new("RGB", (50, 40), (255, 255, 255))
    crop = view.crops((16, 24))(grey)
    assert crop.shape == (3, 16, 24)
    torch.testing.assert_close(crop, torch.full((3, 16, 24), 2.0))
    other = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    assert not torch.equal(view.crops((16, 24))(other), view.crops((16, 24))(other))


@pytest.mark.parametrize("command", ["convert", "align", "diagnose", "search"])
def test_a_place_that_cannot_be_written_is_told_before_any_work(command, run, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    data = () if command == "diagnose" else ("--data", "flat")
    code, _, err = run(command, "model.py:nothing_there", *data, "--out", "new/out")
    assert code == 2
    assert "--out: expected a place that can be written, got new/out in " in err


def test_an_error_of_the_system_is_one_line(run, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(t5fx, "save_pretrained", full)
    code, _, err = run("convert", "model.py:vit", "--out", "out", "--min-tokens", "0")
    assert code == 1
    assert err.strip().endswith("t5fx convert: [Errno 28] No space left on device")
