"""torch.compile(model, backend="t5"): the same model as `linearize` makes, without touching it."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import vits
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from vits import Shape

import t5fx
from t5fx.backend import adapters as adapters
from t5fx.backend import compile as backend
from t5fx.errors import NothingRewrittenWarning, UntrainedWarning

ALL = {"min_tokens": 0}

pytestmark = [
    pytest.mark.filterwarnings("ignore::t5fx.errors.UntrainedWarning"),
    # Dynamo of itself, where a graph's input is another graph's output
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.fixture
def eager(monkeypatch):
    """Lower without Inductor, which takes seconds a graph."""
    monkeypatch.setattr(backend, "_inductor", lambda options, more: aot_eager)


def compiled(model, options=ALL, **kwargs):
    return torch.compile(model, backend="t5", options=dict(options), **kwargs)


def linearized(model, images, options=ALL):
    return t5fx.linearize(model, (images,), config=t5fx.LinearizeConfig(**options))


def trained(module):
    """Values that matter: with the fresh ones a node's output is close to zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def results(call, images, model, *more):
    """Output and all gradients of a random projection of it."""
    for module in (model, *more):
        module.zero_grad()
    images = images.clone().requires_grad_()
    output = call(images)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output)
    (output * weight).sum().backward()
    found = {"output": output.detach(), "images": images.grad}
    for module in (model, *more):
        found |= {name: p.grad.clone() for name, p in module.named_parameters()}
    return found


