"""`param_groups` and `freeze`: which parameters are new, and what an optimizer does with them."""

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from vits import Shape

import t5fx
from t5fx.backend import compile as backend
from t5fx.errors import TrainingError

CONFIG = t5fx.LinearizeConfig(min_tokens=0, neighborhood=3, coarse=2)


def linearized(model=None):
    shape = Shape(depth=2)
    return t5fx.linearize(model or shape.model(), (shape.images(),), config=CONFIG)


def named(lin, groups):
    names = {id(p): name for name, p in lin.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


@pytest.mark.parametrize("compiled", [False, True])
def test_each_parameter_is_in_one_group(compiled):
    lin = linearized()
    groups = t5fx.param_groups(torch.compile(lin) if compiled else lin, 1e-3, weight_decay=0.05)
    found = named(lin, groups)
    assert set.union(*found.values()) == {name for name, _ in lin.named_parameters()}
    assert sum(map(len, found.values())) == len(list(lin.parameters()))
    assert all((".t5." in name) == kind.startswith("new") for kind in found for name in found[kind])
    assert "blocks.0.attn.t5.gate" in found["new, no decay"]
    assert {"blocks.0.attn.t5.w1", "blocks.1.attn.t5.dwc_q.weight"} <= found["new"]
    settings = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}
    assert settings["new"] == (1e-3, 0.05) and settings["new, no decay"] == (1e-3, 0.0)
    assert settings["old"] == (pytest.approx(5e-5), 0.05)
    assert settings["old, no decay"] == (pytest.approx(5e-5), 0.0)
    torch.optim.SGD(groups, lr=1.0)


def test_what_is_spared_decay_is_the_models_own_list_or_the_callers():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    lin = t5fx.linearize(model, (torch.randn(2, 3, 64, 64),), config=CONFIG)
    assert "pos_embed" in lin.no_weight_decay()
    found = named(lin, t5fx.param_groups(lin, 1e-3))
    assert {"pos_embed", "cls_token"} <= found["old, no decay"]
    found = named(lin, t5fx.param_groups(lin, 1e-3, no_decay=["*.w1", "head.*"]))
    assert "pos_embed" in found["old"] and "head.weight" in found["old, no decay"]
    assert "blocks.0.attn.t5.w1" in found["new, no decay"]


def test_what_is_frozen_is_in_no_group():
    lin = linearized()
    lin.blocks[0].attn.t5.requires_grad_(False)
    assert t5fx.freeze(lin) is lin
    trained = {name for name, p in lin.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in lin.named_parameters() if n.startswith("blocks.1.attn.t5.")}
    found = named(lin, t5fx.param_groups(lin, 1e-3))
    assert found.keys() == {"new", "new, no decay"}
    assert set.union(*found.values()) == trained
    lin.requires_grad_(False)
    with pytest.raises(TrainingError, match="all of which is frozen"):
        t5fx.param_groups(lin, 1e-3)


def test_untouched_models_that_were_compiled(monkeypatch):
    monkeypatch.setattr(backend, "_inductor", lambda options, more: aot_eager)
    shape = Shape(depth=1)
    model = shape.model()
    fast = torch.compile(model, backend="t5", options={"min_tokens": 0})
    with pytest.warns(t5fx.UntrainedWarning):
        fast(shape.images())
    groups = t5fx.param_groups(fast, 1e-3)
    new = {id(p) for g in groups if g["name"].startswith("new") for p in g["params"]}
    assert new == {id(p) for p in t5fx.adapter(fast).parameters()}
    t5fx.freeze(fast)
    assert not any(p.requires_grad for p in model.parameters() if id(p) not in new)
    assert all(p.requires_grad for p in t5fx.adapter(fast).parameters())


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"lr_ratio": -1}, {"weight_decay": -0.1}])
def test_wrong_numbers_and_models(wrong):
    with pytest.raises(TrainingError, match=f"{next(iter(wrong))}: expected a number"):
        t5fx.param_groups(linearized(), **{"lr": 1e-3, **wrong})
    for function in (t5fx.freeze, lambda m: t5fx.param_groups(m, 1e-3)):
        with pytest.raises(TrainingError, match="nothing to train"):
            function(nn.Linear(2, 2))
