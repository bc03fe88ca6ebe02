"""Properties of rewritten graphs, on vision transformers of every description."""

import copy
import io

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from vits import SPELLINGS, Shape, shapes

import t5fx
from t5fx.errors import AlreadyLinearizedError
from t5fx.kernels import TTT, ttt

ALL = t5fx.LinearizeConfig(min_tokens=0)
#: Sums that torch 2.11 and 2.15 both give.
FRESH = {"w1": -0.043036, "dwc_k.weight": -0.951142}
STATIC = t5fx.LinearizeConfig(min_tokens=0, dynamic=False)


def linearized(shape: Shape, **options) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    model, images = shape.model(), shape.images()
    config = t5fx.LinearizeConfig(**{"min_tokens": 0, "dynamic": False, **options})
    return model, t5fx.linearize(model, (images,), config=config), images


def by_hand(model: nn.Module, lin: nn.Module, shape: Shape, images: torch.Tensor) -> torch.Tensor:
    """The contract, spelled out: the original's own code with its attention replaced."""
    model = copy.deepcopy(model)
    sizes = [n // shape.patch for n in images.shape[-2:]]

    for i, block in enumerate(model.blocks):
        node = lin.get_submodule(f"blocks.{i}.attn.t5")

        def attend(q, k, v, node=node):
            conv = [node.dwc_q.weight, node.dwc_q.bias, node.dwc_k.weight, node.dwc_k.bias]
            return ttt(
                *(q, k, v, [node.w1, node.w2, node.w3], conv, node.gate),
                scale=shape.head_dim**-0.5,
                grid=sizes,
                prefix=shape.class_token + shape.registers,
                neighborhood=5,
                coarse=8,
            )

        block.attn.attend = attend
    return model(images)


@given(shapes)
def test_every_site_is_found_and_equals_the_contract(shape):
    model, lin, images = linearized(shape)
    sites = t5fx.report(lin).sites
    assert [s.fqn for s in sites] == [f"blocks.{i}.attn" for i in range(shape.depth)]
    for site in sites:
        assert (site.status, site.num_tokens) == ("rewritten", shape.tokens)
        assert (site.num_heads, site.head_dim) == (shape.heads, shape.head_dim)
        assert (site.prefix, site.suffix) == (shape.class_token + shape.registers, 0)
        assert site.grid == tuple(n for n in shape.grid)
    out = lin(images)
    torch.testing.assert_close(out, by_hand(model, lin, shape, images), rtol=1e-5, atol=1e-5)
    assert out.shape == model(images).shape
    assert out.dtype == model(images).dtype


@given(shapes, st.tuples(st.integers(1, 5), st.integers(2, 6)), st.integers(1, 3))
@examples(6)
def test_one_dynamic_capture_serves_other_sizes(shape, grid, batch):
    model, images = shape.model(), shape.images()
    lin = t5fx.linearize(model, (images,), config=ALL)
    lin(images)
    other = torch.randn(batch, 3, *(n * shape.patch for n in grid))
    expected = by_hand(model, lin, shape, other)
    torch.testing.assert_close(lin(other), expected, rtol=1e-5, atol=1e-5)


@given(shapes)
def test_gradients_reach_every_parameter(shape):
    _, lin, images = linearized(shape)
    lin(images).pow(2).sum().backward()
    for name, parameter in lin.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        lonely = shape.tokens == 1 or name.endswith((".bias", "dwc_k.weight"))
        assert lonely or parameter.grad.abs().sum() > 0, name


@given(shapes)
def test_a_constant_added_to_all_keys_changes_nothing(shape):
    _, lin, images = linearized(shape)
    before = lin(images)
    width = shape.heads * shape.head_dim
    with torch.no_grad():
        for block in lin.blocks:
            block.attn.qkv.bias[width : 2 * width] += torch.randn(width)
    torch.testing.assert_close(lin(images), before, rtol=1e-4, atol=1e-4)


@given(shapes)
def test_batch_items_do_not_mix(shape):
    _, lin, images = linearized(shape)
    before = lin(images)
    images[0] = torch.randn_like(images[0])
    after = lin(images)
    torch.testing.assert_close(after[1:], before[1:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after[0], before[0])


@pytest.mark.parametrize("spelling", SPELLINGS[1:])
def test_spellings_convert_to_equal_outputs(spelling):
    fused = Shape(spelling="fused", batch=1)
    other = Shape(spelling=spelling, batch=1)
    images = fused.images()
    a = t5fx.linearize(fused.model(), (images,), config=STATIC)
    b = t5fx.linearize(other.model(), (images,), config=STATIC)
    torch.testing.assert_close(a(images), b(images), rtol=1e-6, atol=1e-6)
    assert a.state_dict().keys() == b.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cast", ["before", "after"])
def test_dtypes(dtype, cast):
    shape = Shape()
    model, images = shape.model(), shape.images()
    reference = t5fx.linearize(model, (images,), config=STATIC)(images)
    if cast == "before":
        lin = t5fx.linearize(model.to(dtype), (images.to(dtype),), config=STATIC)
    else:
        lin = t5fx.linearize(model, (images,), config=STATIC).to(dtype)
    out = lin(images.to(dtype))
    assert out.dtype == dtype
    assert {p.dtype for p in lin.parameters()} == {dtype}
    loose = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.float(), reference, rtol=loose, atol=loose)


def test_the_original_is_untouched():
    shape = Shape()
    model, images = shape.model(), shape.images()
    model.blocks[0].eval()
    model.blocks[1].train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    flags = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    out = model(images)
    lin = t5fx.linearize(model, (images,), config=ALL)
    assert [lin.get_submodule(name).training for name in names] == flags
    with torch.no_grad():
        for parameter in lin.parameters():
            parameter.zero_()
    assert torch.equal(torch.get_rng_state(), random)
    assert [name for name, _ in model.named_modules()] == names
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert torch.equal(model(images), out)


def test_parameter_names_and_shared_parameters():
    shape = Shape()
    model, images = shape.model(), shape.images()
    lin = t5fx.linearize(model, (images,), config=STATIC)
    old, new = model.state_dict(), lin.state_dict()
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    node = ["w1", "w2", "w3", "dwc_q.weight", "dwc_q.bias", "dwc_k.weight", "dwc_k.bias", "gate"]
    expected = {f"blocks.{i}.attn.t5.{name}" for i in range(2) for name in node}
    assert new.keys() - old.keys() == expected
    shared = t5fx.linearize(model, (images,), config=STATIC, inplace=True)
    own = {id(p) for p in model.parameters()}
    assert own <= {id(p) for p in shared.parameters()}
    assert not own & {id(p) for p in lin.parameters()}


def test_fresh_parameters_depend_on_seed_and_name_alone():
    small, large = Shape(depth=1), Shape(depth=3)
    torch.manual_seed(0)
    a = t5fx.linearize(small.model(), (small.images(),), config=STATIC).state_dict()
    torch.manual_seed(123)
    b = t5fx.linearize(large.model(), (large.images(),), config=STATIC).state_dict()
    config = t5fx.LinearizeConfig(min_tokens=0, seed=1, dynamic=False)
    c = t5fx.linearize(small.model(), (small.images(),), config=config).state_dict()
    for name in (n for n in a if ".t5." in n):
        assert torch.equal(a[name], b[name]), name
        alike = name.endswith(".gate")  # ones, all of them
        assert torch.equal(a[name], c[name]) == alike, name
        other = name.replace("blocks.0", "blocks.1")
        assert torch.equal(b[name], b[other]) == alike, name


def test_fresh_parameters_are_the_same_on_every_version_of_torch():
    node = TTT(2, 8, 8, 2, scale=1.0, seed=3, name="blocks.0.attn.t5")
    assert node.w1.std().item() == pytest.approx(0.02, rel=0.2)
    assert node.w1.sum().item() == pytest.approx(FRESH["w1"], abs=1e-5)
    assert node.dwc_k.weight.sum().item() == pytest.approx(FRESH["dwc_k.weight"], abs=1e-4)


@given(shapes)
@examples(5)
def test_survives_deepcopy_and_torch_save(shape):
    _, lin, images = linearized(shape)
    out = lin(images)
    twin = copy.deepcopy(lin)
    with torch.no_grad():
        lin.norm.weight.zero_()
    assert torch.equal(twin(images), out)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(images), out)
    assert [s.fqn for s in t5fx.report(loaded).rewritten] == [
        s.fqn for s in t5fx.report(lin).rewritten
    ]
    loaded.load_state_dict(lin.state_dict())
    assert not torch.equal(loaded(images), out)


