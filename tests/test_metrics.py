"""Attacks on `mean_ap`, `precision_recall` and `error_kinds`: others' programs, a slow version in
fractions, corners, bad input."""
import contextlib
import io
from fractions import Fraction

import numpy as np
import pytest
import torch

from course_lib import tables
from course_lib.metrics import KINDS, error_kinds, mean_ap, precision_recall


def picture(boxes=(), labels=None, scores=None, **more):
    "One picture's dict, from lists."
    boxes = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    d = dict(boxes=boxes, labels=torch.tensor(labels if labels is not None else [0] * len(boxes),
                                              dtype=torch.long))
    if scores is not None: d["scores"] = torch.tensor(scores, dtype=torch.float64)
    return d | {k: torch.tensor(v) for k, v in more.items()}


def generate(seed, pictures=8, classes=3, objects=6, found=10, flag="iscrowd", area=False,
             whole=True):
    """Guesses around objects, with empty pictures, equal scores, whole pixels (so equal overlaps,
    too), crowds or difficult ones, and a class without objects."""
    rng, preds, targets = np.random.default_rng(seed), [], []
    for _ in range(pictures):
        n, m = (int(rng.integers(1, 2 * k)) * (rng.random() > .15) for k in (objects, found))
        corner, size = (rng.random((n, 2)) * 300,
                        4 * 2 ** (rng.random((n, 1)) * 6) * (.6 + .8 * rng.random((n, 2))))
        boxes, labels = (np.concatenate([corner, corner + size], 1),
                         rng.integers(0, max(classes - 1, 1), n))
        if whole:
            boxes = np.concatenate([boxes[:, :2].round(),
                                    np.maximum(boxes[:, 2:].round(), boxes[:, :2].round() + 1)], 1)
        k = rng.integers(0, n, m) if n else None
        source, which = ((boxes[k], labels[k]) if n else (np.tile([50., 50, 150, 150], (m, 1)),
                                                          np.zeros(m, dtype=int)))
        sides = np.tile(source[:, 2:] - source[:, :2], 2)
        far = np.where(rng.random((m, 1)) < .35, 1., .12) * sides
        guess = source + far * (2 * rng.random((m, 4)) - 1)
        if whole: guess = guess.round()
        guess = np.concatenate([np.minimum(guess[:, :2], guess[:, 2:]),
                                np.maximum(guess[:, :2], guess[:, 2:]) + 1], 1)
        preds.append(picture(guess.tolist(), np.where(rng.random(m) < .8, which,
                                                      rng.integers(0, classes, m)).tolist(),
                             (np.floor(rng.random(m) * 10) / 10).tolist()))
        t = picture(boxes.tolist(), labels.tolist())
        t[flag] = torch.from_numpy(rng.random(n) < .15)
        if area: t["area"] = torch.from_numpy(size.prod(1) * (.4 + .6 * rng.random(n)))
        targets.append(t)
    return preds, targets


# ---------------------------------------------------------------- COCO: two peers

def as_coco(preds, targets, classes):
    "The same in COCO's form. Ids start at 1: pycocotools takes 0 for no match."
    truth, results = [], []
    for i, (p, t) in enumerate(zip(preds, targets)):
        for k, (x0, y0, x1, y1) in enumerate(t["boxes"].tolist()):
            truth.append(dict(id=len(truth) + 1, image_id=i, category_id=int(t["labels"][k]),
                              bbox=[x0, y0, x1 - x0, y1 - y0],
                              area=float(t["area"][k]) if "area" in t else (x1 - x0) * (y1 - y0),
                              iscrowd=int(t["iscrowd"][k])))
        for (x0, y0, x1, y1), label, score in zip(p["boxes"].tolist(), p["labels"].tolist(),
                                                  p["scores"].tolist()):
            results.append(dict(image_id=i, category_id=label, bbox=[x0, y0, x1 - x0, y1 - y0],
                                score=score))
    images = [dict(id=i, width=640, height=640) for i in range(len(targets))]
    return dict(images=images, annotations=truth,
                categories=[dict(id=c, name=str(c)) for c in range(classes)]), results


