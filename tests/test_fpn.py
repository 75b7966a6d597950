"""Attacks on `course_lib.fpn`: shapes for all sizes, ATSS against plain Python, GIoU against
torchvision."""
import math
import random
import statistics
from functools import partial

import pytest
import torch
from torchvision.ops import complete_box_iou_loss, generalized_box_iou, generalized_box_iou_loss

from course_lib.anchors import decode, encode, make_anchors
from course_lib.boxes import iou
from course_lib.detector import checkpoint, load_detector, write_whole
from course_lib.fpn import FPN, RetinaNet, atss, giou, iou_losses, retina_loss
from course_lib.backbone import backbone
from course_lib.losses import SSDLoss


def net(n_classes=3, size=64, **kwargs):
    return RetinaNet(n_classes, size, width=16, depth=1,
                     body=backbone(pretrained=False, out_indices=(2, 3, 4)), **kwargs)


# ---------------------------------------------------------------- the network

@pytest.mark.parametrize("sizes", [(16, 8, 4), (28, 14, 7), (5, 3, 2), (2, 1, 1), (13, 7, 4)])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_the_pyramid_keeps_the_size_of_every_map(sizes, extra):
    maps = [torch.rand(2, c, g, g) for c, g in zip((4, 6, 8), sizes)]
    levels = FPN((4, 6, 8), width=8, extra=extra)(maps)
    expected = [*sizes] + [-(-sizes[-1] // 2 ** (i + 1)) for i in range(extra)]
    assert [tuple(m.shape) for m in levels] == [(2, 8, g, g) for g in expected]


def test_coarse_maps_reach_fine_ones_and_not_the_other_way_round():
    torch.manual_seed(0)
    fpn, maps = (FPN((4, 6, 8), width=8, extra=0).eval(),
                 [torch.rand(1, c, g, g, requires_grad=True) for c, g in zip((4, 6, 8), (8, 4, 2))])
    levels = fpn(maps)
    for i, level in enumerate(levels):
        grads = torch.autograd.grad(level.square().sum(), maps, retain_graph=True,
                                    allow_unused=True)
        assert [g is not None and g.abs().sum().item() > 0
                for g in grads] == [j >= i for j in range(3)]


def test_a_width_that_group_norm_can_not_divide():
    with pytest.raises(ValueError, match="multiple of 8"): FPN((4,), width=12)


@pytest.mark.parametrize("size", [32, 64, 100, 129, 224])
def test_outputs_and_anchors_agree_for_every_size(size):
    model = net(size=size, zooms=(3., 4.), ratios=((1, 1), (1, .5))).eval()
    with torch.no_grad(): offsets, logits = model(torch.rand(1, 3, size, size))
    assert offsets.shape == (1, len(model.anchors), 4)
    assert logits.shape == (1, len(model.anchors), 3)
    torch.testing.assert_close(model.anchors,
                               make_anchors(size, model.grids, (3., 4.), ((1, 1), (1, .5))))
    assert .005 < logits.sigmoid().mean() < .03


def test_outputs_come_in_the_order_of_the_anchors():
    "Cut a hole into one level: only the offsets of the anchors of those cells change."
    model = net(size=64).eval()
    with torch.no_grad():
        model.offsets.weight.zero_()
        model.offsets.weight[:, :, 1, 1] = 1.
        maps = [torch.zeros(1, 16, g, g) for g in model.grids]
        maps[1][0, :, 2, 3] = 1.
        model.box_tower = torch.nn.Identity()
        model.fpn = torch.nn.Module(); model.fpn.forward = lambda _: maps
        offsets, _ = model(torch.rand(1, 3, 64, 64))
    changed = (offsets[0] - offsets[0, -1]).abs().sum(1).nonzero()[:, 0].tolist()
    x0, y0, x1, y1 = model.anchors[changed[0]].tolist()
    assert len(changed) == 1 and ((x0 + x1) / 2, (y0 + y1) / 2) == (3.5 * 16, 2.5 * 16)


def test_every_weight_learns():
    model = net().train()
    boxes, labels = torch.tensor([[[4., 4, 40, 40], [50, 50, 60, 60]]]), torch.tensor([[0, 2]])
    loss = SSDLoss(model.anchors, assign=partial(atss, grids=model.grids),
                   box_losses=partial(iou_losses, anchors=model.anchors))
    loss(model(torch.rand(1, 3, 64, 64)), boxes, labels).backward()
    missing = [name for name, p in model.named_parameters() if not name.startswith("body")
               and (p.grad is None or not p.grad.isfinite().all())]
    assert missing == []


def test_it_comes_back_from_a_file(tmp_path):
    model = net(zooms=(3.,)).eval()
    write_whole(checkpoint(model, ["a", "b", "c"]), tmp_path / "x.pth")
    again, classes = load_detector(tmp_path / "x.pth", "cpu")
    picture = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(picture), again(picture)))
    assert classes == ["a", "b", "c"] and again.grids == model.grids


