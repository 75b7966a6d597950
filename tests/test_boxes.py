"""Attacks on `course_lib.boxes`: properties, a reference in plain Python, torchvision beside it,
and bad input."""

import math

import pytest
import torch
import torchvision.ops as ops
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from course_lib.boxes import area, convert, iou, pairwise_iou

FORMATS = ["xyxy", "xywh", "cxcywh"]
settings.register_profile("boxes", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("boxes")

coordinates = st.floats(-500, 500, width=32)
lengths = st.floats(.125, 500, width=32)
anything = st.floats(-1000, 1000, width=32)


@st.composite
def proper(draw, coordinate=coordinates, length=lengths):
    "A box with an inside."
    x, y, w, h = draw(coordinate), draw(coordinate), draw(length), draw(length)
    return [x, y, x + w, y + h]


whole = proper(st.integers(-60, 60), st.integers(1, 50))
lists = st.lists(proper(), min_size=1, max_size=7)
messy = st.lists(st.one_of(st.lists(anything, min_size=4, max_size=4), st.just([0, 0, 0, 0]),
                           st.just([3, 3, 3, 9])), min_size=1, max_size=6)


def tensor(boxes, dtype=torch.float32): return torch.tensor(boxes, dtype=dtype).reshape(-1, 4)


def random_boxes(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=g) * 200
    return torch.cat([corner, corner + 1 + torch.rand(*shape, 2, generator=g) * 100], -1)


def reference(a, b):
    """IoU of two boxes in plain Python, in another way: clip first, decide on emptiness before any
    product."""
    size = lambda box: (box[2] - box[0]) * (box[3]
                                            - box[1]) if box[2] > box[0] and box[3] > box[1] else 0.
    shared = (size([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])]) if size(a)
              and size(b) else 0.)
    union = size(a) + size(b) - shared
    return shared / union if union else 0.


def pixels(box): return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


# ---------------------------------------------------------------- IoU: what it is

@given(messy, messy)
def test_plain_python_agrees_on_any_boxes(a, b):
    a, b = tensor(a, torch.float64), tensor(b, torch.float64)
    expected = torch.tensor([[reference(x, y) for y in b.tolist()] for x in a.tolist()],
                            dtype=torch.float64)
    torch.testing.assert_close(pairwise_iou(a, b), expected)


@given(whole, whole)
def test_counting_pixels_agrees(a, b):
    shared, union = len(pixels(a) & pixels(b)), len(pixels(a) | pixels(b))
    torch.testing.assert_close(iou(torch.tensor(a), torch.tensor(b)), torch.tensor(shared / union))


@given(lists, lists)
def test_torchvision_agrees_on_proper_boxes(a, b):
    a, b = tensor(a), tensor(b)
    assume((a[:, 2:] > a[:, :2]).all() and (b[:, 2:] > b[:, :2]).all())
    torch.testing.assert_close(pairwise_iou(a, b), ops.box_iou(a, b))
    torch.testing.assert_close(area(a), ops.box_area(a))


@given(messy, messy)
def test_always_between_0_and_1_and_never_nan(a, b):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        table = pairwise_iou(tensor(a, dtype), tensor(b, dtype))
        assert ((table >= 0) & (table <= 1)).all()


@given(messy, messy)
def test_symmetric(a, b):
    a, b = tensor(a), tensor(b)
    assert torch.equal(pairwise_iou(a, b), pairwise_iou(b, a).T)


@given(lists, lists, st.integers(-300, 300), st.integers(-300, 300))
def test_moving_both_changes_nothing(a, b, dx, dy):
    a, b, by = tensor(a, torch.float64), tensor(b, torch.float64), torch.tensor([dx, dy, dx, dy])
    torch.testing.assert_close(pairwise_iou(a + by, b + by), pairwise_iou(a, b), atol=1e-6,
                               rtol=1e-6)


@given(lists, lists, st.floats(.001, 1000), st.floats(.001, 1000))
def test_scaling_each_axis_changes_nothing(a, b, sx, sy):
    a, b, by = (tensor(a, torch.float64), tensor(b, torch.float64),
                torch.tensor([sx, sy, sx, sy], dtype=torch.float64))
    torch.testing.assert_close(pairwise_iou(a * by, b * by), pairwise_iou(a, b), atol=1e-6,
                               rtol=1e-6)


