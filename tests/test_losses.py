"""Attacks on `course_lib.losses`."""
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from course_lib.anchors import encode, make_anchors
from course_lib.losses import SSDLoss, focal_loss
from course_lib.match import match

KINDS = ("bce", "hard", "focal")
ANCHORS = make_anchors(64, grids=(4, 2), zooms=(1.,))           # [60,4]


def batch(B=4, N=3, C=5, seed=0, anchors=ANCHORS, dtype=torch.float):
    """Predictions and targets: the first picture full, the last without objects, some padding
    between."""
    g = torch.Generator().manual_seed(seed)
    corner, side = torch.rand(B, N, 2, generator=g) * 40, 4 + torch.rand(B, N, 2, generator=g) * 30
    labels = torch.randint(C, (B, N), generator=g)
    for b in range(B): labels[b, max(0, N - b):] = -1
    if B > 1: labels[-1] = -1
    boxes = torch.cat([corner, corner + side], 2) * (labels >= 0)[..., None]
    pred = (torch.randn(B, len(anchors), 4, generator=g),
            torch.randn(B, len(anchors), C, generator=g) * 2 - 1)
    return tuple(p.to(dtype) for p in pred), boxes.to(dtype), labels


def plain(pred, boxes, labels, difficult, kind, alpha=.25, gamma=2., negatives=3, anchors=ANCHORS):
    "Both parts, one anchor and one class at a time, in Python floats."
    matched = match(anchors, boxes, labels, difficult, .4, .3)
    box_sum = class_sum = n = 0
    for b in range(len(boxes)):
        costs = {}
        for a, m in enumerate(matched[b].tolist()):
            if m == -2: continue
            cost = 0.
            for c, x in enumerate(pred[1][b, a].tolist()):
                p = 1 / (1 + math.exp(-x))
                pt, at = (p, alpha) if m >= 0 and labels[b, m] == c else (1 - p, 1 - alpha)
                cost += -math.log(pt) * (at * (1 - pt) ** gamma if kind == "focal" else 1)
            costs[a] = cost
            if m >= 0:
                n += 1
                for d in (pred[0][b, a] - encode(boxes[b, m], anchors[a])).abs().tolist():
                    box_sum += d * d / 2 if d < 1 else d - .5
        yes = [a for a in costs if matched[b, a] >= 0]
        no = [a for a in costs if matched[b, a] == -1]
        if kind == "hard": no = sorted(no, key=lambda a: (-costs[a], a))[:negatives * len(yes)]
        class_sum += sum(costs[a] for a in yes + no)
    return box_sum / max(n, 1), class_sum / max(n, 1)


# focal_loss

@pytest.mark.parametrize("alpha", [None, 0., .1, .25, .5, .9, 1.])
@pytest.mark.parametrize("gamma", [0, 0., .5, 1, 2, 2.5, 5])
def test_focal_loss_and_its_gradient_are_torchvisions(alpha, gamma):
    g = torch.Generator().manual_seed(1)
    x, t = (torch.randn(7, 5, 3, generator=g, dtype=torch.double) * 5,
            (torch.rand(7, 5, 3, generator=g) < .4).double())
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss, other = (focal_loss(mine, t, alpha, gamma),
                   sigmoid_focal_loss(theirs, t, alpha=-1 if alpha is None else alpha, gamma=gamma))
    torch.testing.assert_close(loss, other, rtol=1e-7, atol=1e-8)
    loss.sum().backward(), other.sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-8)


def test_without_gamma_and_alpha_it_is_cross_entropy():
    x, t = torch.linspace(-30, 30, 101), (torch.arange(101) % 2).float()
    torch.testing.assert_close(focal_loss(x, t, None, 0),
                               F.binary_cross_entropy_with_logits(x, t, reduction="none"))


@pytest.mark.parametrize("alpha", [None, .25])
@pytest.mark.parametrize("gamma", [0, .5, 1, 2, 3.3])
def test_focal_loss_gradcheck(alpha, gamma):
    x, t = (torch.linspace(-6, 6, 12, dtype=torch.double, requires_grad=True),
            (torch.arange(12) % 2).double())
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, t, alpha, gamma), x)


def test_targets_may_be_bool_integer_or_one_number():
    x = torch.randn(4, 3)
    t = torch.tensor([[True, False, True]]).expand(4, 3)
    for other in (t, t.long(), t.float()):
        loss = focal_loss(x, other)
        assert loss.dtype == torch.float
        torch.testing.assert_close(loss, sigmoid_focal_loss(x, t.float()))
    torch.testing.assert_close(focal_loss(x, 1), focal_loss(x, torch.ones(4, 3)))
    torch.testing.assert_close(focal_loss(x, 0), focal_loss(x, torch.zeros(4, 3)))


