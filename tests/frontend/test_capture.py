"""Capturing: calls of every kind, and what is judged anew."""

import copy
import math
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vits import Shape

import t5fx
from t5fx.errors import CaptureError, NothingRewrittenError, RefusedCallError
from t5fx.frontend.calls import Signature
from t5fx.frontend.capture import capture
from t5fx.frontend.copies import duplicate
from t5fx.runtime.lookup import runtimes

ALL = t5fx.LinearizeConfig(min_tokens=0)


class Flexible(nn.Module):
    """A model with optional arguments of every kind around one attention."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, 2)

    def forward(self, x, scale: float = 1.0, mask=None, *, extra=None, as_dict=True, **more):
        t = self.embed(x).flatten(2).transpose(1, 2).unsqueeze(1)
        out = F.scaled_dot_product_attention(t, t, t, attn_mask=mask) * scale
        if extra is not None:
            out = out + extra[0] * extra[1]["b"]
        for value in more.values():
            out = out + value
        return {"out": out, "none": None} if as_dict else (out, scale)


def test_calls_of_every_kind():
    torch.manual_seed(0)
    model, x = Flexible().eval(), torch.randn(2, 3, 8, 8)
    lin = t5fx.linearize(model, (x,), config=ALL)
    base = lin(x)["out"]
    assert lin(x)["none"] is None
    runtime = next(runtimes(lin))
    for call in (lambda: lin(x=x), lambda: lin(x, 1.0), lambda: lin(x, mask=None, as_dict=True)):
        assert torch.equal(call()["out"], base)
    assert len(runtime.kinds) == 1
    torch.testing.assert_close(lin(x, scale=2.0)["out"], 2 * base)
    out, scale = lin(x, 3.0, as_dict=False)
    torch.testing.assert_close(out, 3 * base)
    assert scale == 3.0
    nested = lin(x, extra=[torch.ones(1), {"b": torch.full((1,), 5.0)}])["out"]
    torch.testing.assert_close(nested, base + 5)
    torch.testing.assert_close(lin(x, bonus=torch.ones(1))["out"], base + 1)
    count = len(runtime.kinds)
    lin(x, extra=[torch.zeros(1), {"b": torch.zeros(1)}])
    lin(x, 3.0, as_dict=False)
    assert len(runtime.kinds) == count == 5
    with pytest.raises(TypeError):
        lin()
    with pytest.raises(RefusedCallError, match="masked"):
        lin(x, mask=torch.rand(16, 16) > 0.5)
    assert torch.equal(lin(x)["out"], base)


class Layer:
    def __init__(self, keys):
        self.keys, self.length, self.device = keys, keys.shape[1], keys.device


class Cache:
    """As transformers' caches: no dataclass, no pytree; tensors in attributes of attributes."""

    def __init__(self, *layers):
        self.layers, self.name, self.index = list(layers), "cache", {"seen": 3}


class WithCache(Flexible):
    def forward(self, x):
        t = self.embed(x).flatten(2).mT
        return F.scaled_dot_product_attention(t[:, None], t[:, None], t[:, None]), Cache(Layer(t))


def test_objects_around_tensors_among_the_outputs():
    model = WithCache()
    lin = t5fx.linearize(model, (torch.randn(2, 3, 8, 8),), config=ALL)
    for size in ((2, 3, 8, 8), (1, 3, 4, 12)):
        x = torch.randn(size)
        _, cache = lin(x)
        assert (type(cache), cache.name, cache.index) == (Cache, "cache", {"seen": 3})
        (layer,) = cache.layers
        assert (type(layer), layer.device) == (Layer, x.device)
        torch.testing.assert_close(layer.keys, model.embed(x).flatten(2).mT)
        assert layer.length == layer.keys.shape[1]


def test_varargs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(8, 8, 1)

        def forward(self, *images, weight=1.0):
            t = self.embed(torch.cat(images, 1)).flatten(2).transpose(1, 2).unsqueeze(1)
            return F.scaled_dot_product_attention(t, t, t) * weight

    a, b = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    lin = t5fx.linearize(Model(), (a, b), config=ALL)
    assert lin(a, b).shape == (2, 1, 9, 8)
    torch.testing.assert_close(lin(a, b, weight=2.0), 2 * lin(a, b))


