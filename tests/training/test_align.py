"""`Align`: the original as a teacher in every site at once, and what the nodes learn from it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import vits
from effort import examples
from hypothesis import given
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.data import DataLoader, TensorDataset
from vits import Shape

import t5fx
from t5fx.backend import compile as backend
from t5fx.errors import TrainingError
from t5fx.kernels import TTT
from t5fx.training.students import Student, merge_heads, taught

#: Without near attention, which leaves next to nothing to learn on a few tokens.
CONFIG = t5fx.LinearizeConfig(min_tokens=0, neighborhood=0, coarse=0)


def linearized(shape, model=None, **kwargs):
    model = shape.model() if model is None else model
    return t5fx.linearize(model, (shape.images(),), config=CONFIG, **kwargs)


def batches(shape, count=2):
    return [shape.images() for _ in range(count)]


def nodes(lin):
    return {name: m for name, m in lin.named_modules() if isinstance(m, TTT)}


@examples(10)
@given(vits.shapes)
def test_teacher_is_the_original(shape):
    """With the softmax back in its nodes, the linearized model computes what the original does."""
    model, images = shape.model(), shape.images()
    lin = linearized(shape, model)
    students = {key: Student(key, node) for key, node in nodes(lin).items()}
    with taught(students, lin):
        result = lin(images)
    torch.testing.assert_close(result, model(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(lin(images), result, rtol=1e-3, atol=1e-4)


def test_loss_is_the_relative_error_at_the_output_projection():
    """Each site's first loss, worked out from the original alone."""
    shape = Shape(depth=2, heads=2, head_dim=8)
    model, images = shape.model(), shape.images()
    lin = linearized(shape, model)
    align = t5fx.Align([images], steps=1, lr=1e-9)
    align(lin)

    inputs = []
    for block in model.blocks:
        attend = block.attn.attend
        block.attn.attend = lambda q, k, v, f=attend: (inputs.append((q, k, v)), f(q, k, v))[1]
    model(images)
    for i, (q, k, v) in enumerate(inputs):
        softmax = merge_heads(F.scaled_dot_product_attention(q, k, v))
        got = merge_heads(nodes(lin)[f"blocks.{i}.attn.t5"](q, k, v, grid=shape.grid, prefix=1))
        weight = model.blocks[i].attn.proj.weight
        wanted = ((got - softmax) @ weight.mT).square().sum()
        wanted /= (softmax @ weight.mT).square().sum()
        loss = align.result.losses[f"blocks.{i}.attn.t5"]
        assert loss == [pytest.approx(wanted.item(), rel=1e-4)]
        assert align.result.measured[f"blocks.{i}.attn.t5"] == f"blocks.{i}.attn.proj"


def test_learns_and_touches_nothing_but_the_nodes():
    shape = Shape(depth=2, heads=2, head_dim=8, grid=(4, 4))
    model = shape.model()
    data = batches(shape, 4)
    lin = linearized(shape, model).train()
    lin.blocks[0].mlp.requires_grad_(False)
    before = copy.deepcopy(lin.state_dict())
    align = t5fx.Align(data, steps=60, lr=2e-2)
    assert align(lin) is None

    result = align.result
    assert (result.steps, result.samples) == (60, 120)
    assert set(result.losses) == set(nodes(lin))
    assert all(len(values) == 60 for values in result.losses.values())
    for key in result.losses:
        assert result.after[key] < 0.6 * result.before[key], str(result)
    for name, value in lin.state_dict().items():
        assert torch.equal(value, before[name]) == (".t5." not in name), name
    assert all("forward" not in vars(node) for node in nodes(lin).values())
    assert all(m.training for m in lin.modules())
    frozen = {name for name, p in lin.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in lin.named_parameters() if n.startswith("blocks.0.mlp")}
    assert all(p.grad is None for p in lin.parameters())

    # What it is for: the whole model is nearer to the original than it was.
    images = shape.images()
    lin.eval()
    aligned = (lin(images) - model(images)).norm()
    lin.load_state_dict(before)
    assert aligned < 0.8 * (lin(images) - model(images)).norm()


