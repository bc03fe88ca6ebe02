"""`save_pretrained` and `from_pretrained`: what comes back, and what damage is told."""

import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import vits
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from vits import Shape, ViT, shapes

import t5fx
from t5fx.backend import compile as backend
from t5fx.checkpoint.description import CONFIG_NAME
from t5fx.checkpoint.files import digest_of
from t5fx.errors import AlreadyLinearizedError, CaptureError, CheckpointError, ConfigError
from t5fx.runtime.lookup import configs

SHAPE = Shape(depth=2)
CONFIG = t5fx.LinearizeConfig(min_tokens=0)


def fresh(shape=SHAPE, seed=5):
    """The same architecture with other values."""
    torch.manual_seed(seed)
    return ViT(shape).eval()


def linearized(shape=SHAPE, config=CONFIG, **kwargs):
    """With values of the nodes that matter to the output."""
    lin = t5fx.linearize(shape.model(), (shape.images(),), config=config, **kwargs)
    with torch.no_grad():
        for name, parameter in lin.named_parameters():
            if ".t5." in name:
                parameter.normal_(0, 0.3)
    return lin


@examples(8)
@given(shapes, st.booleans(), st.sampled_from(["swiglu", "mlp2", "gate1"]), st.booleans())
def test_round_trip_is_bit_equal(tmp_path_factory, shape, adapter_only, inner, share):
    folder = tmp_path_factory.mktemp("saved")
    lin = linearized(shape, t5fx.LinearizeConfig(min_tokens=0, inner=inner))
    t5fx.save_pretrained(lin, folder, adapter_only=adapter_only)
    model = shape.model() if adapter_only else fresh(shape)
    before = copy.deepcopy(model.state_dict())
    again = t5fx.from_pretrained(folder, model, inplace=share)
    images = shape.images()
    assert torch.equal(again(images), lin(images))
    assert next(configs(again)) == next(configs(lin))
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in lin.state_dict().items())
    assert t5fx.report(again).trainable == t5fx.report(lin).trainable
    own = dict(model.named_parameters())
    for name, parameter in again.named_parameters():
        if name in own:
            assert (parameter is own[name]) == share
    if not share:
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("compiled", [False, True])
def test_in_a_fresh_process_without_pickle(tmp_path, compiled):
    lin = linearized()
    images = SHAPE.images()
    run = torch.compile(lin, backend="t5") if compiled else lin
    with torch.no_grad():
        save_file({"images": images, "wanted": run(images)}, tmp_path / "call.safetensors")
    t5fx.save_pretrained(lin, tmp_path / "saved")
    script = f"""
        import pickle, sys
        import torch
        from safetensors.torch import load_file
        sys.path.insert(0, {os.path.dirname(vits.__file__)!r})
        from vits import Shape, ViT
        import t5fx

        def refuse(*args, **kwargs):
            raise AssertionError("pickle on the load path")

        call = load_file({str(tmp_path / "call.safetensors")!r})
        model = ViT({SHAPE!r}).eval()
        kept = torch.load, pickle.load, pickle.loads
        torch.load = pickle.load = pickle.loads = refuse
        lin = t5fx.from_pretrained({str(tmp_path / "saved")!r}, model)
        torch.load, pickle.load, pickle.loads = kept  # Inductor's caches may
        run = torch.compile(lin, backend="t5") if {compiled} else lin
        with torch.no_grad():
            assert torch.equal(run(call["images"]), call["wanted"])
        print("equal")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert result.stdout.endswith("equal\n"), result.stderr


def test_shards_and_meta_device(tmp_path):
    lin = linearized()
    t5fx.save_pretrained(lin, tmp_path, max_shard_size=2000)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    largest = max(t.nbytes for t in lin.state_dict().values())
    assert len(files) > 3
    assert all(sum(t.nbytes for t in load_file(f).values()) <= max(2000, largest) for f in files)
    with torch.device("meta"):
        model = ViT(SHAPE).eval()
    images = SHAPE.images()
    again = t5fx.from_pretrained(tmp_path, model)
    assert torch.equal(again(images), lin(images))
    assert all(p.is_meta for p in model.parameters())


def test_meta_tensors_that_the_checkpoint_does_not_have(tmp_path):
    lin = linearized()
    t5fx.save_pretrained(lin, tmp_path, adapter_only=True)
    with torch.device("meta"):
        model = ViT(SHAPE)
    with pytest.raises(CheckpointError, match=r"accelerate.init_empty_weights"):
        t5fx.from_pretrained(tmp_path, model)


class Tied(nn.Module):
    """Two names for one parameter, which both are in the state_dict."""

    def __init__(self):
        super().__init__()
        self.vit = SHAPE.model()
        self.head = nn.Linear(16, 16, bias=False)
        self.again = nn.Linear(16, 16, bias=False)
        self.again.weight = self.head.weight
        self.register_buffer("flat", torch.randn(8))
        self.register_buffer("front", self.flat[:4])

    def forward(self, images):
        return self.again(self.head(self.vit(images))) * self.front[0] * self.flat[0]


def test_tied_and_overlapping_tensors(tmp_path):
    images = SHAPE.images()
    lin = t5fx.linearize(Tied().eval(), (images,), config=CONFIG)
    t5fx.save_pretrained(lin, tmp_path)
    names = set(load_file(next(tmp_path.glob("*.safetensors"))))
    assert len(names & {"head.weight", "again.weight"}) == 1
    again = t5fx.from_pretrained(tmp_path, Tied().eval())
    assert torch.equal(again(images), lin(images))
    assert again.head.weight is again.again.weight


def test_graph_modules(tmp_path):
    images = SHAPE.images()

    def graph():
        return torch.export.export(SHAPE.model(), (images,), strict=False).module()

    lin = t5fx.linearize(graph(), config=CONFIG)
    t5fx.save_pretrained(lin, tmp_path)
    again = t5fx.from_pretrained(tmp_path, graph())
    assert torch.equal(again(images), lin(images))


def test_compiled_untouched_model_and_adapter_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "_inductor", lambda options, more: aot_eager)
    model, images = SHAPE.model(), SHAPE.images()
    fast = torch.compile(model, backend="t5", options={"min_tokens": 0, "inner": "mlp2"})
    with pytest.warns(t5fx.errors.UntrainedWarning):
        wanted = fast(images)
    with torch.no_grad():
        for parameter in t5fx.adapter(model).parameters():
            parameter.add_(0.1)
    wanted = fast(images)
    t5fx.save_pretrained(fast, tmp_path / "whole")
    t5fx.save_pretrained(t5fx.adapter(model), tmp_path / "adapter")
    whole = t5fx.from_pretrained(tmp_path / "whole", fresh())
    torch.testing.assert_close(whole(images), wanted, rtol=1e-5, atol=1e-6)
    other = SHAPE.model()
    for folder in ("whole", "adapter"):  # the options come with it
        torch._dynamo.reset()
        loaded = torch.compile(other, backend="t5", options={"adapter": tmp_path / folder})
        torch.testing.assert_close(loaded(images), wanted)


def test_callable_layout_is_asked_for_again(tmp_path):
    config = t5fx.LinearizeConfig(min_tokens=0, grid=lambda images: (3, 4), prefix=1)
    lin = linearized(config=config)
    t5fx.save_pretrained(lin, tmp_path)
    with pytest.raises(CheckpointError, match=r"grid of its LinearizeConfig was a callable"):
        t5fx.from_pretrained(tmp_path, fresh())
    images = SHAPE.images()
    again = t5fx.from_pretrained(tmp_path, fresh(), config=config)
    assert torch.equal(again(images), lin(images))


def test_selection_is_that_of_the_saved_model_whatever_the_cost(tmp_path):
    """One site of two, and too few tokens for the cost model."""
    lin = linearized(config=t5fx.LinearizeConfig(min_tokens=0, exclude=("blocks.0.*",)))
    t5fx.save_pretrained(lin, tmp_path)
    data = json.loads((tmp_path / CONFIG_NAME).read_text())
    data["config"] |= {"min_tokens": None, "exclude": []}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(data))
    again = t5fx.from_pretrained(tmp_path, fresh())
    assert [site.fqn for site in t5fx.report(again).sites] == ["blocks.1.attn"]
    again(SHAPE.images())
    assert [site.status for site in t5fx.report(again).sites] == ["skipped", "rewritten"]


# Damage.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    t5fx.save_pretrained(linearized(), folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def restore(saved, folder):
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, content in saved.items():
        (folder / name).write_bytes(content)
    return folder


def load(folder, model=None, **kwargs):
    model = fresh() if model is None else model
    return t5fx.from_pretrained(folder, model, **kwargs)


def weights(folder):
    return next(folder.glob("*.safetensors"))


@examples(60)
@given(data=st.data())
def test_a_damaged_file_is_named_and_nothing_is_loaded(saved, tmp_path_factory, data):
    """Any byte of the weights changed, any length cut off, either file."""
    folder = restore(saved, tmp_path_factory.getbasetemp() / "damaged")
    path = data.draw(st.sampled_from([folder / CONFIG_NAME, weights(folder)]))
    content = bytearray(path.read_bytes())
    if path.suffix == ".json" or data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content.rstrip()) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    model = fresh()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=str(path)):
        load(folder, model, inplace=True)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def edit(folder, change):
    """Change the description, its digests made right again."""
    path = folder / CONFIG_NAME
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_tensors(folder, change):
    """Change the stored tensors, and the description as if they had been written so."""
    path = weights(folder)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)

    def describe(data):
        about = {"bytes": path.stat().st_size, "sha256": digest_of(path)}
        data["files"] = {path.name: about}

    edit(folder, describe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "missing: 'norm.weight'"),
        (lambda t: t.pop("blocks.1.attn.t5.w2"), "missing: 'blocks.1.attn.t5.w2'"),
        (lambda t: t.update(head=torch.zeros(2)), "unexpected: 'head'"),
        (
            lambda t: t.update({"blocks.0.attn.t5.w9": torch.zeros(2)}),
            "unexpected: 'blocks.0.attn.t5.w9'",
        ),
        (lambda t: t.update({"norm.bias": torch.zeros(3)}), r"'norm.bias' of shape \[16\].*\[3\]"),
        (
            lambda t: t.update({"blocks.0.attn.t5.w1": torch.zeros(2, 8, 9)}),
            r"'blocks.0.attn.t5.w1' of shape \[2, 8, 8\].*\[2, 8, 9\]",
        ),
    ],
)
def test_tensors_of_another_model(saved, tmp_path, change, message):
    edit_tensors(restore(saved, tmp_path), change)
    model = fresh()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, model, inplace=True)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=1), "expected a checkpoint of version 2, got 1"),
        (lambda d: d.pop("version"), "got None"),
        (lambda d: d.update(content="half"), "content 'half'"),
        (lambda d: d.update(more=1), r"unknown fields \['more'\]"),
        (lambda d: d.pop("sites"), "expected 'sites' to be a dict, got None"),
        (lambda d: d["config"].update(version=9), "LinearizeConfig of version"),
        (lambda d: d["config"].update(inner="swish"), "inner: expected one of"),
        (lambda d: d["config"].update(colour=1), "unknown fields of LinearizeConfig: colour"),
        (lambda d: d["sites"]["blocks.0.attn.t5"].pop("scale"), "'blocks.0.attn.t5' has bad"),
        (lambda d: d["sites"]["blocks.0.attn.t5"].update(inner="swish"), "has bad settings"),
        (lambda d: d["sites"].update({"nowhere.t5": {}}), "'nowhere.t5': expected its owner"),
        (lambda d: d["files"].update({"gone.safetensors": {}}), "gone.safetensors': expected this"),
        (lambda d: d["files"].update({"../x": {}}), "expected names of files in the same folder"),
        (lambda d: d["tied"].update({"norm.weight": "x"}), "ties 'norm.weight' to 'x'"),
    ],
)
def test_descriptions_that_are_not_right(saved, tmp_path, change, message):
    edit(restore(saved, tmp_path), change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_folders_and_models_that_do_not_fit(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"that t5fx.save_pretrained wrote"):
        load(tmp_path)
    restore(saved, tmp_path)
    with pytest.raises(AlreadyLinearizedError):
        load(tmp_path, linearized())
    with pytest.raises(CheckpointError, match=r"missing: 'blocks.2"):
        t5fx.from_pretrained(tmp_path, Shape(depth=3).model())
    with pytest.raises(CaptureError, match=r"expected an nn\.Module"):
        t5fx.from_pretrained(tmp_path, "vit")
    other = fresh()
    other.blocks[1].attn = nn.Linear(16, 16)  # no attention there any more
    t5fx.save_pretrained(linearized(), tmp_path, adapter_only=True)
    with pytest.raises(CaptureError, match=r"expected attention at 'blocks.1.attn.t5'"):
        load(tmp_path, other)(SHAPE.images())


def test_scale_of_another_model_is_told(saved, tmp_path):
    edit(restore(saved, tmp_path), lambda d: d["sites"]["blocks.0.attn.t5"].update(scale=0.5))
    with pytest.raises(t5fx.T5Error, match=r"'blocks.0.attn' with scale 0.35.* made for scale 0.5"):
        load(tmp_path)(SHAPE.images())


# Saving.


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    lin, images = linearized(), SHAPE.images()
    t5fx.save_pretrained(lin, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    wanted = lin(images)
    with torch.no_grad():
        for parameter in lin.parameters():
            parameter.mul_(1.5)
    replace, left = os.replace, []

    def failing(source, target):
        if not left:
            raise OSError("no space left on device")
        left.pop()
        replace(source, target)

    for successes in range(4):  # fails at a shard, another one, the index, the description
        left[:] = [True] * successes
        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="no space"):
            t5fx.save_pretrained(lin, tmp_path, max_shard_size=20_000)
        monkeypatch.setattr(os, "replace", replace)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert torch.equal(load(tmp_path)(images), wanted)
    t5fx.save_pretrained(lin, tmp_path)
    assert not torch.equal(load(tmp_path)(images), wanted)
    files = {"README.md", CONFIG_NAME, "model.safetensors.index.json", weights(tmp_path).name}
    assert {path.name for path in tmp_path.iterdir()} == files  # the old weights are gone


def test_a_saved_folder_keeps_what_else_is_in_it(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "other.safetensors").write_text("mine too")
    lin = linearized()
    for _ in range(2):
        t5fx.save_pretrained(lin, tmp_path)
    assert (tmp_path / "README.md").exists() and (tmp_path / "other.safetensors").exists()
    assert torch.equal(load(tmp_path).norm.weight, lin.norm.weight)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(t5fx.T5Error, match="has no new parameters"):
        t5fx.save_pretrained(SHAPE.model(), tmp_path)
    lin = linearized()
    state = lin.state_dict()
    with pytest.raises(CheckpointError, match=r"no values: it is on the meta device"):
        t5fx.save_pretrained(copy.deepcopy(lin).to("meta"), tmp_path)
    with pytest.raises(CheckpointError, match=r"missing: 'blocks.0.attn.t5.w1'"):
        t5fx.save_pretrained(
            lin,
            tmp_path,
            state_dict={n: t for n, t in state.items() if not n.endswith("0.attn.t5.w1")},
        )
    with pytest.raises(CheckpointError, match="got a str for 'extra'"):
        t5fx.save_pretrained(lin, tmp_path, state_dict={**state, "extra": "text"})
    assert not list(tmp_path.iterdir())


def test_state_dict_may_be_given(tmp_path):
    lin = linearized()
    state = {name: tensor + 1 for name, tensor in lin.state_dict().items()}
    t5fx.save_pretrained(lin, tmp_path, state_dict=state)
    again = load(tmp_path)
    assert all(torch.equal(v, state[n]) for n, v in again.state_dict().items())


def test_config_is_refused_where_it_is_none_of_ours():
    with pytest.raises(ConfigError, match="version"):
        t5fx.LinearizeConfig.from_dict({"version": 3})