def test_blocks_without_gradients_are_looked_into():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.head = Shape(depth=1).model(), nn.Linear(16, 2)

        def forward(self, x):
            with torch.no_grad():
                x = self.frozen(x)
            return self.head(x)

    images = Shape().images()
    lin = t5fx.linearize(Model().eval(), (images,), config=ALL)
    assert [s.fqn for s in t5fx.report(lin).rewritten] == ["frozen.blocks.0.attn"]
    lin(images).sum().backward()
    assert lin.head.weight.grad is not None
    assert lin.frozen.blocks[0].attn.t5.w1.grad is None
    assert torch.is_grad_enabled()
    broken = torch.ones_like(images)[:, :2]
    with pytest.raises(Exception, match=r"channel|size|shape"):
        lin(broken)
    assert torch.is_grad_enabled()


def test_explain_captures_static_and_linearize_dynamic():
    model, images = Shape().model(), Shape().images()
    assert "static" in t5fx.explain(model, (images,)).capture
    lin = t5fx.linearize(model, (images,), config=ALL)
    assert t5fx.report(lin).capture.startswith("dynamic sizes: images [s")


def test_what_dynamic_sizes_cannot_do_is_captured_static():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = Shape(depth=1).model()

        def forward(self, x):
            if type(x.shape[2]) is not int:
                raise ValueError("sizes must be numbers")
            return self.vit(x)

    images = Shape().images()
    lin = t5fx.linearize(Fixed().eval(), (images,), config=ALL)
    assert t5fx.report(lin).capture == "static sizes (dynamic sizes failed: sizes must be numbers)"
    assert lin(images).shape == Fixed()(images).shape
    assert lin(images[:1]).shape[0] == 1


def test_sizes_that_become_long_formulas_are_captured_static():
    """As of a grid that each block pads to whole windows, for which torch takes minutes."""

    class Long(Flexible):
        def forward(self, x):
            size = sum((x.shape[2] + i) // (i + 2) for i in range(30))
            return super().forward(x + x.new_zeros(size).sum())

    image = torch.randn(2, 3, 16, 24)
    lin = t5fx.linearize(Long().eval(), (image,), config=ALL)
    shown = t5fx.report(lin).capture
    assert "dynamic sizes failed: a size became a formula of" in shown
    (site,) = t5fx.report(lin).sites
    other = lin(torch.randn(1, 3, 24, 16))["out"]  # judged by itself
    assert other.shape[1] == 1 and math.prod(site.grid) == lin(image)["out"].shape[2]


def test_sizes_stay_dynamic_where_only_one_of_them_decides_between_broadcasts():
    class Model(nn.Module):
        def forward(self, x, mask):
            heads = mask.repeat_interleave(2, 0).view(x.shape[0], 2, -1, mask.shape[-1])
            return (x @ x.mT).unsqueeze(1) + heads[..., :1]

    captured = capture(Model(), (torch.ones(3, 4, 6), torch.ones(3, 1, 5)), {}, dynamic=None)
    assert captured.dynamic
    assert captured.guards.accept([torch.ones(5, 7, 6), torch.ones(5, 1, 5)]) is not None
    assert captured.guards.accept([torch.ones(5, 7, 6), torch.ones(5, 2, 5)]) is None


def test_dynamic_says_what_is_asked_for():
    model, images = Shape(depth=1).model(), Shape().images()
    lin = t5fx.linearize(model, (images,), config=replace(ALL, dynamic=False))
    assert t5fx.report(lin).capture == "static sizes (asked for)"

    class Fixed(nn.Module):
        def forward(self, x):
            if type(x.shape[2]) is not int:
                raise ValueError("sizes must be numbers")
            return model(x)

    with pytest.raises(CaptureError, match="sizes must be numbers"):
        t5fx.linearize(Fixed(), (images,), config=replace(ALL, dynamic=True))


def test_threads_that_need_the_same_capture_share_it():
    static = t5fx.LinearizeConfig(min_tokens=0, dynamic=False)
    lin = t5fx.linearize(Shape(depth=1).model(), (Shape().images(),), config=static)
    images = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(lin)(images)
    results = [None] * 4

    def work(i):
        results[i] = lin(images)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results)
    assert len(next(runtimes(lin)).kinds) == 2


def test_contexts():
    images = Shape().images()
    with torch.no_grad():
        lin = t5fx.linearize(Shape().model(), (images,), config=ALL)
        assert not lin(images).requires_grad
    assert lin(images).requires_grad
    with torch.inference_mode():
        assert torch.equal(lin(images), lin(images))
        fresh = t5fx.linearize(Shape().model(), (images.clone(),), config=ALL)
    fresh(images).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lin(images)
    torch.testing.assert_close(out.float(), lin(images), rtol=0.1, atol=0.1)