def peer(name, preds, targets, classes):
    "Twelve numbers, and AP of each class."
    if name == "pycocotools":
        coco, evaluation = (pytest.importorskip("pycocotools.coco").COCO,
                            pytest.importorskip("pycocotools.cocoeval").COCOeval)
    else:
        coco, evaluation = (pytest.importorskip("faster_coco_eval").COCO,
                            pytest.importorskip("faster_coco_eval").COCOeval_faster)
    truth, results = as_coco(preds, targets, classes)
    with contextlib.redirect_stdout(io.StringIO()):
        gt = coco()
        gt.dataset = truth
        gt.createIndex()
        e = evaluation(gt, gt.loadRes(results), "bbox")
        e.evaluate(), e.accumulate(), e.summarize()
    each = e.eval["precision"].reshape(10, 101, classes, 4, 3)[:, :, :, 0, 2].mean((0, 1))
    return np.asarray(e.stats)[:12], np.where(each < 0, np.nan, each)


@pytest.mark.parametrize("name", ["pycocotools", "faster-coco-eval"])
@pytest.mark.parametrize("seed", range(24))
def test_coco_agrees_with_peers(name, seed):
    crowded = seed % 8 == 7
    preds, targets = generate(seed, pictures=4 if crowded else 8, classes=1 + seed % 4,
                              found=250 if crowded else 10, area=seed % 3 == 0, whole=seed % 2 == 0)
    assert not crowded or max(len(p["boxes"]) for p in preds) > 100
    stats, each = peer(name, preds, targets, 1 + seed % 4)
    ours = mean_ap(preds, targets, 1 + seed % 4, style="coco")
    np.testing.assert_allclose(ours.stats, stats, atol=1e-9)
    np.testing.assert_allclose(ours.ap, each, atol=1e-9)
    assert ours.map == pytest.approx(stats[0], abs=1e-9)


@pytest.mark.parametrize("name", ["pycocotools", "faster-coco-eval"])
def test_coco_many_of_one_class(name):
    """More than a hundred guesses of one class in a picture, and objects packed so that guesses
    compete for them."""
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 30, (40, 2)).astype(float)
    boxes = np.concatenate([corner, corner + rng.integers(20, 40, (40, 2))], 1)
    guess = np.repeat(boxes, 5, 0) + rng.integers(-4, 5, (200, 4))
    targets = [picture(boxes.tolist(), iscrowd=[k % 9 == 0 for k in range(40)])] * 3
    preds = [picture(guess.tolist(), scores=(rng.integers(0, 8, 200) / 8).tolist())
             for _ in range(3)]
    np.testing.assert_allclose(mean_ap(preds, targets, 1, style="coco").stats,
                               peer(name, preds, targets, 1)[0], atol=1e-9)


@pytest.mark.parametrize("name", ["pycocotools", "faster-coco-eval"])
@pytest.mark.parametrize("turn", [1, -1])
def test_coco_equal_overlaps(name, turn):
    """The first guess overlaps both objects equally: it matters which one it takes, and the last
    one is it."""
    targets = [picture([[0, 0, 40, 40], [10, 0, 50, 40]][::turn], iscrowd=[False, False])]
    preds = [picture([[5, 0, 45, 40], [0, 0, 40, 40]], scores=[.9, .8])]
    stats = mean_ap(preds, targets, 1, style="coco").stats
    assert (stats[2] > .9) == (turn == 1)
    np.testing.assert_allclose(stats, peer(name, preds, targets, 1)[0], atol=1e-9)


def test_coco_difficult_and_iou_are_not_looked_at():
    preds, targets = generate(3)
    before = mean_ap(preds, targets, 3, style="coco").stats
    marked = [t | dict(difficult=torch.ones(len(t["boxes"]), dtype=torch.bool)) for t in targets]
    assert torch.equal(mean_ap(preds, marked, 3, iou=.9, style="coco").stats, before)


def test_coco_without_objects():
    r = mean_ap([picture([[0, 0, 9, 9]], scores=[.5])], [picture()], 2, style="coco")
    assert r.stats.tolist() == [-1] * 12 and np.isnan(r.map) and r.ap.isnan().all()


# ---------------------------------------------------------------- VOC: the devkit's rule, slowly

