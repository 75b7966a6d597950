"""Lessons 3 to 5 on real photographs: the largest object's class, its box, and both from one
network.

    # the three models, scored on the validation split
    python benchmarks/experiments/single_object.py
    # tries settings: a fifth of the training split is the judge, validation stays closed
    python benchmarks/experiments/single_object.py --tune
    # one model, on a folder in VOC's layout
    python benchmarks/experiments/single_object.py --models joint --data FOLDER

Needs `data/VOC2012-animals`: `python benchmarks/data/make_animals.py` makes it from VOC2012. All
three models have the same backbone, data, transforms, budget and seed. Results go to
benchmarks/results/single_object.json, one entry a model.
"""
import argparse, json, os, platform, time
from pathlib import Path

# give Learner its no_bar and fit_one_cycle
import fastai.callback.progress, fastai.callback.schedule
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import nn

from course_lib.augment import train_tfms, valid_tfms
from course_lib.boxes import iou
from course_lib.data import data_root, get_data, hold_out
from course_lib.learn import backbone, class_loss, dataloaders, only_largest, param_groups
from course_lib.single import SingleHead, SingleLoss

CLASSES = ["cat", "cow", "dog", "horse", "person", "sheep"]
RESULTS = Path(__file__).resolve().parents[1] / "results" / "single_object.json"


class SkipValidation(Callback):
    "The validation split is scored once, at the end."
    def before_validate(self): raise CancelValidException()


class Seconds(Callback):
    "A line after every epoch: training loss and seconds since the start."
    def __init__(self, start, name): self.start, self.label = start, name
    def after_epoch(self):
        print(f"  {self.label} epoch {self.epoch}: training loss {self.learn.smooth_loss:.3f}, "
              f"{time.time() - self.start:.0f} s", flush=True)


def class_model(size, n_classes):
    "Lesson 3: average the map, then one linear layer."
    body = backbone()
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.2),
                         nn.Linear(body.channels[-1], n_classes))
    nn.init.zeros_(head[-1].weight)
    return nn.Sequential(body, head), class_loss


def box_model(size, n_classes):
    "Lesson 4: the joint head with no class outputs, trained on L1 alone."
    body = backbone()
    def loss(pred, boxes, labels):
        has = labels[:, 0] >= 0
        return ((pred[0] - boxes[:, 0]).abs().mean(1) * has).sum() / has.sum().clamp(min=1)
    return nn.Sequential(body, SingleHead(body.channels[-1], 0, size)), loss


def joint_model(size, n_classes):
    "Lesson 5: both answers from one head."
    body = backbone()
    return nn.Sequential(body, SingleHead(body.channels[-1], n_classes, size)), SingleLoss(size)


MODELS = {"class": class_model, "box": box_model, "joint": joint_model}


def train(name, data, args):
    "One model, trained and scored once at the end: a dict of its measurements."
    set_seed(args.seed)
    dls = dataloaders(data, args.size, args.bs, train_tfms(args.size, crop=args.crop),
                      valid_tfms(args.size), device=args.device)
    model, loss = MODELS[name](args.size, len(data.classes))
    learn = Learner(dls, model, loss, splitter=param_groups, train_bn=False)
    start = time.time()
    with learn.no_bar(), learn.no_logging():
        learn.freeze()
        learn.fit_one_cycle(args.frozen, 3e-3, cbs=[Seconds(start, name), SkipValidation()])
        learn.freeze_to(1)
        learn.fit_one_cycle(args.epochs, slice(args.lr / 100, args.lr),
                            cbs=[Seconds(start, name), SkipValidation()])
        seconds = time.time() - start
        pred, (boxes, labels) = learn.get_preds(dl=dls.valid)
    has, true, label = labels[:, 0] >= 0, boxes[:, 0], labels[:, 0]
    result = dict(train_seconds=round(seconds), train_pictures=len(data.train),
                  valid_pictures=int(has.sum()))
    if name != "box":
        logits = pred if name == "class" else pred[1]
        result["accuracy"] = round((logits.argmax(1) == label)[has].float().mean().item(), 4)
    if name != "class":
        result["l1_pixels"] = round((pred[0] - true).abs().mean(1)[has].mean().item(), 2)
        overlap = iou(pred[0], true)[has]
        result["mean_iou"] = round(overlap.mean().item(), 4)
        result["iou_above_half"] = round((overlap > .5).float().mean().item(), 4)
    return result


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default=None, help="a folder in VOC's layout (default: "
                   "VOC2012-animals where data lives)")
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    p.add_argument("--tune", action="store_true", help="train on four fifths of train, "
                   "score on the rest of it")
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--bs", type=int, default=32)
    p.add_argument("--frozen", type=int, default=2, help="epochs with a frozen backbone")
    p.add_argument("--epochs", type=int, default=8, help="epochs with the later half of the "
                   "backbone unfrozen")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--crop", type=float, default=.5)
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--limit", type=int, default=None, help="pictures per split, for a quick try")
    p.add_argument("--device", default=None)
    args = p.parse_args()
    data = only_largest(get_data(args.data or data_root() / "VOC2012-animals", classes=CLASSES,
                                 limit=args.limit))
    if args.tune: data = hold_out(data)
    for name in args.models:
        result = train(name, data, args)
        print(name, result, flush=True)
        if args.tune or args.limit: continue
        settings = {k: getattr(args, k) for k in ("size", "bs", "frozen", "epochs", "lr", "crop",
                                                  "seed")}
        machine = dict(cores=os.cpu_count(), threads=torch.get_num_threads(),
                       torch=torch.__version__.split("+")[0],
                       device=str(args.device or ("cuda" if torch.cuda.is_available() else "cpu")),
                       python=platform.python_version())
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        stored[name] = dict(result, settings=settings, machine=machine)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__": main()
