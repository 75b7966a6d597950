"""Attacks on `course_lib.match`: a reference in plain Python on thousands of batches, properties,
and bad input."""

import random

import pytest
import torch

from course_lib.match import match, unmatched


# ---------------------------------------------------------------- the reference

def overlap_of(a, b):
    "IoU of two boxes in plain Python."
    size = lambda x0, y0, x1, y1: max(x1 - x0, 0) * max(y1 - y0, 0)
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = size(*a) + size(*b) - shared
    return shared / union if union else 0.


def match_picture(anchors, boxes, labels, difficult, positive, negative):
    """The rule as `match` states it, one pair after the other.

    Python's sort puts equal overlaps in order of object, then anchor."""
    overlap = {(n, a): overlap_of(boxes[n], anchors[a]) for n in range(len(boxes)) if labels[n] >= 0
               for a in range(len(anchors))}
    result = []
    for a in range(len(anchors)):
        best, who = 0., -1
        for (n, other), value in overlap.items():
            if other == a and value > best: best, who = value, n
        result.append(who if best >= positive else -2 if best >= negative else -1)
    objects, taken = set(), set()
    for value, n, a in sorted((-value, n, a) for (n, a), value in overlap.items()):
        if value < 0 and n not in objects and a not in taken:
            objects.add(n), taken.add(a)
            result[a] = n
    return [-2 if n >= 0 and difficult[n] else n for n in result]


def reference(anchors, boxes, labels, difficult=None, positive=.5, negative=None):
    hard = torch.zeros_like(labels) if difficult is None else difficult
    batch = zip(boxes.tolist(), labels.tolist(), hard.tolist())
    return [match_picture(anchors.tolist(), *picture, positive, positive if negative is None
                          else negative) for picture in batch]


def lost(matched, labels, difficult):
    "Objects of one picture without an anchor, in plain Python."
    return sum(1 for n, label in enumerate(labels) if label >= 0 and not difficult[n]
               and n not in matched)


# ---------------------------------------------------------------- generated batches

def grid(g, size, zoom=1.):
    "Squares around the centres of g x g cells."
    at = [(i + .5) * size / g for i in range(g)]
    half = zoom * size / g / 2
    return torch.tensor([[x - half, y - half, x + half, y + half] for y in at for x in at])


def random_boxes(rng, n, low, high, longest):
    "Whole numbers, so that overlaps tie; a side may be 0, and a box may lie outside."
    corners = [(rng.randint(low, high), rng.randint(low, high)) for _ in range(n)]
    return [[x, y, x + rng.randint(0, longest), y + rng.randint(0, longest)] for x, y in corners]


ANCHORS = {
    "four": lambda rng: grid(2, 16),
    "sixteen": lambda rng: grid(4, 16),
    "gaps": lambda rng: grid(4, 16, .5),
    "three grids": lambda rng: torch.cat([grid(4, 16), grid(2, 16), grid(1, 16), grid(2, 16, 1.5)]),
    "twins": lambda rng: torch.cat([grid(2, 16), grid(2, 16)]),
    "anything": lambda rng: torch.tensor(random_boxes(rng, rng.randint(1, 9), -4, 14, 12),
                                         dtype=torch.float),
}


def batch_of(rng, B=3):
    """Crowds, empty pictures, padding anywhere, objects twice, boxes outside or without an inside,
    one-pixel boxes, difficult ones."""
    N, longest = rng.randint(1, 9), rng.choice([1, 4, 12])
    boxes = [random_boxes(rng, N, -3, 15, longest) for _ in range(B)]
    labels = [[rng.choice([-1, 0, 1, 2]) for _ in range(N)] for _ in range(B)]
    if rng.random() < .3: boxes[0][-1] = boxes[0][0]
    if rng.random() < .3: boxes[1] = [[x, y, x + 1, y + 1] for x, y, _, _ in boxes[1]]
    if rng.random() < .2: labels[2] = [-1] * N
    difficult = [[rng.random() < .2 for _ in range(N)] for _ in range(B)]
    return torch.tensor(boxes, dtype=torch.float), torch.tensor(labels), torch.tensor(difficult)


def thresholds(rng):
    positive = rng.choice([.2, .25, .5, .5, .75, 1.])
    return positive, rng.choice([None, positive, positive / 2, .1])


