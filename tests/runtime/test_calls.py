"""Calls like the original's: signatures, return types, autocast blocks, hooks, errors, FSDP."""

import copy
import dataclasses
import inspect
import pickle
import sys
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.export import Dim
from vits import Shape

import t5fx
from t5fx.errors import CaptureError
from t5fx.rewrite.forms import constants_of
from t5fx.runtime.lookup import runtimes
from t5fx.runtime.state import KEPT

STATIC = t5fx.LinearizeConfig(min_tokens=0, dynamic=False)
DYNAMIC = t5fx.LinearizeConfig(min_tokens=0)


class Wrapped(nn.Module):
    """A vision transformer whose outputs go through a function."""

    def __init__(self, after):
        super().__init__()
        self.vit, self.after = Shape(depth=1).model(), after

    def forward(self, x, *, scale: float = 1.0):
        return self.after(self.vit(x) * scale)


@dataclasses.dataclass
class Inner:
    logits: torch.Tensor


@dataclasses.dataclass
class Outputs:
    main: Inner
    more: list[Inner]
    loss: Any = None


class Pair(NamedTuple):
    logits: torch.Tensor
    loss: Any = None


def test_forward_has_the_signature_of_the_original():
    model, images = Wrapped(lambda y: y).eval(), Shape().images()
    lin = t5fx.linearize(model, (images,), config=STATIC)
    for same in (lin, copy.deepcopy(lin)):
        assert inspect.signature(same.forward) == inspect.signature(model.forward)
        assert type(same) is Wrapped
        assert torch.equal(same(images), lin(images))
    attention = lin.vit.blocks[0].attn
    assert inspect.signature(attention.forward) == inspect.signature(
        model.vit.blocks[0].attn.forward
    )


def test_the_signature_survives_pickle():
    model, images = Shape(depth=1).model(), Shape().images()
    lin = t5fx.linearize(model, (images,), config=STATIC)
    again = pickle.loads(pickle.dumps(lin))
    assert inspect.signature(again.forward) == inspect.signature(model.forward)
    assert torch.equal(again(images), lin(images))
    assert torch.equal(pickle.loads(pickle.dumps(again))(images), lin(images))


def test_a_linearized_model_exports_with_dynamic_shapes():
    images = Shape().images()
    lin = t5fx.linearize(Shape(depth=1).model(), (images,), config=DYNAMIC)
    shapes = ({0: Dim.AUTO},)
    program = torch.export.export(lin, (images,), strict=False, dynamic_shapes=shapes)
    other = torch.randn(5, *images.shape[1:])
    torch.testing.assert_close(program.module()(other), lin(other))


def test_models_return_what_the_original_returns():
    images = Shape().images()
    pair = t5fx.linearize(Wrapped(Pair).eval(), (images,), config=STATIC)(images)
    assert type(pair) is Pair and pair.loss is None

    def outputs(y):
        return Outputs(Inner(y), [Inner(y + 1), Inner(y + 2)])

    lin = t5fx.linearize(Wrapped(outputs).eval(), (images,), config=STATIC)
    got = lin(images)
    assert type(got) is Outputs and type(got.more[1]) is Inner and got.loss is None
    torch.testing.assert_close(got.more[1].logits, got.main.logits + 2)
    compiled = torch.compile(lin, backend="aot_eager", fullgraph=True)(images)
    torch.testing.assert_close(compiled.main.logits, got.main.logits)


