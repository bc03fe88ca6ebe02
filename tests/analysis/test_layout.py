"""Where the tokens of windows and pooled grids are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import t5fx
from t5fx.analysis.layout import Axes
from t5fx.frontend.shapes import add_shapes
from t5fx.graph.view import View

CONFIG = t5fx.LinearizeConfig(min_tokens=0)


class Windows(nn.Module):
    """Attention inside windows of a grid that is padded to whole windows, as Swin and DaViT do."""

    def __init__(self, side=4):
        super().__init__()
        self.side = side
        self.embed, self.qkv = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48)

    def forward(self, images):
        x = self.embed(images).permute(0, 2, 3, 1)
        batch, height, width, channels = x.shape
        x = F.pad(x, (0, 0, 0, -width % self.side, 0, -height % self.side))
        rows, columns = x.shape[1] // self.side, x.shape[2] // self.side
        x = x.view(batch, rows, self.side, columns, self.side, channels).transpose(2, 3)
        x = x.reshape(-1, self.side * self.side, channels)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x.view(batch, rows, columns, self.side, self.side, channels).transpose(2, 3)
        return x.reshape(batch, rows * self.side, columns * self.side, channels)[:, :height, :width]


class Pooled(nn.Module):
    """Attention over the greatest or the mean of each square of patches."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool
        self.embed, self.qkv = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48)

    def forward(self, images):
        x = self.embed(images)
        x = self.pool(x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)))
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("size", [(16, 32), (24, 20)])  # whole windows, and padded
def test_windows_of_a_padded_grid(size):
    model, images = Windows().eval(), torch.randn(2, 3, *size)
    lin = t5fx.linearize(model, (images,), config=CONFIG)
    (site,) = t5fx.report(lin).sites
    assert (site.status, site.prefix, site.grid, site.suffix) == ("rewritten", 0, (4, 4), 0)
    assert lin(images).shape == model(images).shape


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.amax((3, 5)),
        lambda x: x.mean((-1, -3)),
        lambda x: x.max(5).values.max(3)[0],
        lambda x: x.amax(5, keepdim=True).amax(3, keepdim=True).squeeze(5).squeeze(3),
    ],
)
def test_pooled_grid(pool):
    model, images = Pooled(pool).eval(), torch.randn(2, 3, 24, 40)
    lin = t5fx.linearize(model, (images,), config=CONFIG)
    (site,) = t5fx.report(lin).sites
    assert (site.status, site.grid) == ("rewritten", (3, 5))
    assert lin(torch.randn(1, 3, 32, 16)).shape == (1, 8, 16)


class Patches(nn.Module):
    """Tokens cut out of the image by reshape, without a convolution."""

    def __init__(self, height=4, width=4):
        super().__init__()
        self.height, self.width = height, width
        self.embed, self.qkv = nn.Linear(3 * height * width, 16), nn.Linear(16, 48)

    def forward(self, images):
        x = images.unflatten(3, (-1, self.width)).unflatten(2, (-1, self.height))
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        q, k, v = self.qkv(self.embed(x)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Frames(nn.Module):
    """Attention over all patches of all frames, which a 2-D convolution embeds one by one."""

    def __init__(self, all_frames=True):
        super().__init__()
        self.all_frames = all_frames
        self.embed, self.qkv = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48)

    def forward(self, video):
        batch, _, frames = video.shape[:3]
        x = self.embed(video.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        x = x.unflatten(0, (batch, frames))
        x = x.flatten(1, 2) if self.all_frames else x.transpose(1, 2).flatten(0, 1)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("all_frames", "grid"), [(True, (5, 4, 6)), (False, (5,))])
def test_frames_of_a_video(all_frames, grid):
    model, video = Frames(all_frames).eval(), torch.randn(2, 3, 5, 16, 24)
    (site,) = t5fx.explain(model, (video[:1],), config=CONFIG).sites
    assert site.grid == grid
    lin = t5fx.linearize(model, (video,), config=CONFIG)
    (site,) = t5fx.report(lin).sites
    assert (site.status, site.grid) == ("rewritten", grid)
    other = torch.randn(1, 3, 2, 8, 8)
    assert lin(other).shape == model(other).shape


