"""Attacks on `course_lib.deploy`: the file's answers beside PyTorch's, for several networks,
batches and crowds."""
import numpy as np
import onnxruntime
import pytest
import torch
from fastai.torch_core import set_seed

from course_lib.deploy import Deployable, to_onnx
from course_lib.detect import detections
from course_lib.fpn import RetinaNet
from course_lib.backbone import backbone
from course_lib.ssd import SSD

CLASSES = ["a", "b", "c"]


def retinanet():
    return RetinaNet(3, 64, width=16, depth=1, prior=.3,
                     body=backbone(pretrained=False, out_indices=(2, 3, 4))).eval()
def ssd(): return SSD(3, 64, grids=(2, 1), prior=.3, body=backbone(pretrained=False)).eval()


def spread(model):
    """Random weights answer alike everywhere; larger ones in the last layer make answers that
    differ."""
    for name, p in model.named_parameters():
        if "logits" in name and p.ndim == 4: torch.nn.init.normal_(p, std=.3)
    return model


def rows(picture, boxes, labels, scores):
    found = np.concatenate([np.stack([picture, labels], 1), np.asarray(boxes),
                            np.asarray(scores)[:, None]], 1).astype("float64")
    return found[np.lexsort((found[:, 2].round(2), found[:, 3].round(2), found[:, 6].round(4),
                             found[:, 1], found[:, 0]))]


@pytest.mark.parametrize("make", [retinanet, ssd])
def test_the_file_finds_what_pytorch_finds(make, tmp_path):
    """For batches of 1, 2 and 5 pictures from one file: the same objects as `detections`, boxes to
    a thousandth of a pixel."""
    set_seed(0)
    model = spread(make())
    session = onnxruntime.InferenceSession(to_onnx(model, CLASSES, tmp_path / "net.onnx", score=.4),
                                           providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert about["classes"].split("\n") == CLASSES and about["size"] == "64"
    found = 0
    for B in (1, 2, 5):
        x = torch.rand(B, 3, 64, 64)
        picture, boxes, scores, labels = session.run(None, {"images": x.numpy()})
        with torch.no_grad(): expected = detections(model(x), model.anchors, 64, score=.4, top=400)
        theirs = rows(np.repeat(np.arange(B), [len(d["labels"]) for d in expected]),
                      torch.cat([d["boxes"] for d in expected]),
                      torch.cat([d["labels"] for d in expected]),
                      torch.cat([d["scores"] for d in expected]))
        ours = rows(picture, boxes, labels, scores)
        assert ours.shape == theirs.shape and np.abs(ours - theirs).max(initial=0) < 1e-3
        assert (np.diff(scores) <= 0).all()
        found += len(ours)
    assert found > 10


def test_nothing_found_is_no_rows(tmp_path):
    session = onnxruntime.InferenceSession(to_onnx(retinanet(), CLASSES, tmp_path / "net.onnx",
                                                   score=.999), providers=["CPUExecutionProvider"])
    assert [f.shape for f in session.run(None,
                                         {"images": np.zeros((2, 3, 64, 64), "float32")})] == [
                                             (0,), (0, 4), (0,), (0,)]


@pytest.mark.parametrize("B", [1, 7, 40])
def test_many_pictures_and_classes_stay_apart(B):
    "The same box in every picture and class: each stays, whatever the batch."
    class Same(torch.nn.Module):
        size = 300
        def __init__(self):
            super().__init__()
            self.register_buffer("anchors",
                                 torch.tensor([[100.25, 50.5, 180.75, 120.5], [101, 51, 180, 120]]))
        def forward(self, x):
            return (torch.zeros(len(x), 2, 4),
                    torch.tensor([2., 1]).view(1, 2, 1).expand(len(x), 2, 30))
    picture, boxes, scores, labels = Deployable(Same())(torch.zeros(B, 3, 300, 300))
    assert len(picture) == B * 30
    assert sorted(zip(picture.tolist(), labels.tolist())) == [(b, c) for b in range(B)
                                                              for c in range(30)]
    assert torch.allclose(boxes, Same().anchors[:1].expand_as(boxes), atol=1e-4)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        to_onnx(ssd(), CLASSES, tmp_path / "nowhere" / "net.onnx")
    with pytest.raises(ValueError, match="2 names.*3 classes"):
        to_onnx(ssd(), ["a", "b"], tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