class Mixed(nn.Module):
    """Attention inside an autocast block, itself inside one without gradients where asked for."""

    def __init__(self, frozen=False):
        super().__init__()
        self.vit, self.head, self.frozen = Shape(depth=1).model(), nn.Linear(16, 2), frozen

    def forward(self, x):
        if not self.frozen:
            return self.head(self.mixed(x))
        with torch.no_grad():
            y = self.mixed(x)
        return self.head(y)

    def mixed(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.vit(x)
        return y.float()


def _autocast():
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return depth, torch.is_autocast_cache_enabled(), enabled, dtype


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_blocks_are_looked_into(frozen):
    torch.manual_seed(0)
    model, images = Mixed(frozen).eval(), Shape().images()
    lin = t5fx.linearize(model, (images,), config=STATIC)
    assert [s.fqn for s in t5fx.report(lin).rewritten] == ["vit.blocks.0.attn"]
    plain = t5fx.linearize(model.vit, (images,), config=STATIC)
    plain.load_state_dict(lin.vit.state_dict())
    before = _autocast()
    out = lin(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(images)
    torch.testing.assert_close(out, model.head(expected.float()), rtol=2e-2, atol=2e-2)
    out.sum().backward()
    assert (lin.vit.blocks[0].attn.t5.w1.grad is None) == frozen
    assert _autocast() == before and torch.is_grad_enabled()


def test_an_error_in_an_autocast_block_leaves_no_mode_behind():
    images = Shape().images()
    lin = t5fx.linearize(Mixed(frozen=True).eval(), (images,), config=STATIC)

    def fail(*_):
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
        raise ZeroDivisionError

    before, expected = _autocast(), lin(images)
    hook = lin.vit.blocks[0].attn.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        lin(images)
    hook.remove()
    assert _autocast() == before and torch.is_grad_enabled()
    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        inside = _autocast()
        hook = lin.vit.blocks[0].attn.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            lin(images)
        hook.remove()
        assert _autocast() == inside and not torch.is_grad_enabled()
    assert torch.equal(lin(images), expected)


@pytest.mark.skipif(
    not hasattr(torch.amp.autocast_mode, "_UnmanagedAutocast"),
    reason="this Dynamo cannot follow the ends of autocast blocks",
)
def test_autocast_blocks_compile():
    images = Shape().images()
    lin = t5fx.linearize(Mixed().eval(), (images,), config=STATIC)
    compiled = torch.compile(lin, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), lin(images))


def test_hooks_are_the_copys_and_do_not_see_traces():
    model, images, seen = Shape(depth=1).model(), Shape().images(), []

    def hook(*args, **kwargs):
        seen.append(args)

    attention = model.blocks[0].attn
    attention.register_forward_hook(hook, with_kwargs=True, always_call=True)
    attention.register_forward_pre_hook(hook, with_kwargs=True)
    attention.register_full_backward_hook(hook)
    lin = t5fx.linearize(model, (images,), config=STATIC)
    assert t5fx.explain(model, (images,), config=STATIC).rewritten
    assert not seen
    lin(images).sum().backward()
    assert len(seen) == 3 and {id(s[0]) for s in seen} == {id(lin.blocks[0].attn)}
    model(images).sum().backward()
    assert len(seen) == 6, "the given model keeps its hooks"


@pytest.mark.filterwarnings("ignore:The tensor attribute")  # torch.export's, of the old hook
def test_parametrizations_and_hooks_that_compute_weights_stay():
    model, images = Shape(depth=1).model(), Shape().images()
    nn.utils.parametrizations.weight_norm(model.blocks[0].attn.qkv)
    nn.utils.spectral_norm(model.blocks[0].attn.proj)
    lin = t5fx.linearize(model, (images,), config=STATIC)
    lin(images).sum().backward()
    assert lin.blocks[0].attn.qkv.parametrizations.weight.original0.grad is not None
    assert lin.blocks[0].attn.proj.weight_orig.grad is not None


def test_a_model_that_cannot_be_copied():
    model, images = Shape(depth=1).model(), Shape().images()
    model.computed = model.prefix * 2
    with pytest.raises(CaptureError, match=r"copy\.deepcopy can copy.*remove_weight_norm"):
        t5fx.linearize(model, (images,), config=STATIC)


def test_wrong_calls_say_what_is_wrong():
    model, images = Shape(depth=1).model(), Shape().images()
    with pytest.raises(CaptureError, match=r"kwargs: expected a mapping.*got a tuple"):
        t5fx.explain(model, (), (images,))
    lin = t5fx.linearize(model, (images,), config=STATIC)
    with pytest.raises(
        CaptureError, match=r"a call of ViT that torch.export can trace.*3 channels, but got 2"
    ):
        lin(images[:, :2])
    assert lin(images).isfinite().all()


def test_floats_make_no_new_kind_of_call_and_kinds_are_bounded():
    images = Shape().images()
    lin = t5fx.linearize(Wrapped(lambda y: y).eval(), (images,), config=STATIC)
    runtime = next(runtimes(lin))
    reference = lin(images)
    for scale in (2.0, -1.0, 0.5):
        torch.testing.assert_close(lin(images, scale=scale), scale * reference)
    assert lin(images, scale=float("nan")).isnan().all()
    assert len(runtime.kinds) == 2
    constants = constants_of([float("nan"), 1, images])
    assert constants == constants_of([2.0, 1, images])
    assert len({constants_of([v]) for v in (None, 1, True, "1", 1.0)}) == 5
    for _ in range(KEPT):
        runtime.keep(runtime.kinds[-1])
        runtime.keep_form("vit.blocks.0.attn", runtime.forms["vit.blocks.0.attn"][-1])
    assert len(runtime.kinds) == KEPT == len(runtime.forms["vit.blocks.0.attn"])


def test_a_compiled_call_without_a_capture_says_what_to_do():
    images = Shape().images()
    lin = t5fx.linearize(Shape(depth=1).model(), (images,), config=STATIC).train()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call the model once\s.*without"):
        torch.compile(lin, backend="aot_eager", fullgraph=True)(images)
    lin(images)
    torch._dynamo.reset()
    compiled = torch.compile(lin, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), lin(images))


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this one process."""
    if sys.platform == "win32" or not dist.is_available():
        pytest.skip("needs torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_models_are_captured_anew(mesh):
    from torch.distributed.fsdp import fully_shard

    images = Shape().images()
    lin = t5fx.linearize(Shape().model(), (images,), config=STATIC)
    plain = copy.deepcopy(lin)
    for block in lin.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(lin, mesh=mesh)
    outputs = lin.train()(images)
    expected = plain.train()(images)
    torch.testing.assert_close(outputs, expected)
    outputs.sum().backward()
    expected.sum().backward()
    gradients = {n: p.grad for n, p in lin.named_parameters()}
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name].full_tensor(), parameter.grad)
