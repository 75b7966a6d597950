"Pictures and boxes: what `course_lib.plot` accepts, what it draws, and that it stays legible."
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from matplotlib.colors import to_rgb
from PIL import Image

from course_lib.data import Record
from course_lib.plot import PALETTE, show_boxes, show_grid, show_image

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def pixels(ax):
    ax.figure.canvas.draw()
    return np.asarray(ax.figure.canvas.buffer_rgba())[..., :3].astype(int)


def record(path, boxes, size=(80, 60)):
    Image.new("RGB", size, "gray").save(path)
    boxes = torch.tensor(boxes, dtype=torch.float).reshape(-1, 4)
    return Record(Path(path), boxes, torch.zeros(len(boxes), dtype=torch.long),
                  torch.zeros(len(boxes), dtype=torch.bool), size)


def test_all_kinds_of_picture_look_the_same(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(array)
    picture.save(tmp_path / "a.png")
    tensor = torch.tensor(array).permute(2, 0, 1)
    kinds = [array, picture, tmp_path / "a.png", str(tmp_path / "a.png"), tensor, tensor / 255,
             (tensor / 255).numpy().transpose(1, 2, 0)]
    for kind in kinds: assert (np.asarray(show_image(kind).images[0].get_array()) == array).all()


def test_grey_half_and_strange_values():
    assert show_image(torch.zeros(6, 8)).images[0].get_array().shape == (6, 8, 3)
    assert show_image(torch.zeros(1, 6, 8)).images[0].get_array().shape == (6, 8, 3)
    assert show_image(torch.full((3, 6, 8), .5,
                                 dtype=torch.bfloat16)).images[0].get_array().max() == 128
    wild = torch.tensor([[[float("nan"), 2., -1.]]]).expand(3, 1, 3)
    assert show_image(wild).images[0].get_array()[0, :, 0].tolist() == [0, 255, 0]
    assert show_image(torch.zeros(3, 6, 8, requires_grad=True)) is not None


@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (8,), (5, 6, 8), (6, 8, 4)])
def test_what_is_no_picture(shape):
    with pytest.raises(ValueError, match="image: shape"): show_image(torch.zeros(shape))


