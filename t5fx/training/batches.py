"""The batches of a training: again and again, split over processes, from a place that is kept."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.data import DataLoader

from t5fx.errors import TrainingError
from t5fx.training.processes import gathered, process_count, process_index


class Batches:
    """An endless iterator over this process's batches of `data`, whose place can be saved.

    Every process is given the same data. Of what is a DataLoader that accelerate has prepared, and
    so split, a process takes all; of anything else every so many-th batch.

    The place is the number of passes and of batches in the pass, with the states of the random
    number generators (torch's on the CPU, Python's, NumPy's, those of the sampler) at the start of
    the pass and before the last batch. From there the same batches follow as without a stop,
    shuffled and augmented alike, as far as they depend on these and on the number of passes. A
    DataLoader without workers skips what was taken, one with workers makes it again, for their
    generators to move on, and anything else is iterated through.

    Args:
        data: what is iterated in each pass.
        skip: (loader, number) -> the loader without its first batches, accelerate's
            `skip_first_batches`.

    Raises:
        TrainingError: `data` cannot be iterated; from `next`, where it cannot be iterated again, or
            has no batch.
    """

    def __init__(
        self, data: Iterable[Any], skip: Callable[[Any, int], Iterable[Any]] | None = None
    ) -> None:
        if not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
            raise TrainingError(
                f"data: expected batches, such as a list or a DataLoader, got {data!r}"
            )
        self.data, self.skip = data, skip
        prepared = skip is not None and isinstance(data, DataLoader)
        #: Batches of all processes in one of `data`; and how many of `data` are taken at a time.
        self.joined, self.at_once = (process_count(), 1) if prepared else (1, process_count())
        self.passes = self.taken = 0
        self.iterator: Iterator[Any] | None = None
        self.peeked: list[Any] = []
        self.at_start = self.before = self._random()

    def __iter__(self) -> Batches:
        return self

    def peek(self) -> Any:
        """The first batch, which comes again; before anything else only."""
        if not self.peeked:
            self.peeked.append(next(self))
        return self.peeked[0]

    def __next__(self) -> Any:
        if self.peeked:
            return self.peeked.pop()
        self.before = self._random()
        batches = [self._take() for _ in range(self.at_once)]
        return batches[process_index() if self.at_once > 1 else 0]

    def _take(self) -> Any:
        while True:
            if self.iterator is None:
                self._begin(self.data)
            assert self.iterator is not None
            for batch in self.iterator:
                self.taken += 1
                return batch
            if not self.taken:
                what = "no batch"
                if self.passes:
                    what = f"batches for {self.passes} pass over it only"
                raise TrainingError(
                    f"data: expected what can be iterated again and again, such as a DataLoader "
                    f"or a list of batches, got {what} from a {type(self.data).__name__}"
                )
            self.passes += 1
            self.iterator = None

    def _begin(self, data: Any) -> None:
        """Begin a pass, over a part of the data."""
        self.at_start, self.taken = self._random(), 0
        for each in (self.data, data):
            if isinstance(each, DataLoader) and hasattr(each, "set_epoch"):
                each.set_epoch(self.passes)
        self.iterator = iter(data)

    def state_dict(self) -> dict[str, Any]:
        """The place, as plain data and tensors; every process has to call it."""
        states = {"at start": self.at_start, "before": self.before, "now": self._random()}
        taken = self.taken * self.joined
        return {"passes": self.passes, "taken": taken, "random": gathered(states)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place; the random number generators then are as they were there."""
        index = min(process_index(), len(state["random"]) - 1)
        states = state["random"][index]
        self.peeked.clear()
        taken = state["taken"] // self.joined
        data, ahead, skipped = self.data, max(0, taken - self.at_once), 0
        if self.iterator is data:  # it can be iterated once only, and that has begun
            skipped = self.taken
        else:
            self.passes = state["passes"]
            if not isinstance(data, DataLoader):
                for _ in range(self.passes):  # which changes what it keeps
                    for _ in data:
                        pass
            self._set_random(states["at start"])
            if self.skip is not None and isinstance(data, DataLoader) and not data.num_workers:
                # A prepared loader is one batch ahead: the last that is made again is the next.
                skipped = max(0, ahead - 1)
                data = self.skip(data, skipped)
            if taken:
                self._begin(data)
        for number in range(skipped, taken):
            if number == ahead and ahead:
                self._set_random(states["before"])
            self._take()
        self.at_start, self.before, self.taken = states["at start"], states["before"], taken
        self._set_random(states["now"])

    def _generators(self) -> Iterator[torch.Generator]:
        """The random generators that the data uses."""
        known: list[torch.Generator] = []
        part: Any = self.data
        while part is not None:
            found = getattr(part, "generator", None)
            if isinstance(found, torch.Generator) and all(found is not one for one in known):
                known.append(found)
            inner = getattr(part, "batch_sampler", None)
            part = getattr(part, "sampler", None) if inner is None else inner
        return iter(known)

    def _random(self) -> dict[str, Any]:
        """The states of the random number generators that batches are made with."""
        numpy = sys.modules.get("numpy")
        states = {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "data": [one.get_state() for one in self._generators()],
        }
        if numpy is not None:
            name, keys, *rest = numpy.random.get_state()
            states["numpy"] = (name, torch.from_numpy(keys.astype("int64")), *rest)
        return states

    def _set_random(self, states: dict[str, Any]) -> None:
        torch.set_rng_state(states["torch"].cpu())
        random.setstate(states["python"])
        for one, state in zip(self._generators(), states["data"], strict=False):
            one.set_state(state.cpu())
        numpy = sys.modules.get("numpy")
        if numpy is not None and "numpy" in states:
            name, keys, *rest = states["numpy"]
            numpy.random.set_state((name, keys.cpu().numpy().astype("uint32"), *rest))


def placed(batch: Any, device: torch.device) -> Any:
    """A batch of the same structure with its tensors on `device`."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)


def samples(batch: Any) -> int:
    """Samples in a batch: the first axis of its first tensor that has one."""
    leaves = pytree.tree_leaves(batch)
    return next((x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim()), 1)
