"""`Distill`: the student, its teacher and what each way of training may change."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from vits import Shape

import t5fx
from t5fx.errors import TrainingError
from t5fx.training.distill import cosine, relative

SHAPE = Shape()
#: Without near attention, which leaves next to nothing to learn on a few tokens.
CONFIG = t5fx.LinearizeConfig(min_tokens=0, neighborhood=0, coarse=0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SHAPE.model()


@pytest.fixture
def lin(model):
    return t5fx.linearize(model, (SHAPE.images(),), config=CONFIG)


def batches(count=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SHAPE.images().shape, generator=generator) for _ in range(count)]


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(before, module):
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("train", ["new", "full", pytest.param("lora", marks=pytest.mark.extras)])
def test_the_student_comes_closer_and_only_what_is_trained_changes(model, lin, train):
    original, before, names = values(model), values(lin), list(lin.state_dict())
    flags = [p.requires_grad for p in lin.parameters()]
    images = batches()[0]
    wanted = model.eval()(images)
    start = relative(lin.eval()(images), wanted).item()
    hook = t5fx.Distill(batches(), output="relative", train=train, rank=2, steps=60, lr=1e-2)
    hook(lin)
    assert relative(lin.eval()(images), wanted).item() < 0.8 * start
    assert list(lin.state_dict()) == names
    assert [p.requires_grad for p in lin.parameters()] == flags
    new = {name for name in before if ".t5." in name}
    found = changed(before, lin)
    assert found & new
    assert (found <= new) == (train == "new")
    assert not changed(original, model)
    linear = {n for n, m in lin.named_modules() if type(m) is nn.Linear}
    assert linear == {n for n, m in model.named_modules() if type(m) is nn.Linear}
    if train == "lora":
        assert found - new <= {f"{name}.weight" for name in linear}


def test_the_teacher_is_the_original(model, lin):
    """The loss of a student that is its teacher is zero, whatever the teacher was before."""
    seen = []

    def look(student, teacher):
        seen.append(teacher)
        return (student - teacher).square().sum()

    images = batches(1)
    t5fx.Distill(images, output=look, hidden=(), train="full", steps=3, lr=1e-2)(lin)
    for teacher in seen:
        torch.testing.assert_close(teacher, model.eval()(images[0]))


def test_hidden_states_are_those_of_the_blocks_or_those_named(lin):
    hook = t5fx.Distill(batches())
    nodes = t5fx.training.nodes.nodes_of(lin)
    blocks = sorted({key.rpartition(".")[0].rpartition(".")[0] for key in nodes})
    assert hook._hidden(lin, nodes) == blocks
    named = t5fx.Distill(batches(), hidden=["*.mlp"])._hidden(lin, nodes)
    assert named and all(name.endswith(".mlp") for name in named)
    with pytest.raises(TrainingError, match=r"hidden: expected names of modules.* got 'nothing'"):
        t5fx.Distill(batches(), hidden=["nothing"], steps=1)(lin)


def test_an_average_is_what_remains(model, lin):
    plain, averaged = (t5fx.linearize(model, (SHAPE.images(),), config=CONFIG) for _ in range(2))
    for module, ema in ((plain, None), (averaged, 0.999)):
        t5fx.Distill(batches(), train="new", steps=5, lr=1e-2, ema=ema)(module)
    moves = []
    for module in (plain, averaged):
        both = zip(module.parameters(), lin.parameters(), strict=True)
        moves.append(sum(float((p - q).detach().norm()) for p, q in both))
    assert 0 < moves[1] < 0.1 * moves[0]


def test_losses():
    one, other = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    torch.testing.assert_close(
        cosine(one, other), 1 - functional.cosine_similarity(one, other, dim=-1).mean()
    )
    torch.testing.assert_close(cosine(3 * one, one), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert relative({"a": one, "b": 3}, {"a": torch.zeros_like(one) + one, "b": 3}) == 0
    with pytest.raises(TrainingError, match="expected as many values"):
        relative((one, one), one)
    with pytest.raises(TrainingError, match="expected tensors among the results"):
        relative(3, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "all"}, "train: expected one of 'new', 'full', 'lora', got 'all'"),
        ({"output": "mse"}, "output: expected one of 'cosine', 'relative' or a function"),
        ({"rank": 0}, "rank: expected a whole number above 0"),
        ({"lr": -1.0}, "lr: expected a number above 0"),
        ({"ema": 1.5}, "ema: expected a decay between 0 and 1, got 1.5"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(TrainingError, match=message):
        t5fx.Distill([], **settings)
