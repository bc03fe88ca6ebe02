"""backend="t5" with layouts that are given: callables are asked, and numbers checked, each call."""

import functools
import warnings

import packed
import pytest
import torch
from packed import call, grid_of, trained
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import t5fx
from t5fx.backend import compile as backend
from t5fx.errors import NothingRewrittenWarning, RefusedCallError

pytestmark = pytest.mark.filterwarnings("ignore::t5fx.errors.UntrainedWarning")

CALLED = {"min_tokens": 0, "grid": grid_of}


@pytest.fixture
def eager(monkeypatch):
    """Lower without Inductor, which takes seconds a graph."""
    monkeypatch.setattr(backend, "_inductor", lambda options, more: aot_eager)


def whole(model, options):
    return torch.compile(model, backend="t5", options=options)


def in_place(model, options):
    model.compile(backend="t5", options=options)
    return model


def blocks(model, options):
    for block in model.blocks:
        block.compile(backend="t5", options=options)
    return model


@functools.cache
def converted():
    config = t5fx.LinearizeConfig(**CALLED)
    return trained(t5fx.linearize(packed.model(), (), call(3, 4), config=config))


def wanted(size, batch):
    return converted()(**call(*size, batch))


@pytest.mark.parametrize("compiled", [whole, in_place, blocks])
def test_a_callable_is_asked_at_each_call(eager, compiled):
    model = packed.model()
    fast = compiled(model, dict(CALLED))
    with torch.no_grad():
        fast(**call(3, 4))
        trained_values(model)
        graphs = counters["stats"]["unique_graphs"]
        for size, batch in (((3, 4), 2), ((4, 3), 2), ((2, 6), 2), ((4, 3), 2)):
            torch.testing.assert_close(fast(**call(*size, batch)), wanted(size, batch))
        assert counters["stats"]["unique_graphs"] == graphs  # of Dynamo
        for size, batch in (((4, 3), 3), ((4, 4), 2), ((2, 8), 2)):
            torch.testing.assert_close(fast(**call(*size, batch)), wanted(size, batch))


def trained_values(model):
    """Give the new parameters beside a model the values of `trained`."""
    known = dict(converted().named_parameters())
    with torch.no_grad():
        for name, parameter in t5fx.adapter(model).named_parameters():
            parameter.copy_(known[name])


def test_gradients_are_those_of_the_call(eager):
    model = packed.model()
    fast = whole(model, dict(CALLED))
    fast(**call(3, 4))
    trained_values(model)
    fast(**call(4, 3)).square().sum().backward()
    wanted((4, 3), 2).square().sum().backward()
    expected = {name: p.grad for name, p in converted().named_parameters()}
    for some in (model, t5fx.adapter(model)):
        for name, parameter in some.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.slow
def test_inductor_compiles_each_grid():
    model = packed.model()
    fast = whole(model, dict(CALLED))
    with torch.no_grad():
        fast(**call(3, 4))
        trained_values(model)
        for size in ((4, 3), (4, 4), (2, 8)):
            torch.testing.assert_close(fast(**call(*size)), wanted(size, 2), rtol=1e-4, atol=1e-5)


def test_numbers_that_positions_contradict_are_refused(eager):
    options = {"min_tokens": 0, "grid": (3, 4)}
    fast = whole(packed.model(), options)
    fast(**call(3, 4))
    with pytest.raises(RefusedCallError, match=r"positions .* of 4 x 3"):
        fast(**call(4, 3))
    fast(**call(3, 4))
    torch._dynamo.reset()
    with pytest.warns(NothingRewrittenWarning, match="grid-unknown"):
        whole(packed.model(), options)(**call(4, 3))


def test_a_grid_of_other_axes_is_refused(eager):
    options = {"min_tokens": 0, "grid": lambda text, **_: (12,) if text[0, 0, 0] > 9 else (3, 4)}
    fast = whole(packed.model(), options)
    fast(**call(3, 4))
    other = call(3, 4)
    other["text"][0, 0, 0] = 10.0
    with pytest.raises(RefusedCallError, match="grid of 2 axes"):
        fast(**other)


