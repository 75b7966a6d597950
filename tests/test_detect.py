"""Attacks on `course_lib.detect`: references in plain Python, torchvision beside it, every kind of
picture, and bad input."""
import math

import numpy as np
import pytest
import torch
import torchvision.ops as ops
from PIL import Image
from torch import nn

from course_lib.anchors import decode, make_anchors
from course_lib.data import Record
from course_lib.detect import detections, nms, predict, show_detections

KINDS = ["few", "crowd", "ties", "whole pixels", "no area", "negative", "far away"]


def random_set(kind, n, g, classes=5):
    """Boxes, scores and labels in double precision; IoU thresholds are hit exactly by the
    whole-pixel ones."""
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.double)
    corner = rand(n, 2) * (40 if kind == "crowd" else 200)
    side = 5 + rand(n, 2) * 60
    if kind == "whole pixels": corner, side = (corner / 20).floor(), (side / 15).ceil()
    if kind == "no area": side = side * (rand(n, 2) > .2)
    if kind == "negative": corner = corner - 300
    if kind == "far away": corner = corner + 1e7
    scores = (rand(n) * 4).floor() / 4 if kind in ("ties", "whole pixels") else rand(n)
    return torch.cat([corner, corner + side], 1), scores, torch.randint(classes, (n,), generator=g)


def by_hand(boxes, scores, labels, iou):
    "NMS in plain Python floats: best first, of equal scores the lower index."
    def overlap(a, b):
        wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        shared = max(0, wide) * max(0, high)
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
        return shared / union if union > 0 else 0
    boxes, scores, labels, stay = boxes.tolist(), scores.tolist(), labels.tolist(), []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        if all(labels[i] != labels[j] or overlap(boxes[i], boxes[j]) <= iou for j in stay):
            stay.append(i)
    return stay


# ---------------------------------------------------------------- nms

@pytest.mark.parametrize("kind", KINDS)
def test_plain_python_agrees(kind):
    g = torch.Generator().manual_seed(0)
    for i in range(150):
        boxes, scores, labels = random_set(kind, i % 23, g)
        if kind == "whole pixels":
            boxes[:, :2], boxes[:, 2:] = boxes[:, :2].floor(), boxes[:, 2:].ceil()
        for iou in (.25, .5, .7123):
            assert nms(boxes, scores, labels, iou).tolist() == by_hand(boxes, scores, labels, iou)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("negative",)])
def test_torchvision_agrees(kind):
    g = torch.Generator().manual_seed(1)
    for i in range(400):
        boxes, scores, labels = random_set(kind, i % 40, g)
        for iou in (.3123, .5):
            assert torch.equal(nms(boxes, scores, labels, iou),
                               ops.batched_nms(boxes, scores, labels, iou))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, classes", [(499, 3), (501, 3), (1500, 1), (3000, 40), (900, 900)])
def test_many_boxes_at_once(kind, n, classes):
    boxes, scores, labels = random_set(kind, n, torch.Generator().manual_seed(n), classes)
    stay, rest = nms(boxes, scores, labels), torch.zeros(n, dtype=torch.bool)
    for c in range(classes):
        rest[(ids := (labels == c).nonzero()[:, 0])[ops.nms(boxes[ids], scores[ids], .5)]] = True
    assert sorted(stay.tolist()) == rest.nonzero()[:, 0].tolist()
    assert stay.tolist() == sorted(stay.tolist(), key=lambda i: (-scores[i].item(), i))


def test_without_labels_all_compete():
    g = torch.Generator().manual_seed(2)
    for n in (1, 30, 700):
        boxes, scores, _ = random_set("crowd", n, g)
        assert torch.equal(nms(boxes, scores), ops.nms(boxes, scores, .5))
        assert torch.equal(nms(boxes, scores), nms(boxes, scores, torch.full((n,), 3)))


def test_negative_coordinates_do_not_mix_classes():
    boxes = torch.tensor([[0., 0, 10, 10], [-11, -11, -1, -1]])
    scores, labels = torch.tensor([.9, .8]), torch.tensor([0, 1])
    assert len(ops.batched_nms(boxes, scores, labels,
                               .5)) == 1, "torchvision has mended it: change lesson 10"
    assert nms(boxes, scores, labels).tolist() == [0, 1]


