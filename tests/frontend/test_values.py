"""Models whose code reads numbers from the values of their arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import t5fx
from t5fx.errors import CaptureError, RefusedCallError
from t5fx.frontend.capture import capture
from t5fx.runtime.lookup import runtimes

CONFIG = t5fx.LinearizeConfig(min_tokens=0, neighborhood=0, coarse=0)


class Reads(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(3, 4))

    def forward(self, x):
        return self.function(x, self.weight)


def a_set(x, _weight):
    return x if len(set(x.sum(1).tolist())) > 1 else -x


def a_condition(x, _weight):
    return -x if x[0].all() else x


def a_range(x, _weight):
    return sum((x * i for i in range(x.sum())), start=x)


def changed_in_place(x, _weight):
    counts = torch.zeros(3, dtype=torch.long)
    counts[1:] += x[1:].sum(1)
    return x * (2 if int(counts[1]) in {4} and int(counts[2]) in {2} else 3)


X = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 1]])


@pytest.mark.parametrize(
    ("function", "read"),
    [(a_set, [4, 4, 2]), (a_condition, [True]), (a_range, [10]), (changed_in_place, [4, 2])],
)
def test_a_capture_has_the_numbers_of_its_call_and_knows_them_again(function, read):
    model, before = Reads(function), X.clone()
    captured = capture(model, (X,), {}, None)
    assert [one.value for one in captured.values] == read and "numbers read" in captured.note
    graph = torch.fx.GraphModule(model, captured.graph)
    torch.testing.assert_close(graph(X)[0], model(X))
    assert X.equal(before)
    assert all(one.holds([X]) for one in captured.values)
    assert not all(one.holds([1 - X]) for one in captured.values)


def a_float(x, _weight):
    return x if x.double().mean().item() > 0 else -x


def a_weight(x, weight):
    return x if (x * weight).sum() > 0 else -x


def a_draw(x, _weight):
    return x if (torch.rand(3) > 0.5).any() else -x


def an_argument_changed(x, _weight):
    return x if x.add_(1).sum() > 0 else -x


@pytest.mark.parametrize("function", [a_float, a_weight, a_draw, an_argument_changed])
def test_what_more_than_arguments_decides_is_refused(function):
    before = X.clone()
    with pytest.raises(CaptureError, match="Reads failed with"):
        capture(Reads(function), (X,), {}, None)
    assert X.equal(before)


def test_what_cannot_be_given_is_named():
    def function(x, weight):
        return x if len({int(n) for n in (x * weight).sum(1).long().tolist()}) > 1 else -x

    with pytest.raises(CaptureError, match="failed with"):
        capture(Reads(function), (X,), {}, None)


def test_numbers_that_need_no_value_do_not_specialise():
    captured = capture(Reads(lambda x, _weight: x * x.sum().item()), (X,), {}, None)
    assert captured.dynamic and not captured.values


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x, table):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        q, k = (t * table[:, None] for t in (q, k))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Packed(nn.Module):
    """As many words as a mask has, then the image; each has its rows of one rotary table."""

    def __init__(self):
        super().__init__()
        self.embed, self.text = nn.Conv2d(3, 16, 4, 4), nn.Linear(8, 16)
        self.words, self.joint = Attention(), Attention()

    def forward(self, images, words, mask):
        image, words = self.embed(images).flatten(2).mT, self.text(words)
        lengths = mask.sum(1).tolist()
        totals = [length + image.shape[1] for length in lengths]
        padded = len(set(totals)) > 1
        table = torch.arange(1.0, max(totals) + 1)[None, :, None].repeat(len(mask), 1, 8).cos()
        of_words = torch.zeros(*words.shape[:2], 8)
        x = image.new_zeros(len(mask), max(totals), 16)
        for i, length in enumerate(lengths):
            of_words[i, :length] = table[i, :length]
        words = words + self.words(words, of_words)
        for i, (length, total) in enumerate(zip(lengths, totals, strict=True)):
            x[i, :length] = words[i, :length]
            x[i, length:total] = image[i]
        out = self.joint(x, table)[:, lengths[0] :]
        return -out if padded else out


def call(length, height=12, width=16):
    generator = torch.Generator().manual_seed(length)
    images = torch.randn(1, 3, height, width, generator=generator)
    words = torch.randn(1, 6, 8, generator=generator)
    return images, words, (torch.arange(6) < length)[None]


def test_tokens_whose_number_is_read_from_a_mask():
    model = Packed()
    lin = t5fx.linearize(model, call(4), config=CONFIG)
    layouts = [(s.status, s.prefix, s.grid, s.suffix) for s in t5fx.report(lin).sites]
    assert layouts[1] == ("rewritten", 4, (3, 4), 0)
    assert layouts[0][0] == "skipped" and t5fx.report(lin).sites[0].reason == "grid-unknown"
    (runtime,) = runtimes(lin)
    with torch.no_grad():
        for length, kinds in ((4, 1), (2, 2), (4, 2), (2, 2), (6, 3)):
            other = t5fx.linearize(model, call(length), config=CONFIG)
            other.load_state_dict(lin.state_dict())
            torch.testing.assert_close(lin(*call(length)), other(*call(length)))
            assert len(runtime.kinds) == kinds
        lin(*call(4, 16, 12))
    (layout,) = runtime.kinds[-1].layouts["joint"]
    assert (layout.prefix, layout.grid) == (4, (4, 3))


def test_items_of_a_batch_have_one_layout_or_are_refused():
    two = [torch.cat([x, x.flip(-1) * 2 if x.is_floating_point() else x]) for x in call(4)]
    model = Packed()
    lin = t5fx.linearize(model, call(4), config=CONFIG)
    (runtime,) = runtimes(lin)
    with torch.no_grad():
        outputs = lin(*two)
        torch.testing.assert_close(outputs[:1], lin(*(x[:1] for x in two)))
        torch.testing.assert_close(outputs[1:], lin(*(x[1:] for x in two)))
        (layout,) = runtime.kinds[-1].layouts["joint"]
        assert (layout.prefix, layout.grid) == (4, (3, 4))
        with pytest.raises(RefusedCallError, match="grid-unknown"):
            lin(*two[:2], torch.arange(6) < torch.tensor([[4], [3]]))


def test_a_module_that_cannot_be_traced_by_itself_is_named():
    """How many rows its table has is a value, of which the module alone has no example."""

    class Rows(Attention):
        def forward(self, x, rows):
            return super().forward(x, rows.mean(0)[None, None])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attn = nn.Conv2d(3, 16, 4, 4), Rows()

        def forward(self, images, count):
            return self.attn(self.embed(images).flatten(2).mT, torch.ones(count.item(), 8))

    example = torch.randn(1, 3, 12, 16), torch.tensor(3)
    with pytest.raises(CaptureError, match=r"'attn' \(Rows\).*exclude=\('attn',\)") as found:
        t5fx.linearize(Model(), example, config=CONFIG)
    assert isinstance(found.value.__cause__, GuardOnDataDependentSymNode)


def test_a_module_that_reads_and_attends_says_what_to_do():
    class Both(Packed):
        def forward(self, images, words, mask):
            x = super().forward(images, words, mask).unsqueeze(1)
            return F.scaled_dot_product_attention(x, x, x)

    with pytest.raises(CaptureError, match="Move the attention into a module"):
        t5fx.linearize(Both(), call(4), config=CONFIG)