def test_signature_brings_calls_to_one_form():
    signature = Signature(Flexible().forward)
    x = torch.zeros(1)
    assert signature.bind((x, 1.0), {"mask": None}) == ((), {"x": x})
    assert signature.bind((), {"more": 2, "scale": 2.0, "x": x})[1].keys() == {"x", "scale", "more"}
    assert signature.bind((x, 1), {})[1] == {"x": x, "scale": 1}  # an int is not the default 1.0


def test_errors_say_what_to_do():
    images = Shape().images()
    with pytest.raises(CaptureError, match=r"write \(x,\)"):
        t5fx.linearize(Shape().model(), images)
    with pytest.raises(CaptureError, match=r"expected an nn\.Module"):
        t5fx.explain(lambda x: x, (images,))
    with pytest.raises(NothingRewrittenError, match="min_tokens=0"):
        t5fx.linearize(Shape().model(), (images,))
    with pytest.raises(NothingRewrittenError, match="found none"):
        t5fx.linearize(nn.Linear(2, 2), (torch.zeros(1, 2),))

    class Untraceable(nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    with pytest.raises(CaptureError, match="Untraceable failed with"):
        t5fx.linearize(Untraceable(), (images,))


def test_a_table_made_in_the_first_call_is_not_a_traces():
    class Tables:
        table = None

        def __call__(self, x):
            if self.table is None:
                self.table = torch.arange(1.0, 9.0, device=x.device)
            return x * self.table

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = Tables()

        def forward(self, x):
            return self.tables(x[:4]) if x.shape[0] > 4 else self.tables(x)

    model, x = Model(), torch.ones(6, 8)
    for _ in range(2):
        capture(model, (x,), {}, dynamic=None)
        assert model.tables.table is None
    torch.testing.assert_close(model(x), torch.arange(1.0, 9.0).expand(4, 8))


def test_a_call_that_does_not_use_what_a_rewritten_module_returns_is_refused():
    """The graph of such a call says nothing of the module, which is run all the same."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, t, repeat):
            return F.scaled_dot_product_attention(t, t, t) * self.scale * repeat

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.block = nn.Conv2d(3, 8, 2, 2), Block()

        def forward(self, x, early=False):
            t = self.embed(x).flatten(2).transpose(1, 2).unsqueeze(1)
            out = self.block(t, 2 if early else 1)
            return t if early else out

    x = torch.randn(2, 3, 8, 8)
    lin = t5fx.linearize(Model(), (x,), config=ALL)
    with pytest.raises(RefusedCallError, match="uses the attention of 'block', which was"):
        lin(x, early=True)
    with t5fx.softmax(lin):
        assert lin(x, early=True).shape == lin(x).shape


def scripted_block(model):
    model.blocks[1] = torch.jit.script(nn.Sequential(nn.Linear(64, 64)))
    return model


@pytest.mark.parametrize(
    ("change", "convert", "said"),
    [
        (lambda m: torch.jit.script(nn.Linear(2, 2)), lambda x: x, "it is a TorchScript program"),
        (scripted_block, lambda x: x, r"'blocks\.1' is a TorchScript program"),
        (
            lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}),
            lambda x: x,
            r"'blocks\.0\.attn\.qkv' was quantized by torch\.ao\.quantization",
        ),
        (lambda m: m.half(), lambda x: x, "parameters are of float16 and the arguments of float32"),
        (lambda m: m, lambda x: x.double(), "are of float32 and the arguments of float64"),
        (lambda m: m.to("meta"), lambda x: x, "parameters are on meta and the arguments on cpu"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch calls both ways deprecated
def test_what_was_done_to_a_model_is_named(change, convert, said):
    model = change(Shape().model())
    with pytest.raises(CaptureError, match=said):
        t5fx.linearize(model, (convert(Shape().images()),))


@pytest.mark.parametrize("share", [False, True])
def test_a_copy_has_empty_containers_of_its_own(share):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].known = model[1].known = {}
    model[0].number = torch.ones(2)  # a tensor of which nobody may ask whether it is true
    twin = duplicate(model, share=share)
    twin.register_forward_hook(lambda *_: None)
    twin[0].known["key"] = 1
    assert twin[1].known is twin[0].known
    assert not model[0].known and not model._forward_hooks and not twin[0]._forward_hooks