def test_linearizing_twice_is_an_error():
    _, lin, images = linearized(Shape())
    with pytest.raises(AlreadyLinearizedError, match="TTT nodes"):
        t5fx.linearize(lin, (images,))
    with pytest.raises(AlreadyLinearizedError):
        t5fx.linearize(nn.Sequential(lin), (images,))


def test_train_and_eval_are_those_of_the_original():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = Shape(depth=1).model()
            self.bn = nn.BatchNorm1d(16)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.bn(self.vit(x).mean(1)))

    images = Shape(batch=4).images()
    lin = t5fx.linearize(Model().eval(), (images,), config=ALL)
    assert torch.equal(lin(images), lin(images))
    assert lin.bn.num_batches_tracked == 0
    lin.train()
    assert (lin(images) == 0).float().mean() > 0.2
    assert lin.bn.num_batches_tracked == 1
    assert lin.bn.running_mean.abs().sum() > 0
    lin.drop.eval()
    assert (lin(images) == 0).float().mean() < 0.1
    lin.eval()
    assert torch.equal(lin(images), lin(images))
    assert lin.bn.num_batches_tracked == 2


def test_active_dropout_of_probabilities_is_kept():
    class Model(nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.embed, self.drop, self.fused = nn.Conv1d(3, 8, 1), nn.Dropout(0.5), fused

        def forward(self, x):
            q = self.embed(x).transpose(1, 2).unsqueeze(1)
            if self.fused:
                p = self.drop.p if self.training else 0.0
                return nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=p)
            return self.drop((q @ q.mT).softmax(-1)) @ q

    x = torch.randn(1, 3, 30)
    for fused in (True, False):
        lin = t5fx.linearize(Model(fused).eval(), (x,), config=STATIC)
        still = lin(x)
        assert torch.equal(lin(x), still)
        lin.train()
        draws = torch.stack([lin(x) for _ in range(400)])
        assert not torch.equal(draws[0], draws[1])
        spread = draws.std(0).clamp_min(1e-6) / 20
        assert ((draws.mean(0) - still).abs() < 6 * spread).float().mean() > 0.99


