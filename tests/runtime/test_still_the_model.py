"""A linearized model is still the model: what its libraries do to it goes on working."""

import copy
import functools
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from vits import Shape

import t5fx
from t5fx.errors import CaptureError, LayoutUnknownError, RefusedCallError
from t5fx.kernels import TTT

ALL = t5fx.LinearizeConfig(min_tokens=0)
STATIC = t5fx.LinearizeConfig(min_tokens=0, dynamic=False)


def vit(shape=None, config=ALL):
    shape = shape or Shape()
    model, images = shape.model(), shape.images()
    return t5fx.linearize(model, (images,), config=config), images


def image(height, width, batch=1):
    return torch.randn(batch, 3, 4 * height, 4 * width)


# --- no dead weights ------------------------------------------------------------------------------


def wrapped_forward(model):
    old = model.forward
    model.forward = lambda x: old(x)


def closure_over_the_module(model):
    for block in model.blocks:
        attention = block.attn

        def forward(x, attention=attention):
            return type(attention).forward(attention, x)

        attention.forward = forward


def partial_of_a_method(model):
    for block in model.blocks:
        block.mlp.forward = functools.partial(type(block.mlp).forward, block.mlp)


def hook_that_holds_a_module(model):
    scale = model.norm
    model.blocks[0].register_forward_hook(lambda module, args, out: scale(out))


@pytest.mark.parametrize(
    "change",
    [wrapped_forward, closure_over_the_module, partial_of_a_method, hook_that_holds_a_module],
)
def test_every_parameter_of_the_copy_reaches_the_output(change):
    shape = Shape()
    model, images = shape.model(), shape.images()
    change(model)
    expected = model(images)
    lin = t5fx.linearize(model, (images,), config=ALL)
    with t5fx.softmax(lin):
        torch.testing.assert_close(lin(images), expected)
    lin(images).square().sum().backward()
    dead = [n for n, p in lin.named_parameters() if p.grad is None]
    assert not dead
    assert all(p.grad is None for p in model.parameters())


def test_a_copy_that_reads_the_originals_tensors_is_refused():
    shape = Shape(depth=1)
    model, images = shape.model(), shape.images()
    hidden = {"scale": model.norm.weight}

    class Outside:
        def __call__(self, x):
            return x * KEPT[0]

    KEPT = [hidden["scale"]]
    globals()["KEPT"] = KEPT
    model.norm.forward = Outside()
    with pytest.raises(CaptureError, match=r"reads 'norm\.weight' of the original"):
        t5fx.linearize(model, (images,), config=ALL)


# --- hooks ----------------------------------------------------------------------------------------


def test_hooks_see_each_modules_own_arguments_and_may_change_them():
    lin, images = vit()
    seen = {}
    for name, module in lin.named_modules():
        if ".t5" not in name:
            module.register_forward_hook(
                lambda m, args, kwargs, out, name=name: seen.update({name: (args, kwargs, out)}),
                with_kwargs=True,
            )
    out = lin(images)
    names = {
        n for n, m in lin.named_modules() if ".t5" not in n and not isinstance(m, nn.ModuleList)
    }
    assert seen.keys() == names
    for name, (args, kwargs, result) in seen.items():
        assert len(args) == 1 and isinstance(args[0], torch.Tensor) and not kwargs, name
        assert isinstance(result, torch.Tensor), name
    handle = lin.blocks[0].attn.qkv.register_forward_hook(lambda m, args, out: out * 0)
    changed = lin(images)
    handle.remove()
    assert not torch.allclose(changed, out)
    handle = lin.blocks[1].attn.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    assert not torch.allclose(lin(images), out)
    handle.remove()
    assert torch.equal(lin(images), out)


