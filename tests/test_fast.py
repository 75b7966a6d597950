"""Attacks on `course_lib.fast`: windows against torchvision, boxes against pictures, loaders
against several processes, and steps that never wait."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

import numpy as np
from PIL import Image

from course_lib.augment import KeepVisible
from course_lib.boxes import area, pairwise_iou
from course_lib.data import Data, Record
from course_lib.fast import (MemoryLoader, augment, colour, cut, follow, in_memory, memory_loaders,
                             mosaic, overlap_windows, random_windows)
from course_lib.fpn import RetinaNet, retina_loss
from course_lib.learn import backbone, dataloaders, param_groups


def random(seed=0): return torch.Generator().manual_seed(seed)
def no(n=1): return torch.zeros(n, dtype=torch.bool)
def yes(n=1): return torch.ones(n, dtype=torch.bool)


def records(folder, counts):
    made = []
    for i, n in enumerate(counts):
        path, rs = folder / f"{i}.png", np.random.RandomState(i)
        Image.fromarray(rs.randint(0, 255, (60, 80, 3), dtype=np.uint8)).save(path)
        corner = torch.from_numpy(rs.rand(n, 2).astype("float32")) * 30
        boxes = torch.cat([corner, corner + 5 + torch.from_numpy(rs.rand(n, 2).astype("float32"))
                           * 25], 1)
        made.append(Record(path, boxes, torch.from_numpy(rs.randint(0, 3, n)),
                           torch.from_numpy(rs.rand(n) < .2), (80, 60)))
    return made


@pytest.fixture
def data(tmp_path):
    return Data(records(tmp_path, [0, 1, 2, 3, 4, 1, 1]), records(tmp_path, [2, 0, 5]), [],
                ["a", "b", "c"])


# ---------------------------------------------------------------- windows

def test_the_whole_picture_at_its_own_size_is_the_picture():
    x = torch.randint(0, 256, (3, 3, 32, 32)).float()
    whole = torch.tensor([[0., 0, 32, 32]]).expand(3, -1)
    assert torch.allclose(cut(x, whole, 32, no(3)), x, atol=.01)
    assert torch.allclose(cut(x, whole, 32, yes(3)), x.flip(3), atol=.01)


@pytest.mark.parametrize("box", [(4, 6, 20, 22), (0, 0, 16, 24), (10, 3, 31, 9)])
def test_a_window_inside_shows_what_torchvision_crops(box):
    """Inside, the two are the same; at the rim of the window `cut` sees the pixels next to it, and
    a crop can't."""
    x, (x0, y0, x1, y1) = torch.randint(0, 256, (1, 3, 32, 32)).float(), box
    shown = cut(x, torch.tensor([box]).float(), 40, no())
    cropped = TF.resized_crop(x, y0, x0, y1 - y0, x1 - x0, [40, 40], antialias=False)
    rim = 5
    assert torch.allclose(shown[..., rim:-rim, rim:-rim], cropped[..., rim:-rim, rim:-rim],
                          atol=.05)


def test_what_lies_outside_is_grey():
    shown = cut(torch.full((1, 3, 20, 20), 200.), torch.tensor([[-20., -20, 40, 40]]), 60, no())
    assert shown[0, 0, 0, 0] == 127 and shown[0, 0, 30, 30] == 200 and shown[0, 0, 59, 59] == 127


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0., 1.]), st.booleans())
def test_boxes_go_where_their_pictures_go(seed, out, mirrored):
    """A white rectangle on black: after any window it fills just the box that `follow` gives, to
    within a pixel."""
    g = random(seed)
    corner = torch.rand(2, generator=g) * 60
    box = torch.cat([corner, corner + 20 + torch.rand(2, generator=g) * 20]).round()
    x0, y0, x1, y1 = box.int().tolist()
    picture = torch.zeros(1, 3, 100, 100)
    picture[:, :, y0:y1, x0:x1] = 255
    window, mirror = random_windows(1, 100, out=out, generator=g), yes() if mirrored else no()
    boxes, labels = follow(box.view(1, 1, 4), torch.zeros(1, 1, dtype=torch.long), window, 200,
                           mirror)
    white = cut(picture, window, 200, mirror)[0, 0] > 140
    if labels[0, 0] < 0: return
    ys, xs = white.nonzero().T
    seen = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    assert (seen - boxes[0, 0]).abs().max() <= 3


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_follow_keeps_whom_lesson_4_keeps(seed, n):
    """The same boxes as torchvision's crop and resize with `KeepVisible`, for windows of whole
    pixels."""
    g = random(seed)
    corner = torch.rand(n, 2, generator=g) * 80
    boxes = torch.cat([corner, (corner + 1 + torch.rand(n, 2, generator=g) * 60).clamp(max=100)], 1)
    x0, y0 = torch.randint(0, 50, (2,), generator=g).tolist()
    w, h = torch.randint(10, 51, (2,), generator=g).tolist()
    target = dict(boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(100, 100),
                                                 clamping_mode=None), labels=torch.arange(n))
    target["boxes"] = TF.resized_crop(target["boxes"], y0, x0, h, w, [64, 64])
    _, expected = KeepVisible(.3)(None, target)
    moved, labels = follow(boxes[None], torch.arange(n)[None],
                           torch.tensor([[x0, y0, x0 + w, y0 + h]]).float(), 64, no(), least=.3)
    assert labels[0][labels[0] >= 0].tolist() == expected["labels"].tolist()
    assert torch.allclose(moved[0][labels[0] >= 0], expected["boxes"].as_subclass(torch.Tensor),
                          atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(.05, 1), st.floats(0, 1))