def agree(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max()
        assert error <= tolerance * value.abs().max().clamp_min(1e-6), name


def same_everywhere(shape, tolerance, dtype=torch.float32, options=ALL, dynamic=None):
    """The linearized model eagerly and compiled, and the untouched model compiled."""
    torch._dynamo.reset()
    model, images = shape.model().to(dtype), shape.images(dtype)
    lin = linearized(model, images, options)
    fast = compiled(model, options, fullgraph=True, dynamic=dynamic)
    fast(images)
    new = trained(t5fx.adapter(model))
    lin.load_state_dict(new.state_dict(), strict=False)
    expected = results(lin, images, lin)
    agree(results(fast, images, model, new), expected, tolerance)
    slow = torch.compile(lin, backend="t5", fullgraph=True, dynamic=dynamic)
    agree(results(slow, images, lin), expected, tolerance)
    return model, fast, lin


@given(shape=vits.shapes, dynamic=st.sampled_from([None, True]))
@examples(3)
def test_equals_the_linearized_model_on_any_transformer(shape, dynamic):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_inductor", lambda options, more: aot_eager)
        same_everywhere(shape, 1e-9, torch.float64, dynamic=dynamic)


@pytest.mark.parametrize(
    "options",
    [
        {"inner": "mlp2", "inner_loss": "l2", "seed": 4},
        {"locality": "dwc_v", "inner": "gate1", "key_norm": "rms"},
        {"locality": "none", "inner": "mlp3", "key_norm": "instance_center"},
        {"qk_affine": True, "inner": "mlp2", "inner_loss": "l2", "coarse": 0, "mix": "half"},
        {"inner": "linear_projqk", "key_norm": "none", "coarse": 0, "neighborhood": 0},
        {"inner": "none", "key_norm": "none", "locality": "none", "coarse": 0},
        {"overrides": {"blocks.1.*": {"inner": "mlp2"}}},
        {"exclude": ("blocks.0.*",)},
    ],
)
def test_options_are_those_of_linearize(eager, options):
    _, _, lin = same_everywhere(Shape(), 1e-9, torch.float64, {**ALL, **options})
    assert t5fx.report(lin).rewritten


def test_inductor_forward_and_backward():
    same_everywhere(Shape(depth=1, registers=2), 1e-4)


def test_inductor_for_inference_at_many_sizes():
    shape = Shape(registers=2)
    model = shape.model()
    lin = linearized(model, shape.images())
    fast = compiled(model, fullgraph=True, dynamic=True)
    slow = torch.compile(lin, backend="t5", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for grid, batch in (((3, 4), 2), ((5, 6), 3), ((2, 9), 4)):
            images = replace(shape, grid=grid, batch=batch).images()
            torch.testing.assert_close(fast(images), lin(images), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(slow(images), lin(images), atol=1e-5, rtol=1e-4)


def test_equal_nodes_are_compiled_once_for_inference(monkeypatch):
    graphs = []
    monkeypatch.setattr(
        backend, "_inductor", lambda options, more: lambda gm, inputs: graphs.append(gm) or gm
    )
    shape = Shape(depth=3)
    model = shape.model()
    with torch.no_grad():
        expected = linearized(model, shape.images())(shape.images() * 0)
        assert torch.allclose(compiled(model)(shape.images() * 0), expected, atol=1e-6)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert targets.count("invoke_subgraph") == 3
    assert not any("t5fx.ttt" in target for target in targets)


# Identity of the new parameters


def test_parameters_are_those_of_linearize(eager):
    shape = Shape()
    model, images = shape.model(), shape.images()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lin = linearized(model, images, {**ALL, "seed": 11})
    compiled(model, {**ALL, "seed": 11})(images)
    new = t5fx.adapter(model).state_dict()
    assert new.keys() == lin.state_dict().keys() - before.keys()
    assert all(torch.equal(new[k], lin.state_dict()[k]) for k in new)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_parameters_are_the_same_in_every_compilation(eager):
    shape = Shape()
    model = shape.model()
    fast = compiled(model)
    fast(shape.images())
    first = list(t5fx.adapter(model).parameters())
    fast(replace(shape, grid=(5, 5)).images())
    model.train()
    fast(shape.images())
    model.eval()
    with torch.no_grad():
        fast(shape.images())
    compiled(model)(shape.images())
    torch._dynamo.reset()
    fast(shape.images())
    again = list(t5fx.adapter(fast).parameters())
    assert all(a is b for a, b in zip(first, again, strict=True))
    optimizer = torch.optim.SGD(trained(t5fx.adapter(model)).parameters(), lr=1.0)
    before = fast(shape.images().fill_(0.5))
    before.square().sum().backward()
    optimizer.step()
    assert not torch.allclose(fast(shape.images().fill_(0.5)), before)


def test_models_with_the_same_names_share_nothing(eager):
    """Dynamo serves both with one compiled graph."""
    shape = Shape()
    one, two = shape.model(), shape.model()
    images = shape.images()
    fast = [compiled(one), compiled(two)]
    outputs = [f(images) for f in fast]
    trained(t5fx.adapter(one))
    assert not torch.allclose(fast[0](images), outputs[0])
    assert torch.equal(fast[1](images), outputs[1])
    ours = {id(p) for p in t5fx.adapter(one).parameters()}
    assert not ours & {id(p) for p in t5fx.adapter(two).parameters()}


def test_a_compiled_function_serves_any_model(eager):
    shape = Shape()
    one, two = shape.model(), shape.model()
    images = shape.images()
    call = compiled(lambda model, x: model(x))
    call(one, images), call(two, images)
    lin = linearized(one, images)
    for model in (one, two):
        new = t5fx.adapter(model)
        assert all(torch.equal(v, lin.state_dict()[k]) for k, v in new.state_dict().items())
    trained(t5fx.adapter(one))
    torch.testing.assert_close(call(two, images), lin(images))


def test_two_models_in_one_graph(eager):
    shape = Shape()
    student, teacher = shape.model(), shape.model()
    images = shape.images()

    def distance(x):
        return (student(x) - teacher(x)).abs().max()

    assert compiled(distance, fullgraph=True)(images) == 0
    trained(t5fx.adapter(student))
    assert compiled(distance, fullgraph=True)(images) > 0.01
    lin = linearized(teacher, images)
    assert t5fx.adapter(teacher).state_dict().keys() <= lin.state_dict().keys()


def test_parameters_go_with_the_model(eager):
    shape = Shape()
    model = shape.model()
    compiled(model)(shape.images()).sum().backward()
    nodes = [weakref.ref(node) for node in t5fx.adapter(model).nodes().values()]
    assert len(nodes) == 2 and all(ref() is not None for ref in nodes)
    watched = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert watched() is None
    assert all(ref() is None for ref in nodes)
    assert len(adapters._HELD) == 0


def test_parameters_are_moved_and_cast_with_the_model(eager):
    shape = Shape()
    model = shape.model()
    fast = compiled(model)
    fast(shape.images())
    parameters = list(t5fx.adapter(model).parameters())
    model.double()
    assert fast(shape.images(torch.float64)).dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in parameters)
    model.to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in t5fx.adapter(model).parameters())
    assert all(a is b for a, b in zip(parameters, t5fx.adapter(model).parameters(), strict=True))


def test_parameters_may_not_be_cast_apart(eager):
    shape = Shape()
    model = shape.model()
    fast = compiled(model)
    fast(shape.images())
    t5fx.adapter(model).double()
    with pytest.raises(t5fx.T5Error, match=r"blocks\.0\.attn\.t5.*float32.*got torch\.float64"):
        fast(shape.images())


def test_frozen_parameters_and_frozen_model(eager):
    shape = Shape()
    model, images = shape.model().requires_grad_(False), shape.images()
    fast = compiled(model)
    fast(images).sum().backward()
    new = t5fx.adapter(model)
    assert all(p.grad is not None for p in new.parameters())
    assert all(p.grad is None for p in model.parameters())
    new.zero_grad()
    new.requires_grad_(False)
    assert not fast(images).requires_grad
    new.requires_grad_(True)
    fast(images).sum().backward()
    assert all(p.grad is not None for p in new.parameters())


def test_several_options_for_one_model(eager):
    shape = Shape()
    model, images = shape.model(), shape.images()
    one, two = compiled(model), compiled(model, {**ALL, "inner": "mlp2"})
    one(images), two(images)
    with pytest.raises(t5fx.T5Error, match="several options"):
        t5fx.adapter(model)
    new = t5fx.adapter(model, config=t5fx.LinearizeConfig(inner="mlp2"))
    assert "blocks.0.attn.t5.w3" not in new.state_dict()
    assert "blocks.0.attn.t5.w2" in new.state_dict()
    expected = linearized(model, images, {**ALL, "inner": "mlp2"})(images)
    torch.testing.assert_close(two(images), expected)


def test_keys_are_seen_from_any_module(eager):
    shape = Shape()
    model = shape.model()
    whole = nn.ModuleDict({"backbone": model})
    compiled(model)(shape.images())
    keys = set(t5fx.adapter(model).state_dict())
    assert "blocks.1.attn.t5.dwc_q.weight" in keys
    assert set(t5fx.adapter(whole).state_dict()) == {f"backbone.{k}" for k in keys}
    assert "attn.t5.w1" in t5fx.adapter(model.blocks[1]).state_dict()
    with pytest.raises(t5fx.T5Error, match='backend="t5" and called once'):
        t5fx.adapter(shape.model())
    lin = linearized(model, shape.images())
    assert set(t5fx.adapter(lin).state_dict()) == keys


# Adapters


def test_adapters_go_from_linearized_to_compiled_and_back(eager, tmp_path):
    shape = Shape()
    model, images = shape.model(), shape.images()
    lin = linearized(model, images)
    trained(t5fx.adapter(lin))
    path = tmp_path / "adapter.safetensors"
    save_file(t5fx.adapter(lin).state_dict(), path)
    for origin in (lin, t5fx.adapter(lin), path, str(path)):
        fresh = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UntrainedWarning)
            fast = torch.compile(fresh, backend="t5", options={"adapter": origin})
            torch.testing.assert_close(fast(images), lin(images))
        assert not {id(p) for p in lin.parameters()} & {
            id(p) for p in t5fx.adapter(fresh).parameters()
        }
    untrained = linearized(model, images)
    untrained.load_state_dict(t5fx.adapter(fresh).state_dict(), strict=False)
    torch.testing.assert_close(untrained(images), lin(images))