def test_same_on_a_linearized_and_on_a_compiled_untouched_model(monkeypatch):
    monkeypatch.setattr(backend, "_inductor", lambda options, more: aot_eager)
    shape = Shape(depth=2)
    model, data = shape.model(), batches(shape)
    lin = linearized(shape, model)
    fast = torch.compile(
        model, backend="t5", options={"min_tokens": 0, "neighborhood": 0, "coarse": 0}
    )
    with pytest.warns(t5fx.errors.UntrainedWarning):
        fast(data[0])
    state = copy.deepcopy(model.state_dict())
    one, two = t5fx.Align(data, steps=3), t5fx.Align(data, steps=3)
    one(lin)
    two(fast)
    for key, losses in one.result.losses.items():
        assert two.result.losses[key] == pytest.approx(losses, rel=1e-4)
    new = t5fx.adapter(model).state_dict()
    for name, value in new.items():
        torch.testing.assert_close(value, lin.state_dict()[name])
    torch.testing.assert_close(fast(data[0]), lin(data[0]), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    compiled = torch.compile(lin, backend="t5")
    t5fx.Align(data, steps=1)(compiled)  # through torch.compile, without compiling anything
    assert not torch.equal(lin.blocks[0].attn.t5.w1, new["blocks.0.attn.t5.w1"])


def test_graph_module_is_measured_at_the_attention_itself():
    shape = Shape(depth=1)
    model = shape.model()
    gm = torch.export.export(model, (shape.images(),), strict=False).module()
    lin = t5fx.linearize(gm, config=CONFIG)
    align = t5fx.Align(batches(shape), steps=2)
    align(lin)
    assert set(align.result.measured.values()) == {""}
    assert "attention" in str(align.result)


def test_half_precision_learns_in_float32():
    """Steps too small for bfloat16 add up."""
    shape = Shape(depth=1)
    model = shape.model().bfloat16()
    images = shape.images(torch.bfloat16)
    lin = t5fx.linearize(model, (images,), config=CONFIG)
    twin = copy.deepcopy(lin)
    t5fx.Align([images], steps=100, lr=1e-5, warmup=0.01)(lin)
    t5fx.Align([images], steps=1, lr=1e-5)(twin)
    assert lin.blocks[0].attn.t5.w1.dtype == torch.bfloat16
    moved = (lin.blocks[0].attn.t5.w1 - twin.blocks[0].attn.t5.w1).abs().max()
    assert moved > 1e-4


def test_batches_of_every_form():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = Shape(depth=1).model()

        def forward(self, images, gain=None):
            return self.vit(images) if gain is None else gain * self.vit(images)

    shape = Shape(depth=1)
    images = shape.images()
    losses = []
    for data, inputs in (
        ([images], None),
        ([(images,)], None),
        ([{"images": images}], None),
        (DataLoader(TensorDataset(images, torch.arange(2)), 2), lambda batch: batch[0]),
    ):
        lin = t5fx.linearize(Named().eval(), (images,), config=CONFIG)
        align = t5fx.Align(data, inputs=inputs, steps=2)
        align(lin)
        losses.append(align.result.losses["vit.blocks.0.attn.t5"])
    assert losses == [pytest.approx(losses[0])] * 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "got no batch from a list"),
        (iter([Shape().images()]), "batches for 1 pass over it only"),
    ],
)
def test_data_that_ends(data, message):
    lin = linearized(Shape())
    with pytest.raises(TrainingError, match=message):
        t5fx.Align(data, steps=3)(lin)


def test_loss_that_is_not_finite_leaves_the_last_good_values():
    shape = Shape(depth=1)
    good = shape.images()
    lin, twin = linearized(shape), linearized(shape)
    align = t5fx.Align([good, good * math.nan], steps=4)
    with pytest.raises(TrainingError, match=r"'blocks.0.attn.t5'.*got nan at step 1"):
        align(lin)
    assert align.result.steps == 1
    assert torch.isfinite(lin(good)).all()
    assert not torch.equal(lin.blocks[0].attn.t5.w1, twin.blocks[0].attn.t5.w1)
    assert "forward" not in vars(lin.blocks[0].attn.t5)