def overlap(a, b):
    "IoU as a fraction of whole numbers."
    a, b = [Fraction(x) for x in a], [Fraction(x) for x in b]
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0: return Fraction(0)
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def devkit(preds, targets, label, threshold, style):
    "One class, one guess after the other, in fractions."
    truth = [[(b, d) for b, l, d in zip(*(t[k].tolist() for k in ("boxes", "labels", "difficult")))
              if l == label] for t in targets]
    n, taken, right, wrong, points = sum(not d for t in truth for _, d in t), set(), 0, 0, []
    found = [(s, i, b) for i, p in enumerate(preds) for s, b,
             l in zip(*(p[k].tolist() for k in ("scores", "boxes", "labels"))) if l == label]
    for score, i, box in sorted(found, key=lambda d: -d[0]):
        best, where = Fraction(-1), None
        for k, (b, _) in enumerate(truth[i]):
            if overlap(box, b) > best: best, where = overlap(box, b), k
        if where is None or best < threshold or (i, where) in taken: wrong += 1
        elif not truth[i][where][1]: right, _ = right + 1, taken.add((i, where))
        points.append((right, wrong))
    if n == 0: return float("nan")
    precision, recall = ([Fraction(r, r + w) if r + w else Fraction(0) for r, w in points],
                         [Fraction(r, n) for r, _ in points])
    if style == "11pt":
        return float(sum(max((p for p, r in zip(precision, recall) if r >= Fraction(k, 10)),
                             default=0) for k in range(11)) / Fraction(11))
    area, height, after = Fraction(0), Fraction(0), None
    for k in reversed(range(len(points))):
        height = max(height, precision[k])
        area += height * (recall[k] - (recall[k - 1] if k else 0))
    return float(area)


@pytest.mark.parametrize("style", ["area", "11pt"])
@pytest.mark.parametrize("seed", range(30))
def test_voc_agrees_with_the_devkits_rule(seed, style):
    classes, threshold = 1 + seed % 4, (Fraction(1, 2), Fraction(1, 4), Fraction(3, 4))[seed % 3]
    preds, targets = generate(seed, classes=classes, flag="difficult", whole=seed % 5 > 0)
    expected = [devkit(preds, targets, c, threshold, style) for c in range(classes)]
    ours = mean_ap(preds, targets, classes, float(threshold), style)
    np.testing.assert_allclose(ours.ap, expected, atol=1e-12)
    assert ours.stats is None and ours.map == pytest.approx(np.nanmean(expected), nan_ok=True)


TEN = [[20 * k, 0, 20 * k + 10, 10] for k in range(10)]


@pytest.mark.parametrize("n", [1, 3, 6, 7, 10])
def test_eleven_points_do_not_round(n):
    """n of ten objects are found, and nothing is wrong: recall n/10 reaches the level n/10, for 3,
    6 and 7 too."""
    r = mean_ap([picture(TEN[:n], scores=[.9] * n)], [picture(TEN)], 1, style="11pt")
    assert r.map == pytest.approx((n + 1) / 11)
    assert mean_ap([picture(TEN[:n], scores=[.9] * n)], [picture(TEN)],
                   1).map == pytest.approx(n / 10)


def test_worked_example_of_the_lesson():
    a, b = [[10, 10, 50, 50], [60, 20, 95, 70]], [[20, 30, 80, 90], [5, 5, 25, 25]]
    targets = [picture(a), picture(b), picture([[30, 30, 70, 70]]), picture()]
    preds = [picture([[12, 10, 52, 50], [60, 25, 95, 75], [4, 16, 44, 54], [70, 75, 95, 95]],
                     scores=[.95, .8, .7, .3]),
             picture([[25, 30, 85, 90], [60, 5, 90, 25], [0, 40, 18, 60]], scores=[.9, .55, .2]),
             picture([[45, 30, 85, 70], [32, 28, 72, 70]], scores=[.6, .4]),
             picture([[40, 40, 60, 80]], scores=[.85])]
    assert mean_ap(preds, targets, 1).map == pytest.approx(.65)
    assert mean_ap(preds, targets, 1, style="11pt").map == pytest.approx(7.5 / 11)
    assert mean_ap(preds, targets, 1, style="coco").stats[1] == pytest.approx(66 / 101)
    curve = precision_recall(preds, targets, 1, 0)
    assert curve.recall.tolist() == pytest.approx([.2, .4, .4, .6, .6, .6, .6, .8, .8, .8])
    assert curve.precision.tolist() == pytest.approx([1, 1, 2 / 3, 3 / 4, 3 / 5, 3 / 6, 3 / 7,
                                                      4 / 8, 4 / 9, 4 / 10])
    kinds = [[KINDS[k] for k in e["kind"]] for e in error_kinds(preds, targets, 1)]
    assert kinds == [["right", "right", "duplicate", "background"],
                     ["right", "background", "background"], ["localisation", "right"],
                     ["background"]]


