"""A `FineTune` that was interrupted, or killed at any moment, ends as if it had not been."""

import copy
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from vits import Shape

import t5fx
from t5fx.errors import TrainingError

SHAPE = Shape(depth=1, batch=4)
STEPS = 8


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit = SHAPE.model()
        self.norm = nn.BatchNorm1d(SHAPE.heads * SHAPE.head_dim)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(SHAPE.heads * SHAPE.head_dim, 3)

    def forward(self, images):
        return self.head(self.drop(self.norm(self.vit(images).mean(1))))


@functools.cache
def _linearized():
    torch.manual_seed(4)
    config = t5fx.LinearizeConfig(min_tokens=0, neighborhood=0, coarse=0, impl="reference")
    lin = t5fx.linearize(Classifier().eval(), (SHAPE.images(),), config=config)
    lin.train()(SHAPE.images())  # judged once, for all copies: in forks no thread is left for it
    return lin.eval()


def linearized():
    return copy.deepcopy(_linearized())


def loader():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, *SHAPE.images().shape[1:], generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(12) % 3), 4, shuffle=True)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def evaluate(model):
    return {"noise": torch.rand(()).item()}  # it draws random numbers


def tune(folder=None, **settings):
    torch.manual_seed(5)
    return t5fx.FineTune(
        *(loader(), loss),
        **{"protocol": "full", "steps": STEPS, "lr": 1e-2, "log_every": 3, "checkpoint": folder},
        **{"ema": 0.9, "save_every": 1, "evaluate": evaluate, "eval_every": 5} | settings,
    )


def trained(folder=None, **settings):
    """The values and the history of a training, or of what a training goes on with."""
    lin = linearized()
    one = tune(folder, **settings)
    one(lin)
    history = [{n: v for n, v in r.items() if n != "seconds"} for r in one.result.history]
    return lin.state_dict(), history, one.result.samples


def same(one, other):
    values = all(torch.equal(v, other[0][n]) for n, v in one[0].items())
    return values and one[0].keys() == other[0].keys() and one[1:] == other[1:]


class Interrupted(Exception):
    pass


def stop_at(steps):
    def stop(step, numbers):
        if step == steps:
            raise Interrupted

    return stop


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"optimizer": lambda groups: torch.optim.SGD(groups, momentum=0.9)},
        {"schedule": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2)},
        {"save_every": 3, "max_grad_norm": None, "ema": None},
    ],
)
def test_goes_on_to_the_same_bits(other, tmp_path):
    wanted = trained(**other)
    for steps in (2, 5):
        with pytest.raises(Interrupted):
            trained(tmp_path, **other, on_step=stop_at(steps))
    seen = []
    got = trained(tmp_path, **other, on_step=lambda step, numbers: seen.append((step, numbers)))
    assert same(got, wanted)
    assert [step for step, _ in seen] == list(range(4 if other.get("save_every") == 3 else 5, 9))
    assert all(numbers.keys() == {"loss", "grad_norm", "lr"} for _, numbers in seen)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000008"]
    seen.clear()
    assert same(trained(tmp_path, **other, on_step=lambda *_: seen.append(1)), wanted)
    assert not seen


def test_states_that_do_not_fit(tmp_path):
    with pytest.raises(Interrupted):
        trained(tmp_path, on_step=stop_at(3))
    for settings, said in (
        ({"lr_ratio": 3}, r"expected a training with lr_ratio=3 .* got one with 20"),
        ({"weight_decay": 0.5}, r"expected a training with weight_decay=0.5"),
    ):
        lin = linearized()
        before = {n: v.clone() for n, v in lin.state_dict().items()}
        with pytest.raises(TrainingError, match=said):
            tune(tmp_path, **settings)(lin)
        assert all(torch.equal(v, before[n]) for n, v in lin.state_dict().items())
    lin = linearized()
    lin.head.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"the same parameters, .*head"):
        tune(tmp_path)(lin)
    file = tmp_path / "step-000000002" / "custom_checkpoint_0.pkl"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TrainingError, match=r"cannot be read .* delete it to start anew"):
        tune(tmp_path)(linearized())
    with pytest.raises(TrainingError, match="save_every: expected a whole number above 0"):
        tune(save_every=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of itself")
@pytest.mark.parametrize("moments", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_the_same(moments, tmp_path):
    """A process that is killed with SIGKILL, in a step or while it writes, and one that goes on."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    run = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(moments)],
        **{"capture_output": True, "text": True, "env": environment},
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == moments
    for one in found:
        assert one["same"], found
        assert one["first step of the second"] >= one["killed in step"], found


def _life(folder, pipe):
    """A training in a process of its own, which tells its steps."""
    torch.set_num_threads(1)  # or threads of the backward pass may find no pool after the fork
    result = trained(folder / "state", on_step=lambda step, _: os.write(pipe, bytes([step])))
    torch.save(result, folder / "result.pt")


def _fork(folder):
    """The process, and where its steps can be read."""
    folder.mkdir(exist_ok=True)
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    try:
        _life(folder, writing)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def _steps(pipe):
    """All that are told, until the process is gone."""
    steps = b"".join(iter(lambda: os.read(pipe, 1), b""))
    os.close(pipe)
    return list(steps)


def main(folder, moments):
    torch.set_num_threads(1)
    linearized()  # all that is imported and compiled is, before anything is forked
    process, pipe = _fork(folder / "whole")
    start = time.perf_counter()
    _steps(pipe)
    each = (time.perf_counter() - start) / STEPS
    os.waitpid(process, 0)
    wanted = torch.load(folder / "whole" / "result.pt")
    chance = random.Random(0)
    for number in range(moments):
        process, pipe = _fork(folder / str(number))
        killed = chance.randrange(STEPS)
        for _ in range(killed):
            os.read(pipe, 1)
        time.sleep(chance.uniform(0, each))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        _steps(pipe)
        left = [path.name for path in (folder / str(number)).glob("state/*")]
        process, pipe = _fork(folder / str(number))
        steps = _steps(pipe)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        got = None if status else torch.load(folder / str(number) / "result.pt")
        line = {"killed in step": killed, "left": left, "exit": status}
        line["first step of the second"] = steps[0] if steps else STEPS
        print(json.dumps(line | {"same": got is not None and same(got, wanted)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
