"""`FineTune`: which parameters it trains and how, what it records, what it refuses."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.data import DataLoader, TensorDataset
from vits import Shape

import t5fx
from t5fx.backend import compile as backend
from t5fx.errors import TrainingError
from t5fx.training.nodes import warm_cosine

SHAPE = Shape(depth=1, batch=4)
CONFIG = t5fx.LinearizeConfig(min_tokens=0)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit = SHAPE.model()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(SHAPE.heads * SHAPE.head_dim, 3)

    def forward(self, images):
        return self.head(self.drop(self.vit(images).mean(1)))


def classifier():
    torch.manual_seed(4)
    return Classifier().eval()


def linearized():
    return t5fx.linearize(classifier(), (SHAPE.images(),), config=CONFIG)


def data():
    return [(SHAPE.images(), torch.tensor([0, 1, 2, 0])) for _ in range(2)]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def test_freeze_trains_the_new_parameters_only_and_puts_flags_back():
    lin = linearized().train()
    lin.head.requires_grad_(False)
    before = copy.deepcopy(lin.state_dict())
    training = []

    def watched(model, batch):
        training.append(model.training)
        return loss(model, batch)

    assert t5fx.FineTune(data(), watched, steps=2)(lin) is None
    assert training == [False, False]  # no dropout, no running statistics
    for name, value in lin.state_dict().items():
        assert torch.equal(value, before[name]) == (".t5." not in name), name
    assert lin.training
    frozen = {name for name, p in lin.named_parameters() if not p.requires_grad}
    assert frozen == {"head.weight", "head.bias"}


def test_full_trains_everything_new_parameters_faster():
    """AdamW's first step moves every parameter by its learning rate, whatever the gradient."""
    lin = linearized()
    before = copy.deepcopy(lin.state_dict())
    training = []

    def watched(model, batch):
        training.append(model.training)
        return loss(model, batch)

    t5fx.FineTune(data(), watched, protocol="full", steps=1, lr=1e-2, weight_decay=0.0)(lin)
    assert training == [True] and not lin.training
    moved = {n: (v - before[n]).abs().max().item() for n, v in lin.state_dict().items()}
    assert max(m for n, m in moved.items() if ".t5." in n) == pytest.approx(1e-2, rel=1e-2)
    assert max(m for n, m in moved.items() if ".t5." not in n) == pytest.approx(5e-4, rel=1e-2)
    assert all(moved.values())


def test_learns_records_and_evaluates():
    lin = linearized()
    flags = []

    def evaluate(model):
        flags.append((model.training, torch.is_grad_enabled()))
        return {"accuracy": torch.tensor(0.5), "count": 3}

    images, labels = SHAPE.images(), torch.tensor([0, 1, 2, 0])
    loader = DataLoader(TensorDataset(images, labels), 4)
    tune = t5fx.FineTune(
        *(loader, loss),
        **{"protocol": "full", "steps": 25, "lr": 0.1, "log_every": 5},
        **{"evaluate": evaluate, "eval_every": 10},
    )
    tune(lin)
    history = tune.result.history
    assert [r["step"] for r in history] == [5, 10, 15, 20, 25]
    assert [r["samples"] for r in history] == [20, 40, 60, 80, 100]
    assert [r.get("accuracy") for r in history] == [None, 0.5, None, 0.5, 0.5]
    assert flags == [(False, False)] * 3
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[-1]["lr"] < history[0]["lr"] and history[0]["grad_norm"] > 0
    assert "accuracy" in str(tune.result) and "100 samples" in str(tune.result)


def test_schedule_rises_then_falls():
    factors = [warm_cosine(step, 100, 0.1) for step in range(100)]
    assert factors[9] == 1 and factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 1e-3 and warm_cosine(0, 1, 0.05) == 1


def test_gradients_accumulate_as_the_accelerator_says():
    """Two half batches give the step of the whole one."""
    images, labels = SHAPE.images(), torch.tensor([0, 1, 2, 0])
    halves = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    whole, split = linearized(), linearized()
    t5fx.FineTune([(images, labels)], loss, steps=2)(whole)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    tune = t5fx.FineTune(halves, loss, steps=2, accelerator=accelerator)
    tune(split)
    assert tune.result.samples == 8
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_gradients_are_clipped():
    lin = linearized()
    norms = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        grads = [p.grad.flatten() for g in self.param_groups for p in g["params"]]
        norms.append(torch.cat(grads).norm().item())
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        tune = t5fx.FineTune(data(), lambda m, b: 1e4 * loss(m, b), steps=1, max_grad_norm=0.5)
        tune(lin)
    assert norms == [pytest.approx(0.5, rel=1e-3)]
    assert tune.result.history[0]["grad_norm"] > 0.5