def test_an_identity_between_can_be_hooked():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.drop, self.out = nn.Linear(8, 24), nn.Identity(), nn.Dropout(0.0)

        def forward(self, x):
            q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
            y = F.scaled_dot_product_attention(q, k, v).squeeze(1)
            return y + self.out(self.drop(y))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attn = nn.Conv2d(3, 8, 2, 2), Attention()

        def forward(self, x):
            return self.attn(self.embed(x).flatten(2).mT)

    x = torch.randn(1, 3, 8, 8)
    lin = t5fx.linearize(Model().eval(), (x,), config=ALL)
    plain = lin(x)
    lin.attn.drop.register_forward_hook(lambda m, args, out: out * 0)
    torch.testing.assert_close(lin(x), plain / 2)


# --- where the grid of a call comes from ----------------------------------------------------------


class Features(nn.Module):
    """A model with methods of its own around the parts of its forward."""

    def __init__(self):
        super().__init__()
        self.vit = Shape().model()

    def forward_features(self, x):
        return self.vit(x)

    def tokens(self, x):
        x = self.vit.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.vit.prefix.expand(x.shape[0], -1, -1), x], dim=1)

    def forward(self, x):
        return self.forward_features(x).mean(1)


def test_methods_and_parts_run_without_the_models_forward():
    lin = t5fx.linearize(Features().eval(), (image(3, 4),), config=ALL)
    for size in ((3, 4), (5, 2), (2, 5), (1, 7)):
        x = image(*size)
        torch.testing.assert_close(lin.forward_features(x).mean(1), lin(x))
        y = lin.tokens(x)
        for block in lin.vit.blocks:
            y = block(y)
        torch.testing.assert_close(lin.vit.norm(y).mean(1), lin(x))