def test_regions_far_away_are_exact():
    """A pair that overlaps by just more than the threshold, in class 100,000 of pictures of 10,000
    px: in single precision it would change."""
    g = torch.Generator().manual_seed(3)
    a = torch.tensor([[100., 100, 110, 110]])
    for _ in range(200):
        b = a + torch.tensor([10 / 3 - .001 + .002 * torch.rand(1, generator=g).item(),
                              0]).repeat(2)
        boxes, scores = (torch.cat([a, b, torch.tensor([[0., 0, 10_000, 10_000]])]).repeat(2, 1),
                         torch.tensor([.9, .8, .7] * 2))
        labels = torch.tensor([0] * 3 + [100_000] * 3)
        stay = nms(boxes, scores, labels)
        assert (1 in stay.tolist()) == (4 in stay.tolist()) == (
            by_hand(a.repeat(2, 1)[:1].new_tensor([*a.tolist(), *b.tolist()]), scores[:2],
                    labels[:2], .5) == [0, 1])


def test_exactly_the_threshold_is_not_more():
    boxes = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 3]])
    assert nms(boxes, torch.tensor([.9, .8]), iou=.3).tolist() == [0, 1]
    assert nms(boxes, torch.tensor([.9, .8]), iou=.2999).tolist() == [0]


def test_thresholds_at_the_ends():
    boxes, scores = (torch.tensor([[0., 0, 10, 10], [0, 0, 10, 10], [9, 9, 19, 19],
                                   [10, 0, 20, 9]]), torch.tensor([.1, .2, .3, .05]))
    assert nms(boxes, scores, iou=1).tolist() == [2, 1, 0, 3]
    assert nms(boxes, scores, iou=0).tolist() == [2, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_other_types(dtype):
    boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]]).to(dtype)
    assert nms(boxes, torch.tensor([.5, .75, .25]),
               torch.tensor([1, 1, 0], dtype=torch.int32)).tolist() == [1, 2]


def test_nothing_and_one():
    assert nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long)).tolist() == []
    assert nms(torch.zeros(0, 4), torch.zeros(0)).tolist() == []
    assert nms(torch.tensor([[3., 3, 3, 3]]), torch.tensor([.1])).tolist() == [0]
    assert nms(torch.zeros(0, 4), torch.zeros(0)).dtype == torch.long


@pytest.mark.parametrize("change, message", [
    (dict(iou=1.5), "nms: iou is 1.5"), (dict(iou=-.1), "between 0 and 1"),
    (dict(iou=math.nan), "iou is nan"),
    (dict(boxes=torch.zeros(2, 5)), r"\[n,4\] is needed"),
    (dict(boxes=torch.zeros(4)), r"\[n,4\] is needed"),
    (dict(scores=torch.zeros(3)), r"scores has shape \[3\]"),
    (dict(labels=torch.zeros(2, 1)), r"labels has shape \[2, 1\]"),
    (dict(boxes=torch.tensor([[0., 0, 1, math.inf], [0, 0, 1, 1]])), "not finite"),
    (dict(boxes=torch.full((2, 4), math.nan)), "not finite")])
def test_nms_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        nms(**dict(boxes=torch.rand(2, 4), scores=torch.rand(2), labels=torch.zeros(2)) | change)


# ---------------------------------------------------------------- detections

def random_pred(B, A, C, seed, mean=-3., spread=2.):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, A, 4, generator=g), torch.randn(B, A, C, generator=g) * spread + mean