def test_random_windows_are_inside_or_hold_the_picture(seed, share, out):
    w = random_windows(200, 50, (share, 1.), out=out, generator=random(seed))
    inside, around = (((w >= -.01) & (w <= 50.01)).all(1),
                      ((w[:, :2] <= .01).all(1) & (w[:, 2:] >= 49.99).all(1)))
    assert (inside | around).all() and (area(w) > 0).all()
    assert out > 0 or inside.all()


def test_windows_that_look_at_the_objects():
    """Every window is the whole picture, or overlaps some object as much as it was told to, or was
    told nothing."""
    boxes, labels = (torch.tensor([[[10., 10, 60, 70], [0, 0, 0, 0]]]).expand(400, -1, -1),
                     torch.tensor([[1, -1]]).expand(400, -1))
    w = overlap_windows(boxes, labels, 100, generator=random())
    whole = (w == torch.tensor([0., 0, 100, 100])).all(1)
    best = pairwise_iou(w, boxes[0, :1])[:, 0]
    assert ((w >= 0) & (w <= 100)).all() and .1 < whole.float().mean() < .6
    assert (best[~whole] > .7).any() and (best[~whole] < .3).any()


def test_pictures_without_objects_are_ordinary():
    x, boxes, labels = torch.rand(4, 3, 32, 32) * 255, torch.zeros(4, 1, 4), torch.full((4, 1), -1)
    for options in (dict(), dict(overlap=True), dict(four=1.), dict(out=1.)):
        images, b, l, d = augment(x, boxes, labels, no(4)[:, None], size=24, generator=random(),
                                  **options)
        assert images.shape == (4, 3, 24, 24) and (l == -1).all() and (b == 0).all()
        assert images.isfinite().all()


def test_without_any_change_the_batch_comes_back():
    x = torch.randint(0, 256, (2, 3, 32, 32)).float()
    boxes, labels = torch.tensor([[[3., 4, 20, 30]], [[0, 0, 32, 32]]]), torch.tensor([[1], [0]])
    images, b, l, d = augment(x, boxes, labels, no(2)[:, None], size=32, generator=random(), flip=0,
                              crop=1, color=0)
    assert torch.allclose(images, x, atol=.01) and torch.allclose(b, boxes, atol=1e-4)
    assert torch.equal(l, labels)


def test_colour_by_hand():
    "No change at all for 0; a grey picture stays grey, and nothing leaves 0 to 255."
    x = torch.rand(8, 3, 16, 16) * 255
    assert torch.allclose(colour(x, 0, random()), x, atol=1e-3)
    grey = x[:, :1].expand(-1, 3, -1, -1)
    changed = colour(grey, .5, random())
    assert torch.allclose(changed[:, :1].expand_as(changed), changed, atol=.01)
    assert colour(x, .9, random()).amin() >= 0 and colour(x, .9, random()).amax() <= 255


