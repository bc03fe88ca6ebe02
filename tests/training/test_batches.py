"""`Batches`: from a saved place the same follow, however they are shuffled and augmented."""

import copy
import random

import numpy
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from t5fx.errors import TrainingError
from t5fx.training.batches import Batches


class Augmented(Dataset):
    """Seven samples, with noise of every generator."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        noise = torch.rand(1) + random.random() + numpy.random.rand()
        return torch.tensor([float(index)]) + noise / 10


class Streamed(IterableDataset):
    def __iter__(self):
        return (torch.rand(1) + i for i in range(7))


class Reshuffled:
    """Another order in each pass, by what it keeps."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter([torch.tensor([100.0 * self.passes + i]) for i in range(3)])


class Shuffled:
    """Another order in each pass, and noise, by torch's generator."""

    def __iter__(self):
        return (torch.rand(1) + i for i in torch.randperm(3).tolist())


def endless():
    number = 0
    while True:
        yield torch.tensor([float(number)])
        number += 1


def own_generator():
    return DataLoader(Augmented(), 2, shuffle=True, generator=torch.Generator().manual_seed(3))


KINDS = {
    "list": lambda: [torch.tensor([float(i)]) for i in range(3)],
    "what it keeps": Reshuffled,
    "global generator": Shuffled,
    "once only": endless,
    "in order": lambda: DataLoader(Augmented(), 2),
    "shuffled": lambda: DataLoader(Augmented(), 2, shuffle=True),
    "own generator": own_generator,
    "weighted": lambda: DataLoader(Augmented(), 2, sampler=WeightedRandomSampler([1.0] * 7, 7)),
    "stream": lambda: DataLoader(Streamed(), 2),
    "worker": lambda: DataLoader(Augmented(), 2, shuffle=True, num_workers=1),
}


def batches(data, prepared):
    if not prepared:
        return Batches(data)
    accelerator = Accelerator(cpu=True)
    return Batches(accelerator.prepare(data), accelerator.skip_first_batches)


def seeded():
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)


def followed(place, count):
    """The next batches, each after a draw of the training itself."""
    found = []
    for _ in range(count):
        found.append(next(place).tolist())
        found.append(torch.rand(1).item())
    return found


@pytest.mark.parametrize(
    ("kind", "prepared"),
    [
        *((kind, False) for kind in KINDS if kind != "worker"),
        *((kind, True) for kind, make in KINDS.items() if isinstance(make(), DataLoader)),
    ],
)
def test_the_same_batches_follow(kind, prepared):
    for taken in (9,) if kind == "worker" else (1, 2, 3, 4, 5, 9):
        seeded()
        whole = batches(KINDS[kind](), prepared)
        followed(whole, taken)
        state = copy.deepcopy(whole.state_dict())
        wanted = followed(whole, 6)
        torch.manual_seed(2)
        random.seed(2)
        numpy.random.seed(2)
        again = batches(KINDS[kind](), prepared)
        again.load_state_dict(state)
        assert again.state_dict()["taken"] == state["taken"]
        assert followed(again, 6) == wanted, taken


def test_what_was_peeked_at_comes_again():
    seeded()
    whole, place = Batches(Shuffled()), Batches(Shuffled())
    first = place.peek()
    assert torch.equal(place.peek(), first) and torch.equal(next(place), first)
    seeded()
    assert torch.equal(next(whole), first)
    once = Batches(endless())
    followed(once, 4)
    state = once.state_dict()
    again = Batches(endless())
    again.peek()
    again.load_state_dict(state)
    assert followed(again, 2)[::2] == [[4.0], [5.0]]


def test_data_without_batches():
    with pytest.raises(TrainingError, match="got no batch from a list"):
        next(Batches([]))
    with pytest.raises(TrainingError, match="batches for 1 pass over it only"):
        followed(Batches(iter([torch.zeros(1)])), 2)


def test_what_cannot_be_iterated_is_refused():
    with pytest.raises(TrainingError, match="data: expected batches, such as a list"):
        Batches(3)