# ---------------------------------------------------------------- ATSS

def plain_iou(a, b):
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union else 0.


def reference(anchors, boxes, labels, difficult, grids, k):
    "One picture, in plain Python."
    middle = lambda x: ((x[0] + x[2]) / 2, (x[1] + x[3]) / 2)
    A, wanted = len(anchors), {}
    for n, (box, label) in enumerate(zip(boxes, labels)):
        if label < 0: continue
        near, start = [], 0
        for g in grids:
            ids = sorted(range(start, start + g * g),
                         key=lambda a: math.dist(middle(anchors[a]), middle(box)))
            near += ids[:k]
            start += g * g
        ious = {a: plain_iou(box, anchors[a]) for a in near}
        bar = statistics.mean(ious.values()) + statistics.stdev(ious.values())
        for a, value in ious.items():
            x, y = middle(anchors[a])
            if value >= bar and value > 0 and box[0] < x < box[2] and box[1] < y < box[3]:
                wanted.setdefault(a, []).append((-value, n))
    matched = [min(wanted[a])[1] if a in wanted else -1 for a in range(A)]
    pairs = sorted((-plain_iou(b, anchors[a]), n, a) for n, (b, l) in enumerate(zip(boxes, labels))
                   if l >= 0 for a in range(A))
    objects, taken = set(), set()
    for value, n, a in pairs:
        if value < 0 and n not in objects and a not in taken:
            objects.add(n), taken.add(a)
            matched[a] = n
    return [-2 if m >= 0 and difficult[m] else m for m in matched]


def picture_of(rng, n, side=96):
    corners = [(rng.uniform(-5, side - 10), rng.uniform(-5, side - 10)) for _ in range(n)]
    return ([(x, y, x + rng.uniform(2, 70), y + rng.uniform(2, 70)) for x, y in corners],
            [rng.choice([-1, 0, 1, 2]) for _ in range(n)], [rng.random() < .3 for _ in range(n)])


@pytest.mark.parametrize("k", [1, 4, 9])
def test_plain_python_agrees(k):
    rng, grids, seen = random.Random(k), (6, 3, 2), set()
    anchors = make_anchors(96, grids, (2.5,), ((1, 1),)).double()
    for _ in range(60):
        rows = [picture_of(rng, 4) for _ in range(3)]
        boxes, labels, difficult = (torch.tensor([r[i] for r in rows]) for i in range(3))
        matched = atss(anchors, boxes.double(), labels, difficult, grids, k)
        for b in range(3):
            expected = reference(anchors.tolist(), boxes[b].double().tolist(), labels[b].tolist(),
                                 difficult[b].tolist(), grids, k)
            assert matched[b].tolist() == expected
            seen |= {min(m, 0) for m in expected}
    assert seen == {-2, -1, 0}