# ---------------------------------------------------------------- corners

BOX = [0., 0, 10, 10]


def test_first_guess_on_a_difficult_object():
    "0/0 in the devkit; here the guess is struck before anything is divided."
    targets = [picture([BOX, [50, 50, 60, 60]], difficult=[True, False])]
    assert mean_ap([picture([BOX, [50, 50, 60, 60]], scores=[.9, .8])], targets, 1).map == 1
    assert mean_ap([picture([BOX], scores=[.9])], targets, 1).map == 0
    assert len(precision_recall([picture([BOX], scores=[.9])], targets, 1, 0).scores) == 0


def test_any_number_of_guesses_on_a_difficult_object():
    targets = [picture([BOX, [50, 50, 60, 60]], difficult=[True, False])]
    assert mean_ap([picture([BOX, BOX, BOX, [50, 50, 60, 60]], scores=[.9, .8, .7, .6])], targets,
                   1).map == 1


def test_false_alarm_in_a_picture_without_objects():
    assert mean_ap([picture([BOX], scores=[.9]), picture([BOX], scores=[.8])],
                   [picture(), picture([BOX])], 1).map == .5


def test_a_guess_insists_on_the_object_it_overlaps_most():
    targets, preds = ([picture([[0, 0, 40, 40], [10, 0, 50, 40]])],
                      [picture([[0, 0, 40, 40], [4, 0, 44, 40]], scores=[.9, .8])])
    assert mean_ap(preds, targets, 1).map == .5
    assert mean_ap(preds, targets, 1, style="coco").stats[1] == 1


def test_the_threshold_itself_is_enough():
    assert mean_ap([picture([[0, 0, 10, 5]], scores=[.9])], [picture([BOX])], 1).map == 1
    assert mean_ap([picture([[0, 0, 10, 4.99]], scores=[.9])], [picture([BOX])], 1).map == 0


def test_equal_scores_keep_their_order():
    good, bad = [BOX], [[50, 50, 60, 60]]
    assert mean_ap([picture(good + bad, scores=[.5, .5])], [picture([BOX])], 1).map == 1
    assert mean_ap([picture(bad + good, scores=[.5, .5])], [picture([BOX])], 1).map == .5


def test_classes_that_do_not_occur():
    r = mean_ap([picture([BOX, BOX], labels=[1, 2], scores=[.9, .8])],
                [picture([BOX, BOX], labels=[1, 3], difficult=[False, True])], 5)
    assert r.ap.isnan().tolist() == [True, False, True, True, True] and r.ap[1] == r.map == 1


@pytest.mark.parametrize("style", ["area", "11pt", "coco"])
def test_nothing_at_all(style):
    nothing = picture(scores=[])
    assert np.isnan(mean_ap([], [], 3, style=style).map)
    assert np.isnan(mean_ap([nothing], [picture()], 3, style=style).map)
    assert mean_ap([nothing], [picture([BOX])], 1, style=style).map == 0
    assert mean_ap([dict(boxes=torch.zeros(0), scores=torch.zeros(0), labels=torch.zeros(0))],
                   [picture([BOX])], 1, style=style).map == 0
    assert mean_ap([picture([BOX], scores=[.1])], [picture([BOX])], 1,
                   style=style).map == pytest.approx(1)


def test_boxes_without_an_inside():
    flat = [[5, 5, 5, 5], [9, 9, 1, 1], BOX]
    assert mean_ap([picture(flat, scores=[.9, .8, .7])], [picture([BOX])],
                   1).map == pytest.approx(1 / 3)
    assert mean_ap([picture([[5, 5, 5, 5]], scores=[.9])], [picture([[5, 5, 5, 5]])], 1).map == 0


# ---------------------------------------------------------------- what must not matter

