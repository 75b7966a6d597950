"""The detector's head: sizes, strides, and the order that it shares with the anchors."""
import pytest
import torch
from torch import nn

from course_lib.anchors import make_anchors
from course_lib.backbone import backbone
from course_lib.match import match
from course_lib.ssd import SSD, SSDHead, _shrink


class TinyBody(nn.Module):
    "Stands in for a `Backbone`: one map of stride 32."
    channels, strides = [8], [32]
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 32)
    def forward(self, x): return self.conv(x)


class Numbered(nn.Module):
    "Answers with the number of the anchor that each output should belong to."
    def __init__(self, g, k, numbers, first):
        super().__init__()
        self.map = torch.zeros(1, k * numbers, g, g)
        for y in range(g):
            for x in range(g):
                for a in range(k):
                    for c in range(numbers):
                        self.map[0, a * numbers + c, y, x] = first + (y * g + x) * k + a
    def forward(self, x):
        assert x.shape[-2:] == self.map.shape[-2:]
        return self.map.expand(len(x), -1, -1, -1)


def tiny(n_classes=5, size=128, **settings):
    return SSD(n_classes, size, body=TinyBody(), **settings)


@pytest.mark.parametrize("grids, k", [((4, 2, 1), 9), ((4,), 1), ((4, 3, 2), 2), ((1,), 3),
                                      ((4, 1), 6)])
def test_order_is_that_of_the_anchors(grids, k):
    head, first = SSDHead(8, 4, 3, grids, k, width=16), 0
    for i, g in enumerate(grids):
        head.offsets[i], head.logits[i] = Numbered(g, k, 4, first), Numbered(g, k, 3, first)
        first += g * g * k
    for out in head(torch.rand(2, 8, 4, 4)):
        assert (out == torch.arange(first)[:, None]).all()


def test_cells_lie_where_their_anchors_lie():
    "An anchor in a corner of the picture reads from that corner, and not from the opposite one."
    torch.manual_seed(0)
    model = tiny(grids=(4,), zooms=(1.,), ratios=((1, 1),)).eval()
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    for a, (row, column) in {0: (0, 0), 3: (0, 3), 12: (3, 0), 15: (3, 3)}.items():
        assert model.anchors[a].tolist() == [32 * column, 32 * row, 32 * column + 32, 32 * row + 32]
        grad, = torch.autograd.grad(model(images)[1][0, a].sum(), images)
        cells = grad[0].abs().sum(0).view(4, 32, 4, 32).sum((1, 3))                    # [4,4]
        assert cells[row, column] > 0 and cells[3 - row, 3 - column] == 0