def test_hooks_see_the_modules_of_the_original():
    _, lin, images = linearized(Shape())
    seen = []
    for name, module in lin.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: seen.append(name))
    lin(images)
    inner = ["qkv", "t5.dwc_q", "t5.dwc_k", "t5", "proj"]
    expected = [*(f"blocks.0.attn.{name}" for name in inner), "blocks.0.attn"]
    assert [n for n in seen if n.startswith("blocks.0.attn")] == expected
    assert seen[-1] == ""
    assert {"blocks.0", "blocks.1", "norm", "patch_embed"} <= set(seen)


def test_the_model_is_the_original_but_for_its_attention():
    model, lin, _ = linearized(Shape(depth=3))
    assert type(lin) is type(model)
    assert lin.blocks[-1] is list(lin.blocks)[2] and len(lin.blocks[:2]) == 2
    attention = lin.blocks[0].attn
    assert isinstance(attention, type(model.blocks[0].attn))
    assert type(attention).__name__ == "Attention" and attention.heads == 2
    q = torch.randn(1, 2, 5, 8)
    assert torch.equal(attention.attend(q, q, q), model.blocks[0].attn.attend(q, q, q))
    assert not hasattr(lin, "report") and not hasattr(lin, "no_such_name")
    kinds = [type(m).__name__ for n, m in lin.named_modules() if ".t5" not in n]
    assert kinds == [type(m).__name__ for m in model.modules()]


@pytest.mark.parametrize("inner", ["mlp2", "gate1"])
@pytest.mark.parametrize("locality", ["dwc_v", "none"])
def test_configured_variants_reach_the_node(inner, locality):
    config = {"inner": inner, "locality": locality, "inner_loss": "l2", "key_norm": "rms"}
    _, lin, images = linearized(Shape(), **config)
    node = lin.blocks[0].attn.t5
    assert (node.inner, node.locality, node.inner_loss, node.key_norm) == tuple(
        config[n] for n in ("inner", "locality", "inner_loss", "key_norm")
    )
    assert lin(images).isfinite().all()


