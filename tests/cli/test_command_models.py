"""MODEL as `file.py:function`, `t5fx explain`, and what is wrong with a model in one line."""

import json

import pytest
import torch
from vits import Shape

import t5fx
from t5fx_command import main

FILE = """
import torch
from vits import Shape

SHAPE = Shape(grid=(4, 4))

def vit():
    return SHAPE.model(), (SHAPE.images(),)

def sized(batch, size=8):
    shape = Shape(grid=(size // 4, size // 4), batch=batch)
    return shape.model(), (), {"images": shape.images()}

def alone():
    return SHAPE.model()

def nothing_to_do():
    return torch.nn.Conv2d(3, 4, 3), (torch.randn(1, 3, 8, 8),)

def number():
    return 3

def boom():
    raise KeyError("the key")

def misnamed():
    return SHAPE.model(), (), {"photographs": SHAPE.images()}
"""


@pytest.fixture
def explain(tmp_path, capsys):
    path = tmp_path / "own.py"
    path.write_text(FILE)

    def run(function, *options):
        code = main(["explain", f"{path}:{function}", *options])
        return (code, *capsys.readouterr())

    run.path = path
    return run


def test_the_report_of_the_library_is_what_is_printed(explain):
    shape = Shape(grid=(4, 4))
    wanted = t5fx.explain(shape.model(), (shape.images(),))
    code, out, err = explain("vit", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["model"].endswith("own.py:vit")
    assert found["report"] == json.loads(json.dumps(wanted.to_dict())) | {
        "patterns": found["report"]["patterns"]
    }
    code, out, err = explain("vit")
    assert code == 0 and "ViT: 0 of 2 attention sites rewritten" in out
    assert "below-break-even (2)" in out


def test_the_configuration_is_that_of_the_options(explain, tmp_path):
    sites = json.loads(explain("vit", "--json", "--min-tokens", "0")[1])["report"]["sites"]
    assert [site["status"] for site in sites] == ["rewritten", "rewritten"]
    config = t5fx.LinearizeConfig(min_tokens=0, exclude=("blocks.0.*",))
    (tmp_path / "config.json").write_text(config.to_json())
    given = ["--json", "--config", str(tmp_path / "config.json")]
    sites = json.loads(explain("vit", *given)[1])["report"]["sites"]
    assert [site["reason"] for site in sites] == ["excluded", None]
    # An option wins over the file.
    sites = json.loads(explain("vit", *given, "--exclude", "blocks.1.*")[1])["report"]["sites"]
    assert [site["reason"] for site in sites] == [None, "excluded"]


def test_size_and_batch_go_to_a_function_that_takes_them(explain):
    sites = json.loads(explain("sized", "--json", "--size", "12", "--batch", "3")[1])["report"][
        "sites"
    ]
    assert sites[0]["num_tokens"] == 1 + 3 * 3
    small = json.loads(explain("sized", "--json", "--size", "12")[1])["report"]["sites"]
    assert sites[0]["flops_before"] == 3 * small[0]["flops_before"]


@pytest.mark.parametrize(
    ("function", "options", "code", "words"),
    [
        ("vit", ["--size", "8"], 1, ["--size: expected a function with an argument 'size'"]),
        ("vit", ["--pretrained"], 1, ["--pretrained: expected a function with an argument"]),
        ("missing", [], 1, ["expected a function 'missing'"]),
        ("alone", [], 1, ["got a ViT alone", "(model, args)"]),
        ("number", [], 1, ["expected a model", "got int"]),
        ("misnamed", [], 1, ["expected the arguments of a call of ViT: ", "'images'"]),
        ("boom", [], 1, ["own.py:24: KeyError: 'the key'"]),
        ("vit", ["--neighborhood", "4"], 2, ["neighborhood: expected 0 or an odd number"]),
        ("vit", ["--batch", "0"], 2, ["--batch: expected 1 or more, got 0"]),
        ("vit", ["--config", "nowhere.json"], 2, ["--config: expected a file"]),
        ("vit", ["--device", "nonsense"], 2, ["--device: expected a device of this machine"]),
        ("vit", ["--checkpoint", "nowhere"], 1, ["nowhere"]),
        (
            "vit",
            ["--checkpoint", "d", "--coarse", "4"],
            2,
            ["--coarse: expected no such option beside"],
        ),
    ],
)
def test_what_is_wrong_is_one_line(explain, function, options, code, words):
    got, out, err = explain(function, *options)
    assert (got, out) == (code, "")
    lines = err.splitlines()
    assert len(lines) == code  # wrong usage has a line of usage before it
    assert lines[-1].startswith("t5fx explain: ") and all(word in lines[-1] for word in words), err


def test_a_model_without_attention_is_explained_but_not_converted(explain, tmp_path, capsys):
    assert explain("nothing_to_do")[0] == 0
    where = tmp_path / "out"
    model = f"{explain.path}:nothing_to_do"
    assert main(["convert", model, "--out", str(where)]) == 1
    assert "expected at least one attention in Conv2d" in capsys.readouterr().err
    assert not where.exists()


@pytest.mark.parametrize("text", ["vit_tiny", "own.txt:vit", "nobody:vit", "timm:", "own.py:"])
def test_other_names_of_models_are_wrong_usage(text, capsys):
    assert main(["explain", text]) == 2
    assert "expected timm:NAME, hf:ID, diffusers:ID_OR_PATH" in capsys.readouterr().err


def test_a_file_that_cannot_be_imported_is_told_with_its_line(tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("import os\n1 / 0\n")
    assert main(["explain", f"{path}:model"]) == 1
    assert (
        capsys.readouterr().err == f"t5fx explain: {path}:2: ZeroDivisionError: division by zero\n"
    )
    assert main(["explain", f"{tmp_path / 'none.py'}:model"]) == 1
    assert "expected a Python file, found none" in capsys.readouterr().err


def test_converted_saved_and_explained_again(explain, tmp_path, capsys):
    where, model = str(tmp_path / "out"), f"{explain.path}:vit"
    assert main(["convert", model, "--out", where, "--min-tokens", "0", "--seed", "3"]) == 0
    assert f"saved: {where}" in capsys.readouterr().out
    shape = Shape(grid=(4, 4))
    lin = t5fx.from_pretrained(where, shape.model())
    config = t5fx.LinearizeConfig(min_tokens=0, seed=3)
    wanted = t5fx.linearize(shape.model(), (shape.images(),), config=config)
    x = shape.images()
    torch.testing.assert_close(lin(x), wanted(x), rtol=0, atol=0)
    code, out, _ = explain("vit", "--json", "--checkpoint", where)
    sites = json.loads(out)["report"]["sites"]
    assert code == 0 and [site["status"] for site in sites] == ["rewritten"] * 2


def test_only_the_new_parameters_are_saved_where_that_is_asked_for(explain, tmp_path):
    where = tmp_path / "out"
    given = ["--out", str(where), "--min-tokens", "0", "--adapter-only"]
    assert main(["convert", f"{explain.path}:vit", *given]) == 0
    assert json.loads((where / "t5fx_config.json").read_text())["content"] == "adapter"


def test_a_place_that_is_no_folder_is_refused_before_any_work(explain, capsys):
    assert main(["convert", f"{explain.path}:vit", "--out", str(explain.path)]) == 2
    assert "--out: expected a folder" in capsys.readouterr().err


@pytest.mark.extras  # matplotlib draws
def test_diagnose_measures_the_original_and_a_checkpoint(explain, tmp_path, capsys):
    where, model = tmp_path / "out", f"{explain.path}:vit"
    given = ["--out", str(where), "--sites", "blocks.0.*", "--json"]
    assert main(["diagnose", model, *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["diagnosis"]["sites"]) == 2 and not found["diagnosis"]["linearized"]
    assert all((where / name).exists() for name in ("diagnosis.json", "maps.png"))
    lin = str(tmp_path / "lin")
    assert main(["convert", model, "--out", lin, "--min-tokens", "0"]) == 0
    capsys.readouterr()
    assert main(["diagnose", model, *given, "--checkpoint", lin]) == 0
    assert json.loads(capsys.readouterr().out)["diagnosis"]["linearized"]