@pytest.mark.parametrize("style", ["area", "11pt", "coco"])
@pytest.mark.parametrize("seed", range(4))
def test_invariances(seed, style):
    preds, targets = generate(seed, flag="difficult" if style != "coco" else "iscrowd")
    ap = mean_ap(preds, targets, 3, style=style).ap
    same = lambda p, t: torch.testing.assert_close(mean_ap(p, t, 3, style=style).ap, ap,
                                                   equal_nan=True)
    same([p | dict(scores=p["scores"] ** 3 - 7) for p in preds], targets)
    same(preds + [picture(scores=[])], targets + [picture(**{k: [] for k in ("difficult",)})])
    same([{k: v.numpy() for k, v in p.items()} for p in preds],
         [{k: v.numpy() for k, v in t.items()} for t in targets])
    same([p | dict(labels=p["labels"].int(), boxes=p["boxes"].clone().requires_grad_())
          for p in preds], targets)
    if style != "coco":
        grown = lambda x: [d | dict(boxes=d["boxes"] * torch.tensor([2., 4, 2, 4])) for d in x]
        same(grown(preds), grown(targets))
    turn = torch.tensor([2, 0, 1])
    turned = mean_ap([p | dict(labels=turn[p["labels"]]) for p in preds],
                     [t | dict(labels=turn[t["labels"]]) for t in targets], 3, style=style).ap
    torch.testing.assert_close(turned[turn], ap, equal_nan=True)


@pytest.mark.parametrize("seed", range(4))
def test_more_at_the_end_never_hurts(seed):
    "Any guesses below all others leave VOC's AP as it is, or raise it."
    preds, targets = generate(seed, flag="difficult")
    _, others = generate(seed + 100)
    def last(t):
        lowest = torch.full((len(t["boxes"]),), -1.).double()
        return dict(boxes=t["boxes"], labels=t["labels"], scores=lowest)
    more = [{k: torch.cat([p[k], o]) for k, o in last(t).items()} for p, t in zip(preds, others)]
    assert (mean_ap(more, targets, 3).ap.nan_to_num() >= mean_ap(preds, targets, 3).ap.nan_to_num()
            - 1e-12).all()


def test_inputs_are_left_alone():
    preds, targets = generate(1)
    before = [{k: v.clone() for k, v in d.items()} for d in preds + targets]
    mean_ap(preds, targets, 3), mean_ap(preds, targets, 3,
                                        style="coco"), error_kinds(preds, targets, 3)
    assert all(torch.equal(d[k], b[k]) for d, b in zip(preds + targets, before) for k in b)


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_pairs_in_parts(at_once):
    preds, targets = generate(5)
    boxes = [torch.cat([d["boxes"] for d in x]) for x in (preds, targets)]
    groups = [torch.tensor([i for i, d in enumerate(x) for _ in d["boxes"]])
              for x in (preds, targets)]
    whole, parts = (tables.pairs(*boxes, *groups, .1, at_once=n) for n in (10**6, at_once))
    assert len(whole[0]) > 20 and all(torch.equal(a, b) for a, b in zip(whole, parts))


def test_half_precision_scores_and_boxes():
    preds, targets = [picture([BOX], scores=[.5])], [picture([BOX])]
    assert mean_ap([{k: v.half() if v.is_floating_point() else v for k, v in preds[0].items()}],
                   targets, 1).map == 1


# ---------------------------------------------------------------- kinds of errors

def slow_kinds(p, t, verdict, iou=.5, low=.1):
    kinds = []
    for k, (box, label) in enumerate(zip(p["boxes"].tolist(), p["labels"].tolist())):
        mine, other = [max([float(overlap(box, b)) for b,
                            l in zip(t["boxes"].tolist(), t["labels"].tolist())
                            if (l == label) == same], default=0) for same in (True, False)]
        if verdict[k]: kinds.append(verdict[k])
        elif low <= mine < iou: kinds.append("localisation")
        elif other >= iou: kinds.append("class")
        elif mine >= iou: kinds.append("duplicate")
        elif max(mine, other) < low: kinds.append("background")
        else: kinds.append("both")
    return kinds