def test_a_function_has_no_arguments_of_a_model(eager):
    model = packed.model()
    with pytest.raises(BackendCompilerFailed, match="expected the call of a compiled module"):
        torch.compile(lambda x: model(**x), backend="t5", options=dict(CALLED))(call(3, 4))


class Tables(torch.nn.Module):
    """Packed tokens with a rotary table that is no buffer, or made for the size at hand."""

    def __init__(self, made):
        super().__init__()
        self.qkv, self.made = torch.nn.Linear(16, 48), made
        self.table, self.tables = torch.rand(24, 8), [torch.rand(24, 8)]

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
        table = self.made(self, x.shape[1])
        return torch.nn.functional.scaled_dot_product_attention(table * q, table * k, v)


@pytest.mark.parametrize(
    "made",
    [
        lambda model, count: model.table[:count],
        lambda model, count: model.tables[0][:count],
        lambda model, count: torch.arange(count)[:, None] * torch.arange(8.0).cos(),
    ],
)
def test_constants_and_sizes_that_are_inputs_are_no_data(eager, made):
    fast = whole(Tables(made), {"min_tokens": 0, "grid": lambda x: (x.shape[1] // 4, 4)})
    for count in (24, 16, 12):  # from the second size on it is symbolic
        before = len(list(fast.parameters()))
        with warnings.catch_warnings():
            warnings.simplefilter("error", NothingRewrittenWarning)
            fast(torch.randn(2, count, 16))
        assert len(list(fast.parameters())) == before
    assert t5fx.adapter(fast)


def test_names_of_arguments_in_the_graph_of_dynamo(eager):
    """Functions of torch that have no schema: what they do depends on arguments by position."""

    class Model(torch.nn.Module):
        def __init__(self, tokens):
            super().__init__()
            self.tokens, self.embed = tokens, torch.nn.Conv2d(3, 16, 4, 4)
            self.qkv = torch.nn.Linear(16, 48)

        def forward(self, x):
            x = self.tokens(self, x)
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def row_major(model, x):
        return model.embed(x).flatten(2).mT

    def padded(model, x):
        return torch.nn.utils.rnn.pad_sequence(list(row_major(model, x).unbind(0)), True)

    def filled(model, x):
        tokens = row_major(model, x)
        return torch.slice_scatter(tokens.new_zeros(2, 29, 16), tokens, 1, 5, 29)

    def blocks(_model, x):
        return torch.nn.functional.unfold(x[:, :1], 4, stride=4).mT

    for tokens in (padded, filled, blocks):
        torch._dynamo.reset()
        model = Model(tokens)
        with warnings.catch_warnings():
            warnings.simplefilter("error", NothingRewrittenWarning)
            whole(model, {"min_tokens": 0})(torch.randn(2, 3, 16, 24))
        assert t5fx.adapter(model), tokens


# --- without any layout given ---------------------------------------------------------------------

PROVED = {"min_tokens": 0}


@functools.cache
def proved():
    config = t5fx.LinearizeConfig(**PROVED)
    return trained(t5fx.linearize(packed.model(), (), call(3, 4), config=config))


@pytest.mark.parametrize("compiled", [whole, in_place])
def test_positions_are_read_at_each_call(eager, compiled):
    model = packed.model()
    fast = compiled(model, dict(PROVED))
    with torch.no_grad():
        fast(**call(3, 4))
        trained_values(model)
        graphs = counters["stats"]["unique_graphs"]
        for size in ((3, 4), (4, 3), (2, 6), (4, 3)):
            torch.testing.assert_close(fast(**call(*size)), proved()(**call(*size)))
        assert counters["stats"]["unique_graphs"] == graphs  # of Dynamo
        torch.testing.assert_close(fast(**call(5, 3)), proved()(**call(5, 3)))
        for ids in (call(3, 4)["ids"].flip(0), torch.zeros(12, 3)):
            with pytest.raises(RefusedCallError, match="expected positions of the tokens on one"):
                fast(**(call(3, 4) | {"ids": ids}))


def test_positions_of_two_grids_are_left(eager):
    other = call(4, 6)
    other["ids"] = torch.cat([call(3, 4)["ids"], call(2, 6)["ids"]])
    with pytest.warns(
        NothingRewrittenWarning, match="'ids', are those of 2 grids, 3 x 4, then 2 x 6"
    ):
        whole(packed.model(), dict(PROVED))(**other)


class Broken(torch.nn.Module):
    """An image whose tokens go through graph breaks, before and between the blocks."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 16, 4, 4)
        self.blocks = torch.nn.ModuleList(packed.Block() for _ in range(2))

    def forward(self, image, text):
        x, rope = torch.cat([text, self.embed(image).flatten(2).mT], 1), text.new_ones(1)
        torch._dynamo.graph_break()
        x = x + self.blocks[0](x, rope)
        torch._dynamo.graph_break()
        return x + self.blocks[1](x, rope)


class Tokens(torch.nn.Conv2d):
    """Breaks the graph, so that its caller is left there too, and what it returns is taken on."""

    def forward(self, image):
        torch._dynamo.graph_break()
        return super().forward(image).flatten(2).mT


class Filled(Broken):
    """As `Broken`, but the break is within a module, and tokens are written item by item."""

    def __init__(self):
        super().__init__()
        self.embed = Tokens(3, 16, 4, 4)

    def forward(self, image, text):
        image, rope, words = self.embed(image), text.new_ones(1), text.shape[1]
        x = text.new_zeros(len(text), words + image.shape[1], 16)
        for i in range(len(text)):
            x[i, :words] = text[i]
            x[i, words:] = image[i]
        for block in self.blocks:
            x = x + block(x, rope)
        return x


@pytest.mark.parametrize("kind", [Broken, Filled])
def test_a_layout_goes_on_past_graph_breaks(eager, kind):
    torch.manual_seed(0)
    model = kind().eval()
    text, sizes = torch.randn(2, 3, 16), ((16, 24), (24, 16), (12, 32), (20, 24))
    images = [torch.randn(2, 3, *size) for size in sizes]
    config = t5fx.LinearizeConfig(**PROVED)
    lin = trained(t5fx.linearize(model, (images[0], text), config=config))
    assert len(t5fx.report(lin).rewritten) == 2
    fast = whole(model, PROVED | {"adapter": lin})
    with torch.no_grad():
        for image in (*images, *images):
            torch.testing.assert_close(fast(image, text), lin(image, text))
    assert len(t5fx.adapter(model).nodes()) == 2


class Listed(torch.nn.Module):
    """As Z-Image: a list of images, each of a size of its own, padded to one number of tokens."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 16, 4, 4)
        self.blocks = torch.nn.ModuleList(packed.Block() for _ in range(2))

    def forward(self, images, text):
        tokens = [self.embed(one[None])[0].flatten(1).mT for one in images]
        x = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        x = x + self.blocks[0](x, text.new_ones(1))
        joint = [
            torch.cat([t[: len(one)], t.mean(0, True)]) for t, one in zip(x, tokens, strict=True)
        ]
        return self.blocks[1](torch.nn.utils.rnn.pad_sequence(joint, batch_first=True), text)


def test_images_in_a_list_have_one_grid_where_they_have_one_size(eager):
    torch.manual_seed(0)
    model, one = Listed().eval(), torch.ones(1)
    images = [torch.randn(2, 3, *size) for size in ((16, 24), (24, 16), (12, 32), (20, 24))]
    lin = trained(
        t5fx.linearize(model, (list(images[0]), one), config=t5fx.LinearizeConfig(**PROVED))
    )
    fast = whole(model, PROVED | {"adapter": lin})
    mixed = [images[0][0], images[1][1][..., :12]]
    with torch.no_grad():
        for batch in (*images, *images):
            torch.testing.assert_close(fast(list(batch), one), lin(list(batch), one))
        with pytest.raises(RefusedCallError):
            lin(mixed, one)
        with pytest.raises(BackendCompilerFailed, match="what the node cannot do: grid-unknown"):
            fast(mixed, one)