@pytest.mark.parametrize("gamma", [0, 1, 2, 5])
def test_saturated_logits_stay_finite(gamma):
    x = torch.tensor([-1e4, -200, -100, 0, 100, 200, 1e4], requires_grad=True)
    for target in (0, 1):
        loss = focal_loss(x, target, gamma=gamma)
        grad, = torch.autograd.grad(loss.sum(), x)
        assert loss.isfinite().all() and grad.isfinite().all() and (loss >= 0).all()


def test_numbers_from_the_lesson():
    ratio = (focal_loss(torch.tensor([.1, .5, .9, .99]).logit(), 1, None,
                        2) / focal_loss(torch.tensor([.1, .5, .9, .99]).logit(), 1, None, 0))
    torch.testing.assert_close(ratio, torch.tensor([.81, .25, .01, .0001]), rtol=1e-3, atol=0)


def test_no_elements(): assert focal_loss(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0, 3)


# SSDLoss

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_against_a_plain_loop(kind, hard, seed):
    pred, boxes, labels = batch(seed=seed)
    difficult = (torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < .4
                 if hard else None)
    parts = SSDLoss(ANCHORS, kind).parts(pred, boxes, labels, difficult)
    expected = plain(pred, boxes, labels, difficult, kind)
    torch.testing.assert_close(torch.stack(parts), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    for given, weight in ((3., 3.), (None, .25 if kind == "focal" else 1.)):
        total = SSDLoss(ANCHORS, kind, box_weight=given)(pred, boxes, labels, difficult)
        torch.testing.assert_close(total, torch.tensor(weight * expected[0] + expected[1]),
                                   rtol=1e-4, atol=1e-5)


def test_the_plain_loop_has_seen_every_kind_of_anchor():
    seen = set()
    for seed in range(4):
        _, boxes, labels = batch(seed=seed)
        seen |= set(match(ANCHORS, boxes, labels, None, .4, .3).clamp(max=0).unique().tolist())
    assert seen == {-2, -1, 0}


def test_other_settings_reach_the_sum():
    pred, boxes, labels = batch(seed=5)
    for kind, options in (("focal", dict(alpha=.6, gamma=1.)), ("focal", dict(alpha=.5, gamma=0)),
                          ("hard", dict(negatives=1)), ("hard", dict(negatives=0)),
                          ("hard", dict(negatives=1000))):
        torch.testing.assert_close(torch.stack(SSDLoss(ANCHORS, kind, **options).parts(
            pred, boxes, labels)), torch.tensor(plain(pred, boxes, labels, None, kind, **options)),
                                   rtol=1e-4, atol=1e-5)


def test_ignored_anchors_have_no_gradient():
    pred, boxes, labels = batch(seed=2)
    difficult = torch.zeros_like(labels, dtype=torch.bool); difficult[0] = True
    matched = match(ANCHORS, boxes, labels, difficult, .5, .4)
    assert (matched == -2).sum() > 0
    for kind in KINDS:
        inputs = [p.clone().requires_grad_() for p in pred]
        SSDLoss(ANCHORS, kind)(inputs, boxes, labels, difficult).backward()
        assert (inputs[0].grad[matched < 0] == 0).all()
        assert (inputs[1].grad[matched == -2] == 0).all()
        assert (inputs[1].grad[matched >= 0] != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_order_of_pictures_change_nothing(kind):
    pred, boxes, labels = batch(seed=3)
    loss = SSDLoss(ANCHORS, kind)
    expected = torch.stack(loss.parts(pred, boxes, labels))
    torch.testing.assert_close(torch.stack(loss.parts(pred, F.pad(boxes, (0, 0, 0, 5)),
                                                      F.pad(labels, (0, 5), value=-1))), expected)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(torch.stack(loss.parts([p[order] for p in pred], boxes[order],
                                                      labels[order])), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_renamed_classes_change_nothing(kind):
    "One column a class and none for background: all are alike."
    pred, boxes, labels = batch(seed=6)
    names = torch.tensor([3, 0, 4, 1, 2])
    renamed = torch.where(labels >= 0, names[labels.clamp(min=0)], -1)
    torch.testing.assert_close(SSDLoss(ANCHORS, kind)((pred[0], pred[1][..., names.argsort()]),
                                                      boxes, renamed),
                               SSDLoss(ANCHORS, kind)(pred, boxes, labels))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [0, 1, 4])
def test_batch_without_objects(kind, slots):
    (offsets, logits), _, _ = batch()
    inputs = offsets.requires_grad_(), logits.requires_grad_()
    box, classes = SSDLoss(ANCHORS, kind).parts(inputs, torch.zeros(4, slots, 4),
                                                torch.full((4, slots), -1),
                                                torch.zeros(4, slots, dtype=torch.bool))
    (box + classes).backward()
    assert box == 0 and classes.isfinite() and (classes == 0) == (kind == "hard")
    assert (offsets.grad == 0).all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    anchors = make_anchors(64, grids=(2,), zooms=(1.,), ratios=((1, 1), (1, .5))).double()
    pred, boxes, labels = batch(3, 2, 3, seed=7, anchors=anchors, dtype=torch.double)
    inputs = [p.clone().requires_grad_() for p in pred]
    loss = SSDLoss(anchors, kind)
    assert all(part.dtype == torch.double for part in loss.parts(inputs, boxes, labels))
    assert torch.autograd.gradcheck(lambda o, l: loss.parts((o, l), boxes, labels), inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_half_precision_is_worked_out_in_float32(kind, dtype):
    pred, boxes, labels = batch(seed=8)
    small = [p.to(dtype).requires_grad_() for p in pred]
    loss = SSDLoss(ANCHORS, kind)(small, boxes, labels)
    loss.backward()
    assert loss.dtype == torch.float
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in small)
    torch.testing.assert_close(loss, SSDLoss(ANCHORS, kind)([p.detach().float() for p in small],
                                                            boxes, labels))


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind):
    torch.manual_seed(0)
    _, boxes, labels = batch(seed=9)
    x, layer, loss_func = torch.randn(4, 60, 16), torch.nn.Linear(16, 9), SSDLoss(ANCHORS, kind)
    def run():
        out = layer(x)
        return out, loss_func((out[..., :4], out[..., 4:]), boxes, labels)
    _, expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16): out, loss = run()
    loss.backward()
    assert out.dtype == torch.bfloat16 and loss.dtype == torch.float
    assert layer.weight.grad.isfinite().all()
    torch.testing.assert_close(loss, expected, rtol=.02, atol=.02)


