"""`linearize(..., finetune=...)`: any callable is a hook."""

import pytest
import torch
from torch import nn
from vits import Shape

import t5fx
from t5fx.errors import ConfigError, HookError
from t5fx.kernels import TTT

SHAPE = Shape(depth=1)
CONFIG = t5fx.LinearizeConfig(min_tokens=0)


def linearized(finetune):
    return t5fx.linearize(SHAPE.model(), (SHAPE.images(),), config=CONFIG, finetune=finetune)


def test_hook_gets_module_and_report_and_changes_in_place():
    seen = []

    def hook(module, report):
        seen.append((module, report))
        with torch.no_grad():
            for node in module.modules():
                if isinstance(node, TTT):
                    node.w1.zero_()

    lin = linearized(hook)
    assert len(seen) == 1 and seen[0][0] is lin and seen[0][1] is t5fx.report(lin)
    assert not lin.blocks[0].attn.t5.w1.any() and lin.blocks[0].attn.t5.w2.any()


def test_hooks_compose_in_order_and_may_return_another_module():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    order = []

    def first(module, report):
        order.append(type(module).__name__)
        return Wrapped(module)

    def second(module, report):
        order.append(type(module).__name__)

    result = linearized([first, second])
    assert isinstance(result, Wrapped) and order == ["ViT", "Wrapped"]


def test_hook_on_a_graph_module():
    model = SHAPE.model()
    exported = torch.export.export(model, (SHAPE.images(),), strict=False).module()
    seen = []
    result = t5fx.linearize(
        exported,
        config=t5fx.LinearizeConfig(min_tokens=0),
        finetune=lambda module, report: seen.append(len(report.rewritten)),
    )
    assert isinstance(result, torch.fx.GraphModule) and seen == [1]


def test_failing_hook_keeps_what_was_trained():
    def train(module, report):
        with torch.no_grad():
            module.blocks[0].attn.t5.w1.fill_(7)

    def fail(module, report):
        raise RuntimeError("no space left")

    with pytest.raises(HookError, match="fail failed with RuntimeError: no space left") as caught:
        linearized([train, fail])
    assert (caught.value.module.blocks[0].attn.t5.w1 == 7).all()


def test_interrupted_hook_keeps_what_was_trained():
    def train(module, report):
        train.module = module
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        linearized([lambda module, report: None, train])
    assert caught.value.module is train.module
    assert "`.module`" in caught.value.__notes__[0]


@pytest.mark.parametrize("hook", [3, "freeze", [None]])
def test_what_cannot_be_called_is_refused_before_any_work(hook, monkeypatch):
    monkeypatch.setattr("t5fx.api.build", None)
    with pytest.raises(ConfigError, match="finetune: expected a callable"):
        linearized(hook)


def test_hook_that_returns_no_module():
    with pytest.raises(HookError, match=r"expected an nn.Module, or None .* got a int"):
        linearized(lambda module, report: 3)