@given(lists)
def test_a_box_with_itself_is_1(a):
    a = tensor(a)
    assume((area(a) > 0).all())
    assert torch.equal(iou(a, a), torch.ones(len(a)))


@given(proper())
def test_a_box_inside_another_is_the_quotient_of_areas(b):
    b = torch.tensor(b, dtype=torch.float64)
    assume(area(b) > 0)
    smaller = convert(b, "xyxy", "cxcywh") * torch.tensor([1, 1, .5, .25], dtype=torch.float64)
    inner = convert(smaller, "cxcywh", "xyxy")
    torch.testing.assert_close(iou(inner, b), torch.tensor(.125, dtype=torch.float64), atol=1e-6,
                               rtol=1e-6)


def test_apart_in_both_directions_is_0_and_not_the_gap():
    a, c = torch.tensor([0., 0, 4, 4]), torch.tensor([7., 6, 9, 9])
    assert iou(a, c) == 0 and iou(c, a) == 0
    assert iou(a, torch.tensor([4., 0, 8, 4])) == 0, "touching is not overlapping"


def test_big_coordinates_and_tiny_boxes():
    a = torch.tensor([0., 0, 1e-3, 1e-3])
    torch.testing.assert_close(iou(a, a + torch.tensor([5e-4, 0, 5e-4, 0])), torch.tensor(1 / 3),
                               atol=1e-4, rtol=1e-4)
    huge = torch.tensor([10_000., 10_000, 10_400, 10_400])
    torch.testing.assert_close(iou(huge, huge + torch.tensor([200., 0, 200, 0])),
                               torch.tensor(1 / 3))


# ---------------------------------------------------------------- shapes

def test_batching_is_looping():
    a, b = random_boxes(3, 5, seed=1), random_boxes(3, 7, seed=2)
    assert torch.equal(pairwise_iou(a, b), torch.stack([pairwise_iou(x, y) for x, y in zip(a, b)]))
    assert torch.equal(pairwise_iou(a[0], b), torch.stack([pairwise_iou(a[0], y) for y in b]))
    assert torch.equal(pairwise_iou(a[:, None], b[None]),
                       torch.stack([torch.stack([pairwise_iou(x, y) for y in b]) for x in a]))
    assert torch.equal(pairwise_iou(a[0], b[0]),
                       torch.stack([torch.stack([iou(x, y) for y in b[0]]) for x in a[0]]))
    assert torch.equal(area(a), torch.stack([area(x) for x in a]))


def test_broadcasting_of_iou():
    a, b = random_boxes(6), random_boxes(4, 1)
    assert iou(a[0], a[1]).shape == () and iou(a, a[0]).shape == (6,) and iou(a, b).shape == (4, 6)


@pytest.mark.parametrize("n, m", [(0, 3), (3, 0), (0, 0), (0, 1), (1, 0)])
def test_no_boxes(n, m):
    a, b = torch.zeros(n, 4, requires_grad=True), torch.zeros(m, 4)
    assert pairwise_iou(a, b).shape == (n, m) and area(a).shape == (n,)
    assert convert(a, "xyxy", "cxcywh").shape == (n, 4)
    assert pairwise_iou(a[None].expand(2, n, 4), b).shape == (2, n, m)
    pairwise_iou(a, b).sum().backward()
    assert a.grad.shape == (n, 4)


def test_inputs_stay_as_they_were_and_memory_layout_does_not_matter():
    a, b = random_boxes(5, seed=1), random_boxes(7, seed=2)
    expected, before = pairwise_iou(a, b), (a.clone(), b.clone())
    wide = torch.zeros(5, 9)
    wide[:, 1:9:2] = a
    assert not wide[:, 1:9:2].is_contiguous()
    assert torch.equal(pairwise_iou(wide[:, 1:9:2], b.T.contiguous().T), expected)
    assert torch.equal(pairwise_iou(a.flip(0).flip(0), b), expected)
    for fmt in FORMATS:
        convert(a, "xyxy", fmt).mul_(0)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


# ---------------------------------------------------------------- degenerate boxes

NO_INSIDE = torch.tensor([[0., 0, 0, 0], [5, 5, 5, 5], [0, 3, 10, 3], [3, 0, 3, 10], [10, 0, 0, 10],
                          [0, 10, 10, 0], [10, 10, 0, 0]])