@pytest.mark.parametrize("kind", ANCHORS)
def test_plain_python_agrees_on_generated_batches(kind):
    rng, kinds = random.Random(kind), {-2: 0, -1: 0, 0: 0}
    for _ in range(500):
        anchors, (boxes, labels, difficult) = ANCHORS[kind](rng), batch_of(rng)
        positive, negative = thresholds(rng)
        hard = difficult if rng.random() < .7 else None
        matched = match(anchors, boxes, labels, hard, positive, negative)
        expected = reference(anchors, boxes, labels, hard, positive, negative)
        assert matched.tolist() == expected, (anchors, boxes, labels, hard, positive, negative)
        plain = match(anchors, boxes, labels)
        counted = [lost(*row) for row in zip(plain.tolist(), labels.tolist(),
                                             [[False] * labels.shape[1]] * 3)]
        assert unmatched(plain, labels).tolist() == counted
        for row in expected:
            for n in row: kinds[min(n, 0)] += 1
    assert min(kinds.values()) > 100, kinds


def test_the_rounds_that_a_gpu_runs_to_the_end_change_nothing(monkeypatch):
    "Off the CPU the loop never ends early, since to look would make the host wait."
    rng, ended = random.Random(11), torch.equal
    batches = [(ANCHORS[kind](rng), *batch_of(rng)) for kind in ANCHORS for _ in range(100)]
    early = [match(*batch, .4, .3) for batch in batches]
    monkeypatch.setattr("course_lib.match.torch.equal", lambda *tensors: False)
    assert all(ended(one, match(*batch, .4, .3)) for one, batch in zip(early, batches))


def test_plain_python_agrees_on_fractions():
    rng = random.Random(7)
    for _ in range(200):
        corners = torch.tensor([[[rng.uniform(-5, 30), rng.uniform(-5, 30)] for _ in range(6)]
                                for _ in range(2)], dtype=torch.float64)
        sides = torch.tensor([[[rng.uniform(0, 20), rng.uniform(0, 20)] for _ in range(6)]
                              for _ in range(2)], dtype=torch.float64)
        boxes, labels = (torch.cat([corners, corners + sides], 2),
                         torch.tensor([[rng.choice([-1, 0, 1]) for _ in range(6)]
                                       for _ in range(2)]))
        anchors = torch.cat([grid(4, 32), grid(2, 32, 1.3)]).double()
        assert match(anchors, boxes, labels, positive=.4,
                     negative=.3).tolist() == reference(anchors, boxes, labels, None, .4, .3)


# ---------------------------------------------------------------- the rule, on cases that a person
# can check

four = grid(2, 100)
def one_picture(*boxes):
    return torch.tensor([boxes], dtype=torch.float), torch.zeros(1, len(boxes), dtype=torch.long)


def test_two_objects_with_the_same_best_anchor_both_get_one_in_either_order():
    boxes, labels = one_picture([0, 0, 50, 50], [10, 10, 60, 60])
    assert match(four, boxes, labels).tolist() == [[0, 1, -1, -1]]
    assert match(four, boxes.flip(1), labels).tolist() == [[1, 0, -1, -1]]


def test_equal_overlaps_go_to_the_lower_object_and_then_to_the_lower_anchor():
    boxes, labels = one_picture([25, 25, 75, 75], [25, 25, 75, 75], [0, 0, 50, 50], [0, 0, 50, 50])
    assert match(four, boxes, labels).tolist() == [[2, 0, 1, -1]]


def test_a_picture_full_of_one_object_gives_all_cells_to_it():
    boxes, labels = one_picture([0, 0, 100, 100])
    assert match(four, boxes, labels, positive=.25).tolist() == [[0, 0, 0, 0]]
    assert match(four, boxes, labels, positive=.26).tolist() == [[0, -1, -1, -1]]
    assert match(four, boxes, labels, positive=.26, negative=.25).tolist() == [[0, -2, -2, -2]]


def test_an_object_that_overlaps_nothing_gets_nothing_and_is_counted():
    boxes, labels = one_picture([200, 200, 210, 210], [50, 10, 50, 90], [70, 70, 60, 60],
                                [51, 51, 99, 99])
    matched = match(four, boxes, labels)
    assert matched.tolist() == [[-1, -1, -1, 3]] and unmatched(matched, labels).tolist() == [3]


def test_an_object_that_only_overlaps_taken_anchors_gets_none():
    boxes, labels = one_picture([5, 5, 20, 20], [0, 0, 50, 50])
    matched = match(four, boxes, labels)
    assert matched.tolist() == [[1, -1, -1, -1]] and unmatched(matched, labels).tolist() == [1]