@pytest.mark.parametrize("cells", range(1, 20))
def test_shrink_gives_the_grid_or_says_no(cells):
    for grid in range(1, cells + 3):
        try: kernel, stride, padding = _shrink(cells, grid)
        except ValueError as e:
            assert f"{cells} x {cells}" in str(e) and f"{grid} x {grid}" in str(e)
            assert grid not in (1, cells, -(-cells // 2))
            continue
        assert nn.Conv2d(1, 1, kernel, stride,
                         padding)(torch.zeros(1, 1, cells, cells)).shape[-1] == grid
        windows = [range(n * stride - padding, n * stride - padding + kernel) for n in range(grid)]
        assert set(range(cells)) <= {i for window in windows
                                     for i in window}, "a cell that no window sees"
        assert all(set(window) & set(range(cells))
                   for window in windows), "a window that sees only padding"
        assert abs((windows[0][0] + windows[-1][-1]) - (cells - 1)) <= 1, "windows stand off centre"


@pytest.mark.parametrize("grid", [0, -1, 5, 8])
def test_shrink_never_grows(grid):
    with pytest.raises(ValueError, match="grids"): _shrink(4, grid)


def test_the_usual_strides():
    assert _shrink(4, 4) == (3, 1, 1) and _shrink(7, 4) == (3, 2, 1) and _shrink(4, 2) == (3, 2, 1)
    assert _shrink(2, 1) == (3, 2, 1)


@pytest.mark.parametrize("size, grids", [(96, (3, 2, 1)), (96, (1,)), (100, (4, 2, 1)),
                                         (128, (4, 2, 1)), (160, (4, 2, 1)), (224, (4, 2, 1)),
                                         (224, (7, 4, 2, 1)), (256, (8, 4, 2, 1)),
                                         (320, (10, 5, 3, 2, 1)), (384, (4, 2, 1)),
                                         (512, (4, 2, 1)), (512, (16, 8, 4, 2, 1))])
def test_sizes_and_grids(size, grids):
    model = tiny(3, size, grids=grids).eval()
    with torch.no_grad(): offsets, logits = model(torch.rand(2, 3, size, size))
    A = 9 * sum(g * g for g in grids)
    assert offsets.shape == (2, A, 4) and logits.shape == (2, A, 3)
    assert model.anchors.shape == (A, 4)
    torch.testing.assert_close(model.anchors, make_anchors(size, grids))


@pytest.mark.parametrize("size, grids", [(96, (4, 2, 1)), (128, (8, 4)), (224, (6, 3)),
                                         (128, (4, 2, 3)), (128, (4, 0))])
def test_grids_that_do_not_fit(size, grids):
    with pytest.raises(ValueError, match="grids"): tiny(3, size, grids=grids)


def test_the_default_body():
    model = SSD(4, 128, body=backbone(pretrained=False)).eval()
    with torch.no_grad(): offsets, logits = model(torch.rand(1, 3, 128, 128))
    assert offsets.shape == (1, 189, 4) and logits.shape == (1, 189, 4)


@pytest.mark.parametrize("prior", [.01, .2])
def test_every_class_starts_at_the_prior(prior):
    torch.manual_seed(0)
    probability = tiny(20, prior=prior).eval()(torch.rand(4, 3, 128, 128))[1].sigmoid()
    assert probability.mean().item() == pytest.approx(prior, rel=.3)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = tiny()
    offsets, logits = model(torch.rand(4, 3, 128, 128))
    (offsets.square().sum() + logits.square().sum()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_state_dict_round_trip(tmp_path):
    torch.manual_seed(0)
    model, x = tiny().eval(), torch.rand(2, 3, 128, 128)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    other = tiny().eval()
    other.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    for a, b in zip(model(x), other(x)): assert torch.equal(a, b)
    assert "anchors" not in model.state_dict()


def test_settings_build_the_same_network(tmp_path):
    model = tiny(7, 256, grids=[8, 4], zooms=torch.tensor([.5, 1.]), ratios=[[1, 1], [2, .5]])
    assert model.settings == dict(n_classes=7, size=256, grids=(8, 4), zooms=(.5, 1.),
                                  ratios=((1., 1.), (2., .5)))
    torch.save(model.settings, tmp_path / "settings.pth")
    again = SSD(**torch.load(tmp_path / "settings.pth", weights_only=True), body=TinyBody())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.anchors, model.anchors) and again.settings == model.settings


def test_default_settings():
    assert tiny(20).settings == dict(n_classes=20, size=128, grids=(4, 2, 1), zooms=(.7, 1., 1.3),
                                     ratios=((1., 1.), (1., .5), (.5, 1.)))


def test_anchors_move_with_the_model():
    assert tiny().to(torch.float64).anchors.dtype == torch.float64
    assert tiny().to("meta").anchors.device.type == "meta"


def test_pictures_do_not_disturb_each_other():
    torch.manual_seed(0)
    model, x = tiny().eval(), torch.rand(3, 3, 128, 128)
    with torch.no_grad():
        together, alone = model(x), model(x[1:2])
    for a, b in zip(together, alone): torch.testing.assert_close(a[1:2], b, atol=1e-5, rtol=1e-4)


def test_anchors_fit_match():
    model = tiny()
    matched = match(model.anchors, torch.tensor([[[0., 0, 128, 128]]]), torch.tensor([[3]]))
    assert matched[0, 183] == 0