def test_interrupt_keeps_the_steps_that_were_done():
    shape = Shape(depth=1)

    class Interrupted(list):
        def __iter__(self):
            yield from batches(shape, 3)
            raise KeyboardInterrupt

    lin, twin = linearized(shape), linearized(shape)
    with pytest.raises(KeyboardInterrupt):
        t5fx.Align(Interrupted(), steps=9)(lin)
    assert not torch.equal(lin.blocks[0].attn.t5.w1, twin.blocks[0].attn.t5.w1)
    assert lin.blocks[0].attn.t5.w1.requires_grad


class Stopping(list):
    """Batches, again and again, until so many were given; then an interrupt."""

    left = math.inf

    def __iter__(self):
        for batch in super().__iter__():
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("seen", [3, 8])
def test_goes_on_from_a_checkpoint_to_the_same_values(sequential, seen, tmp_path):
    shape = Shape(depth=2)
    data, others = batches(shape, 3), batches(shape)
    settings = {"steps": 5, "own": 0.0 if sequential else 0.4, "held_out": others}
    settings |= {"sequential": sequential}
    whole, parts = linearized(shape), linearized(shape)
    wanted = t5fx.Align(data, **settings)
    wanted(whole)

    file = tmp_path / "new" / "align.pt"
    settings |= {"checkpoint": file, "save_every": 2}
    stopped = Stopping(data)
    stopped.left = seen
    if sequential or seen < 5:
        with pytest.raises(KeyboardInterrupt):
            t5fx.Align(stopped, **settings)(parts)
        assert [one.name for one in file.parent.iterdir()] == ["align.pt"]
    # As after a crash: the model is a fresh one.
    fresh = linearized(shape)
    again = t5fx.Align(data, **settings)
    again(fresh)
    assert not file.exists()
    assert (again.result.steps, again.result.samples) == (
        wanted.result.steps,
        wanted.result.samples,
    )
    assert again.result.losses == wanted.result.losses
    assert again.result.held_out == wanted.result.held_out
    for name, value in whole.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def test_checkpoints_that_do_not_fit(tmp_path):
    shape, file = Shape(depth=1), tmp_path / "align.pt"
    data = Stopping(batches(shape))
    data.left = 3
    with pytest.raises(KeyboardInterrupt):
        t5fx.Align(data, steps=9, checkpoint=file, save_every=1)(linearized(shape))
    for settings, said in (
        ({"steps": 8}, "expected a training with steps=8 .* got one with 9"),
        ({"steps": 9, "lr": 0.1}, "expected a training with lr=0.1 .* got one with None"),
    ):
        with pytest.raises(TrainingError, match=said):
            t5fx.Align(batches(shape), checkpoint=file, **settings)(linearized(shape))
    assert file.exists()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TrainingError, match="delete it to start anew"):
        t5fx.Align(batches(shape), steps=9, checkpoint=file)(linearized(shape))


def test_model_without_nodes_and_bad_settings():
    with pytest.raises(TrainingError, match="nothing to train"):
        t5fx.Align([Shape().images()])(Shape().model())
    for bad in ({"steps": 0}, {"lr": -1.0}, {"lr": math.nan}):
        with pytest.raises(TrainingError, match=r"expected a (whole )?number above 0"):
            t5fx.Align([], **bad)


def test_frozen_sites_stay_frozen():
    shape = Shape(depth=2)
    lin = linearized(shape)
    lin.blocks[0].attn.t5.requires_grad_(False)
    lin.blocks[1].attn.t5.w1.requires_grad_(False)
    before = copy.deepcopy(lin.state_dict())
    for sequential in (False, True):
        align = t5fx.Align(batches(shape), steps=2, lr=0.1, sequential=sequential)
        align(lin)
        moved = {n for n, v in lin.state_dict().items() if not torch.equal(v, before[n])}
        own = {f"blocks.1.attn.t5.{n}" for n in lin.blocks[1].attn.t5.state_dict()}
        assert moved == own - {"blocks.1.attn.t5.w1"}
        assert align.result.before.keys() == {"blocks.1.attn.t5"}
        assert "blocks.0" not in str(align.result)
    lin.requires_grad_(False)
    with pytest.raises(TrainingError, match="nodes all of which are frozen"):
        t5fx.Align(batches(shape), steps=2)(lin)


