"""The classification demo from end to end, on made-up images and an untrained model."""

import torch

from t5fx.bench.demos import classify, mnist
from t5fx.bench.demos.vit import Training, new_vit
from t5fx.bench.suites import quality


def made_up(count):
    return mnist.Labelled(torch.rand(count, 1, 28, 28), torch.arange(count) % 10)


def test_all_stages_and_files(tmp_path, monkeypatch, capsys):
    data = mnist.Data("fashion", "Made-up images, for a test", made_up(24), made_up(10))
    training = Training("fashion", 0.1, 7, 8, 0, torch.__version__)
    monkeypatch.setattr(classify.mnist, "load", lambda *options: data)
    monkeypatch.setattr(classify, "load_vit", lambda path: (new_vit().eval(), training))
    monkeypatch.setattr(classify, "BATCH", 8)
    monkeypatch.setattr(classify, "SIZES", (28,))
    picture, table = tmp_path / "new" / "classify.png", tmp_path / "new" / "classify.md"
    files = ["--out", str(picture), "--table", str(table)]
    classify.main([*files, "--align-steps", "2", "--steps", "3"])
    markdown = table.read_text()
    for row in ("| softmax |", "| converted |", "| aligned |", "| aligned, then full |"):
        assert row in markdown
    assert "| 24 | 3 |" in markdown  # three steps of eight labelled images
    assert "| 28 | 50 |" in markdown
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "total:" in capsys.readouterr().out


def test_its_quality_as_rows(monkeypatch):
    data = mnist.Data("fashion", "Made-up images, for a test", made_up(24), made_up(110))
    monkeypatch.setattr(quality.mnist, "load", lambda: data)
    monkeypatch.setattr(quality, "load_vit", lambda path: (new_vit().eval(), None))
    monkeypatch.setattr(classify, "BATCH", 8)
    experiment = next(one for one in quality.experiments(small=True) if "classifier" in one.case)
    found = {(row.contender, row.measure): row for row in experiment.run(experiment)}
    accuracies = [contender for contender, measure in found if measure == "accuracy"]
    trained = ["TTT, aligned", "TTT, aligned, then freeze", "TTT, aligned, then full"]
    assert accuracies == ["softmax", "TTT, converted", *trained]
    assert all(0 <= found[name, "accuracy"].value <= 1 for name in accuracies)
    assert [name for name, measure in found if measure == "steps"] == trained
    assert found[trained[-1], "steps"].value == 2
    assert found[trained[-1], "labels seen"].value == 16
    assert found[trained[-1], "seconds of training"].value > 0


def test_measuring_ends_where_ttt_wins_clearly(monkeypatch):
    class Ratio:
        def __init__(self, median):
            self.median = median

    class Made:
        def __init__(self, size):
            self.size = size

        def speedup(self, index):
            return Ratio(self.size / 56)

    seen = []

    def time_models(models, image, *, num_tokens, budget, say):
        seen.append(num_tokens)
        return Made(image.shape[-1])

    monkeypatch.setattr(classify, "time_models", time_models)
    image = torch.rand(1, 1, 28, 28)
    timings = classify.measure(torch.nn.Identity(), torch.nn.Identity(), image, _console())
    assert [t.size for t in timings] == [28, 112]
    assert seen == [50, 785]


def _console():
    import io

    from rich.console import Console

    return Console(file=io.StringIO())


def test_batches_are_new_in_every_pass_and_the_same_for_a_seed(monkeypatch):
    monkeypatch.setattr(classify, "BATCH", 4)
    data = made_up(10)
    one, two = classify.Shuffled(data, 3), classify.Shuffled(data, 3)
    first, second = [labels for _, labels in one], [labels for _, labels in one]
    assert [len(labels) for labels in first] == [4, 4]
    assert len(torch.cat(first).unique()) == 8
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert all(torch.equal(a, b) for a, (_, b) in zip(first, two, strict=True))