def test_mosaics():
    x, boxes = torch.rand(5, 3, 40, 40) * 255, torch.tensor([[4., 4, 36, 36]]).expand(5, 1, 4)
    labels = torch.arange(5)[:, None]
    canvas, b, l, d = mosaic(x, boxes, labels, yes(5)[:, None], share=1., generator=random())
    assert [sorted(row.tolist()) for row in l] == [sorted((i + k) % 5 for k in range(4))
                                                   for i in range(5)] and d.all()
    assert ((b >= 0) & (b <= 40)).all() and (area(b) < 32 * 32 * .5).all()
    assert pairwise_iou(b, b).triu(1).max() == 0
    same, b, l, d = mosaic(x, boxes, labels, no(5)[:, None], share=0., generator=random())
    assert torch.allclose(same, x, atol=.01) and torch.equal(l[:, :1], labels)
    assert (l[:, 1:] == -1).all()


# ---------------------------------------------------------------- loaders

def test_validation_pictures_are_those_of_dataloaders(data):
    theirs, ours = (dataloaders(data, 32, 4, difficult=True, device="cpu", workers=0).valid,
                    memory_loaders(data, 32, 4, device="cpu").valid)
    for a, b in zip(theirs, ours):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("world", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("n, bs", [(7, 4), (65, 32), (10, 3)])
def test_processes_share_an_epoch(world, n, bs, monkeypatch):
    "Every picture comes once, to one of them, and all have the same number of batches."
    if n < world: pytest.skip("fewer pictures than processes")
    split = (torch.arange(n).view(n, 1, 1, 1).expand(n, 3, 4, 4).byte(), torch.zeros(n, 1, 4),
             torch.zeros(n, 1, dtype=torch.long), no(n)[:, None])
    monkeypatch.setenv("WORLD_SIZE", str(world))
    seen, lengths = [], []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        loader = MemoryLoader(split, 4, bs, shuffle=True, device="cpu")
        batches = list(loader)
        lengths.append(len(batches))
        assert len(batches) == len(loader) and all(0 < len(b[0]) <= bs for b in batches)
        seen += [int(v) for b in batches for v in (b[0][:, 0, 0, 0] * 255).round()]
    assert sorted(seen) == list(range(n)) and len(set(lengths)) == 1


def test_more_processes_than_pictures_is_said(data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="7 pictures.*8 processes"):
        memory_loaders(data, 32, device="cpu")


def test_epochs_differ_and_can_be_had_again(data):
    loader = memory_loaders(data, 32, 4, device="cpu", seed=3).train
    first, second = list(loader), list(loader)
    assert loader.epoch == 2
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, second)
                   if a[0].shape == b[0].shape)
    loader.epoch = 1
    assert all(torch.equal(x, y) for a, b in zip(loader, second) for x, y in zip(a, b))


def test_an_empty_split_is_said(data):
    with pytest.raises(ValueError, match="data.valid has no pictures"):
        memory_loaders(Data(data.train, [], [], data.classes), 32)


def test_a_size_that_is_not_kept_is_said(data):
    with pytest.raises(ValueError, match="kept at 32 px"):
        MemoryLoader(in_memory(data.train, 32), 24, device="cpu")


# ---------------------------------------------------------------- never waiting

class Waits(TorchDispatchMode):
    """Notes every operation that needs its result on the host, or whose result has a shape that
    depends on data."""
    def __init__(self): super().__init__(); self.found = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2",
                    "unique_consecutive") or (
name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [dict(), dict(overlap=True, out=.5), dict(four=.5)])
def test_a_step_never_waits(options, monkeypatch):
    """Transforms, network, loss, backward: as on a GPU, where the loop of `strongest_first` has a
    fixed length."""
    # what `strongest_first` asks on the CPU only
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    model = RetinaNet(3, 64, width=16, depth=1,
                      body=backbone(pretrained=False, out_indices=(2, 3, 4))).train()
    for p in param_groups(model)[0]: p.requires_grad_(False)
    loss, g = retina_loss(model), random()
    images, boxes = (torch.randint(0, 256, (4, 3, 73, 73)),
                     torch.tensor([[[3., 4, 40, 50], [30, 30, 60, 60]]]).repeat(4, 1, 1))
    labels, difficult = torch.tensor([[0, 1], [2, -1], [-1, -1], [1, 1]]), no(8).view(4, 2)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    with Waits() as waits:
        x, *truth = augment(images.float(), boxes, labels, difficult, size=64, generator=g,
                            **options)
        value = loss(model(x / 255), *truth)
        value.backward()
        opt.step()
    assert waits.found == [] and value.isfinite()


def test_the_counter_counts():
    x = torch.arange(6.)
    with Waits() as waits: x[x > 2].sum().item()
    assert waits.found == ["index", "_local_scalar_dense"]
