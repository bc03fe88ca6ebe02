"""Checkpoints of models with wrappers around them or around their modules, and dtypes."""

import json

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from vits import Shape

import t5fx
from t5fx.checkpoint.description import CONFIG_NAME
from t5fx.errors import CheckpointError

SHAPE = Shape(depth=2)
CONFIG = t5fx.LinearizeConfig(min_tokens=0)


def linearized(model):
    lin = t5fx.linearize(model, (SHAPE.images(),), config=CONFIG)
    with torch.no_grad():
        for parameter in lin.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return lin


@pytest.fixture(scope="module")
def lin():
    torch.manual_seed(0)
    return linearized(SHAPE.model())


def checkpointed(model):
    """Both blocks recompute their activations in the backward pass."""
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    return model


def compiled(model):
    """One block is compiled on its own."""
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch of itself
@pytest.mark.parametrize("wrap", [checkpointed, compiled])
def test_wrapped_modules_load_into_plain_ones_and_plain_ones_into_wrapped(wrap, tmp_path):
    images = SHAPE.images()
    wrapped = linearized(wrap(SHAPE.model()))
    assert {site.fqn for site in t5fx.report(wrapped).sites} == {"blocks.0.attn", "blocks.1.attn"}
    wanted = wrapped(images)
    t5fx.save_pretrained(wrapped, tmp_path)
    sites = json.loads((tmp_path / CONFIG_NAME).read_text())["sites"]
    assert list(sites) == ["blocks.0.attn.t5", "blocks.1.attn.t5"]
    plain = t5fx.from_pretrained(tmp_path, SHAPE.model())
    assert torch.equal(plain(images), wanted)
    t5fx.save_pretrained(plain, tmp_path)
    again = t5fx.from_pretrained(tmp_path, wrap(SHAPE.model()))
    assert torch.equal(again(images), wanted)
    # As training scripts do it: loaded, wrapped, and only then called.
    late = wrap(t5fx.from_pretrained(tmp_path, SHAPE.model()))
    assert torch.equal(late(images), wanted)
    late(images).sum().backward()
    assert all(p.grad is not None for n, p in late.named_parameters() if ".t5.w" in n)


@pytest.mark.parametrize("around", [torch.compile, nn.DataParallel, checkpoint_wrapper])
def test_wrappers_around_the_model(lin, around, tmp_path):
    t5fx.save_pretrained(around(lin), tmp_path, adapter_only=True)
    t5fx.save_pretrained(around(lin), tmp_path)
    again = t5fx.from_pretrained(tmp_path, SHAPE.model())
    assert all(torch.equal(v, lin.state_dict()[n]) for n, v in again.state_dict().items())
    with pytest.raises(CheckpointError, match="expected the model itself, got a"):
        t5fx.from_pretrained(tmp_path, around(SHAPE.model()))


def test_ddp(lin, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        ddp = nn.parallel.DistributedDataParallel(lin)
        t5fx.save_pretrained(ddp, tmp_path / "saved")
        t5fx.save_pretrained(ddp, tmp_path / "given", state_dict=ddp.state_dict())
    finally:
        torch.distributed.destroy_process_group()
    for folder in ("saved", "given"):
        again = t5fx.from_pretrained(tmp_path / folder, SHAPE.model())
        assert all(torch.equal(v, lin.state_dict()[n]) for n, v in again.state_dict().items())


def test_parametrized_modules_need_the_same_in_the_model(tmp_path):
    def normed(model):
        parametrizations.weight_norm(model.blocks[0].attn.qkv)
        return model

    lin = linearized(normed(SHAPE.model()))
    t5fx.save_pretrained(lin, tmp_path)
    again = t5fx.from_pretrained(tmp_path, normed(SHAPE.model()))
    images = SHAPE.images()
    assert torch.equal(again(images), lin(images))
    with pytest.raises(CheckpointError, match=r"remove_parametrizations"):
        t5fx.from_pretrained(tmp_path, SHAPE.model())


def test_values_that_accelerate_keeps_elsewhere_are_saved(lin, tmp_path):
    t5fx.save_pretrained(lin, tmp_path)
    state = {name: tensor.clone() for name, tensor in lin.state_dict().items()}
    loaded = cpu_offload(t5fx.from_pretrained(tmp_path, SHAPE.model()))
    assert all(p.is_meta for p in loaded.parameters())
    t5fx.save_pretrained(loaded, tmp_path / "again")
    again = t5fx.from_pretrained(tmp_path / "again", SHAPE.model())
    assert all(torch.equal(v, state[n]) for n, v in again.state_dict().items())


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_only", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_every_tensor_comes_back_in_its_dtype(lin, adapter_only, inplace, tmp_path):
    """A bfloat16 model with float32 nodes, one of whose parameters is of yet another dtype."""
    t5fx.save_pretrained(lin, tmp_path)
    mixed = t5fx.from_pretrained(tmp_path, SHAPE.model(), dtype=torch.bfloat16)
    assert {p.dtype for p in mixed.parameters()} == {torch.bfloat16}
    for key, node in mixed.named_modules():
        if key.endswith(".t5"):
            node.float()
    mixed.norm.double()
    saved = {name: tensor.clone() for name, tensor in mixed.state_dict().items()}
    t5fx.save_pretrained(mixed, tmp_path, adapter_only=adapter_only)
    model = SHAPE.model() if not adapter_only else SHAPE.model().to(torch.bfloat16)
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    own = dict(model.named_parameters())
    again = t5fx.from_pretrained(tmp_path, model, inplace=inplace)
    for name, tensor in again.state_dict(keep_vars=True).items():
        if ".t5." in name or not adapter_only:
            assert tensor.dtype == saved[name].dtype and torch.equal(tensor, saved[name]), name
        else:
            assert tensor.dtype == torch.bfloat16
        if name in own:
            assert (tensor is own[name]) == inplace
    if not inplace:
        assert before == {name: parameter.dtype for name, parameter in model.named_parameters()}
    half = t5fx.from_pretrained(tmp_path, SHAPE.model().half(), dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