def test_a_linearized_model_as_adapter_brings_its_options(eager):
    shape = Shape()
    model, images = shape.model(), shape.images()
    lin = linearized(model, images, {**ALL, "inner": "mlp2", "exclude": ("blocks.0.*",)})
    trained(t5fx.adapter(lin))
    fast = torch.compile(model, backend="t5", options={"adapter": lin})
    torch.testing.assert_close(fast(images), lin(images))


def test_adapters_that_do_not_fit(eager, tmp_path):
    shape = Shape()
    model, images = shape.model(), shape.images()
    good = t5fx.adapter(linearized(model, images)).state_dict()

    def refused(tensors, match, options=ALL):
        path = tmp_path / "adapter.safetensors"
        save_file(tensors, path)
        with pytest.raises(BackendCompilerFailed, match=match):
            compiled(shape.model(), {**options, "adapter": path})(images)

    refused({"head.weight": torch.ones(2)}, "expected keys such as")
    refused(
        {k: v for k, v in good.items() if not k.endswith("0.attn.t5.w1")}, r"(?s)0\.attn\.t5.*w1"
    )
    refused({**good, "blocks.0.attn.t5.w1": torch.ones(2, 8, 4)}, "size mismatch")
    refused({**good, "blocks.7.attn.t5.w1": torch.ones(2)}, r"blocks\.7\.attn\.t5.*not rewritten")
    refused(good, "not those of the node", {**ALL, "inner": "mlp2"})
    (tmp_path / "adapter.safetensors").write_bytes(b"short")
    with pytest.raises(BackendCompilerFailed, match="expected a safetensors file"):
        compiled(model, {**ALL, "adapter": tmp_path / "adapter.safetensors"})(images)
    with pytest.raises(BackendCompilerFailed, match="path of a safetensors file"):
        compiled(model, {**ALL, "adapter": 3})(images)
    with pytest.raises(t5fx.T5Error, match="no new parameters"):
        t5fx.adapter(model)