def test_more_objects_than_anchors_fill_every_anchor_once():
    boxes, labels = one_picture(*[[0, 0, 100 - n, 100 - n] for n in range(7)])
    matched = match(four, boxes, labels)
    assert len(set(matched[0].tolist())) == 4 and (matched >= 0).all()
    assert unmatched(matched, labels).tolist() == [3]


def test_a_difficult_object_keeps_its_anchors_from_being_background_and_from_other_objects():
    boxes, labels = one_picture([0, 0, 50, 50], [10, 10, 60, 60])
    difficult = torch.tensor([[True, False]])
    matched = match(four, boxes, labels, difficult)
    assert matched.tolist() == [[-2, 1, -1, -1]]
    assert unmatched(matched, labels, difficult).tolist() == [0]


# ---------------------------------------------------------------- properties

def generated(n=60, seed=0, kind="three grids"):
    rng = random.Random(seed)
    for _ in range(n): yield ANCHORS[kind](rng), *batch_of(rng)


def test_pictures_do_not_see_each_other():
    for anchors, boxes, labels, difficult in generated():
        together = match(anchors, boxes, labels, difficult, .5, .4)
        order = torch.tensor([2, 0, 1])
        assert torch.equal(match(anchors, boxes[order], labels[order], difficult[order], .5, .4),
                           together[order])
        alone = [match(anchors, boxes[b:b + 1], labels[b:b + 1], difficult[b:b + 1], .5, .4)
                 for b in range(3)]
        assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("rubbish", [0., 5., float("nan"), float("inf"), -1e30])
def test_padding_changes_nothing_whatever_stands_in_it(rubbish):
    for anchors, boxes, labels, difficult in generated():
        more = (torch.cat([boxes, torch.full((3, 2, 4), rubbish)], 1),
                torch.cat([labels, torch.full((3, 2), -1)], 1))
        hard = torch.cat([difficult, torch.ones(3, 2, dtype=torch.bool)], 1)
        assert torch.equal(match(anchors, *more, hard), match(anchors, boxes, labels, difficult))
        real = (labels >= 0)[..., None]
        assert torch.equal(match(anchors, boxes.where(real, torch.tensor(rubbish)), labels),
                           match(anchors, boxes, labels))


def test_padding_in_front_only_shifts_the_indices():
    for anchors, boxes, labels, _ in generated():
        shifted = match(anchors, torch.cat([torch.zeros(3, 1, 4), boxes], 1),
                        torch.cat([torch.full((3, 1), -1), labels], 1))
        matched = match(anchors, boxes, labels)
        assert torch.equal(shifted, torch.where(matched >= 0, matched + 1, matched))


def test_the_order_of_the_objects_does_not_matter_where_no_overlaps_tie():
    g = torch.Generator().manual_seed(3)
    for _ in range(60):
        corner = torch.rand(4, 6, 2, generator=g) * 12
        boxes, labels = (torch.cat([corner, corner + .5 + torch.rand(4, 6, 2, generator=g) * 9], 2),
                         torch.zeros(4, 6, dtype=torch.long))
        order = torch.randperm(6, generator=g)
        anchors = grid(4, 16, 1.1) + torch.rand(16, 4, generator=g) * .1
        matched = match(anchors, boxes, labels)
        back = match(anchors, boxes[:, order], labels)
        assert torch.equal(torch.where(back >= 0, order[back.clamp(min=0)], back), matched)


def test_an_object_goes_without_only_if_all_anchors_that_it_overlaps_are_taken():
    for anchors, boxes, labels, _ in generated(seed=5, kind="sixteen"):
        matched = match(anchors, boxes, labels).tolist()
        for b, row in enumerate(matched):
            for n, label in enumerate(labels[b].tolist()):
                if label < 0: assert n not in row
                elif n not in row:
                    assert all(row[a] >= 0 for a in range(16)
                               if overlap_of(boxes[b, n].tolist(), anchors[a].tolist()) > 0)


def test_inputs_stay_as_they_were_and_calls_agree():
    for anchors, boxes, labels, difficult in generated(20):
        before = [t.clone() for t in (anchors, boxes, labels, difficult)]
        results = [match(anchors, boxes, labels, difficult, .5, .4) for _ in range(3)]
        counts = [unmatched(results[0], labels, difficult) for _ in range(2)]
        assert all(torch.equal(r, results[0]) for r in results) and torch.equal(*counts)
        assert all(torch.equal(a, b) for a, b in zip(before, (anchors, boxes, labels, difficult)))


