"""Attacks on `course_lib.single`."""
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from course_lib.backbone import backbone
from course_lib.single import SingleHead, SingleLoss, predict_largest


@pytest.mark.parametrize("size, cells", [(128, 4), (224, 7), (130, 5), (32, 1)])
def test_head_fits_the_map_of_its_size(size, cells):
    boxes, logits = SingleHead(8, 5, size).eval()(torch.randn(3, 8, cells, cells))
    assert boxes.shape == (3, 4) and logits.shape == (3, 5) and (boxes > 0).all()
    assert (boxes < size).all()


def test_head_without_classes():
    boxes, logits = SingleHead(8, 0, 64).eval()(torch.randn(2, 8, 2, 2))
    assert boxes.shape == (2, 4) and logits.shape == (2, 0)


def test_loss_is_the_sum_of_its_parts_and_skips_empty_pictures():
    torch.manual_seed(0)
    boxes, logits = torch.rand(5, 4) * 100, torch.randn(5, 3)
    true, labels = torch.rand(5, 1, 4) * 100, torch.tensor([[2], [-1], [0], [1], [-1]])
    has = labels[:, 0] >= 0
    expected = (7 * F.l1_loss(boxes[has], true[has, 0]) / 100
                + F.cross_entropy(logits[has], labels[has, 0]))
    torch.testing.assert_close(SingleLoss(100, 7.)((boxes, logits), true, labels), expected)


def test_loss_of_a_batch_without_objects_is_zero_with_zero_gradient():
    boxes, logits = torch.rand(2, 4, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    loss = SingleLoss(10)((boxes, logits), torch.zeros(2, 1, 4), torch.full((2, 1), -1))
    loss.backward()
    assert loss == 0 and (boxes.grad == 0).all() and (logits.grad == 0).all()


def test_loss_gradients():
    torch.manual_seed(1)
    boxes, logits = (torch.rand(3, 4, dtype=torch.double, requires_grad=True),
                     torch.randn(3, 4, dtype=torch.double, requires_grad=True))
    true, labels = torch.rand(3, 1, 4, dtype=torch.double), torch.tensor([[1], [-1], [3]])
    assert torch.autograd.gradcheck(lambda b, l: SingleLoss(1.)((b, l), true, labels),
                                    (boxes, logits))


class Constant(nn.Module):
    "A head that always answers with the same box and class."
    size = 64
    def forward(self, x): return torch.tensor([[16., 32, 48, 64]]), torch.tensor([[0., 5]])


def test_prediction_comes_back_in_the_pictures_own_pixels(tmp_path):
    model, path = nn.Sequential(backbone(pretrained=False), Constant()), tmp_path / "wide.png"
    Image.new("RGB", (640, 128)).save(path)
    for picture in (path, str(path), Image.open(path), Image.new("L", (640, 128))):
        box, name, probability = predict_largest(model.train(), picture, ["a", "b"])
        assert box.tolist() == [160, 64, 480, 128] and name == "b" and .99 < probability <= 1
        assert model.training


def test_prediction_of_a_missing_picture_names_it():
    with pytest.raises(FileNotFoundError, match="nowhere.jpg"):
        predict_largest(nn.Sequential(backbone(pretrained=False), Constant()), "nowhere.jpg",
                        ["a", "b"])