def test_unknown_options_are_refused_with_the_valid_ones(eager):
    shape = Shape()
    for options, match in (
        ({"min_token": 0}, r"adapter, mode, inductor, inner.*got 'min_token'"),
        ({"inner": "mlp9"}, "'swiglu'"),
        ({"inductor": 4}, "expected a dict"),
        ({"dynamic": True}, "dynamic"),
    ):
        with pytest.raises(BackendCompilerFailed, match=match):
            compiled(shape.model(), options)(shape.images())


def test_modes_and_inductor_options_reach_inductor(monkeypatch):
    seen = []

    class Inner:
        def __init__(self, mode, options, dynamic):
            seen.append((mode, options))

        def __call__(self, gm, inputs):
            seen.append(torch.compiler.config.cache_key_tag)
            return gm.forward

    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", Inner)
    shape = Shape()
    options = {**ALL, "mode": "max-autotune-no-cudagraphs", "inductor": {"max_fusion_size": 3}}
    compiled(shape.model(), options)(shape.images())
    assert seen[0] == ("max-autotune-no-cudagraphs", {"max_fusion_size": 3})
    assert len(seen[1]) == 16  # our code is part of the key of torch's on-disk caches
    seen.clear()
    big = replace(shape, grid=(12, 12))
    torch.compile(big.model(), backend="t5", mode="reduce-overhead")(big.images())
    assert seen[0] == ("reduce-overhead", {})


# What is left alone


def test_nothing_rewritten_is_said_once_and_compiled_as_it_is(eager):
    shape = Shape()
    model, images = shape.model(), shape.images()
    fast = torch.compile(model, backend="t5")
    with pytest.warns(NothingRewrittenWarning, match="2 x below-break-even"):
        output = fast(images)
    torch.testing.assert_close(output, model(images))
    with warnings.catch_warnings():
        warnings.simplefilter("error", NothingRewrittenWarning)
        fast(replace(shape, grid=(2, 3)).images())
    with pytest.raises(t5fx.T5Error, match="no new parameters"):
        t5fx.adapter(model)


def test_a_model_without_attention_is_said_to_have_none(eager):
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    with pytest.warns(NothingRewrittenWarning, match="found none"):
        compiled(model)(torch.randn(2, 4))