def test_mining_counts_exactly_three_for_each_matched_anchor():
    loss = SSDLoss(ANCHORS, "hard")
    for seed in range(20):
        (_, logits), boxes, labels = batch(seed=seed)
        matched = match(ANCHORS, boxes, labels, None, .4, .3)
        losses = logits.exp().sum(2)
        counts = loss.hardest(losses, matched)
        positive, background = matched >= 0, matched == -1
        wanted = torch.minimum(3 * positive.sum(1), background.sum(1))
        assert (counts & positive).equal(positive) and not (counts & (matched == -2)).any()
        assert (counts & background).sum(1).equal(wanted)
        for b in range(len(matched)):
            inside, outside = (losses[b][counts[b] & background[b]],
                               losses[b][~counts[b] & background[b]])
            assert not len(inside) or not len(outside) or inside.min() >= outside.max()


def test_mining_with_ties_takes_the_lower_anchors():
    matched = torch.full((2, 12), -1)
    matched[0, 5], matched[1, [0, 11]], matched[0, 1] = 0, 0, -2
    counts = SSDLoss(ANCHORS, "hard").hardest(torch.zeros(2, 12), matched)
    assert counts[0].nonzero()[:, 0].tolist() == [0, 2, 3, 5]
    assert counts[1].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 11]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_host(kind):
    """On a device without values, whatever asks for one fails: `.item()`, a boolean index, an `if`
    on a tensor."""
    pred, boxes, labels = (x.to("meta") if isinstance(x, torch.Tensor)
                           else [p.to("meta").requires_grad_() for p in x] for x in batch())
    difficult = torch.zeros_like(labels, dtype=torch.bool)
    with pytest.raises((RuntimeError, NotImplementedError)): difficult.any().item()
    loss = SSDLoss(ANCHORS, kind).to("meta")(pred, boxes, labels, difficult)
    loss.backward()
    assert loss.shape == () and pred[0].grad.shape == (4, 60, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_left_alone_and_twice_gives_the_same(kind):
    pred, boxes, labels = batch(seed=11)
    before = [t.clone() for t in (*pred, boxes, labels)]
    loss = SSDLoss(ANCHORS, kind)
    assert loss(pred, boxes, labels) == loss(pred, boxes, labels)
    assert all(torch.equal(a, b) for a, b in zip(before, (*pred, boxes, labels)))


def test_unknown_kind_names_those_that_exist():
    with pytest.raises(ValueError, match="'ohem'.*'hard'"): SSDLoss(ANCHORS, "ohem")


def test_anchors_move_with_the_module():
    assert SSDLoss(ANCHORS).double().anchors.dtype == torch.double
    assert "anchors" in dict(SSDLoss(ANCHORS).named_buffers())