def test_overrides_include_exclude():
    _, lin, _ = linearized(
        Shape(depth=3), exclude="blocks.1.*", overrides={"blocks.2.*": {"inner": "mlp2"}}
    )
    assert [s.reason for s in t5fx.report(lin).sites] == [None, "excluded", None]
    assert [m.inner for m in lin.modules() if isinstance(m, TTT)] == ["swiglu", "mlp2"]


def test_the_rewritten_graph_compiles_whole():
    _, lin, images = linearized(Shape(depth=1))
    compiled = torch.compile(lin, backend="aot_eager", fullgraph=True)
    out = compiled(images)
    torch.testing.assert_close(out, lin(images), rtol=1e-5, atol=1e-6)
    out.sum().backward()
    assert all(p.grad is not None for p in lin.parameters())


def test_blocks_can_be_sharded_one_by_one():
    """What FSDP2 does to a block: gather its parameters before it runs, free them after."""
    _, lin, images = linearized(Shape())
    expected = lin(images)
    for block in lin.blocks:
        kept = {n: p.detach().clone() for n, p in block.named_parameters()}

        def gather(module, args, kept=kept):
            for name, parameter in module.named_parameters():
                parameter.data = kept[name]

        def free(module, args, out):
            for parameter in module.parameters():
                parameter.data = torch.empty_like(parameter).fill_(float("nan"))

        block.register_forward_pre_hook(gather)
        block.register_forward_hook(free)
        free(block, None, None)
    with torch.no_grad():
        assert torch.equal(lin(images), expected)


def test_a_child_called_self():
    """As transformers call the inner half of an attention."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.self, self.output = Inner(), nn.Linear(8, 8)

        def forward(self, x):
            return self.output(self.self(x))

    class Inner(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention = nn.Conv2d(3, 8, 2, 2), Attention()

        def forward(self, images):
            return self.attention(self.embed(images).flatten(2).mT[:, None])

    images = torch.randn(2, 3, 8, 8)
    lin = t5fx.linearize(Model(), (images,), config=ALL)
    # The inner half has no parameters: its caller owns the node.
    assert [site.fqn for site in t5fx.report(lin).rewritten] == ["attention"]
    assert lin(images).shape == (2, 1, 16, 8)


def test_grids_of_one_and_three_axes():
    class Model(nn.Module):
        def __init__(self, axes):
            super().__init__()
            conv = {1: nn.Conv1d, 3: nn.Conv3d}[axes]
            self.embed = conv(3, 8, 2, 2)

        def forward(self, x):
            q = self.embed(x).flatten(2).transpose(1, 2).unsqueeze(1)
            return nn.functional.scaled_dot_product_attention(q, q, q)

    for axes, sizes in ((1, (10,)), (3, (4, 6, 8))):
        x = torch.randn(2, 3, *sizes)
        lin = t5fx.linearize(Model(axes), (x,), config=ALL)
        assert t5fx.report(lin).sites[0].grid == tuple(n // 2 for n in sizes)
        other = torch.randn(2, 3, *(n + 4 for n in sizes))
        assert lin(other).shape == Model(axes)(other).shape


def test_a_module_called_twice_shares_one_node_and_a_second_site_gets_its_own():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 2, 2)
            self.qkv = nn.Linear(8, 24)

        def forward(self, images):
            x = self.embed(images).flatten(2).transpose(1, 2)
            for _ in range(2):
                q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
                x = x + nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
            return x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Shape(heads=1, head_dim=8).model().blocks[0]
            self.both = Twice()

        def forward(self, images):
            x = self.both(images)
            return self.layer(self.layer(x))

    images = torch.randn(1, 3, 8, 8)
    lin = t5fx.linearize(Model().eval(), (images,), config=STATIC)
    keys = sorted({n for n, m in lin.named_modules() if isinstance(m, TTT)})
    assert keys == ["both.t5", "both.t5_1", "layer.attn.t5"]
    assert len(t5fx.report(lin).rewritten) == 4
    lin(images).sum().backward()
    assert all(p.grad is not None for p in lin.parameters())
