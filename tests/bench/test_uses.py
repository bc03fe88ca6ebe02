"""What features are good for: nearest neighbours, the saliency decoder, and the suite of both."""

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from test_demo import tiny_vit
from torch.nn.functional import normalize

import t5fx
from t5fx.bench.demos import demo, dinov2, frontier, mnist, neighbours, recipe, saliency, uses
from t5fx.bench.harness import packages

close = torch.testing.assert_close


def test_parts_have_no_image_in_common():
    numbers = torch.arange(20)
    images = mnist.Labelled(numbers.float().view(20, 1, 1, 1), numbers)
    drawn = neighbours.parts(images, 10, 6, 3, seed=1)
    assert [len(part.labels) for part in drawn] == [10, 6, 3]
    assert len(set(torch.cat([part.labels for part in drawn]).tolist())) == 19
    assert all(torch.equal(part.images.flatten(), part.labels.float()) for part in drawn)


def test_hits_are_those_of_the_most_frequent_label(monkeypatch):
    monkeypatch.setattr(neighbours, "NEIGHBOURS", 3)
    angles = torch.tensor([0.0, 0.1, 0.5, 2.0, 2.1, 2.2])
    gallery = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.tensor([0, 1, 1, 2, 2, 0])
    asked = torch.tensor([0.0, 2.1])
    queries = torch.stack([asked.cos(), asked.sin()], 1)
    # The first query's very next is a 0, but two of its three nearest are 1.
    found = neighbours.hits(gallery, labels, queries, torch.tensor([1, 2]))
    assert found.tolist() == [True, True]
    assert neighbours.hits(gallery, labels, queries, torch.tensor([0, 2])).tolist() == [False, True]


def test_interval_holds_the_mean_of_paired_differences():
    low, high = neighbours.interval(torch.tensor([0.0, 1.0] * 200))
    assert 0.44 < low < 0.5 < high < 0.56
    assert neighbours.interval(torch.ones(9)) == (1.0, 1.0)


def test_the_decoder_is_that_of_the_file():
    """Against the ONNX graph between the tokens as an image and the map before its resize."""
    decoder = saliency.load_decoder()
    file = packages.find_file(dinov2.PACKAGE, dinov2.VERSION, dinov2.ONNX_NAME)
    model = onnx.load(str(file))
    names = {"ConvTranspose", "BatchNormalization", "Relu", "Conv"}
    image, logits = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in ("/Reshape_output_0", "/decoder/final_conv/Conv_output_0")
    )
    cut = onnx.helper.make_graph(
        [n for n in model.graph.node if n.name.startswith("/decoder/") and n.op_type in names],
        "decoder",
        [image],
        [logits],
        [one for one in model.graph.initializer if one.name.startswith("decoder.")],
    )
    cut = onnx.helper.make_model(cut, opset_imports=model.opset_import)
    tokens = torch.randn(1, 1 + 4, 384)
    given = {"/Reshape_output_0": tokens[:, 1:].mT.reshape(1, 384, 2, 2).numpy()}
    (wanted,) = ReferenceEvaluator(cut).run(None, given)
    with torch.no_grad():
        found = decoder(tokens)
    logits = torch.nn.functional.interpolate(torch.tensor(wanted), (28, 28), mode="bilinear")
    close(found, logits[:, 0].sigmoid(), atol=1e-5, rtol=1e-5)


def test_map_agreement():
    a = torch.tensor([[[0.9, 0.1], [0.6, 0.2]]])
    same = saliency.map_agreement(a, a)
    assert same.correlation == pytest.approx(1) and same.overlap == 1
    other = saliency.map_agreement(a, 1 - a)
    assert other.correlation == pytest.approx(-1) and other.overlap == 0


@pytest.mark.slow  # a command that trains, compiles and draws
def test_uses_from_end_to_end(tmp_path, monkeypatch, capsys):
    """On a tiny model, without what the demo does before."""
    monkeypatch.setattr(dinov2, "load_dinov2_small", lambda: tiny_vit(depth=1))
    monkeypatch.setattr(demo, "SIZE", 56)
    monkeypatch.setattr(demo, "TRAIN_SIZE", 28)
    monkeypatch.setattr(uses, "SIZES", (28, 42))
    monkeypatch.setattr(saliency.Decoder, "forward", lambda _, x: x[:, 1:].sigmoid())
    made = {n: str(tmp_path / n) for n in ("demo.png", "demo.md", "saved", "uses.png", "uses.md")}
    first = ["--out", made["demo.png"], "--table", made["demo.md"], "--save", made["saved"]]
    demo.main([*first, "--sizes", "28", "--steps", "1"])
    files = ["--model", made["saved"], "--out", made["uses.png"], "--table", made["uses.md"]]
    uses.main([*files, "--gallery", "40", "--queries", "20", "--steps", "1"])
    text = (tmp_path / "uses.md").read_text()
    assert text.count("| TTT, distilled on digits too |") == 2
    assert "| softmax |" in text and "digits at 42 px" in text
    assert (tmp_path / "uses.png").read_bytes().startswith(b"\x89PNG")
    assert "distilling on 200 digits" in capsys.readouterr().out


def test_class_tokens_are_of_unit_length():
    images = torch.rand(3, 1, 28, 28)
    found = neighbours.class_tokens(tiny_vit(depth=1), images, 28)
    close(found, normalize(found, dim=1))
    assert found.shape == (3, 32)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(dinov2, "load_dinov2_small", lambda: tiny_vit(depth=2))
    monkeypatch.setattr(demo, "SIZE", 56)
    monkeypatch.setattr(demo, "TRAIN_SIZE", 28)


@pytest.mark.slow  # a command that trains, compiles and draws
def test_recipe_from_end_to_end(tiny, tmp_path):
    table, picture = tmp_path / "recipe.md", tmp_path / "recipe.png"
    files = ["--out", str(picture), "--table", str(table)]
    recipe.main([*files, "--steps", "2", "--seeds", "2", "--sizes", "28,56"])
    text = table.read_text()
    ways = ["converted", "aligned", "distilled"]
    assert all(f"| {way} |" in text for way in ways)
    assert text.count(" ± ") == 8 and "deviation of 2 seeds" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow  # a command that trains, compiles and draws
def test_frontier_from_end_to_end(tiny, tmp_path):
    table, picture = tmp_path / "frontier.md", tmp_path / "frontier.png"
    files = ["--out", str(picture), "--table", str(table)]
    frontier.main([*files, "--size", "224", "--points", "3", "--cost", "flops"])
    text = table.read_text()
    assert "2 of 5 x 5, 8 x 8 cells" in text or "; 1 softmax" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_choices_are_described():
    near = {"neighborhood": 5, "coarse": 8}
    config = t5fx.LinearizeConfig(overrides={"a": near, "b": near, "c": {**near, "coarse": 12}})
    assert frontier.described(config, 4) == (
        "2 of 5 x 5, 8 x 8 cells; 1 of 5 x 5, 12 x 12 cells; 1 softmax"
    )
