"""The pictures of a diagnosis: what is drawn where, and in which colours."""

import pytest
import torch
from matplotlib.figure import Figure
from vits import Shape

import t5fx
from t5fx.diagnostics.draw import draw_maps
from t5fx.diagnostics.places import Layout
from t5fx.diagnostics.result import Maps, SiteDiagnosis
from t5fx.errors import T5Error

SHAPE = Shape(depth=3, grid=(4, 5))


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    return t5fx.diagnose(SHAPE.model(), (SHAPE.images(),), queries=[0, (0.5, 0.5)])


def images_of(figure):
    return [axis.get_images()[0] for axis in figure.axes if axis.get_images()]


def titles(figure):
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


def test_key_shift_has_a_dot_for_every_head_and_a_line_for_the_means(found):
    figure = found.draw_key_shift()
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    (dots,) = axes.collections
    wanted = [(i, shift) for i, site in enumerate(found.sites) for shift in site.key_shift]
    assert [tuple(dot) for dot in dots.get_offsets()] == [pytest.approx(dot) for dot in wanted]
    means, independent = (line.get_ydata() for line in axes.lines)
    assert list(means) == [site.mean_key_shift for site in found.sites]
    assert list(independent) == pytest.approx([21**-0.5] * 3)
    assert [t.get_text() for t in axes.get_xticklabels()] == [f"blocks.{i}.attn" for i in range(3)]


def test_maps_lie_on_the_grid_side_by_side_in_one_scale(found):
    figure = found.draw_maps()
    maps = images_of(figure)
    assert len(maps) == 3 * 2 * 2 and len({id(one.norm) for one in maps}) == 1
    names = titles(figure)[:4]
    assert names == [
        "softmax\nfrom prefix token 0",
        "TTT node\nfrom prefix token 0",
        "softmax\nfrom row 2, column 2",
        "TTT node\nfrom row 2, column 2",
    ]
    first = found.sites[0].maps
    for picture, rows in zip(maps[2:4], (first.softmax, first.node), strict=True):
        wanted = 21 * rows.mean(0)[1, 1:].view(4, 5)
        torch.testing.assert_close(torch.tensor(picture.get_array()), wanted)
    # How much goes to the class token is not on the grid: it is said.
    share = first.softmax.mean(0)[1, 0]
    assert figure.axes[2].get_xlabel() == f"grid {1 - share:.2f}, prefix {share:.2f}"
    marks = [line.get_xydata().tolist() for line in figure.axes[2].lines]
    assert marks == [[[2, 2]]] * 2 and not figure.axes[0].lines


def test_maps_of_some_heads_and_the_image_beside_them(found):
    image = torch.rand(3, 16, 20)
    figure = found.draw_maps(image, heads=1)
    pictures = images_of(figure)
    assert len(pictures) == 3 * (1 + 4)
    assert pictures[0].get_array().shape == (16, 20, 3)
    marks = figure.axes[0].lines[0].get_xydata().tolist()
    assert marks == [[2.5 * 4, 2.5 * 4]]  # the middle of a patch of 4 x 4 pixels
    wanted = 21 * found.sites[0].maps.node[1, 1, 1:].view(4, 5)
    torch.testing.assert_close(torch.tensor(pictures[4].get_array()), wanted)
    for wrong in (2, [0, 5], []):
        with pytest.raises(T5Error, match="heads: expected some of 0 to 1"):
            found.draw_maps(heads=wrong)
    with pytest.raises(T5Error, match=r"image: expected \[3, H, W\] in 0 to 1, got .*\(1, 3, 8"):
        found.draw_maps(image[None, :, :8])


def site(tokens, grid, prefix, node=None, query=0):
    softmax = torch.rand(1, 1, tokens)
    maps = Maps((query,), softmax, softmax if node is None else node)
    return SiteDiagnosis("attn.t5", "", Layout.of(tokens, grid, prefix), (0.5,), maps)


def test_grids_of_one_and_three_axes_and_none():
    video = site(25, (2, 3, 4), 1, query=1 + 12 + 4 + 2)
    line, unknown = site(9, (6,), 2, query=4), site(5, (), 0, query=3)
    figure = draw_maps([video, line, unknown], "m", None, None)
    frames, _, strip, _, every, _ = images_of(figure)
    wanted = 25 * video.maps.softmax[0, 0, 1:].view(2, 3, 4)
    torch.testing.assert_close(torch.tensor(frames.get_array()), torch.cat(list(wanted), dim=1))
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[4 + 2, 1]]
    assert strip.get_array().shape == (1, 6) and every.get_array().shape == (1, 5)
    assert figure.axes[2].lines[0].get_xydata().tolist() == [[2, 0]]
    assert titles(figure)[::2] == [
        "softmax\nfrom frame 1, row 1, column 2",
        "softmax\nfrom place 2",
        "softmax\nfrom token 3",
    ]
    assert "suffix" in figure.axes[2].get_xlabel() and not figure.axes[4].get_xlabel()


def test_colours_have_two_sides_where_a_node_gives_less_than_nothing():
    plain = draw_maps([site(4, (2, 2), 0)], "m", None, None)
    signed = draw_maps([site(4, (2, 2), 0, node=-torch.rand(1, 1, 4) - 1)], "m", None, None)
    (low, high) = (images_of(figure)[0].norm.vmin for figure in (plain, signed))
    assert low == 0 and high == -images_of(signed)[0].norm.vmax


def test_without_maps_there_is_no_picture_of_them(tmp_path):
    found = t5fx.diagnose(Shape(depth=1).model(), (Shape().images(),), sites=())
    with pytest.raises(T5Error, match=r"diagnose\(..., sites=...\)"):
        found.draw_maps()
    files = found.save(tmp_path)
    assert [file.name for file in files] == ["diagnosis.json", "key_shift.png"]


def test_files(found, tmp_path):
    files = found.save(str(tmp_path), image=torch.rand(3, 16, 20))
    assert sorted(file.name for file in files) == sorted(p.name for p in tmp_path.iterdir())
    for name in ("key_shift.png", "maps.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_many_sites_are_numbered():
    from t5fx.diagnostics.draw import draw_key_shift

    many = [SiteDiagnosis(f"{i}.t5", "", Layout(9, 0, (3, 3)), (0.1,)) for i in range(17)]
    assert draw_key_shift(many, "m").axes[0].get_xlabel().startswith("attention site")
    assert not draw_key_shift(many[:16], "m").axes[0].get_xlabel()