@pytest.mark.parametrize("broken", [False, True])
def test_a_linearized_model_keeps_the_attention_it_was_left(eager, broken):
    shape = Shape(depth=3)
    lin = linearized(shape.model(), shape.images(), {**ALL, "include": ("blocks.1.*",)})
    images = shape.images()
    if broken:
        lin.blocks[1].register_forward_hook(lambda *args: torch._dynamo.graph_break())
    with warnings.catch_warnings():
        warnings.simplefilter("error", NothingRewrittenWarning)
        fast = torch.compile(lin, backend="t5", options=ALL)
        torch.testing.assert_close(fast(images), lin(images))


def test_attention_that_no_module_owns_is_left(eager):
    def attend(q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v)

    q = torch.randn(2, 2, 12, 8)
    fast = compiled(attend, {"locality": "none", **ALL})
    with pytest.warns(
        NothingRewrittenWarning, match="none of its inputs comes from a module's parameter"
    ):
        output = fast(q, q, q)
    torch.testing.assert_close(output, attend(q, q, q))


def test_a_site_that_was_rewritten_stays_so_at_sizes_that_do_not_pay(eager):
    shape = Shape(grid=(12, 12))
    model = shape.model()
    fast = torch.compile(model, backend="t5", dynamic=False)
    fast(shape.images())
    small = shape.images()[..., :8, :8]
    torch.testing.assert_close(fast(small), linearized(model, small)(small))
    other = torch.compile(model, backend="t5", options={"seed": 3})
    with pytest.warns(NothingRewrittenWarning, match="below-break-even"):
        other(small)


def test_a_site_that_symbols_do_not_prove_is_proved_with_numbers(eager):
    """As of patches that `unfold` cuts: Dynamo's second size would be one for all."""

    class Unfolded(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(12, 24)

        def forward(self, images):
            tokens = F.unfold(images, 2, stride=2).mT
            q, k, v = self.qkv(tokens).unsqueeze(1).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v)

    model = Unfolded().eval()
    fast = compiled(model)
    static = t5fx.LinearizeConfig(min_tokens=0, dynamic=False)
    for size in ((8, 12), (12, 8), (10, 6)):
        images = torch.randn(2, 3, *size)
        lin = t5fx.linearize(model, (images,), config=static)
        torch.testing.assert_close(fast(images), lin(images))


def test_untrained_parameters_are_warned_of_once(eager):
    shape = Shape()
    model = shape.model()
    fast = compiled(model)
    with pytest.warns(UntrainedWarning, match=r"2 attentions.*adapter\(model\)"):
        fast(shape.images())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedWarning)
        fast(replace(shape, grid=(2, 3)).images())
        model.train()
        fast(shape.images())


def test_parameters_must_be_the_models_own(eager):
    shape = Shape()
    model = shape.model()
    fast = compiled(model)
    values = {f"_orig_mod.{k}": v.detach() * 1 for k, v in model.named_parameters()}
    with pytest.warns(
        NothingRewrittenWarning, match="none of its inputs comes from a module's parameter"
    ):
        torch.func.functional_call(fast, values, shape.images())


# Ways of compiling


def test_in_place_compilation(eager):
    shape = Shape()
    model, images = shape.model(), shape.images()
    lin = linearized(model, images)
    model.compile(backend="t5", options=ALL)
    torch.testing.assert_close(model(images), lin(images))
    assert set(t5fx.adapter(model).state_dict()) <= set(lin.state_dict())


@pytest.mark.parametrize("in_place", [True, False])
def test_each_block_compiled_apart(eager, in_place):
    """One compiled graph serves all blocks; each has its own parameters, named as in the whole."""
    shape = Shape(depth=3)
    model, images = shape.model(), shape.images()
    options = {**ALL, "grid": shape.grid, "prefix": 1}
    lin = linearized(model, images, options)
    names = list(model.state_dict())
    for i, block in enumerate(model.blocks):
        if in_place:
            block.compile(backend="t5", options=options)
        else:
            model.blocks[i] = compiled(block, options)
    torch.testing.assert_close(model(images), lin(images))
    new = t5fx.adapter(model)
    assert len(new.nodes()) == 3
    assert all(torch.equal(v, lin.state_dict()[k]) for k, v in new.state_dict().items())
    trained(new)
    lin.load_state_dict(new.state_dict(), strict=False)
    torch.testing.assert_close(model(images), lin(images))
    assert not in_place or names == list(model.state_dict())