def test_a_larger_picture_gives_the_same_answer():
    for anchors, boxes, labels, _ in generated():
        assert torch.equal(match(anchors * 8, boxes * 8, labels), match(anchors, boxes, labels))


# ---------------------------------------------------------------- types, shapes, devices

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64,
                                   torch.int32])
def test_boxes_of_other_types(dtype):
    for anchors, boxes, labels, _ in generated(20, kind="sixteen"):
        expected = match(anchors, boxes, labels)
        assert torch.equal(match(anchors.to(dtype), boxes.to(dtype), labels), expected)
        assert torch.equal(match(anchors, boxes.to(dtype), labels), expected)


def test_half_precision_boxes_of_a_large_picture():
    anchors, (boxes, labels) = (grid(2, 2048),
                                one_picture([0, 0, 1024, 1024], [1000, 1000, 2048, 2048]))
    assert match(anchors.half(), boxes.half(), labels).tolist() == [[0, -1, -1, 1]]


@pytest.mark.parametrize("B, N, A", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0), (2, 0, 0)])
def test_nothing_to_do(B, N, A):
    labels = torch.zeros(B, N, dtype=torch.long)
    matched = match(torch.zeros(A, 4), torch.zeros(B, N, 4), labels,
                    torch.zeros(B, N, dtype=torch.bool))
    assert matched.shape == (B, A) and matched.dtype == torch.long and (matched == -1).all()
    assert unmatched(matched, labels).tolist() == [N] * B


def test_labels_of_another_integer_type_still_give_indices():
    boxes, labels = one_picture([0, 0, 50, 50])
    for kind in (torch.int32, torch.int16, torch.int8):
        assert match(four, boxes, labels.to(kind)).dtype == torch.long
        assert match(four, boxes[:, :0], labels[:, :0].to(kind)).dtype == torch.long


def test_strided_views_and_gradients_are_welcome():
    for anchors, boxes, labels, difficult in generated(20):
        expected = match(anchors, boxes, labels, difficult)
        wide = torch.stack([boxes, -boxes], 3)[..., 0]
        assert not wide.is_contiguous()
        assert torch.equal(match(anchors, wide, labels, difficult), expected)
        asked = match(anchors, boxes.clone().requires_grad_(), labels, difficult)
        assert torch.equal(asked, expected) and not asked.requires_grad


def test_no_step_needs_to_look_at_the_data():
    boxes, labels, difficult = (torch.empty(2, 5, 4, device="meta"),
                                torch.empty(2, 5, dtype=torch.long, device="meta"),
                                torch.empty(2, 5, dtype=torch.bool, device="meta"))
    matched = match(torch.empty(16, 4, device="meta"), boxes, labels, difficult, .5, .4)
    assert matched.shape == (2, 16) and unmatched(matched, labels, difficult).shape == (2,)


# ---------------------------------------------------------------- bad input

anchors, boxes, labels = (torch.zeros(16, 4), torch.zeros(2, 3, 4),
                          torch.zeros(2, 3, dtype=torch.long))

@pytest.mark.parametrize("arguments, words", [
    ((anchors[0], boxes, labels), ["anchors", "[4]", "[A,4]"]),
    ((anchors[:, :3], boxes, labels), ["anchors", "[16, 3]"]),
    ((anchors[None], boxes, labels), ["anchors", "[1, 16, 4]"]),
    ((anchors, boxes[0], labels[0]), ["boxes", "[3, 4]", "boxes[None]"]),
    ((anchors, boxes[..., :2], labels), ["boxes", "[2, 3, 2]"]),
    ((anchors, boxes, labels[:, :2]), ["labels", "[2, 2]", "[2, 3]"]),
    ((anchors, boxes, labels[0]), ["labels", "[3]"]),
    ((anchors, boxes, labels, labels[:1] > 0), ["difficult", "[1, 3]"]),
    ((anchors, boxes, labels, None, 0), ["positive=0"]),
    ((anchors, boxes, labels, None, 1.5), ["positive=1.5"]),
    ((anchors, boxes, labels, None, .5, .6), ["negative=0.6", "positive=0.5"]),
    ((anchors, boxes, labels, None, .5, -.1), ["negative=-0.1"]),
    ((anchors, boxes, labels, None, float("nan")), ["positive=nan"]),
])
def test_bad_input_is_named(arguments, words):
    with pytest.raises(ValueError) as error: match(*arguments)
    for word in ("match:", *words): assert word in str(error.value)
