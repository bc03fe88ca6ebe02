"""What a trace leaves in a model: nothing."""

import pytest
import torch
from torch import nn

from t5fx.frontend.capture import capture
from t5fx.frontend.unchanged import unchanged


class Tables:
    def __init__(self):
        self.sizes, self.current = {}, None


#: What the layers of the running `Collects` returned.
collected = []


class Collects(nn.Module):
    """As transformers' models with `capture_outputs`: hooks that the first call adds collect what
    its layers return.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.hooked = False

    def forward(self, x):
        if not self.hooked:
            self.hooked = True
            for layer in self.layers:
                layer.register_forward_hook(lambda _m, _args, output: collected.append(output))
        collected.clear()
        self.layers(x)
        if type(x.shape[0]) is not int:
            raise ValueError("sizes must be numbers")
        return torch.stack(collected)


def test_hooks_that_the_first_call_adds_are_there_once_in_each_attempt():
    model, x = Collects(), torch.randn(3, 4)
    captured = capture(model, (x,), {}, dynamic=None)
    assert captured.note == "static sizes (dynamic sizes failed: sizes must be numbers)"
    (shown,) = captured.graph.output_node().args[0]
    assert shown.meta["val"].shape == (2, 3, 4)
    assert not model.hooked and not any(layer._forward_hooks for layer in model.layers)
    assert model(x).shape == (2, 3, 4)


def first(*_args):
    pass


def second(*_args):
    pass


def fails_halfway(model):
    next(iter(model.handles)).remove()
    model[0].register_forward_hook(first, with_kwargs=True, always_call=True)
    model[0].register_full_backward_hook(first)
    model.add_module("more", nn.Linear(2, 2))
    model.register_buffer("table", torch.ones(2))
    model.known["kept"], model.known["more"] = torch.zeros(2), 1
    model.names.add("b")
    model.listed[0].current = model.tables.current = torch.ones(2)
    model.tables.sizes[3] = torch.ones(2)
    model.listed.append(Tables())
    del model.tables
    raise KeyError


def test_everything_that_a_module_has_is_as_before():
    model = nn.Sequential(nn.Linear(2, 2))
    model.tables, model.listed = Tables(), [Tables()]
    model.known, model.names = {"kept": torch.ones(2)}, {"a"}
    model.handles = [model[0].register_forward_pre_hook(hook) for hook in (first, second)]
    kept, hooks = model.known["kept"], list(model[0]._forward_pre_hooks.items())
    with pytest.raises(KeyError), unchanged(model):
        fails_halfway(model)
    assert list(model[0]._forward_pre_hooks.items()) == hooks
    assert not model[0]._forward_hooks and not model[0]._forward_hooks_with_kwargs
    assert not model[0]._forward_hooks_always_called and not model[0]._backward_hooks
    assert [name for name, _ in model.named_modules()] == ["", "0"]
    assert not model._buffers and model.names == {"a"}
    assert list(model.known) == ["kept"] and model.known["kept"] is kept
    assert len(model.listed) == 1 and model.listed[0].current is None
    assert model.tables.current is None and model.tables.sizes == {}
    model.handles[1].remove()
    assert list(model[0]._forward_pre_hooks.values()) == [first]