def test_no_area_no_overlap():
    whole_picture = torch.tensor([[-20., -20, 20, 20]])
    assert (area(NO_INSIDE) == 0).all()
    assert (pairwise_iou(NO_INSIDE, NO_INSIDE) == 0).all()
    assert (pairwise_iou(NO_INSIDE, whole_picture) == 0).all()
    assert (pairwise_iou(whole_picture, NO_INSIDE) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_gradients_of_degenerate_boxes_are_finite(dtype):
    a = NO_INSIDE.to(dtype, copy=True).requires_grad_()
    b = torch.cat([NO_INSIDE, torch.tensor([[-20., -20, 20, 20]])]).to(dtype).requires_grad_()
    (pairwise_iou(a, b).sum() + iou(a, a).sum() + area(a).sum()).backward()
    assert a.grad.isfinite().all() and b.grad.isfinite().all()


def test_a_degenerate_box_does_not_disturb_its_neighbours():
    a, b = random_boxes(4, seed=1), random_boxes(3, seed=2)
    alone, mixed = a.clone().requires_grad_(), torch.cat([a, NO_INSIDE]).requires_grad_()
    pairwise_iou(alone, b).sum().backward()
    pairwise_iou(mixed, torch.cat([b, torch.zeros(2, 4)])).sum().backward()
    torch.testing.assert_close(mixed.grad[:4], alone.grad)


def test_nan_is_not_hidden():
    for i in range(4):
        bad = torch.tensor([0., 0, 4, 4])
        bad[i] = math.nan
        assert iou(bad, torch.tensor([1., 1, 3, 3])).isnan()
        assert iou(torch.tensor([1., 1, 3, 3]), bad).isnan() and area(bad).isnan()


# ---------------------------------------------------------------- types

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_worked_out_in_float32(dtype):
    a = torch.tensor([[0, 0, 400, 400], [8, 16, 504, 504]], dtype=dtype)
    b = torch.tensor([[200, 0, 600, 400]], dtype=dtype)
    assert area(a).dtype == pairwise_iou(a, b).dtype == torch.float32
    assert area(a)[0] == 160_000
    torch.testing.assert_close(pairwise_iou(a, b), pairwise_iou(a.float(), b.float()))
    assert torch.equal(iou(a, a), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integers_give_floats(dtype):
    a = torch.tensor([[0, 0, 10, 10], [20, 20, 250 if dtype == torch.uint8 else 300, 240]],
                     dtype=dtype)
    b = torch.tensor([[5, 0, 15, 10], [0, 0, 10, 10]], dtype=dtype)
    table = pairwise_iou(a, b)
    assert table.dtype == area(a).dtype == torch.float32
    torch.testing.assert_close(table, torch.tensor([[1 / 3, 1.], [0, 0]]))
    assert convert(torch.tensor([0, 0, 5, 5], dtype=dtype), "xyxy",
                   "cxcywh").tolist() == [2.5, 2.5, 5, 5]


def test_float64_stays_and_mixes():
    a = random_boxes(3)
    assert pairwise_iou(a.double(), a.double()).dtype == area(a.double()).dtype == torch.float64
    assert pairwise_iou(a.half(), a.double()).dtype == torch.float64
    assert convert(a.half(), "xyxy", "xywh").dtype == torch.float16


# ---------------------------------------------------------------- derivatives and tracing

def test_gradcheck():
    a, b = (random_boxes(3, seed=1).double().requires_grad_(),
            random_boxes(4, seed=2).double().requires_grad_())
    assert torch.autograd.gradcheck(pairwise_iou, (a, b))
    assert torch.autograd.gradcheck(iou, (a, b[:3]))
    assert torch.autograd.gradcheck(area, (a,))
    for there in FORMATS:
        for back in FORMATS:
            assert torch.autograd.gradcheck(lambda x: convert(x, there, back), (a,))


def test_gradient_is_that_of_torchvision():
    a, b = random_boxes(30, seed=1), random_boxes(20, seed=2)
    grads = []
    for function in (pairwise_iou, ops.box_iou):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        (function(x, y) * torch.arange(20)).sum().backward()
        grads.append((x.grad, y.grad))
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.filterwarnings("error")
def test_vmap():
    "As a warning counts what falls back to a loop."
    a, b = random_boxes(3, 5, seed=1), random_boxes(3, 7, seed=2)
    assert torch.equal(torch.vmap(pairwise_iou)(a, b), pairwise_iou(a, b))
    assert torch.equal(torch.vmap(pairwise_iou, in_dims=(None, 0))(a[0], b), pairwise_iou(a[0], b))


def test_compiles_to_one_graph():
    "One graph: nothing in it looks at a value. The eager backend traces and needs no C++ compiler."
    function = torch.compile(pairwise_iou, fullgraph=True, backend="eager")
    a, b = random_boxes(5), random_boxes(3)
    assert torch.equal(function(a, b), pairwise_iou(a, b))


def test_never_looks_at_a_value():
    "On the meta device there are shapes and no values: any look at one raises."
    a, b = torch.empty(2, 5, 4, device="meta"), torch.empty(7, 4, device="meta")
    assert pairwise_iou(a, b).shape == (2, 5, 7) and area(a).shape == (2, 5)
    assert all(convert(a, f, g).shape == a.shape for f in FORMATS for g in FORMATS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_without_waiting():
    a, b = random_boxes(500, seed=1), random_boxes(32, 20, seed=2)
    there = a.cuda(), b.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try: table = pairwise_iou(*there)
    finally: torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(table.cpu(), pairwise_iou(a, b))


# ---------------------------------------------------------------- convert

@given(lists, st.sampled_from(FORMATS), st.sampled_from(FORMATS))
def test_convert_agrees_with_torchvision_and_comes_back(boxes, there, back):
    boxes = tensor(boxes)
    torch.testing.assert_close(convert(boxes, there, back), ops.box_convert(boxes, there, back),
                               atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(convert(convert(boxes, there, back), back, there), boxes, atol=1e-3,
                               rtol=1e-5)


def test_convert_by_hand():
    forms = {"xyxy": [2, 1, 8, 5], "xywh": [2, 1, 6, 4], "cxcywh": [5, 3, 6, 4]}
    for f, x in forms.items():
        for g, y in forms.items(): assert convert(torch.tensor(x), f, g).tolist() == y


# ---------------------------------------------------------------- bad input is answered in words

@pytest.mark.parametrize("call, words", [
    (lambda: area(torch.zeros(3, 5)), r"boxes: shape \[3, 5\], but the last dimension must be 4"),
    (lambda: area(torch.tensor([])), r"torch.zeros\(0, 4\)"),
    (lambda: area(torch.tensor(1.)), r"shape \[\]"),
    (lambda: iou(torch.zeros(2, 4), torch.zeros(2, 3)), r"iou: b: shape \[2, 3\]"),
    (lambda: iou(torch.zeros(3, 4), torch.zeros(5, 4)), r"\[3, 4\].*\[5, 4\].*use pairwise_iou"),
    (lambda: pairwise_iou(torch.zeros(4), torch.zeros(5, 4)), r"a is one box.*a\[None\]"),
    (lambda: pairwise_iou(torch.zeros(5, 4), torch.zeros(4)), r"b is one box.*b\[None\]"),
    (lambda: pairwise_iou(torch.zeros(4, 5), torch.zeros(5, 4)),
     r"pairwise_iou: a: shape \[4, 5\]"),
    (lambda: pairwise_iou(torch.zeros(2, 6, 4), torch.zeros(3, 6, 4)),
     r"pairwise_iou: a is \[2, 6, "
     r"4\] and b is \[3, 6, 4\]"),
    (lambda: convert(torch.zeros(1, 4), "xyxy", "yxyx"), r"unknown format 'yxyx'. Use one of xyxy, "
     r"xywh, cxcywh"),
    (lambda: convert(torch.zeros(1, 4), "coco", "xyxy"), r"unknown format 'coco'"),
    (lambda: convert(torch.zeros(1, 3), "xyxy", "xyxy"), r"last dimension must be 4"),
])
def test_value_errors(call, words):
    with pytest.raises(ValueError, match=words): call()


@pytest.mark.parametrize("call", [lambda: area([0, 0, 1, 1]),
                                  lambda: iou(torch.zeros(4), [0, 0, 1, 1]),
                                  lambda: convert(None, "xyxy", "xywh"),
                                  lambda: pairwise_iou([[0, 0, 1, 1]], torch.zeros(1, 4))])
def test_type_errors(call):
    with pytest.raises(TypeError, match="a tensor of boxes is needed"): call()
