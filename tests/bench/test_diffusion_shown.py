"""Every stage of the small DiT that is shown trained, on made-up images."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.testing import assert_close

from t5fx.bench.demos import mnist
from t5fx.bench.demos.vit import load_vit, shipped
from t5fx.bench.diffusion import shown
from t5fx.bench.diffusion.distances import Distance, frechet
from t5fx.bench.harness.files import read_rows
from t5fx.errors import T5Error

pytestmark = pytest.mark.extras

TINY = [*("--cpu", "--channels", "32", "--blocks", "1", "--batch", "2", "--steps", "4")]
TINY += [*("--save-every", "2", "--sample-every", "4", "--sampling-steps", "2", "--seed", "3")]
TINY += [*("--align-steps", "3", "--seeds", "2", "--samples", "12")]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs stages as a process of its own would, on made-up images."""

    def made_up(count):
        return mnist.Labelled(torch.rand(count, 1, 28, 28), torch.arange(count) % 10)

    data = mnist.Data("digits", "Made-up images, for a test", made_up(24), made_up(20))
    monkeypatch.setattr(mnist, "load", lambda *_: data)
    plain = {name: replace(config, impl="reference") for name, config in shown.CONFIGS.items()}
    monkeypatch.setattr(shown, "CONFIGS", plain)

    def run(*stages, out="out", more=()):
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(len(stages))  # of which nothing may depend
        files = ["--out", str(tmp_path / out), "--table", str(tmp_path / "docs" / "shown.md")]
        shown.main([*TINY, *files, *more, "--stages", *stages])

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def values(folder):
    """The weights that a stage left in its folder."""
    return {
        name: value
        for file in (folder / "model").glob("*.safetensors")
        for name, value in load_file(file).items()
    }


@pytest.mark.slow
def test_all_stages(run, tmp_path, monkeypatch):
    run(*shown.STAGES)
    out = tmp_path / "out"
    rows = read_rows(tmp_path / "docs" / "shown.csv", Distance)
    models = {(row.model, row.attention) for row in rows}
    kinds = set(shown.KINDS.values())
    assert models == {("training images", ""), ("softmax", "")} | {
        (kind, attention) for kind in kinds for attention in shown.CONFIGS
    }
    assert len(rows) == 2 * len(models) and all(row.distance > 0 for row in rows)
    table = (tmp_path / "docs" / "shown.md").read_text()
    assert table.count("| fine-tuned |") == 2 and "+0.0 %" in table
    assert (tmp_path / "docs" / "shown.png").stat().st_size > 1000

    old, new = values(out / "base"), []
    for attention in ("near-attention", "no-near-attention"):
        converted, aligned, tuned = (values(out / f"{kind}-{attention}") for kind in shown.KINDS)
        moved = {name for name in converted if not converted[name].equal(aligned[name])}
        assert moved and not moved & old.keys()
        assert {name for name in old if not old[name].equal(tuned[name])}
        new.append(converted.keys() - old.keys())
    assert new[0] > new[1] > set()  # near attention has a gate

    # What is there is not made again, and what was made otherwise is not taken for it.
    monkeypatch.setattr(shown, "train", None)
    monkeypatch.setattr(shown, "frechet", None)
    softmax = shown.load(out)
    monkeypatch.setattr(shown, "load", lambda *_: softmax)  # for the picture, and soon there
    run(*shown.STAGES)
    assert read_rows(tmp_path / "docs" / "shown.csv", Distance) == rows
    with pytest.raises(T5Error, match=r"'lr': 0.001.*got .*'lr': 0.5"):
        run("base", more=["--lr", "0.5"])


def test_a_stopped_training_goes_on_to_the_same_weights(run, tmp_path, monkeypatch):
    run("base", out="whole")
    calls, loss = [], shown.loss

    def stopping(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(shown, "loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("base", out="parts")
    with pytest.raises(T5Error, match="expected the model of the stage 'base'"):
        run("convert", out="parts")
    run("base", out="parts")
    assert len(calls) == 6  # the third step was not saved, and is made again
    whole, parts = (values(tmp_path / name / "base") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(whole[name].equal(parts[name]) for name in whole)


def test_a_model_is_put_in_the_package_and_taken_from_there(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shown, "WEIGHTS", tmp_path / "weights")
    with pytest.raises(T5Error, match=r"expected trained weights in .*dit_digits"):
        run("base", out="none", more=["--shipped"])
    run("base", out="trained", more=["--ship"])
    run("base", out="taken", more=["--shipped", "--channels", "64"])  # which the file knows better
    trained, taken = (values(tmp_path / name / "base") for name in ("trained", "taken"))
    assert trained.keys() == taken.keys()
    assert all(trained[name].half().float().equal(taken[name]) for name in trained)
    settings = [
        (tmp_path / name / "base" / shown.SETTINGS).read_text() for name in ("trained", "taken")
    ]
    assert settings[0] == settings[1]


def test_the_shipped_model_draws_digits():
    model, _ = shown.load_shipped(shown.WEIGHTS / "dit_digits.safetensors")
    noise, labels = shown.noise_and_labels(20, 1)
    images = shown.unpadded(shown.sample(model.eval(), noise, labels, 10))
    classifier, _ = load_vit(shipped("digits"))
    with torch.no_grad():
        right = classifier(images).argmax(1) == labels
    assert right.double().mean() > 0.7


def test_sampling_ends_at_the_image_that_the_model_tells():
    """For a model that always tells the same image, from any noise in any number of steps."""
    image = torch.rand(3, 1, 28, 28)

    def knows(x, timestep, class_labels):
        assert timestep.unique().numel() == 1
        return SimpleNamespace(sample=shown.padded(image))

    noise, labels = shown.noise_and_labels(3, 0)
    for steps in (1, 5):
        found = shown.unpadded(shown.sample(knows, noise, labels, steps))
        assert_close(found, image, rtol=0, atol=1e-6)


def test_the_distance_of_normal_distributions():
    """Sets whose moments are exact: rows are moved and turned until they have them."""
    generator = torch.Generator().manual_seed(0)

    def normal(mean, covariance):
        x = torch.randn(50, len(mean), generator=generator, dtype=torch.float64)
        x = x - x.mean(0)
        white = torch.linalg.solve_triangular(
            torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False
        )
        return white.T @ torch.linalg.cholesky(covariance).T + mean

    def turned(angle, *variances):
        angle = torch.tensor(angle, dtype=torch.float64)
        c, s = angle.cos(), angle.sin()
        turn = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
        return turn @ torch.diag(torch.tensor(variances, dtype=torch.float64)) @ turn.T

    mean = torch.tensor([1.0, -2.0], dtype=torch.float64)
    one = normal(mean, turned(0.3, 4, 9))
    # Covariances that commute: the sum of squared differences of standard deviations.
    assert frechet(one, normal(mean + 2, turned(0.3, 1, 25))) == pytest.approx(8 + 1 + 4)
    # Of two by two: tr (A B)^(1/2) = (tr A B + 2 (det A B)^(1/2))^(1/2).
    a, b = turned(0.3, 4, 9), turned(1.1, 1, 25)
    root = ((a @ b).trace() + 2 * torch.linalg.det(a @ b).sqrt()).sqrt()
    wanted = a.trace() + b.trace() - 2 * root
    assert frechet(one, normal(mean, b)) == pytest.approx(wanted.item())
    assert frechet(one, one) == pytest.approx(0, abs=1e-6)
    few = torch.randn(5, 8, generator=generator)  # whose covariance is singular
    assert frechet(few, few) == pytest.approx(0, abs=1e-5)
