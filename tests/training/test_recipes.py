"""The recipes of docs/finetune.md, as they stand there, on small models and random images."""

import os
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import timm
import torch
import transformers  # noqa: F401  imported by the page
from accelerate.state import AcceleratorState
from PIL import Image
from timm.data.auto_augment import RandAugment

import t5fx

PAGE = Path(__file__).parent.parent.parent / "docs" / "finetune.md"

#: What takes a download, a cluster or a day, and what the tests take instead.
SMALLER = {
    'timm.create_model("deit_tiny_patch16_224", pretrained=True)': (
        'timm.create_model("deit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2)'
    ),
    'AutoModelForImageClassification.from_pretrained("facebook/deit-tiny-patch16-224")': (
        "AutoModelForImageClassification.from_config(__import__('transformers').ViTConfig("
        "hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, "
        "num_labels=1000))"
    ),
    "LinearizeConfig(min_tokens=0)": (
        'LinearizeConfig(min_tokens=0, neighborhood=0, coarse=0, impl="reference")'
    ),
    "import ImageFolder": "import FakeData",
    'ImageFolder("imagenet/train", ': "FakeData(8, (3, 224, 224), 1000, ",
    "batch, epochs = 2048, 30": "batch, epochs = 4, 6",
    "epochs = 30\n": "epochs = 2\n",
    "DataLoader(train_set, 256": "DataLoader(train_set, 4",
    "DataLoader(train_set, 64": "DataLoader(train_set, 2",
    "steps = 10_000": "steps = 4",
    "per_device_train_batch_size=64, save_steps=500": (
        "per_device_train_batch_size=2, save_steps=2, disable_tqdm=True, seed=0, use_cpu=True"
    ),
    "steps=5000": "steps=4",
    "accelerator = Accelerator()\n": "accelerator = Accelerator(cpu=True)\n",
}


BLOCKS = [block for block in pages.blocks(PAGE, SMALLER) if block.language == "python"]
START = BLOCKS[0].section


def blocks(heading):
    """The Python blocks under a heading."""
    return [block.text for block in BLOCKS if block.section == heading]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the blocks of a section after those of the beginning; the names that they leave."""
    monkeypatch.chdir(tmp_path)
    names = {}

    def run(code):
        exec(compile(code, "docs/finetune.md", "exec"), names)
        return names

    for block in blocks(START):
        run(block)
    AcceleratorState._reset_state(reset_partial_state=True)  # one a process, which a script is
    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def values(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before, module):
    return {n for n, v in module.state_dict().items() if not torch.equal(v, before[n])}


def learning(names):
    """All but the convolutions, whose gradients are about nothing where a model begins."""
    return {name for name in names if ".dwc_" not in name}


def loaded():
    model = timm.create_model("deit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2)
    return t5fx.from_pretrained("deit-t5", model)


def test_timm(run):
    full, frozen = blocks("timm")
    lin = run("lin")["lin"]
    before = values(lin)
    names = run(full)
    assert moved(before, lin) >= learning(before)
    groups = {
        g["name"]: (g["lr"], g["initial_lr"], g["weight_decay"])
        for g in names["optimizer"].param_groups
    }
    assert groups == {
        "new": (pytest.approx(1e-5), 1.6e-3, 0.05),
        "new, no decay": (pytest.approx(1e-5), 1.6e-3, 0.0),
        "old": (pytest.approx(1e-5), 8e-5, 0.05),
        "old, no decay": (pytest.approx(1e-5), 8e-5, 0.0),
    }
    saved = loaded().state_dict()
    assert all(torch.equal(v, saved[n]) for n, v in names["averaged"].state_dict().items())
    assert not torch.equal(saved["head.weight"], lin.state_dict()["head.weight"])
    names = run(frozen)
    new = {name for name in before if ".t5." in name}
    changed = moved(before, names["frozen"])  # the same seed: they begin alike
    assert learning(new) <= changed <= new
    assert names["frozen"].training and not names["frozen"].head.weight.requires_grad


def test_timm_augments_at_every_magnitude(run):
    """Pillow refuses what timm's posterize asks for at the greatest magnitude."""
    transform = run(blocks("timm")[0].partition("train_set =")[0])["transform"]
    (augment,) = [step for step in transform.transforms if isinstance(step, RandAugment)]
    for operation in augment.ops:
        operation.prob, operation.magnitude = 1.0, 100  # the recipe's own bound applies
        assert operation(Image.new("RGB", (224, 224))).size == (224, 224)


def test_transformers(run):
    (block,) = blocks("transformers")
    names = run(block)
    trainer, lin = names["trainer"], names["lin"]
    assert trainer.state.global_step == 4
    rates = {g["name"]: g["initial_lr"] for g in trainer.optimizer.param_groups}
    assert rates["new"] == 3e-4 and rates["old"] == pytest.approx(1.5e-5)
    ended = values(lin)
    again = run(block.replace("trainer.train()", "trainer.train(resume_from_checkpoint=True)"))
    assert again["trainer"].state.global_step == 4  # all of which were done: it loads
    assert again["lin"] is not lin and not moved(ended, again["lin"])


def test_accelerate(run):
    (block,) = blocks("accelerate")
    names = run(block)
    lin = names["lin"]
    ended, average = values(lin), values(names["average"])
    assert int(names["average"].n_averaged) == 4
    for start in blocks(START):
        run(start)
    AcceleratorState._reset_state(reset_partial_state=True)
    names = run(block)  # finished: it loads and trains no more
    assert names["lin"] is not lin
    assert not moved(ended, names["lin"]) and not moved(average, names["average"])
    saved = loaded().state_dict()
    assert not moved(saved, names["average"].module)


def test_finetune(run, capsys):
    (block,) = blocks("FineTune")
    before = values(run("lin")["lin"])
    names = run(block)
    assert moved(before, names["lin"]) >= learning(before)
    assert names["tune"].result.steps == 4
    assert "accuracy" in names["tune"].result.history[-1]
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[:4]] == ["1", "2", "3", "4"]
    assert [p.name for p in Path("finetune-state").iterdir()] == ["step-000000004"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes", "sharded"),
    [("torchrun", 2, False), ("torchrun", 2, True), ("accelerate", 1, False)],
)
def test_several_processes(launcher, processes, sharded, tmp_path, monkeypatch):
    whole, shard, save = blocks("Several processes")
    if sharded:
        start = whole.split("tune(lin)\n")[0]
        whole = f"{start}{shard}tune(lin)\n{save}"
    (tmp_path / "train.py").write_text(whole)
    start = {
        "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes"],
        "torchrun": ["torch.distributed.run", "--nproc-per-node"],
    }[launcher]
    run = subprocess.run(
        [sys.executable, "-m", *start, str(processes), "train.py"],
        **{"cwd": tmp_path, "capture_output": True, "text": True},
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr
    monkeypatch.chdir(tmp_path)
    assert loaded().blocks[0].attn.t5.w1.isfinite().all()
    assert [path.name for path in Path("state").iterdir()] == ["step-000000004"]
