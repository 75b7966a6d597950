"""Attacks on `course_lib.augment`: boxes follow their pixels through every transform."""
import pytest
import torch
from torchvision import tv_tensors

from course_lib.augment import KeepVisible, train_tfms, valid_tfms
from course_lib.boxes import area, iou


def painted(box, size=(96, 128)):
    "A black picture with one white rectangle, and its box."
    image = torch.zeros(3, *size, dtype=torch.uint8)
    x0, y0, x1, y1 = box
    image[:, y0:y1, x0:x1] = 255
    boxes = tv_tensors.BoundingBoxes([list(map(float, box))], format="XYXY", canvas_size=size)
    return (tv_tensors.Image(image), dict(boxes=boxes, labels=torch.tensor([3]),
                                          difficult=torch.tensor([True])))


def where_white(image):
    rows, cols = (image[0] > 127).any(1).nonzero()[:, 0], (image[0] > 127).any(0).nonzero()[:, 0]
    return torch.tensor([[cols[0], rows[0], cols[-1] + 1, rows[-1] + 1]]).float()


@pytest.mark.parametrize("seed", range(30))
def test_the_box_is_where_the_pixels_are(seed):
    torch.manual_seed(seed)
    image, target = train_tfms(160, color=0)(*painted((30, 20, 90, 70)))
    assert image.shape == (3, 160, 160)
    if len(target["boxes"]): assert iou(target["boxes"], where_white(image)).item() > .93
    else: assert (image > 127).float().mean() < .3


def test_valid_squishes():
    image, target = valid_tfms(64)(*painted((32, 24, 64, 48)))
    assert image.shape == (3, 64, 64) and target["boxes"].tolist() == [[16, 16, 32, 32]]
    assert iou(target["boxes"], where_white(image)).item() > .95


@pytest.mark.parametrize("tfms", [train_tfms(32), train_tfms(32, crop=1), valid_tfms(32)])
def test_a_picture_without_objects_is_ordinary(tfms):
    image, _ = painted((0, 0, 1, 1))
    nothing = dict(boxes=tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY",
                                                  canvas_size=(96, 128)),
                   labels=torch.zeros(0, dtype=torch.long),
                   difficult=torch.zeros(0, dtype=torch.bool))
    image, target = tfms(image, nothing)
    assert image.shape == (3, 32, 32) and target["boxes"].shape == (0, 4)
    assert len(target["labels"]) == len(target["difficult"]) == 0


def test_labels_and_flags_go_with_their_boxes():
    boxes = tv_tensors.BoundingBoxes([[-90., 0, 10, 50], [10, 10, 20, 20], [50, 0, 150, 50],
                                      [0, -10, 10, -1]], format="XYXY", canvas_size=(100, 100))
    target = dict(boxes=boxes, labels=torch.arange(4),
                  difficult=torch.tensor([True, False, True, False]))
    _, out = KeepVisible(.3)(torch.zeros(3, 100, 100), target)
    assert out["labels"].tolist() == [1, 2] and out["difficult"].tolist() == [False, True]
    assert out["boxes"].tolist() == [[10, 10, 20, 20], [50, 0, 100, 50]]


def test_every_box_stays_inside_and_has_an_area():
    torch.manual_seed(0)
    rng = torch.rand(200, 8, 2, 2).sort(2).values * torch.tensor([128., 96])
    for corners in rng:
        boxes = tv_tensors.BoundingBoxes(corners.reshape(-1, 4), format="XYXY",
                                         canvas_size=(96, 128))
        target = dict(boxes=boxes, labels=torch.arange(8),
                      difficult=torch.zeros(8, dtype=torch.bool))
        _, out = train_tfms(48)(tv_tensors.Image(torch.zeros(3, 96, 128, dtype=torch.uint8)),
                                target)
        got = out["boxes"].as_subclass(torch.Tensor)
        assert (got >= 0).all() and (got <= 48).all() and (area(got) > 0).all()
        assert len(got) == len(out["labels"])


def test_flip_can_be_certain_or_never():
    for flip, x0 in ((1., 128 - 90), (0., 30)):
        _, target = train_tfms(128, flip=flip, crop=1,
                               color=0)(*painted((30, 20, 90, 70), size=(128, 128)))
        assert target["boxes"][0, 0] == x0