def plain(offsets, logits, anchors, size, score, iou, candidates, top):
    "One picture, one answer after the other."
    boxes, C = decode(offsets.double(), anchors.double()).clamp(0, size), logits.shape[1]
    answers = [(x, -i) for i, x in enumerate(logits.flatten().tolist()) if 1 / (1 + math.exp(-x))
               > score]
    answers = [-i for _, i in sorted(answers, reverse=True)[:candidates]]
    answers = [i for i in answers if (boxes[i // C, 2:] > boxes[i // C, :2]).all()]
    stay = by_hand(boxes[[i // C for i in answers]].view(-1, 4), logits.flatten()[answers],
                   torch.tensor([i % C for i in answers]), iou)[:top]
    return [answers[i] for i in stay], boxes


@pytest.mark.parametrize("seed", range(12))
def test_plain_loops_agree(seed):
    anchors, options = (make_anchors(64, grids=(3, 1)),
                        dict(score=(.05, .3, .5)[seed % 3], iou=(.5, .3)[seed % 2],
                             candidates=(400, 25)[seed // 6], top=(100, 5)[seed % 2]))
    pred = random_pred(3, len(anchors), 4, seed, mean=(-3, -1, -5)[seed % 3])
    for b, found in enumerate(detections(pred, anchors, 64, **options)):
        answers, boxes = plain(pred[0][b], pred[1][b], anchors, 64, **options)
        assert found["labels"].tolist() == [i % 4 for i in answers]
        torch.testing.assert_close(found["boxes"],
                                   boxes[[i // 4 for i in answers]].float().view(-1, 4), rtol=1e-5,
                                   atol=1e-4)
        torch.testing.assert_close(found["scores"], pred[1][b].flatten()[answers].sigmoid())
        assert (found["scores"][:-1] >= found["scores"][1:]).all()


def test_a_batch_is_its_pictures():
    anchors, pred = make_anchors(128), random_pred(5, 189, 20, 7, mean=-2)
    together = detections(pred, anchors, 128)
    for b, found in enumerate(together):
        (alone,) = detections((pred[0][b:b + 1], pred[1][b:b + 1]), anchors, 128)
        for key in ("boxes", "scores", "labels"): assert torch.equal(found[key], alone[key])


def test_one_crowded_picture_does_not_touch_the_others():
    anchors, (offsets, logits) = make_anchors(64), random_pred(3, 189, 3, 1, mean=-6)
    logits[1] = 2
    found = detections((offsets, logits), anchors, 64, candidates=50)
    assert len(found[1]["boxes"]) <= 50
    for b in (0, 2):
        assert found[b]["labels"].tolist() == detections((offsets[b:b + 1], logits[b:b + 1]),
                                                         anchors, 64)[0]["labels"].tolist()


def test_limits_and_thresholds_at_the_ends():
    anchors, pred = make_anchors(64), random_pred(2, 189, 3, 2)
    sizes = lambda **options: [len(f["boxes"]) for f in detections(pred, anchors, 64, **options)]
    assert sizes(top=0) == [0, 0] == sizes(candidates=0) == sizes(score=1)
    assert sizes(top=7) == [7, 7]
    assert sizes(score=0, iou=1, candidates=10**6, top=10**6) == [189 * 3] * 2


@pytest.mark.parametrize("B, A, C", [(0, 9, 2), (2, 0, 3), (2, 9, 0), (2, 9, 2)])
def test_nothing_found(B, A, C):
    found = detections((torch.zeros(B, A, 4), torch.full((B, A, C), -20.)), torch.rand(A, 4), 32)
    assert [(f["boxes"].shape, f["scores"].shape, f["labels"].shape)
            for f in found] == [((0, 4), (0,), (0,))] * B
    assert all(f["labels"].dtype == torch.long for f in found)


def test_network_that_has_gone_mad():
    anchors = make_anchors(64)
    for value in (math.nan, math.inf, -math.inf, 1e30, -1e30):
        for offsets, logits in ((value, 0.), (0., value), (value, value)):
            for f in detections((torch.full((2, 189, 4), offsets), torch.full((2, 189, 3), logits)),
                                anchors, 64):
                assert f["boxes"].isfinite().all() and f["scores"].isfinite().all()
                assert (f["boxes"][:, 2:] > f["boxes"][:, :2]).all()
                assert (f["boxes"] >= 0).all() and (f["boxes"] <= 64).all()


@pytest.mark.parametrize("dx, dy", [(-20, 0), (20, 0), (0, -20), (0, 20), (20, 20)])
def test_boxes_outside_are_dropped_and_tiny_ones_kept(dx, dy):
    anchors = torch.tensor([[24., 24, 40, 40]]).repeat(3, 1)
    offsets = torch.tensor([[[10. * dx, 10. * dy, 0, 0], [0, 0, -30, -30],
                             [dx * 1., dy * 1., 0, 0]]])
    (found,) = detections((offsets, torch.tensor([[[1.], [2.], [3.]]])), anchors, 64)
    assert found["scores"].tolist() == torch.tensor([3., 2.]).sigmoid().tolist()
    moved = [min(max(v + 1.6 * d, 0), 64) for v, d in zip((24, 24, 40, 40), (dx, dy) * 2)]
    assert found["boxes"][0].tolist() == moved
    assert 0 < found["boxes"][1, 2] - found["boxes"][1, 0] < .1


def test_some_answers_that_are_no_numbers_do_not_hide_the_rest():
    offsets, logits = torch.zeros(1, 189, 4), torch.full((1, 189, 3), -10.)
    logits[0, :60], logits[0, 100, 1] = math.nan, 4.
    (found,) = detections((offsets, logits), make_anchors(64), 64)
    assert found["labels"].tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    anchors, (offsets, logits) = make_anchors(64), random_pred(2, 189, 3, 3)
    half, single = (detections((offsets.to(dtype).to(t), logits.to(dtype).to(t)), anchors, 64)
                    for t in (dtype, torch.float))
    for a, b in zip(half, single):
        assert torch.equal(a["boxes"], b["boxes"]) and a["boxes"].dtype == torch.float


def test_no_gradient_and_nothing_is_changed():
    anchors, pred = make_anchors(64), tuple(x.requires_grad_() for x in random_pred(2, 189, 3, 4))
    before = [x.clone() for x in pred]
    assert not any(v.requires_grad for f in detections(pred, anchors, 64, candidates=20)
                   for v in f.values())
    assert all(torch.equal(a, b) for a, b in zip(pred, before))


@pytest.mark.parametrize("change, message", [
    (dict(score=1.1), "detections: score is 1.1"), (dict(score=-.1), "between 0 and 1"),
    (dict(iou=2), "iou is 2"),
    (dict(anchors=torch.rand(8, 4)), r"anchors \[8, 4\] do not fit"),
    (dict(pred=(torch.rand(2, 9, 4), torch.rand(2, 9))), "do not fit"),
    (dict(pred=(torch.rand(2, 8, 4), torch.rand(2, 9, 3))), "do not fit"),
    (dict(pred=(torch.rand(9, 4), torch.rand(9, 3))), "do not fit")])
def test_detections_refuse(change, message):
    with pytest.raises(ValueError, match=message):
        detections(**dict(pred=(torch.rand(2, 9, 4), torch.rand(2, 9, 3)), anchors=torch.rand(9, 4),
                          size=32) | change)


# ---------------------------------------------------------------- predict

class Fixed(nn.Module):
    """A detector that finds one box with the picture's brightness as its class, and remembers what
    it was shown."""
    size = 64
    def __init__(self):
        super().__init__()
        self.part, self.frozen, self.seen = nn.Dropout(), nn.BatchNorm2d(3).eval(), []
        self.register_buffer("anchors", torch.tensor([[16., 32, 48, 64]]))
    def forward(self, x):
        assert not self.training and not self.part.training and not torch.is_grad_enabled()
        self.seen.append(x)
        logits = torch.full((len(x), 1, 4), -9.)
        logits[torch.arange(len(x)), 0, (x.mean((1, 2, 3)) * 3).round().long()] = 3.
        return torch.zeros(len(x), 1, 4), logits


@pytest.fixture
def model():
    m = Fixed().train()
    m.frozen.eval()
    return m


def grey(level, w=100, h=50): return Image.new("RGB", (w, h), (level,) * 3)


@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("RGB", "jpg"), ("L", "png"),
                                          ("LA", "png"), ("RGBA", "png"), ("P", "png"),
                                          ("P", "gif"),
                                          ("1", "png"), ("CMYK", "jpg"), ("RGB", "webp"),
                                          ("RGB", "bmp"), ("L", "tiff")])
def test_kinds_of_files(model, tmp_path, mode, suffix):
    path = tmp_path / f"picture.{suffix}"
    grey(255).convert(mode).save(path)
    for picture in (path, str(path), Image.open(path)):
        one = predict(model, picture)
        assert one["boxes"].tolist() == [[25, 25, 75, 50]] and one["labels"].tolist() == [3]
        assert model.seen[-1].shape == (1, 3, 64, 64)


def test_kinds_in_memory(model, tmp_path):
    grey(85).save(tmp_path / "a.png")
    record = Record(tmp_path / "a.png", torch.zeros(0, 4), torch.zeros(0, dtype=torch.long),
                    torch.zeros(0, dtype=torch.bool), (100, 50))
    array = np.array(grey(85))
    t = torch.tensor(array).permute(2, 0, 1)
    kinds = [record, grey(85), array, array[..., 0], array[..., :1], array / 255, array[:, ::-1], t,
             t / 255, t[:1], t.half() / 255]
    for one in predict(model, kinds):
        assert one["boxes"].tolist() == [[25, 25, 75, 50]] and one["labels"].tolist() == [1]


def test_a_picture_lying_on_its_side_is_put_up(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    grey(0).save(tmp_path / "turned.jpg", exif=exif)
    assert predict(model, tmp_path / "turned.jpg")["boxes"].tolist() == [[12.5, 50, 37.5, 100]]


@pytest.mark.parametrize("w, h", [(1000, 1), (1, 1000), (1, 1), (3, 2000), (1921, 1081)])
def test_odd_shapes(model, w, h):
    one = predict(model, grey(255, w, h))
    torch.testing.assert_close(one["boxes"], torch.tensor([[w / 4, h / 2, w * 3 / 4, h]]))
    assert (one["boxes"] <= torch.tensor([w, h, w, h])).all()


@pytest.mark.parametrize("bs", [1, 2, 3, 7, 100])
def test_lists_keep_their_order(model, bs):
    pictures = [grey(level, w) for level, w in zip((0, 85, 170, 255, 85, 0, 255),
                                                   range(40, 110, 10))]
    found = predict(model, pictures, bs=bs)
    assert [f["labels"].item() for f in found] == [0, 1, 2, 3, 1, 0, 3]
    assert [f["boxes"][0, 2].item() for f in found] == [w * 3 / 4 for w in range(40, 110, 10)]
    assert [len(x) for x in model.seen] == [min(bs, 7 - i) for i in range(0, 7, bs)]
    assert len(predict(model, tuple(pictures))) == 7


def test_empty_list_and_list_of_one(model):
    assert predict(model, []) == [] and len(predict(model, [grey(0)])) == 1


def test_pixels_are_those_of_validation(model):
    from course_lib.augment import valid_tfms
    picture = torch.randint(0, 256, (3, 37, 91), dtype=torch.uint8)
    predict(model, picture)
    assert torch.equal(model.seen[-1][0], valid_tfms(64)(picture).float() / 255)


@pytest.mark.parametrize("training", [True, False])
def test_every_part_stays_in_its_mode(model, training):
    model.train(training).frozen.eval()
    modes = [m.training for m in model.modules()]
    predict(model, grey(0))
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(FileNotFoundError): predict(model, [grey(0), "nowhere.jpg"])
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()


@pytest.mark.parametrize("picture, error, message", [
    ("nowhere.jpg", FileNotFoundError, "there is no picture nowhere.jpg"),
    (np.zeros((8, 8, 4), np.uint8), ValueError, "is not one picture"),
    (torch.zeros(2, 3, 8, 8), ValueError, "is not one picture"),
    (np.full((8, 8, 3), 200), ValueError, "int64 goes from 200 to 200"),
    (np.full((8, 8), 60000, np.uint16), ValueError, "uint16 goes from 60000"),
    (torch.full((3, 8, 8), 255.), ValueError, "float32 goes from 255"),
    (None, ValueError, "is not one picture")])
def test_pictures_that_are_refused(model, picture, error, message):
    with pytest.raises(error, match=message): predict(model, picture)


def test_a_file_that_is_no_picture(model, tmp_path):
    (tmp_path / "notes.jpg").write_text("not a picture")
    with pytest.raises(OSError, match="notes.jpg"): predict(model, tmp_path / "notes.jpg")


@pytest.mark.parametrize("options, message", [(dict(score=3), "predict: score is 3"),
                                              (dict(iou=-1), "predict: iou is -1"),
                                              (dict(bs=0), "bs is 0")])
def test_predict_refuses(model, options, message):
    for pictures in (grey(0), []):
        with pytest.raises(ValueError, match=message): predict(model, pictures, **options)


def test_score_is_passed_on(model):
    assert len(predict(model, grey(0), score=.99)["boxes"]) == 0
    assert len(predict(model, grey(0), score=.95)["boxes"]) == 1


def test_drawing(model):
    ax = show_detections(grey(255), dict(boxes=torch.tensor([[1., 1, 20, 20], [30, 10, 60, 40]]),
                                         scores=torch.tensor([.9, .2]),
                                         labels=torch.tensor([1, 0])), ["cat", "dog"], title="here")
    assert [t.get_text() for t in ax.texts] == ["dog 0.90"] and ax.get_title() == "here"
    empty = dict(boxes=torch.zeros(0, 4), scores=torch.zeros(0),
                 labels=torch.zeros(0, dtype=torch.long))
    assert len(show_detections(grey(255), empty, ["cat"]).texts) == 0


@pytest.mark.parametrize("picture, words", [(torch.full((3, 4, 4), -1.), "from -1"),
                                            (torch.full((3, 4, 4), torch.nan), "nan"),
                                            (np.full((4, 4, 3), 2.), "to 2"),
                                            (np.full((4, 4, 3), 300, np.int32), "300"),
                                            (np.zeros((0, 30, 3), np.uint8), "nothing in it")])
def test_pictures_that_would_be_taken_for_black_or_white_or_have_no_pixels(model, picture, words):
    with pytest.raises(ValueError, match=words): predict(model, picture)


@pytest.mark.parametrize("limits", [dict(top=-1), dict(candidates=-1)])
def test_negative_limits_are_refused(limits):
    with pytest.raises(ValueError, match="negative"):
        detections((torch.zeros(1, 2, 4), torch.zeros(1, 2, 3)),
                   make_anchors(32, grids=(1,), zooms=(1., 2.), ratios=((1, 1),)), 32, **limits)
