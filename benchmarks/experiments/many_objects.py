"""Lessons 7 to 12 by numbers: the same data and budget, five detectors, one mAP each.

    python benchmarks/experiments/many_objects.py  # pocket, 128 px
    # photographs, 224 px; `python benchmarks/data/make_animals.py` makes them
    python benchmarks/experiments/many_objects.py --data VOC2012-animals
    # torchvision's RetinaNet, for scale
    python benchmarks/experiments/many_objects.py --data VOC2012-animals --models torchvision
    # a fifth of the training split is the judge
    python benchmarks/experiments/many_objects.py --data VOC2012-animals --tune

The models: `cells`, 16 cells with one anchor each; `bce`, 189 anchors; `hard`, the same with
hard-negative mining; `focal`, the same with focal loss; `pyramid`, lesson 12's RetinaNet with
ATSS and GIoU. All have the same backbone, transforms, schedule and seed, and are scored once,
at the end, on the validation split: AP at an IoU of .5, area under the curve, objects marked
difficult left out. `torchvision` is its RetinaNet with a pyramid of 128 channels on the same
backbone, AdamW, one cycle, mirror images only, as someone would train it who reaches for a
library; `torchvision_ssd` the same for its SSD. Results go to
benchmarks/results/many_objects.json, one entry a data set and model.
"""
import argparse, json, os, platform, time
from collections import OrderedDict
from pathlib import Path

import course_lib.machine  # before fastai
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.torch_core import set_seed
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD as TorchvisionSSD, SSDHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from course_lib.augment import train_tfms, valid_tfms
from course_lib.data import data_root, get_data, hold_out
from course_lib.detector import detection_learner, unpad
from course_lib.fpn import RetinaNet, retina_loss
from course_lib.learn import backbone, dataloaders
from course_lib.losses import SSDLoss
from course_lib.metrics import mean_ap
from course_lib.ssd import SSD

ANIMALS = ["cat", "cow", "dog", "horse", "person", "sheep"]
RESULTS = Path(__file__).resolve().parents[1] / "results" / "many_objects.json"
ONE_ANCHOR = dict(grids=(4,), zooms=(1.,), ratios=((1, 1),))
# kind of loss, anchors
SSDS = {"cells": ("bce", ONE_ANCHOR), "bce": ("bce", {}), "hard": ("hard", {}),
        "focal": ("focal", {})}


class SkipValidation(Callback):
    """The validation split is scored once, at the end; a line after every epoch says how far
    training is."""
    def __init__(self): self.start = time.time()
    def before_validate(self): raise CancelValidException()
    def after_epoch(self):
        print(f"  epoch {self.epoch}: training loss {self.learn.smooth_loss:.3f}, "
              f"{time.time() - self.start:.0f} s", flush=True)


def train_ours(name, data, args):
    "One of the course's models: predictions, truth, seconds of training."
    if name == "pyramid":
        model = RetinaNet(len(data.classes), args.size)
        loss = retina_loss(model)
    else:
        kind, anchors = SSDS[name]
        model = SSD(len(data.classes), args.size, **anchors)
        loss = SSDLoss(model.anchors, kind)
    learn = detection_learner(data, model, bs=args.bs, loss=loss,
                              train_tfms=train_tfms(args.size, crop=args.crop), device=args.device)
    start = time.time()
    with learn.no_bar(), learn.no_logging():
        learn.freeze()
        learn.fit_one_cycle(args.frozen, 3e-3, cbs=SkipValidation())
        learn.freeze_to(1)
        learn.fit_one_cycle(args.epochs, slice(args.lr / 100, args.lr), cbs=SkipValidation())
        seconds = time.time() - start
        return *learn.get_preds(), seconds


class Pyramid(nn.Module):
    "The course's backbone under torchvision's feature pyramid."
    def __init__(self, channels=128):
        super().__init__()
        self.body = backbone(out_indices=(2, 3, 4))
        self.fpn = FeaturePyramidNetwork(self.body.channels, channels,
                                         LastLevelP6P7(channels, channels))
        self.out_channels = channels
    def forward(self, x):
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self.body(x))))


def torchvision_retinanet(n_classes, size):
    "torchvision's RetinaNet with the course's backbone."
    return detection.RetinaNet(Pyramid(), n_classes, min_size=size, max_size=size,
                               image_mean=[0, 0, 0], image_std=[1, 1, 1],
                               score_thresh=.01, detections_per_img=100)


class Maps(nn.Module):
    "The course's backbone, its maps of stride 16 and 32, and two more, for torchvision's SSD."
    def __init__(self, width=256):
        super().__init__()
        self.body = backbone(out_indices=(3, 4))
        down = lambda n: nn.Sequential(nn.Conv2d(n, width, 3, 2, 1, bias=False),
                                       nn.BatchNorm2d(width), nn.ReLU())
        self.more = nn.ModuleList([down(self.body.channels[-1]), down(width)])
        self.out_channels = [*self.body.channels, width, width]
    def forward(self, x):
        maps = list(self.body(x))
        for more in self.more: maps.append(more(maps[-1]))
        return OrderedDict((str(i), m) for i, m in enumerate(maps))