def test_missing_picture(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.jpg"): show_image(tmp_path / "gone.jpg")


def test_pixels_and_boxes_share_their_corners():
    ax = show_image(np.zeros((6, 8, 3), dtype=np.uint8))
    assert ax.get_xlim() == (0, 8) and ax.get_ylim() == (6, 0) and not ax.axison


def test_a_box_is_drawn_where_it_is():
    ax = show_boxes(np.zeros((6, 8, 3), dtype=np.uint8), [[2, 1, 5, 3]])
    assert [p.get_bbox().extents.tolist() for p in ax.patches] == [[2, 1, 5, 3]] * 2


@pytest.mark.parametrize("background", [0, 128, 255])
@pytest.mark.parametrize("color", PALETTE)
def test_every_colour_is_seen_on_every_background(background, color):
    """Along a line across the box's edge there is something much darker or much brighter than the
    background."""
    ax = show_boxes(np.full((60, 80, 3), background, dtype=np.uint8), [[20, 15, 60, 45]],
                    colors=color)
    image = pixels(ax)
    row = image[image.shape[0] // 2].mean(-1)
    assert np.abs(row - background).max() > 75


def test_palette():
    assert len(set(PALETTE)) == len(PALETTE) == 8
    rgb = np.array([to_rgb(c) for c in PALETTE])
    apart = np.linalg.norm(rgb[:, None] - rgb[None], axis=-1) + np.eye(8)
    assert apart.min() > .25


def test_labels_in_all_forms():
    draw = lambda **k: [t.get_text() for t in show_boxes(np.zeros((60, 80, 3), np.uint8),
                                                         [[9, 9, 30, 30], [40, 20, 70, 50]],
                                                         **k).texts]
    assert draw() == []
    assert draw(labels=["a", "b"]) == ["a", "b"]
    assert draw(labels=torch.tensor([1, 0]), classes=["a", "b"]) == ["b", "a"]
    assert draw(labels=np.array([1, 0])) == ["1", "0"]
    assert draw(labels=[1, -1], classes=["a", "b"]) == ["b"]
    assert draw(labels=[0, 1], classes=["a", "b"],
                scores=torch.tensor([.5, .25])) == ["a 0.50", "b 0.25"]
    assert draw(scores=[.5, .25]) == ["0.50", "0.25"]
    assert draw(labels=["a", "b"], difficult=torch.tensor([True, False])) == ["a?", "b"]


def test_padding_is_not_drawn():
    ax = show_boxes(np.zeros((60, 80, 3), np.uint8), torch.zeros(3, 4), [-1, -1, -1], ["a"])
    assert not ax.patches and not ax.texts


def test_no_boxes():
    for boxes in ([], torch.zeros(0, 4), np.zeros((0, 4))):
        ax = show_boxes(np.zeros((60, 80, 3), np.uint8), boxes, [], ["a"], scores=[], difficult=[])
        assert not ax.patches and len(ax.images) == 1


def test_difficult_and_predicted_are_dashed():
    def dashed(**k):
        ax = show_boxes(np.zeros((60, 80, 3), np.uint8), [[9, 9, 30, 30], [40, 20, 70, 50]], **k)
        return [p.get_linestyle() not in ("-", "solid") for p in ax.patches[1::2]]
    assert dashed() == [False, False]
    assert dashed(difficult=[False, True]) == [False, True]
    assert dashed(dashed=True) == [True, True]


def test_drawing_on_what_is_there():
    ax = show_boxes(np.zeros((60, 80, 3), np.uint8), [[9, 9, 30, 30]], ["truth"])
    assert show_boxes(None, [[12, 12, 33, 33]], ["guess"], ax=ax, dashed=True) is ax
    assert len(ax.images) == 1 and len(ax.patches) == 4
    with pytest.raises(ValueError, match="ax"): show_boxes(None, [[1, 2, 3, 4]])


@pytest.mark.parametrize("name", ["labels", "scores", "difficult"])
def test_lengths_must_fit(name):
    with pytest.raises(ValueError, match=f"{name}: 1 for 2"):
        show_boxes(np.zeros((6, 8, 3), np.uint8), [[1, 1, 2, 2], [3, 3, 4, 4]], **{name: [0]})


def test_a_label_without_a_name():
    with pytest.raises(ValueError, match="labels: 2 has no name"):
        show_boxes(np.zeros((6, 8, 3), np.uint8), [[1, 1, 2, 2]], [2], ["a", "b"])


coordinate = st.floats(0, 1)

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), min_size=1, max_size=4),
       st.sampled_from([1.5, 3, 6]))
def test_tags_stay_inside(corners, size):
    boxes = [[min(a, c) * 160, min(b, d) * 120, max(a, c) * 160, max(b, d) * 120] for a, b, c,
             d in corners]
    ax = show_boxes(np.zeros((120, 160, 3), np.uint8), boxes, ["bicycle"] * len(boxes), size=size)
    ax.figure.canvas.draw()
    for tag in ax.texts:
        e = tag.get_window_extent()
        assert e.x0 >= ax.bbox.x0 - 1 and e.x1 <= ax.bbox.x1 + 1 and e.y0 >= ax.bbox.y0 - 1
        assert e.y1 <= ax.bbox.y1 + 1
    plt.close("all")


def test_grid(tmp_path):
    records = [record(tmp_path / f"{i}.jpg", [[5, 5, 40, 40]] * (i % 2)) for i in range(5)]
    fig = show_grid(records, ["cat"], cols=3)
    assert len(fig.axes) == 6 and not any(ax.axison for ax in fig.axes)
    assert [len(ax.texts) for ax in fig.axes] == [0, 1, 0, 1, 0, 0]
    assert len(show_grid(records[:2], ["cat"], cols=4).axes) == 2
    with pytest.raises(ValueError, match="records"): show_grid([], ["cat"])


def test_grid_notices_a_picture_of_another_size(tmp_path):
    wrong = record(tmp_path / "a.jpg", [[5, 5, 40, 40]])
    wrong.size = (800, 600)
    with pytest.raises(ValueError, match="a.jpg"): show_grid([wrong], ["cat"])


def test_titles_are_whole():
    title = "a title that is much too long to stand in one line above so small a picture"
    ax = show_image(np.zeros((60, 80, 3), np.uint8), title=title, size=2)
    assert ax.get_title().replace("\n", " ") == title and "\n" in ax.get_title()