def test_every_object_that_overlaps_an_anchor_gets_one_and_padding_none():
    grids = (4, 2)
    anchors = make_anchors(64, grids, (4.,), ((1, 1),))
    boxes, labels = torch.tensor([[[1., 1, 3, 3], [60, 60, 63, 63], [0, 0, 64, 64],
                                   [900, 900, 910, 910]]]), torch.tensor([[0, 1, 2, -1]])
    assert set(atss(anchors, boxes, labels, grids=grids)[0].tolist()) >= {0, 1, 2}
    assert 3 not in atss(anchors, boxes, labels, grids=grids)
    assert (atss(anchors, boxes[:, :0], labels[:, :0], grids=grids) == -1).all()
    assert (atss(anchors, boxes, torch.full((1, 4), -1), grids=grids) == -1).all()


def test_nothing_waits_for_the_host():
    anchors = make_anchors(64, (4, 2)).to("meta")
    assert atss(anchors, torch.zeros(2, 5, 4, device="meta"),
                torch.zeros(2, 5, dtype=torch.long, device="meta"),
                torch.zeros(2, 5, dtype=torch.bool, device="meta"), (4, 2)).shape == (2, 180)


def test_grids_that_are_not_those_of_the_anchors():
    with pytest.raises(ValueError, match="grids"):
        atss(make_anchors(64, (4,), (1.,), ((1, 1),)), torch.zeros(1, 1, 4),
             torch.zeros(1, 1).long(), grids=(3,))


# ---------------------------------------------------------------- GIoU

def boxes_of(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g, dtype=torch.double) * 50
    return torch.cat([corner, corner + 1 + torch.rand(n, 2, generator=g, dtype=torch.double) * 50],
                     1)


def test_giou_is_torchvisions():
    a, b = boxes_of(500), boxes_of(500, 1)
    torch.testing.assert_close(giou(a, b), generalized_box_iou(a, b).diagonal())
    torch.testing.assert_close(1 - giou(a, b), generalized_box_iou_loss(a, b), rtol=1e-5, atol=1e-5)
    assert (giou(a, b) <= iou(a, b) + 1e-12).all() and (giou(a, b) > -1).all()
    assert torch.allclose(giou(a, a), torch.ones(500).double())


def test_giou_of_boxes_without_an_area_is_finite_and_its_gradient_too():
    point, box = torch.tensor([[5., 5, 5, 5]], requires_grad=True), torch.tensor([[0., 0, 10, 10]])
    for other in (point.detach(), box, torch.tensor([[20., 5, 20, 5]])):
        value = giou(point, other)
        grad, = torch.autograd.grad(value.sum(), point)
        assert value.isfinite().all() and grad.isfinite().all() and -1 <= value.item() <= 1


def test_gradients():
    a, b = boxes_of(6), boxes_of(6, 3)
    assert torch.autograd.gradcheck(lambda x: giou(x, b), (a.clone().requires_grad_(),))
    anchors, index = boxes_of(7, 4), torch.tensor([[0, 1, 2, 3, 4, 5, 0]])
    offsets = encode(b[index], anchors) + .1
    for kind in ("giou", "ciou"):
        losses = lambda x: iou_losses(x, b[None], index, anchors, kind)
        assert losses(encode(b[index], anchors)).abs().max() < 1e-5
        if kind == "giou":
            assert torch.autograd.gradcheck(losses, (offsets.clone().requires_grad_(),))
    torch.testing.assert_close(iou_losses(offsets, b[None], index, anchors, "ciou")[0, 0],
                               complete_box_iou_loss(decode(offsets, anchors)[0, 0], b[0]))
    with pytest.raises(ValueError, match="diou"):
        iou_losses(offsets, b[None], index, anchors, "diou")


def test_the_loss_may_be_made_before_model_and_loss_move_to_another_device():
    model = RetinaNet(3, 64, width=16, depth=1,
                      body=backbone(pretrained=False, out_indices=(2, 3, 4)))
    loss = retina_loss(model).to("meta")
    pred = (torch.zeros(2, len(model.anchors), 4, device="meta"),
            torch.zeros(2, len(model.anchors), 3, device="meta"))
    boxes, labels = torch.zeros(2, 1, 4, device="meta"), torch.zeros(2, 1, device="meta").long()
    assert loss(pred, boxes, labels).device.type == "meta"