def torchvision_ssd(n_classes, size):
    """torchvision's SSD with the course's backbone: boxes of a tenth to most of the picture, six a
    cell; class 0 is background."""
    boxes = DefaultBoxGenerator([[2, 3]] * 4, scales=[.1, .25, .45, .7, .95])
    head = SSDHead([*backbone(pretrained=False, out_indices=(3, 4)).channels, 256, 256],
                   boxes.num_anchors_per_location(), n_classes + 1)
    return TorchvisionSSD(Maps(), boxes, (size, size), n_classes + 1, image_mean=[0, 0, 0],
                          image_std=[1, 1, 1], head=head, score_thresh=.01, detections_per_img=100)


def train_torchvision(data, args, make=torchvision_retinanet, first=0):
    """A detector of torchvision's, whose labels begin with `first`: predictions, truth, seconds of
    training."""
    size = args.size
    dls = dataloaders(data, size, 16, train_tfms(size, crop=1, color=0), valid_tfms(size),
                      difficult=True, device=args.device)
    model = make(len(data.classes), size).to(dls.device)
    body, head = (list(model.backbone.body.parameters()),
                  [p for n, p in model.named_parameters() if not n.startswith("backbone.body.")])
    opt = torch.optim.AdamW([dict(params=body), dict(params=head)], lr=1e-3, weight_decay=.01)
    steps = args.torchvision_epochs * len(dls.train)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, [1e-4, 1e-3], total_steps=steps)
    start = time.time()
    for epoch in range(args.torchvision_epochs):
        model.train()
        for images, boxes, labels, difficult in dls.train:
            truth = [dict(boxes=b[l >= 0], labels=l[l >= 0] + first) for b, l in zip(boxes, labels)]
            loss = sum(model(list(images), truth).values())
            opt.zero_grad(); loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.)
            opt.step(); schedule.step()
        print(f"  epoch {epoch}: training loss {loss.item():.3f}, {time.time() - start:.0f} s",
              flush=True)
    seconds, preds, targets = time.time() - start, [], []
    model.eval()
    with torch.no_grad():
        for images, *truth in dls.valid:
            preds += [{k: v.cpu() - first * (k == "labels") for k, v in p.items()}
                      for p in model(list(images))]
            targets += unpad(*truth)
    return preds, targets, seconds


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="pocket", help="pocket, or a folder in VOC's layout, or the "
                   "name of one where data lives")
    p.add_argument("--models", nargs="+", choices=[*SSDS, "pyramid", "torchvision",
                                                   "torchvision_ssd"], default=[*SSDS, "pyramid"])
    p.add_argument("--tune", action="store_true", help="train on four fifths of train, "
                   "score on the rest of it")
    p.add_argument("--size", type=int, default=None, help="default: 128 for pocket, else 224")
    p.add_argument("--bs", type=int, default=32)
    p.add_argument("--frozen", type=int, default=1, help="epochs with a frozen backbone")
    p.add_argument("--epochs", type=int, default=6, help="epochs with the later half of the "
                   "backbone unfrozen")
    p.add_argument("--torchvision-epochs", type=int, default=8)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--crop", type=float, default=.5)
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--limit", type=int, default=None, help="pictures per split, for a quick try")
    p.add_argument("--device", default=None)
    args = p.parse_args()
    pocket = args.data == "pocket"
    args.size = args.size or (128 if pocket else 224)
    folder = args.data if pocket or Path(args.data).exists() else data_root() / args.data
    data = get_data(folder, classes=None if pocket else ANIMALS, limit=args.limit)
    if args.tune: data = hold_out(data)
    for name in args.models:
        set_seed(args.seed)
        if name == "torchvision": preds, targets, seconds = train_torchvision(data, args)
        elif name == "torchvision_ssd":
            preds, targets, seconds = train_torchvision(data, args, torchvision_ssd, first=1)
        else: preds, targets, seconds = train_ours(name, data, args)
        score = lambda **k: mean_ap(preds, targets, len(data.classes), **k)
        ap = score()
        result = dict(map50=round(100 * ap.map, 1),
                      map50_11pt=round(100 * score(style="11pt").map, 1),
                      map30=round(100 * score(iou=.3).map, 1),
                      map_coco=round(100 * score(style="coco").map, 1),
                      ap50={c: round(100 * a, 1) for c, a in zip(data.classes, ap.ap.tolist())},
                      train_seconds=round(seconds), train_pictures=len(data.train),
                      valid_pictures=len(data.valid))
        print(name, result, flush=True)
        if args.tune or args.limit: continue
        keys = (("size", "seed", "torchvision_epochs") if name.startswith("torchvision")
                else ("size", "bs", "frozen", "epochs", "lr", "crop", "seed"))
        machine = dict(cores=os.cpu_count(), threads=torch.get_num_threads(),
                       torch=torch.__version__.split("+")[0],
                       device=str(args.device or ("cuda" if torch.cuda.is_available() else "cpu")),
                       python=platform.python_version())
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        stored.setdefault(Path(args.data).name,
                          {})[name] = dict(result, settings={k: getattr(args, k) for k in keys},
                                           machine=machine)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__": main()