def test_a_compiled_untouched_model_trains_too(monkeypatch):
    monkeypatch.setattr(backend, "_inductor", lambda options, more: aot_eager)
    model, batch = classifier(), data()
    lin = t5fx.linearize(model, (batch[0][0],), config=CONFIG)
    fast = torch.compile(model, backend="t5", options={"min_tokens": 0})
    with pytest.warns(t5fx.errors.UntrainedWarning):
        fast(batch[0][0])
    t5fx.FineTune(batch, loss, steps=3)(lin)
    t5fx.FineTune(batch, loss, steps=3)(fast)
    for name, value in t5fx.adapter(model).state_dict().items():
        torch.testing.assert_close(value, lin.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_align_then_tune_as_hooks_of_linearize():
    align = t5fx.Align([batch[0] for batch in data()], steps=2)
    tune = t5fx.FineTune(data(), loss, steps=2)
    model = classifier()
    lin = t5fx.linearize(model, (SHAPE.images(),), config=CONFIG, finetune=[align, tune])
    assert align.result.steps == tune.result.steps == 2
    assert isinstance(lin, nn.Module) and t5fx.report(lin).rewritten


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda model, batch: 3.0, "expected a tensor with one number, got float"),
        (lambda model, batch: model(batch[0]), r"got shape \[4, 3\]"),
        (lambda model, batch: loss(model, batch).detach(), "got one without"),
        (lambda model, batch: loss(model, batch) * math.inf, "expected a finite loss, got inf at"),
    ],
)
def test_losses_that_cannot_be_trained_on(wrong, message):
    lin = linearized()
    before = copy.deepcopy(lin.state_dict())
    with pytest.raises(TrainingError, match=message):
        t5fx.FineTune(data(), wrong, steps=1)(lin)
    assert all(torch.equal(v, before[n]) for n, v in lin.state_dict().items())
    assert all(p.requires_grad for p in lin.parameters())


def test_gradients_that_are_not_finite_are_not_stepped():
    """sqrt(0) is finite, its gradient is not."""
    lin = linearized()
    before = copy.deepcopy(lin.state_dict())

    def root(model, batch):
        return loss(model, batch) + (model(batch[0]) * 0).abs().sum().sqrt()

    for most in (1.0, None):
        tune = t5fx.FineTune(data(), root, protocol="full", steps=2, max_grad_norm=most)
        with pytest.raises(TrainingError, match="expected finite gradients, got a norm of nan"):
            tune(lin)
        assert tune.result.steps == 0
        assert all(torch.equal(v, before[n]) for n, v in lin.state_dict().items())


def test_gradients_may_be_left_as_they_are():
    lin, twin = linearized(), linearized()
    settings = {"steps": 3, "lr": 1e-2, "weight_decay": 0.0}
    batches = data()
    t5fx.FineTune(batches, loss, **settings, max_grad_norm=None)(lin)
    t5fx.FineTune(batches, loss, **settings, max_grad_norm=1e9)(twin)
    for value, other in zip(lin.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(value, other)


def test_parameters_in_16_bits_are_refused():
    lin = linearized().bfloat16()
    with pytest.raises(TrainingError, match="expected parameters in float32, got bfloat16"):
        t5fx.FineTune(data(), loss, protocol="full", steps=1)(lin)
    for node in t5fx.adapter(lin).nodes().values():
        node.float()
    with pytest.raises(TrainingError, match="got bfloat16"):  # the model's own
        t5fx.FineTune(data(), loss, protocol="full", steps=1)(lin)


def test_frozen_sites_stay_frozen():
    lin = linearized()
    node = lin.vit.blocks[0].attn.t5
    node.w1.requires_grad_(False)
    before = copy.deepcopy(lin.state_dict())
    for protocol in ("freeze", "full"):
        t5fx.FineTune(data(), loss, protocol=protocol, steps=2, lr=0.1)(lin)
        assert torch.equal(node.w1, before["vit.blocks.0.attn.t5.w1"])
        assert not torch.equal(node.w2, before["vit.blocks.0.attn.t5.w2"])
    node.requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to train"):
        t5fx.FineTune(data(), loss, steps=1)(lin)


def test_bad_settings_and_nothing_to_train():
    with pytest.raises(TrainingError, match="protocol: expected one of freeze, full"):
        t5fx.FineTune([], loss, protocol="lora")
    for name in ("lr", "lr_ratio", "max_grad_norm"):
        with pytest.raises(TrainingError, match=f"{name}: expected a number above 0, got 0"):
            t5fx.FineTune([], loss, **{name: 0})
    for name in ("steps", "log_every", "eval_every"):
        for value in (0, 2.5, True):
            with pytest.raises(TrainingError, match=f"{name}: expected a whole number above 0"):
                t5fx.FineTune([], loss, **{name: value})
    with pytest.raises(TrainingError, match="weight_decay: expected a number of at least 0"):
        t5fx.FineTune([], loss, weight_decay=-1)
    with pytest.raises(TrainingError, match="warmup: expected a fraction, 0 to 1, got 5"):
        t5fx.FineTune([], loss, warmup=5)
    with pytest.raises(TrainingError, match="nothing to train"):
        t5fx.FineTune(data(), loss)(classifier())
    with pytest.raises(TrainingError, match="got no batch from a list"):
        t5fx.FineTune([], loss)(linearized())