def test_a_grid_that_is_not_known_is_an_error_and_never_another_calls():
    lin, _ = vit()
    tokens = torch.randn(1, 13, 16)
    lin(image(3, 4))
    with pytest.raises(LayoutUnknownError, match=r"not known.*'patch_embed'"):
        lin.blocks[0](tokens)
    lin.patch_embed(image(4, 5))
    with pytest.raises(LayoutUnknownError, match=r"13 tokens: expected 1 \+ 4 x 5 \+ 0"):
        lin.blocks[0](tokens)
    lin.patch_embed(image(4, 3))
    lin.blocks[0](tokens)
    with pytest.raises(CaptureError, match="3 channels, but got 2"):
        lin(image(3, 4)[:, :2])
    with pytest.raises(LayoutUnknownError, match="not known"):
        lin.blocks[0](tokens)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_recomputed_with_their_own_calls_grid(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = Shape(depth=3).model()
            self.on = True

        def forward(self, x):
            x = self.vit.patch_embed(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.vit.prefix.expand(x.shape[0], -1, -1), x], dim=1)
            for block in self.vit.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant) if self.on else block(x)
            return self.vit.norm(x)

    lin = t5fx.linearize(Checkpointed().eval(), (image(3, 4),), config=ALL)
    a, b = image(12, 8), image(8, 12)
    gradients = []
    for on in (True, False):
        lin.zero_grad()
        lin.on = on
        first, second = lin(a), lin(b)
        (first.square().sum() + 2 * second.pow(3).sum()).backward()
        gradients.append({n: p.grad.clone() for n, p in lin.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_checkpoints_still_save_memory():
    class Model(nn.Module):
        def __init__(self, on):
            super().__init__()
            self.vit, self.on = Shape(depth=4, heads=2, head_dim=8).model(), on

        def forward(self, x):
            x = self.vit.patch_embed(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.vit.prefix.expand(x.shape[0], -1, -1), x], dim=1)
            for block in self.vit.blocks:
                x = checkpoint(block, x, use_reentrant=False) if self.on else block(x)
            return x

    def saved(model, x):
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(x)
        assert out.requires_grad
        return sum(sizes.values())

    x = image(12, 12)
    on, off = (t5fx.linearize(Model(on), (x,), config=ALL) for on in (True, False))
    assert saved(on, x) < saved(off, x) / 3


def test_threads_with_different_sizes_do_not_see_each_other():
    lin, _ = vit(Shape(depth=2))
    inputs = [image(h, 24 // h) for h in (2, 3, 4, 6, 8, 12)] * 3
    expected = [lin(x) for x in inputs]
    results = [None] * len(inputs)

    def work(i):
        results[i] = lin(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_converted_model_inside_another():
    inner, _ = vit(Shape(depth=1))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = inner, copy.deepcopy(inner)

        def forward(self, x):
            y = self.large(F.interpolate(x, scale_factor=2.0))
            return self.small(x).mean(1) + y.mean(1)

    outer, x = Outer(), image(3, 4)
    expected = inner(x).mean(1) + inner(F.interpolate(x, scale_factor=2.0)).mean(1)
    torch.testing.assert_close(outer(x), expected)


def test_replicas_of_data_parallel_run_their_own_parameters():
    lin, images = vit()
    replica = torch.nn.Module._replicate_for_data_parallel
    twin = copy.deepcopy(lin)

    def replicated(module, source):
        new = replica(module)
        new._parameters = dict(source._parameters)
        new._buffers = dict(source._buffers)
        new._modules = {n: replicated(module._modules[n], m) for n, m in source._modules.items()}
        return new

    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
        other = replicated(lin, twin)
        torch.testing.assert_close(other(images), twin(images))


# --- kinds of calls -------------------------------------------------------------------------------


class Guided(nn.Module):
    """A mask among the arguments: None, or what hides keys."""

    def __init__(self):
        super().__init__()
        self.embed, self.attn = nn.Conv2d(3, 8, 2, 2), Masked()

    def forward(self, x, mask=None, empty=False):
        tokens = self.embed(x).flatten(2).mT
        if empty:
            mask = torch.ones(tokens.shape[0], 1, 1, tokens.shape[1], dtype=torch.bool)
        return self.attn(tokens, mask)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(1)


def test_kinds_of_calls_may_alternate_and_a_mask_is_never_assumed_to_be_empty():
    x = torch.randn(2, 3, 8, 8)
    lin = t5fx.linearize(Guided().eval(), (x,), config=ALL)
    expected = lin(x)
    for _ in range(2):
        torch.testing.assert_close(lin(x, empty=True), expected)
        torch.testing.assert_close(lin(x), expected)
    mask = torch.rand(2, 1, 16, 16) > 0.5  # of each query's own
    with pytest.raises(RefusedCallError, match=r"'attn'.*masked"):
        lin(x, mask)
    tokens = lin.embed(x).flatten(2).mT
    torch.testing.assert_close(lin.attn(tokens), expected)
    with pytest.raises(RefusedCallError, match=r"'attn'"):
        lin.attn(tokens, mask)
    with t5fx.softmax(lin):
        assert not torch.allclose(lin(x, mask), expected)


def test_calls_with_a_mask_of_keys_and_with_an_empty_one_may_alternate():
    x = torch.randn(2, 3, 8, 8)
    lin = t5fx.linearize(Guided().eval(), (x,), config=ALL)
    expected = lin(x)
    mask = (torch.arange(16) < torch.tensor([[16], [9]]))[:, None, None]
    hidden = lin(x, mask)
    torch.testing.assert_close(hidden[0], expected[0])
    assert not torch.allclose(hidden[1], expected[1])
    for _ in range(2):
        torch.testing.assert_close(lin(x, empty=True), expected)
        torch.testing.assert_close(lin(x, mask), hidden)
        torch.testing.assert_close(lin(x), expected)
    torch.testing.assert_close(lin.attn(lin.embed(x).flatten(2).mT, mask), hidden)
    # Numbers are looked at in each call.
    numbers = torch.zeros(2, 1, 1, 16).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lin(x, numbers), hidden)
    with pytest.raises(RefusedCallError, match="0 where keys count"):
        lin(x, numbers.clamp(min=-1.0))


def test_an_owner_that_was_told_another_way_of_attention_proves_itself_or_is_refused():
    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.way = nn.Linear(8, 24), "fused"

        def forward(self, x):
            q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
            if self.way == "fused":
                return F.scaled_dot_product_attention(q, k, v).squeeze(1)
            if self.way == "eager":
                return ((q @ k.mT) * 8**-0.5).softmax(-1).matmul(v).squeeze(1)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attn = nn.Conv2d(3, 8, 2, 2), Switched()

        def forward(self, x):
            return self.attn(self.embed(x).flatten(2).mT)

    x = torch.randn(1, 3, 8, 8)
    lin = t5fx.linearize(Model().eval(), (x,), config=ALL)
    expected = lin(x)
    lin.attn.way = "eager"
    torch.testing.assert_close(lin(x), expected)
    lin.attn.way = "causal"
    with pytest.raises(RefusedCallError, match="causal"):
        lin(x)


def called_by_the_owner(module, q, k, v):
    """As transformers has it: a function of the module, whose attributes it reads."""
    mask = getattr(module, "mask", None)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=module.causal)


class Core(nn.Module):
    def __init__(self):
        super().__init__()
        self.mask, self.causal = None, False

    def forward(self, q, k, v):
        return called_by_the_owner(self, q, k, v)


class Around(Core):
    """Attention of a module's own, or in a child that it hands q, k and v to."""

    def __init__(self, core):
        super().__init__()
        self.embed, self.qkv, self.core = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 24), core

    def forward(self, x):
        q, k, v = self.qkv(self.embed(x).flatten(2).mT).unsqueeze(1).chunk(3, -1)
        return (self.core or functools.partial(called_by_the_owner, self))(q, k, v).squeeze(1)


@pytest.mark.parametrize("core", [None, Core])
def test_attributes_that_change_what_attention_does(core):
    x = torch.randn(2, 3, 8, 8)
    lin = t5fx.linearize(Around(core and core()).eval(), (x,), config=ALL)
    at, expected = lin.core or lin, lin(x)
    for mask in (torch.randn(16, 16), torch.ones(16, 16).tril().bool()):
        at.mask = mask
        with pytest.raises(RefusedCallError, match=r"additive-bias|causal"):
            lin(x)
        at.mask = None
        torch.testing.assert_close(lin(x), expected)
    at.causal = True
    with pytest.raises(RefusedCallError, match="causal"):
        lin(x)
    at.causal = False
    torch.testing.assert_close(lin(x), expected)


def test_copies_made_while_softmax_runs_are_linearized():
    lin, images = vit()
    expected = lin(images)
    with t5fx.softmax(lin):
        copies = [copy.deepcopy(lin), pickle.loads(pickle.dumps(lin))]
    for one in copies:
        torch.testing.assert_close(one(images), expected)


def test_function_transforms():
    lin, images = vit()
    expected = lin(images)
    torch.testing.assert_close(torch.vmap(lambda x: lin(x[None])[0])(images), expected)
    given = dict(lin.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(lin, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(given, images)
    expected.square().sum().backward()
    for name, parameter in lin.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_a_call_that_reads_probabilities_since_a_switch_was_turned_is_refused():
    """As transformers' `set_attn_implementation` turns it, a property of the configuration."""

    class Options:
        def __init__(self):
            self.kept = "fused"

        @property
        def way(self):
            return self.kept

    class Switched(nn.Module):
        def __init__(self, options):
            super().__init__()
            self.qkv, self.options = nn.Linear(8, 24), options

        def forward(self, x):
            q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
            if self.options.way == "fused":
                return F.scaled_dot_product_attention(q, k, v).squeeze(1), None
            weights = ((q @ k.mT) * 8**-0.5).softmax(-1)
            return weights.matmul(v).squeeze(1), weights

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.options = nn.Conv2d(3, 8, 2, 2), Options()
            self.attn = Switched(self.options)

        def forward(self, x, probabilities=False):
            out, weights = self.attn(self.embed(x).flatten(2).mT)
            return (out, weights) if probabilities else out

    x = torch.randn(1, 3, 8, 8)
    judged = t5fx.linearize(Model().eval(), (x,), config=ALL)
    expected = judged(x)
    assert judged(x, probabilities=True)[1] is None
    for lin in (copy.deepcopy(judged), judged):
        lin.options.kept = "eager"
        with pytest.raises(RefusedCallError, match="probabilities-used"):
            lin(x, probabilities=True)
        torch.testing.assert_close(lin(x), expected)
        with pytest.raises(RefusedCallError, match="probabilities-used"):
            lin(x, probabilities=True)
        torch.testing.assert_close(torch.compile(lin, backend="eager", fullgraph=True)(x), expected)
        lin.options.kept = "fused"
        out, weights = lin(x, probabilities=True)
        torch.testing.assert_close(out, expected)
        assert weights is None


# --- parents that go around their children --------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
def test_every_node_runs_in_every_mode(mode):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.embed, self.layers = nn.Conv2d(3, 16, 2, 2), nn.TransformerEncoder(layer, 2)

        def forward(self, x):
            return self.layers(self.embed(x).flatten(2).mT)

    x = torch.randn(2, 3, 8, 8)
    lin = t5fx.linearize(Model().eval(), (x,), config=ALL)
    lin.train(mode == "train")
    ran = []
    for name, module in lin.named_modules():
        if isinstance(module, TTT):
            module.register_forward_hook(lambda *a, name=name: ran.append(name))
    grad = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(
        mode, torch.enable_grad
    )
    with grad():
        lin(x)
    assert ran == ["layers.layers.0.self_attn.t5", "layers.layers.1.self_attn.t5"]


def test_a_shared_core_without_parameters_makes_its_callers_owners():
    class Core(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    class Attention(nn.Module):
        def __init__(self, core):
            super().__init__()
            self.qkv, self.core = nn.Linear(8, 24), core

        def forward(self, x):
            return self.core(*self.qkv(x).unsqueeze(1).chunk(3, -1)).squeeze(1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, core = nn.Conv2d(3, 8, 2, 2), Core()
            self.first, self.second = Attention(core), Attention(core)

        def forward(self, x):
            return self.second(self.first(self.embed(x).flatten(2).mT))

    x = torch.randn(1, 3, 8, 8)
    lin = t5fx.linearize(Model(), (x,), config=ALL)
    assert [n for n, m in lin.named_modules() if isinstance(m, TTT)] == ["first.t5", "second.t5"]
    lin(x).sum().backward()
    assert all(p.grad is not None for p in lin.parameters())


# --- editing afterwards ---------------------------------------------------------------------------


def test_parts_can_be_replaced_shortened_and_taken_away():
    lin, images = vit(Shape(depth=3))
    whole = lin(images)
    lin.norm = nn.Identity()
    assert not torch.allclose(lin(images), whole)
    lin.blocks = lin.blocks[:2]
    assert lin(images).shape == whole.shape

    class Scaled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.gain = base, nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.base(x) * self.gain

    before = lin(images)
    lin.blocks[0].attn.qkv = Scaled(lin.blocks[0].attn.qkv)
    torch.testing.assert_close(lin(images), before)
    lin(images).sum().backward()
    assert lin.blocks[0].attn.qkv.gain.grad is not None
    nn.utils.parametrizations.weight_norm(lin.blocks[1].attn.proj)
    torch.testing.assert_close(lin(images), before)


def test_inplace_changes_the_model_that_is_given():
    shape = Shape()
    model, images = shape.model(), shape.images()
    pointers = [p.data_ptr() for p in model.parameters()]
    lin = t5fx.linearize(model, (images,), config=ALL, inplace=True)
    assert lin is model and t5fx.report(model).rewritten
    assert [p.data_ptr() for n, p in lin.named_parameters() if ".t5." not in n] == pointers


def test_example_inputs_of_a_call_inside_a_pipeline():
    model, images = Shape(depth=1).model(), Shape().images()

    def pipeline():
        try:
            return model(images.double().float())
        except Exception as error:  # as pipelines do
            raise AssertionError from error

    args, kwargs = t5fx.example_inputs(model, pipeline)
    assert torch.equal(args[0], images) and not kwargs
    assert not model._forward_pre_hooks
    with pytest.raises(t5fx.T5Error, match="ended without"):
        t5fx.example_inputs(model, lambda: None)
