"""Align, Distill and FineTune in two processes, under DDP and sharded by FSDP2.

One start of the processes runs all of it; the tests compare what they left with one process.
"""

import copy
import functools
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from vits import Shape

import t5fx
from t5fx.errors import TrainingError

SHAPE = Shape(depth=2, heads=2, head_dim=16, batch=2)
KINDS = ("ddp", "fsdp")
KEYS = [f"blocks.{i}.attn.t5" for i in range(2)]
STEPS = 4


@functools.cache
def _linearized():
    config = t5fx.LinearizeConfig(min_tokens=0, neighborhood=0, coarse=0, impl="reference")
    lin = t5fx.linearize(SHAPE.model(), (SHAPE.images(),), config=config)
    lin.train()(SHAPE.images())  # judged once, for all copies
    return lin.eval()


def linearized(kind="one"):
    lin = copy.deepcopy(_linearized())
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in lin.blocks:
            fully_shard(block)
        fully_shard(lin)
    return lin


def images(count=2 * STEPS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE.images().shape, generator=generator) for _ in range(count)]


def mirrored():
    """Each batch twice, the second time its samples in another order: relative errors are those of
    the whole batch."""
    return [batch for one in images(STEPS) for batch in (one, one.flip(0))]


def align(lin, two):
    hook = t5fx.Align(mirrored() if two else images(STEPS), steps=STEPS)
    hook(lin)
    return [[hook.result.losses[key][step] for key in KEYS] for step in range(STEPS)]


def distill(lin, two):
    data = mirrored() if two else images(STEPS)
    hook = t5fx.Distill(data, output="relative", steps=STEPS, lr=1e-3, log_every=1)
    hook(lin)
    return [[record["loss"]] for record in hook.result.history]


def loss(model, batch):
    assert not (
        isinstance(model, DistributedDataParallel) and "FSDP" in type(model.module).__name__
    )
    return F.mse_loss(model(batch), batch.mean().expand(SHAPE.batch, SHAPE.tokens, 32))


def tune(lin, two, protocol="full", **settings):
    """Two processes take a batch each, one takes both."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1 if two else 2)
    hook = t5fx.FineTune(
        *(images(), loss),
        **{"protocol": protocol, "steps": STEPS, "lr": 1e-2, "log_every": 1, "ema": 0.5},
        **{"accelerator": accelerator, "max_grad_norm": 0.1, **settings},
    )
    hook(lin)
    return [[r["loss"], r["grad_norm"]] for r in hook.result.history]


TRAININGS = {
    "align": align,
    "distill": distill,
    "tune": tune,
}


class Interrupted(Exception):
    pass


def stop(step, numbers):
    if step == 3:
        raise Interrupted


def values(lin):
    """The whole values of a model, sharded or not."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(lin, options=options)


def in_two(rank, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found = {kind: trainings(kind, folder) for kind in KINDS}
        torch.save(found | {"refused": refusals(), "loader": of_a_loader()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def trainings(kind, folder):
    found = {}
    for name, train in TRAININGS.items():
        lin = linearized(kind)
        if dist.get_rank() and kind == "ddp":  # the first process's values count
            with torch.no_grad():
                lin.blocks[0].attn.t5.w1.mul_(2)
        losses = train(lin, two=True)
        assert all(p.requires_grad for p in lin.parameters())
        found[name] = {"losses": losses, "values": values(lin)}
    if dist.get_rank() == 0:
        t5fx.save_pretrained(lin, f"{folder}/{kind}-saved", state_dict=found["tune"]["values"])
    # On the same model what was frozen for one training is trained in the next.
    lin = linearized(kind)
    tune(lin, two=True, protocol="freeze", evaluate=lambda model: {"x": model(images()[0]).sum()})
    before = values(lin)
    with pytest.raises(Interrupted):
        tune(lin, two=True, on_step=stop)
    after = values(lin)
    found["same"] = [name for name, value in before.items() if torch.equal(value, after[name])]
    lin = linearized(kind)
    with pytest.raises(Interrupted):
        tune(lin, two=True, checkpoint=f"{folder}/{kind}", save_every=2, on_step=stop)
    return found


def refusals():
    from torch.distributed.fsdp import fully_shard

    found = []
    lin = linearized()
    fully_shard(lin.blocks[0])
    sharded = linearized("fsdp")
    for hook, model in (
        (t5fx.FineTune(images(), loss, protocol="full"), lin),
        (t5fx.Distill(images(), train="lora"), sharded),
    ):
        with pytest.raises(TrainingError) as caught:
            hook(model)
        found.append(str(caught.value))
    return found


def of_a_loader():
    """What each process sees of a shuffled loader in two passes, and of one that goes on."""
    torch.manual_seed(7)  # as a training script does
    data = TensorDataset(torch.arange(8.0))
    seen = []

    def watched(model, batch):
        seen.append(batch[0].tolist())
        return loss(model, torch.ones(SHAPE.images().shape)) * batch[0].mean()

    loader = DataLoader(data, 2, shuffle=True)
    t5fx.FineTune(loader, watched, steps=4, accelerator=Accelerator(cpu=True))(linearized())
    return seen


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(in_two, (str(folder),), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@functools.cache
def alone(name):
    lin = linearized()
    return TRAININGS[name](lin, two=False), lin.state_dict()


def assert_alike(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(ran, kind, name):
    one, two = (found[kind][name] for found in ran[1])
    losses, state = alone(name)
    assert one["losses"] == two["losses"]
    torch.testing.assert_close(
        torch.tensor(one["losses"]), torch.tensor(losses), rtol=1e-3, atol=1e-5
    )
    assert_alike(one["values"], state)
    for name, value in (two["values"] or one["values"]).items():  # only the first has them, sharded
        assert torch.equal(value, one["values"][name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_frozen_is_trained_in_the_next_training(ran, kind):
    assert ran[1][0][kind]["same"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_two_processes_goes_on_in_one(ran, kind):
    losses, state = alone("tune")
    lin, steps = linearized(), []
    settings = {"checkpoint": ran[0] / kind, "on_step": lambda step, _: steps.append(step)}
    got = tune(lin, two=False, **settings)
    assert steps == [3, 4]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(losses), rtol=1e-3, atol=1e-5)
    assert_alike(lin.state_dict(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_two_processes_is_loaded_in_one(ran, kind):
    lin = t5fx.from_pretrained(ran[0] / f"{kind}-saved", SHAPE.model())
    assert_alike(lin.state_dict(), alone("tune")[1])


def test_refused_before_training(ran):
    for plain, lora in (found["refused"] for found in ran[1]):
        assert "expected every parameter that is trained to be sharded, got 'prefix'" in plain
        assert 'got "lora"' in lora


def test_a_loader_is_split(ran):
    one, two = (found["loader"] for found in ran[1])
    for half in (slice(2), slice(2, 4)):
        both = [x for batches in (one[half], two[half]) for batch in batches for x in batch]
        assert sorted(both) == list(range(8))
    assert one[:2] != one[2:]


def test_processes_that_accelerate_does_not_see_are_refused(monkeypatch):
    """Such as those of torchrun on CPUs, where each makes an Accelerator() of its own."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    tune = t5fx.FineTune(images(), loss, accelerator=accelerator)
    with pytest.raises(TrainingError, match=r"the 2 processes .* got an Accelerator of 1: "):
        tune(linearized())