@pytest.mark.parametrize("seed", range(12))
def test_kinds_agree_with_a_slow_version(seed):
    preds, targets = generate(seed, flag="difficult")
    for p in preds:
        p["scores"] = torch.rand(len(p["scores"]), dtype=torch.float64,
                                 generator=torch.Generator().manual_seed(seed))
    errors = error_kinds(preds, targets, 3)
    for p, t, e in zip(preds, targets, errors):
        names = [KINDS[k] for k in e["kind"]]
        assert names == slow_kinds(p, t, [n if n in ("right", "ignored") else None for n in names])
        about = e["object"]
        assert ((about < 0) == (e["kind"] == KINDS.index("background"))).all()
        assert (about < max(len(t["boxes"]), 1)).all()
        named = [KINDS.index(k) for k in ("right", "localisation", "class")]
        covered = {int(o) for k, o in zip(e["kind"], about) if k in named}
        assert e["missed"].tolist() == [not d and n not in covered for n,
                                        d in enumerate(t["difficult"].tolist())]
        taken = about[e["kind"] == KINDS.index("right")].tolist()
        assert len(set(taken)) == len(taken) and not t["difficult"][taken].any()
    for label in range(3):
        right = sum(int(((e["kind"] == 0) & (p["labels"] == label)).sum()) for p,
                    e in zip(preds, errors))
        curve = precision_recall(preds, targets, 3, label)
        n = sum(int(((t["labels"] == label) & ~t["difficult"]).sum()) for t in targets)
        assert n == 0 and curve.recall.isnan().all() or len(curve.recall) == 0 or round(
            float(curve.recall[-1]) * n) == right


def test_kinds_of_nothing():
    assert error_kinds([], [], 2) == []
    e, = error_kinds([picture(scores=[])], [picture([BOX])], 1)
    assert e["missed"].tolist() == [True] and len(e["kind"]) == 0


# ---------------------------------------------------------------- bad input is answered in words

GOOD = picture([BOX], scores=[.5])


@pytest.mark.parametrize("preds, targets, words", [
    ([GOOD], [], r"1 predictions for 0 targets"),
    ([picture([BOX])], [picture([BOX])], r"preds\[0\] has no 'scores', only 'boxes', 'labels'"),
    ([GOOD, GOOD | dict(scores=torch.zeros(2))], [picture([BOX])] * 2,
     r"preds\[1\]\['scores'\] has "
     r"shape \[2\], and \[1\], one for each of its 1 boxes"),
    ([GOOD], [picture([BOX]) | dict(difficult=torch.zeros(3))], r"targets\[0\]\['difficult'\] has "
     r"shape \[3\]"),
    ([GOOD], [picture([BOX], labels=[0, 0])], r"targets\[0\]\['labels'\] has shape \[2\]"),
    ([GOOD, picture([BOX], labels=[1], scores=[.5])], [picture([BOX])] * 2,
     r"preds\[1\]\['labels'\] holds 1: labels are 0 to 0"),
    ([GOOD], [picture([BOX], labels=[-1])], r"targets\[0\]\['labels'\] holds -1"),
    ([GOOD | dict(boxes=torch.zeros(4))], [picture([BOX])], r"preds\[0\]\['boxes'\] has shape "
     r"\[4\], and \[n,4\]"),
    ([GOOD | dict(boxes=torch.zeros(1, 5))], [picture([BOX])], r"preds\[0\]\['boxes'\] has "
     r"shape \[1, 5\]"),
    ([GOOD | dict(scores=torch.tensor([float("nan")]))], [picture([BOX])],
     r"preds\[0\]\['scores'\] holds nan"),
    ([GOOD], [picture([[0, 0, float("inf"), 1]])], r"targets\[0\]\['boxes'\] holds \[0.0, 0.0, "
     r"inf, 1.0\]"),
])
def test_value_errors(preds, targets, words):
    for call in (mean_ap, lambda *a: precision_recall(*a, 0), error_kinds):
        with pytest.raises(ValueError, match=words): call(preds, targets, 1)


def test_unknown_style_and_threshold():
    with pytest.raises(ValueError, match="unknown style 'voc'. Use 'area', '11pt' or 'coco'"):
        mean_ap([GOOD], [picture([BOX])], 1, style="voc")
    for iou in (0, 1.5, 50):
        with pytest.raises(ValueError, match="0 < iou <= 1"):
            mean_ap([GOOD], [picture([BOX])], 1, iou=iou)
    with pytest.raises(ValueError, match="n_classes is 0"): mean_ap([], [], 0)
    with pytest.raises(ValueError, match="0 < low < iou"):
        error_kinds([GOOD], [picture([BOX])], 1, iou=.1, low=.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu():
    preds, targets = generate(2)
    there = [[{k: v.cuda() for k, v in d.items()} for d in x] for x in (preds, targets)]
    assert torch.equal(mean_ap(*there, 3, style="coco").stats,
                       mean_ap(preds, targets, 3, style="coco").stats)
