"""Anchors and offsets: order, hand numbers, round trips at the edges, and torchvision's coder."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchvision.models.detection._utils import BoxCoder

from course_lib.anchors import VARIANCES, decode, encode, make_anchors
from course_lib.boxes import convert


def random_boxes(n, size=128., least=1e-2, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g) * size
    return torch.cat([corner, corner + least + torch.rand(n, 2, generator=g) * size], 1)


def plain_anchors(size, grids, zooms, ratios):
    "The same by four loops, in plain numbers."
    return [[(i + .5) * size / g - zoom * w * size / g / 2,
             (j + .5) * size / g - zoom * h * size / g / 2,
             (i + .5) * size / g + zoom * w * size / g / 2,
             (j + .5) * size / g + zoom * h * size / g / 2]
            for g in grids for j in range(g) for i in range(g) for zoom in zooms for w, h in ratios]


def test_default_is_the_lessons_189():
    anchors = make_anchors()
    assert anchors.shape == (189, 4) and anchors.dtype == torch.float32
    assert torch.equal(anchors, make_anchors(128, (4, 2, 1), (.7, 1., 1.3),
                                             ((1, 1), (1, .5), (.5, 1))))
    assert (anchors[:, 2:] > anchors[:, :2]).all()


@pytest.mark.parametrize("grids", [(1,), (3,), (4, 2, 1), (8, 4, 2, 1), (7, 5)])
@pytest.mark.parametrize("zooms", [(1.,), (.7, 1., 1.3)])
@pytest.mark.parametrize("ratios", [((1, 1),), ((1, 1), (1, .5), (.5, 1)), ((2, 1), (.3, .9))])
@pytest.mark.parametrize("size", [96, 224])
def test_agrees_with_plain_loops(size, grids, zooms, ratios):
    anchors = make_anchors(size, grids, zooms, ratios)
    assert len(anchors) == sum(g * g for g in grids) * len(zooms) * len(ratios)
    torch.testing.assert_close(anchors, torch.tensor(plain_anchors(size, grids, zooms, ratios)),
                               atol=1e-3, rtol=0)


def test_order_row_by_row():
    centres = convert(make_anchors(100, (2,), (1.,), ((1, 1),)), "xyxy", "cxcywh")[:, :2]
    assert centres.tolist() == [[25, 25], [75, 25], [25, 75], [75, 75]]


def test_order_zoom_before_ratio():
    sides = convert(make_anchors(100, (1,), (1., .5), ((1, 1), (1, .5))), "xyxy", "cxcywh")[:, 2:]
    assert sides.tolist() == [[100, 100], [100, 50], [50, 50], [50, 25]]


def test_ratio_is_width_height():
    x0, y0, x1, y1 = make_anchors(100, (1,), (1.,), ((1, .5),))[0].tolist()
    assert (x1 - x0, y1 - y0) == (100, 50)


def test_tiles_cover_the_picture_exactly():
    tiles = make_anchors(120, (5,), (1.,), ((1, 1),))
    assert (tiles[:, :2].min(), tiles[:, 2:].max()) == (0, 120)
    torch.testing.assert_close((tiles[:, 2:] - tiles[:, :2]).prod(1).sum(), torch.tensor(120. ** 2))


def test_anchors_scale_with_the_picture():
    torch.testing.assert_close(make_anchors(448), make_anchors(224) * 2)


def test_integers_and_lists_are_welcome():
    assert torch.equal(make_anchors(100, [2], [1], [(1, 1)]),
                       make_anchors(100., (2,), (1.,), ((1., 1.),)))


def test_values_by_hand():
    anchor = torch.tensor([30., 30, 70, 70])
    assert encode(anchor, anchor).tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(encode(torch.tensor([14., 40, 94, 60]), anchor),
                               torch.tensor([1, 0, math.log(2) / .2, -math.log(2) / .2]))
    torch.testing.assert_close(decode(torch.tensor([-1., 2, 0, math.log(.5) / .2]), anchor),
                               torch.tensor([26., 48, 66, 68]))


def test_variances_are_the_usual_ones(): assert VARIANCES == (.1, .2)


@given(st.floats(0, 120), st.floats(0, 120), st.floats(.2, 200), st.floats(.2, 200),
       st.integers(0, 188))
@settings(max_examples=200, deadline=None)
def test_round_trip(x, y, w, h, i):
    """Sides from a thousandth of the largest anchor's on, which is where `encode` stops to tell
    them apart."""
    box, anchor = torch.tensor([x, y, x + w, y + h]), make_anchors()[i]
    torch.testing.assert_close(decode(encode(box, anchor), anchor), box, atol=2e-3, rtol=1e-5)


def test_round_trip_the_other_way():
    torch.manual_seed(0)
    offsets, anchors = torch.randn(1000, 4) * 3, make_anchors()[torch.randint(189, (1000,))]
    torch.testing.assert_close(encode(decode(offsets, anchors), anchors), offsets, atol=1e-3,
                               rtol=1e-4)


def test_round_trip_of_tiny_boxes_in_float64():
    boxes = random_boxes(500, least=0).double()
    boxes[:, 2:] = boxes[:, :2] + torch.rand(500, 2, dtype=torch.float64) + .2
    anchors = make_anchors().double()[torch.arange(500) % 189]
    torch.testing.assert_close(decode(encode(boxes, anchors), anchors), boxes, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype, atol", [(torch.float16, .5), (torch.bfloat16, 4.)])
def test_half_precision_stays_close_and_finite(dtype, atol):
    anchors = make_anchors()
    boxes = (anchors + torch.tensor([3., -2, 5, 4])).to(dtype)
    offsets = encode(boxes, anchors.to(dtype))
    assert offsets.dtype == dtype and offsets.isfinite().all()
    torch.testing.assert_close(decode(offsets, anchors.to(dtype)).float(), boxes.float(), atol=atol,
                               rtol=.02)


def test_half_offsets_with_full_anchors_give_full_boxes():
    assert decode(torch.zeros(189, 4, dtype=torch.bfloat16), make_anchors()).dtype == torch.float32


def test_a_batch_broadcasts():
    anchors = make_anchors()
    offsets = torch.randn(5, 189, 4, generator=torch.Generator().manual_seed(0))
    boxes = decode(offsets, anchors)
    assert boxes.shape == (5, 189, 4)
    for b in range(5): torch.testing.assert_close(boxes[b], decode(offsets[b], anchors))
    torch.testing.assert_close(encode(boxes, anchors), offsets, atol=1e-3, rtol=1e-4)
    assert encode(torch.rand(2, 3, 1, 4) + torch.tensor([0, 0, 1, 1]),
                  anchors).shape == (2, 3, 189, 4)
    assert encode(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_padding_is_finite(dtype):
    assert encode(torch.zeros(2, 1, 4, dtype=dtype), make_anchors(512).to(dtype)).isfinite().all()


def test_padding_has_finite_gradients():
    boxes = torch.zeros(3, 189, 4, requires_grad=True)
    (encode(boxes, make_anchors()) * 0).sum().backward()
    assert boxes.grad.isfinite().all()


def test_no_overflow():
    boxes = decode(torch.full((189, 4), 1e4), make_anchors())
    assert boxes.isfinite().all()
    assert decode(torch.full((189, 4), 500., dtype=torch.float16),
                  make_anchors(512).half()).isfinite().all()


def test_a_side_grows_at_most_62_and_a_half_times():
    anchor = torch.tensor([0., 0, 10, 20])
    x0, y0, x1, y1 = decode(torch.tensor([0., 0, 99, 99]), anchor).tolist()
    assert x1 - x0 == pytest.approx(625, rel=1e-4) and y1 - y0 == pytest.approx(1250, rel=1e-4)


def test_sides_are_never_negative():
    boxes = decode(torch.randn(1000, 4, generator=torch.Generator().manual_seed(1)) * 50,
                   random_boxes(1000))
    assert (boxes[:, 2:] >= boxes[:, :2]).all()


def test_agrees_with_torchvision():
    coder, boxes, anchors = (BoxCoder((10., 10., 5., 5.)), random_boxes(1000, least=.5),
                             make_anchors()[torch.arange(1000) % 189])
    offsets = encode(boxes, anchors)
    torch.testing.assert_close(offsets, coder.encode_single(boxes, anchors), atol=1e-4, rtol=1e-4)
    wild = offsets * 3
    torch.testing.assert_close(decode(wild, anchors), coder.decode_single(wild, anchors), atol=1e-2,
                               rtol=1e-4)


def test_gradients():
    torch.manual_seed(0)
    anchors = make_anchors()[::31].double()
    offsets = torch.randn(len(anchors), 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: decode(x, anchors), offsets)
    boxes = (anchors + torch.tensor([1., 2, 4, 3])).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: encode(x, anchors), boxes)


def test_arguments_are_left_alone():
    boxes, anchors = random_boxes(189), make_anchors()
    before = boxes.clone(), anchors.clone()
    decode(encode(boxes, anchors), anchors)
    assert torch.equal(boxes, before[0]) and torch.equal(anchors, before[1])