def test_sites_in_several_graphs(eager):
    shape = Shape(depth=3)
    model, images = shape.model(), shape.images()
    options = {**ALL, "grid": shape.grid, "prefix": 1}
    lin = linearized(model, images, options)
    forward = vits.Layer.forward

    class Broken(vits.Layer):
        def forward(self, x):
            x = forward(self, x)
            torch._dynamo.graph_break()
            return x * 1

    for block in model.blocks:
        block.__class__ = Broken
    fast = compiled(model, options)
    counters.clear()
    torch.testing.assert_close(fast(images), lin(images))
    assert counters["stats"]["unique_graphs"] > 1
    new = t5fx.adapter(model)
    assert all(torch.equal(v, lin.state_dict()[k]) for k, v in new.state_dict().items())
    assert len(new.nodes()) == 3


class Checkpointed(nn.Module):
    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, images):
        vit = self.vit
        x = vit.patch_embed(images).flatten(2).transpose(1, 2)
        for block in vit.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return vit.norm(x)


def test_checkpointed_blocks_are_rewritten_and_still_recomputed(monkeypatch):
    lowered = []

    def lower(gm, inputs):
        lowered.append(gm)
        return aot_eager(gm, inputs)

    monkeypatch.setattr(backend, "_inductor", lambda options, more: lower)
    shape = Shape(class_token=False)
    model, images = shape.model().double(), shape.images(torch.float64)
    lin = linearized(model, images)
    wrapped = Checkpointed(model)
    fast = compiled(wrapped, fullgraph=True)
    fast(images)
    new = trained(t5fx.adapter(model))
    lin.load_state_dict(new.state_dict(), strict=False)
    agree(results(fast, images, model, new), results(lin, images, lin), 1e-9)
    targets = [node.target for node in lowered[0].graph.nodes]
    assert targets.count(torch.ops.higher_order.tag_activation_checkpoint) == 2
    assert torch.ops.t5fx.ttt.default not in targets  # they are inside of the checkpoints


def test_modes_of_autograd_and_autocast(eager):
    shape = Shape()
    model, images = shape.model(), shape.images()
    lin = linearized(model, images)
    fast = compiled(model, fullgraph=True)
    for context in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.enable_grad(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        with context:
            found, expected = fast(images), lin(images)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=2e-2 if context == 3 else 1e-5, rtol=2e-2)
    assert all(not p.is_inference() for p in t5fx.adapter(model).parameters())


def test_as_many_compilations_as_another_backend(eager):
    shape = Shape(depth=1)

    def graphs(backend, **kwargs):
        torch._dynamo.reset()
        counters.clear()
        model = shape.model()
        fast = torch.compile(model, backend=backend, **kwargs)
        for grid in ((3, 4), (4, 4), (5, 6)):
            for batch in (2, 3):
                fast(replace(shape, grid=grid, batch=batch).images())
        assert not counters["graph_break"]
        return counters["stats"]["unique_graphs"]

    assert graphs("t5", options=ALL) == graphs("aot_eager")
    assert graphs("t5", options=ALL, dynamic=True) == graphs("aot_eager", dynamic=True)