def test_a_loss_that_grows_beyond_measure_is_an_error_and_changes_nothing():
    shape = Shape(depth=1)
    lin = linearized(shape)
    before = copy.deepcopy(lin.state_dict())
    with pytest.raises(TrainingError, match=r"expected a loss that falls, got .* lower lr \(3"):
        t5fx.Align(batches(shape), steps=50, lr=3.0, warmup=0.0)(lin)
    assert all(torch.equal(v, before[n]) for n, v in lin.state_dict().items())


def test_says_nothing_where_there_is_no_terminal(capsys):
    t5fx.Align(batches(Shape(depth=1)), steps=2)(linearized(Shape(depth=1)))
    assert capsys.readouterr() == ("", "")


def test_held_out_inputs_are_measured_and_not_trained_on():
    shape = Shape(depth=2)
    lin, twin = linearized(shape), linearized(shape)
    data, others = batches(shape), batches(shape, 3)
    with_them, without = t5fx.Align(data, steps=3, held_out=others), t5fx.Align(data, steps=3)
    with_them(lin)
    without(twin)
    for value, other in zip(lin.parameters(), twin.parameters(), strict=True):
        assert torch.equal(value, other)
    assert not without.result.held_out
    again = t5fx.Align(data, steps=1, lr=1e-9, held_out=others)
    again(lin)
    for key, (before, after) in with_them.result.held_out.items():
        assert before != after
        assert again.result.held_out[key] == (pytest.approx(after), pytest.approx(after, rel=1e-3))
    assert "held out" in str(with_them.result) and "held out" not in str(without.result)


def test_own_activations_go_on_in_the_last_steps():
    """The second site's last losses are those of the linearized model's own activations."""
    shape = Shape(depth=2)
    lin, images = linearized(shape), shape.images()
    seen = []
    lin.blocks[1].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    t5fx.Align([images], steps=4, own=0.5, lr=1e-9)(lin)
    lin.eval()(images)
    first, second, third, fourth, linear = seen[-5:]
    assert torch.equal(first, second) and not torch.allclose(second, third, atol=1e-3)
    torch.testing.assert_close(third, linear, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fourth, linear, rtol=1e-4, atol=1e-5)


def test_sites_one_after_the_other():
    shape = Shape(depth=2, heads=2, head_dim=8, grid=(4, 4))
    lin = linearized(shape)
    align = t5fx.Align(batches(shape, 4), steps=30, lr=2e-2, sequential=True)
    align(lin)
    result = align.result
    assert (result.steps, result.samples) == (60, 120)
    assert [len(values) for values in result.losses.values()] == [30, 30]
    assert all(result.after[key] < 0.8 * result.before[key] for key in result.losses)


def test_stops_when_nothing_moves():
    lin = linearized(Shape(depth=1))
    align = t5fx.Align(batches(Shape(depth=1)), steps=300, lr=1e-9, until=0.01)
    align(lin)
    assert align.result.steps == 100
    for bad in ({"own": 1.5}, {"own": -0.1}, {"until": 0}):
        with pytest.raises(TrainingError, match="expected a"):
            t5fx.Align([], **bad)


def test_tokens_that_a_mask_hides_are_not_in_the_loss():
    node = TTT(2, 4, 4, 1, scale=0.5, locality="none")
    q, k, v = torch.randn(3, 2, 2, 9, 4).unbind()
    losses = []
    for tokens, mask in ((6, None), (9, (torch.arange(9) < 6).expand(2, -1))):
        student = Student("site", node)
        student.learns = True
        student.learn(*(x[:, :, :tokens] for x in (q, k, v)), key_mask=mask)
        gradients = [p.grad for p in student.parameters.values()]
        losses.append((student.take_loss(), *gradients))
    torch.testing.assert_close(losses[1], losses[0])