def test_patches_cut_by_reshape():
    model, images = Patches().eval(), torch.randn(2, 3, 24, 40)
    lin = t5fx.linearize(model, (images,), config=CONFIG)
    (site,) = t5fx.report(lin).sites
    assert (site.status, site.grid) == ("rewritten", (6, 10))
    assert lin(torch.randn(1, 3, 32, 16)).shape == (1, 32, 16)


def test_frames_whose_patches_are_cut_by_reshape():
    class Model(Patches):
        def forward(self, video):
            x = video.unflatten(4, (-1, 4)).unflatten(3, (-1, 4))
            x = x.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)
            q, k, v = self.qkv(self.embed(x)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    model, video = Model().eval(), torch.randn(2, 3, 5, 16, 24)
    lin = t5fx.linearize(model, (video,), config=CONFIG)
    assert [site.grid for site in t5fx.report(lin).rewritten] == [(5, 4, 6)]
    assert lin(video).shape == model(video).shape


@pytest.mark.parametrize("sizes", [(4, 1), (4, 2)])
def test_one_side_cut_is_no_image(sizes):
    """Of [B, C, H, W] or [B, T, N, C]: nothing says that the other axis is one of an image."""
    images = torch.randn(2, 3, 24, 40)
    report = t5fx.explain(Patches(*sizes).eval(), (images,), config=CONFIG)
    assert [site.reason for site in report.sites] == ["grid-unknown"]


def test_heads_repeated_and_rotated_as_complex_numbers():
    """RoPE as in Llama's code: neither loses the tokens."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.qkv = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 32)
            self.register_buffer("turn", torch.polar(torch.ones(24, 4), torch.randn(24, 4)))

        def rotated(self, x):
            turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * self.turn
            return torch.view_as_real(turned).flatten(3)

        def forward(self, images):
            x = self.embed(images).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(x).split((16, 8, 8), -1)
            q, k, v = (t.unflatten(2, (-1, 8)).transpose(1, 2) for t in (q, k, v))
            k, v = self.rotated(k).repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
            return F.scaled_dot_product_attention(self.rotated(q), k, v).transpose(1, 2).flatten(2)

    model, images = Model().eval(), torch.randn(2, 3, 16, 24)
    lin = t5fx.linearize(model, (images,), config=CONFIG)
    (site,) = t5fx.report(lin).sites
    assert (site.status, site.grid, site.num_heads) == ("rewritten", (4, 6), 2)
    assert lin(images).shape == model(images).shape


def test_queries_of_the_pooled_grid_are_other_tokens_than_the_keys():
    def attend(images, embed):
        x = embed(images)
        pooled = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))
        q, k = (t.flatten(2).transpose(1, 2)[:, None] for t in (pooled, x))
        return F.scaled_dot_product_attention(q, k, k)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 4, 4)

        def forward(self, images):
            return attend(images, self.embed)

    report = t5fx.explain(Model().eval(), (torch.randn(2, 3, 24, 40),), config=CONFIG)
    assert [site.reason for site in report.sites] == ["cross-attention"]


class Tokens(nn.Module):
    """Self-attention over [B, N, C] that `tokens(embedded image)` makes."""

    def __init__(self, tokens, channels=16):
        super().__init__()
        self.tokens = tokens
        self.embed, self.qkv = nn.Conv2d(3, channels, 4, 4), nn.Linear(16, 48)
        self.mix = nn.Linear(24, 7)

    def attend(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, images):
        return self.attend(self.tokens(self, self.embed(images)))


def site_of(tokens, *size):
    (site,) = t5fx.explain(Tokens(tokens).eval(), (torch.randn(2, 3, *size),), config=CONFIG).sites
    return site


def row_major(x):
    return x.flatten(2).mT


class Unfolded(nn.Module):
    """MobileViT: tokens at one place of every patch attend to each other, one place at a time."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48)

    def forward(self, images):
        x = self.embed(images)
        batch, channels, height, width = x.shape
        rows, columns = -(-height // 2), -(-width // 2)
        if (rows * 2, columns * 2) != (height, width):
            x = F.interpolate(x, (rows * 2, columns * 2), mode="bilinear")
        x = x.reshape(batch * channels * rows, 2, columns, 2).transpose(1, 2)
        x = x.reshape(batch, channels, rows * columns, 4).transpose(1, 3)
        x = x.reshape(batch * 4, rows * columns, channels)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_channels_merged_with_rows():
    model, images = Unfolded().eval(), torch.randn(2, 3, 32, 48)
    lin = t5fx.linearize(model, (images,), config=CONFIG)
    (site,) = t5fx.report(lin).sites
    assert (site.status, site.prefix, site.grid, site.suffix) == ("rewritten", 0, (4, 6), 0)
    other = torch.randn(1, 3, 64, 16)
    assert lin(other).shape == model(other).shape


def test_sizes_that_prove_no_grid_are_captured_static():
    """A size that the model turns into a number leaves an image's sides without one."""

    class Model(Unfolded):
        def forward(self, images):
            x = self.embed(images)
            batch, channels, height, width = x.shape
            rows, columns = int(height / 2), int(width / 2)
            x = x.reshape(batch * channels * rows, 2, columns, 2).transpose(1, 2)
            x = x.reshape(batch, channels, rows * columns, 4).transpose(1, 3)
            x = x.reshape(batch * 4, rows * columns, channels)
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    model, images = Model().eval(), torch.randn(2, 3, 32, 48)
    lin = t5fx.linearize(model, (images,), config=CONFIG)
    (site,) = t5fx.report(lin).sites
    assert (site.status, site.grid) == ("rewritten", (4, 6))
    assert lin(images).shape == model(images).shape


@pytest.mark.parametrize(("kernel", "stride", "grid"), [(4, 4, (6, 10)), (8, 4, (5, 9))])
def test_blocks_of_unfold(kernel, stride, grid):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.qkv = nn.Linear(3 * kernel**2, 16), nn.Linear(16, 48)

        def forward(self, images):
            x = self.embed(F.unfold(images, kernel, stride=stride).mT)
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    (site,) = t5fx.explain(Model().eval(), (torch.randn(2, 3, 24, 40),), config=CONFIG).sites
    assert (site.status, site.grid) == ("rewritten", grid)


def test_interleaved_rotary_embedding():
    """Even and odd channels, turned and stacked."""

    class Model(Tokens):
        def attend(self, x):
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
            q, k = (torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(3) for t in (q, k))
            return F.scaled_dot_product_attention(q, k, v)

    model = Model(lambda _, x: row_major(x)).eval()
    (site,) = t5fx.explain(model, (torch.randn(2, 3, 16, 24),), config=CONFIG).sites
    assert (site.status, site.grid) == ("rewritten", (4, 6))


@pytest.mark.parametrize("batch", [1, 2])
def test_rotary_embedding_written_between(batch):
    """Even and odd channels, turned and written into an empty tensor, for one image too."""

    class Model(Tokens):
        def attend(self, x):
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).unbind(2)
            q, k, v = (t.transpose(1, 2) for t in (self.turned(q), self.turned(k), v))
            return F.scaled_dot_product_attention(q, k, v)

        def turned(self, t):
            out = torch.empty_like(t)
            out[..., 0::2] = -t[..., 1::2]
            out[..., 1::2] = t[..., 0::2]
            return out

    model = Model(lambda _, x: row_major(x)).eval()
    (site,) = t5fx.explain(model, (torch.randn(batch, 3, 16, 24),), config=CONFIG).sites
    assert (site.status, site.grid) == ("rewritten", (4, 6))


def test_tokens_written_between_others_are_no_grid():
    def mixed(_model, x):
        tokens = row_major(x)
        out = torch.empty_like(tokens)
        out[:, 0::2] = tokens[:, 12:]
        out[:, 1::2] = tokens[:, :12]
        return out

    assert site_of(mixed, 16, 24).reason == "grid-unknown"


@pytest.mark.parametrize(
    "item", [lambda t, i: t[i : i + 1], lambda t, i: t.index_select(0, torch.tensor([i]))]
)
def test_items_of_a_batch_are_not_the_same_for_being_one(item):
    class Model(Tokens):
        def attend(self, x):
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
            return F.scaled_dot_product_attention(item(q, 0), item(k, 1), item(v, 1))

    model = Model(lambda _, x: row_major(x)).eval()
    (site,) = t5fx.explain(model, (torch.randn(2, 3, 16, 24),), config=CONFIG).sites
    assert site.status == "skipped"


def test_looked_up_tokens_are_those_of_the_indices():
    """torch.nn.functional's embedding takes the indices first, ATen's the table."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 16))

        def forward(self, ids):
            return F.embedding(ids, self.table)

    traced = torch.fx.symbolic_trace(Model())
    add_shapes(traced, (torch.ones(2, 24, dtype=torch.long),), {})
    ids, _, tokens, _ = traced.graph.nodes
    axes = Axes(View(traced.graph, traced))
    assert axes[tokens][:2] == axes[ids]


def test_frames_modulated_one_by_one():
    """A modulation repeated for every frame does not hide that frames are an axis of the grid."""

    class Model(Frames):
        def forward(self, video, shift):
            batch, _, frames = video.shape[:3]
            x = self.embed(video.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
            x = shift.repeat_interleave(frames, 0)[:, None] + x
            x = x.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    args = torch.randn(2, 3, 5, 16, 24), torch.randn(2, 16)
    (site,) = t5fx.explain(Model().eval(), args, config=CONFIG).sites
    assert (site.status, site.grid) == ("rewritten", (5,))


def test_places_filled_one_after_another():
    """Text and image written into a tensor made for both are its tokens, in that order."""

    def joint(model, x):
        image = row_major(x)
        tokens = image.new_zeros(image.shape[0], 5 + image.shape[1], 16)
        tokens[:, :5] = model.qkv.weight[:5]
        tokens[:, 5:] = image
        return tokens

    site = site_of(joint, 16, 24)
    assert (site.status, site.prefix, site.grid, site.suffix) == ("rewritten", 5, (4, 6), 0)


def test_one_sequence_an_item():
    def padded(_model, x):
        return nn.utils.rnn.pad_sequence(list(row_major(x).unbind(0)), batch_first=True)

    site = site_of(padded, 16, 24)
    assert (site.status, site.grid) == ("rewritten", (4, 6))


@pytest.mark.parametrize("sides", [(4, 6), (6, 4), None])
@pytest.mark.parametrize(
    "batch",
    [
        lambda a, b: torch.cat([a[None], b[None]]),
        lambda a, b: torch.stack([a, b]),
        lambda a, b: nn.utils.rnn.pad_sequence([a, b], batch_first=True),
    ],
    ids=["cat", "stack", "pad_sequence"],
)
def test_an_item_that_need_not_be_an_image(batch, sides):
    """As many words, or patches of an image of other sides, are not where the patches are."""

    def tokens(_model, x):
        words = x.flatten(1)[1, :384].view(24, 16)  # of an image whose sides nothing tells
        if sides is not None:
            words = F.adaptive_avg_pool2d(x, sides)[1].flatten(1).mT
        return batch(x[0].flatten(1).mT, words)

    site = site_of(tokens, 16, 24)
    assert (site.status, site.grid) == (
        ("rewritten", (4, 6)) if sides == (4, 6) else ("skipped", None)
    ), site


def _stacked(order):
    return lambda t: torch.stack([t[i] for i in order])


def _written(order):
    def write(t):
        result = t.new_zeros(t.shape)
        for i, item in enumerate(order):
            result[i] = t[item]
        return result

    return write


@pytest.mark.parametrize("order", [(0, 0, 0), (0, 0, 1), (0, 2, 1), (2, 1, 0), (0, 1, 2)])
@pytest.mark.parametrize("made", [_stacked, _written])
def test_keys_of_other_items(made, order):
    """Keys of the first frame or the previous one for all frames, or of swapped items."""

    class Model(Tokens):
        def attend(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            q, k, v = (
                t.unflatten(2, (2, 8)).transpose(1, 2) for t in (q, made(order)(k), made(order)(v))
            )
            return F.scaled_dot_product_attention(q, k, v)

    model = Model(lambda _, x: row_major(x)).eval()
    (site,) = t5fx.explain(model, (torch.randn(3, 3, 16, 24),), config=CONFIG).sites
    assert site.reason == (None if order == (0, 1, 2) else "cross-attention"), site


def test_rows_copied_to_the_front_of_more_are_no_grid():
    def longer(_model, x):
        tokens = row_major(x)
        result = tokens.new_zeros(2, 28, 16)
        for i in range(24):
            result[:, i] = tokens[:, i]
        return result

    site = site_of(longer, 16, 24)
    assert site.status == "skipped" or site.suffix == 4, site


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        # In another order, the same for all: no grid that is known.
        (lambda _, x: row_major(x)[:, torch.arange(24).flip(0)], "grid-unknown"),
        # Some of them, as the values decide: a mask.
        (lambda _, x: row_major(x)[:, x.mean((0, 1)).flatten().topk(12).indices], "masked"),
        # The first half of the rows: a grid perhaps, but not proved.
        (lambda _, x: row_major(x)[:, :11], "grid-unknown"),
        # New tokens that a layer makes of the old ones, whose channels they still have.
        (lambda model, x: model.mix(x.flatten(2)).mT, "grid-unknown"),
    ],
)
def test_tokens_chosen_or_mixed(tokens, reason):
    assert site_of(tokens, 16, 24).reason == reason


def test_attention_over_channels_is_none():
    class Model(Tokens):
        def attend(self, x):
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 4, 1).unbind()
            return F.scaled_dot_product_attention(q, k, v)

    model = Model(lambda _, x: row_major(x)).eval()
    (site,) = t5fx.explain(model, (torch.randn(2, 3, 16, 24),), config=CONFIG).sites
    assert site.reason == "not-attention"


def test_sizes_of_positions_between_patches():
    """DINOv3: as many positions as arange(0.5, n) has, with class and register tokens in front."""

    class Model(Tokens):
        def forward(self, images):
            x = self.embed(images)
            height, width = x.shape[2:]
            rows, columns = torch.arange(0.5, height) / height, torch.arange(0.5, width) / width
            places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
            turn = places.repeat(1, 4)
            tokens = torch.cat([self.qkv.weight[:3].expand(len(x), -1, -1), row_major(x)], 1)
            q, k, v = self.qkv(tokens).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
            sizes = q.shape[-2] - turn.shape[-2], turn.shape[-2]
            q, k = (
                torch.cat([prefix, patches * turn], -2)
                for prefix, patches in (t.split(sizes, -2) for t in (q, k))
            )
            return F.scaled_dot_product_attention(q, k, v)

    model, images = Model(None).eval(), torch.randn(2, 3, 16, 24)
    lin = t5fx.linearize(model, (images,), config=CONFIG)
    (site,) = t5fx.report(lin).sites
    assert (site.status, site.prefix, site.grid) == ("rewritten", 3, (4, 6))
    assert "dynamic" in t5fx.report(lin).capture
    other = torch.randn(1, 3, 32, 8)
    assert lin(other).shape == model(other).shape