def test_threads(eager):
    shape = Shape()
    model, images = shape.model(), shape.images()
    others = [shape.model() for _ in range(3)]
    expected = linearized(model, images)(images)
    outputs = []

    def work(module):
        outputs.append(compiled(module)(images))

    threads = [threading.Thread(target=work, args=(m,)) for m in (model, model, *others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 5
    for output in outputs:
        torch.testing.assert_close(output, expected)
    assert len(list(t5fx.adapter(model).parameters())) == 16


def test_a_failure_names_the_site_and_changes_nothing(eager, monkeypatch):
    shape = Shape()
    model, images = shape.model(), shape.images()
    expected = model(images)

    def fail(*args):
        raise RuntimeError("no such axis")

    with monkeypatch.context() as patch:
        patch.setattr("t5fx.rewrite.sites._free_views", fail)
        with pytest.raises(BackendCompilerFailed, match=r"blocks\.0\.attn.*no such axis.*exclude="):
            compiled(model)(images)
        assert not any(adapters._HELD.get(parameter) for parameter in model.parameters())
    with monkeypatch.context() as patch:
        patch.setattr("t5fx.analysis.policy._measure", fail)
        with pytest.raises(BackendCompilerFailed, match=r"blocks\.0\.attn.*exclude="):
            compiled(model)(images)
        with pytest.warns(NothingRewrittenWarning, match="2 x excluded"):
            compiled(model, {"exclude": ("blocks.*",)})(images)
    torch.testing.assert_close(model(images), expected)
    torch.testing.assert_close(compiled(model)(images), linearized(model, images)(images))


def script(text, **environment):
    tests = os.path.dirname(vits.__file__)
    text = f"import sys; sys.path.insert(0, {tests!r})\n" + textwrap.dedent(text)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_no_import_is_needed_and_the_logs_are_torchs():
    done = script(
        """
        import torch
        from torch import nn

        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.qkv = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48)
            def forward(self, x):
                x = self.embed(x).flatten(2).mT
                q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
                return nn.functional.scaled_dot_product_attention(q, k, v)

        assert "t5" in torch.compiler.list_backends()
        model = Attention().eval()
        with torch.no_grad():
            output = torch.compile(model, backend="t5", options={"min_tokens": 0})(
                torch.randn(1, 3, 32, 32)
            )
        import t5fx
        assert sorted(t5fx.adapter(model).nodes()) == ["t5"]
        print("done", tuple(output.shape))
        """,
        TORCH_LOGS="+t5fx",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done (1, 2, 64, 8)" in done.stdout
    assert "1 attentions rewritten, 0 left" in done.stderr
    assert "t5fx.ttt" in done.stderr


def test_gradients_are_averaged_over_ranks(tmp_path):
    done = script(
        f"""
        import os, torch, vits, t5fx
        import torch.distributed as dist, torch.multiprocessing as mp
        from torch._dynamo.backends.debugging import aot_eager
        from torch.nn.parallel import DistributedDataParallel
        from t5fx.backend import compile as backend

        def work(rank):
            backend._inductor = lambda options, more: aot_eager
            store = dist.FileStore({str(tmp_path / "store")!r}, 2)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
            shape = vits.Shape()
            model = shape.model()
            fast = torch.compile(model, backend="t5", options={{"min_tokens": 0}})
            torch.manual_seed(5)
            images = [shape.images() for _ in range(2)]
            fast(images[0])
            ddp = DistributedDataParallel(fast)
            new = t5fx.adapter(model)
            with ddp.no_sync():
                ddp(images[rank]).square().sum().backward()
            ddp(images[rank]).square().sum().backward()
            found = [p.grad.clone() for p in [*new.parameters(), *model.parameters()]]
            new.zero_grad(), model.zero_grad()
            for image in images:
                (fast(image).square().sum()).backward()
            expected = [p.grad for p in [*new.parameters(), *model.parameters()]]
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)
            dist.destroy_process_group()

        if __name__ == "__main__":
            mp.start_processes(work, nprocs=2, start_method="fork")
            print("done")
        """
    )
    assert "done" in done.stdout, done.stderr[-3000:]


def test_sharded_models_are_refused():
    done = script(
        """
        import torch, vits
        import torch.distributed as dist
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        mesh = dist.device_mesh.DeviceMesh("cpu", [0])
        shape = vits.Shape()
        fast = torch.compile(shape.model(), backend="t5", options={"min_tokens": 0})
        try:
            fully_shard(fast, mesh=mesh)(shape.images())
        except torch._dynamo.exc.BackendCompilerFailed as error:
            print(error)
        """
    )
    assert "linearize the model first" in done.stdout, done.stderr[-3000:]
