"""The ladder of lesson 13: every idea of the course as one rung, trained on the same photographs
and scored on the same held-out pictures.

    python benchmarks/experiments/ladder.py --list  # the rungs, and which are measured
    python benchmarks/experiments/ladder.py         # runs what is missing, with seed 0
    python benchmarks/experiments/ladder.py giou ema --seeds 0 1 2  # with three seeds
    # another setting, judged on a fifth of the training split; nothing is stored
    python benchmarks/experiments/ladder.py giou --tune crop=.3

Each run writes benchmarks/results/ladder/RUNG-SEED.json when it is over, and a run whose file
is there is not repeated: stop it when you like, call it again later, or start several with
other rungs or seeds beside each other. Every rung has the same data (VOC2012-animals, six
classes, see make_animals.py), backbone (EfficientNet-Lite0 with ImageNet weights, early half
frozen), optimiser and number of epochs unless the rung is about just that; it adds its idea to
the rung named `on`. Scored once, at the end, on the official val split: AP at an IoU of .5,
area under the curve, difficult objects left out.
"""
import argparse, json, os, platform, time
from functools import partial
from pathlib import Path

import course_lib.machine  # before fastai
import torch
from course_lib.boxes import area
from course_lib.data import data_root, get_data, hold_out
from course_lib.detector import MeanAP
from course_lib.fast import augment
from course_lib.fpn import RetinaNet, atss, iou_losses, retina_loss
from course_lib.losses import SSDLoss
from course_lib.metrics import mean_ap
from course_lib.recipe import EMA, Flipped, Grow, fast_learner, one_cycle
from course_lib.ssd import SSD
from fastai.callback.core import Callback, CancelValidException

ANIMALS = ["cat", "cow", "dog", "horse", "person", "sheep"]
RESULTS = Path(__file__).resolve().parents[1] / "results" / "ladder"
START = dict(net="cells", loss="bce", assign="iou", boxes="l1", flip=0., color=0., crop=1.,
             overlap=False, out=0., four=0., ema=0., schedule="cycle",
             epochs=5, size=160, start=None, whole=False, lr=5e-3, bs=32)
RUNGS = dict(   # name: what it is called, which rung it stands on, what it changes
    cells=("16 cells", None, {}),
    anchors=("189 anchors", "cells", dict(net="ssd")),
    hard=("hard negatives", "anchors", dict(loss="hard")),
    focal=("focal loss", "anchors", dict(loss="focal")),
    flip=("mirror images", "focal", dict(flip=.5)),
    colour=("colour", "flip", dict(color=.2)),
    crop=("random crop", "flip", dict(crop=.5)),
    overlap=("SSD's crop", "flip", dict(overlap=True)),
    out=("zoom out", "flip", dict(out=.3)),
    mosaic=("mosaic", "flip", dict(four=.5)),
    pyramid=("feature pyramid", "flip", dict(net="pyramid")),
    atss=("ATSS", "pyramid", dict(assign="atss")),
    giou=("GIoU", "atss", dict(boxes="giou")),
    ciou=("CIoU", "atss", dict(boxes="ciou")),
    ema=("weight averaging", "giou", dict(ema=.99)),
    flat=("a constant rate", "giou", dict(schedule="flat")),
    flat_ema=("constant rate, averaged", "flat", dict(ema=.99)),
    whole=("whole body trained", "ema", dict(whole=True)),
    grow=("small pictures first", "ema", dict(start=96)),
    double=("twice the epochs", "ema", dict(epochs=10)),
    long_crop=("random crop, twice the epochs", "double", dict(crop=.5)),
    best=("224 px, crop, twice the epochs", "long_crop", dict(size=224)),
    quadruple=("four times the epochs", "double", dict(epochs=20)),
    quadruple_crop=("random crop, four times the epochs", "quadruple", dict(crop=.5)),
    quadruple_colour=("crop and colour, four times the epochs", "quadruple_crop", dict(color=.2)),
)
MIRRORED = ("ema", "double", "best")   # scored a second time, with test-time mirror images


def settings(rung):
    "All settings of a rung: its own on top of those it stands on."
    name, on, changes = RUNGS[rung]
    return (settings(on) if on else START) | changes


def make(data, s):
    "Model and loss of a rung."
    if s["net"] == "pyramid": model = RetinaNet(len(data.classes), s["size"])
    elif s["net"] == "ssd": model = SSD(len(data.classes), s["size"])
    else: model = SSD(len(data.classes), s["size"], grids=(4,), zooms=(1.,), ratios=((1, 1),))
    if s["start"]: return model, retina_loss(model)   # as `Grow` makes it
    options = {}
    if s["assign"] == "atss": options.update(assign=partial(atss, grids=model.grids))
    if s["boxes"] != "l1":
        options.update(box_losses=partial(iou_losses, anchors=model.anchors, kind=s["boxes"]),
                       box_weight=1.)
    return model, SSDLoss(model.anchors, s["loss"], **options)


class Unscored(Callback):
    """The held-out pictures are scored once, at the end; a line after every epoch says how far
    training is."""
    order = 60
    def before_fit(self): self.begin = time.time()
    def before_validate(self):
        print(f"  epoch {self.epoch}: loss {self.recorder.smooth_loss.value.item():.3f}, "
              f"{time.time() - self.begin:.0f} s", flush=True)
        if self.epoch < self.n_epoch - 1: raise CancelValidException()


def scores(preds, targets, classes, size):
    "AP of every kind that is kept, in percent."
    percent = lambda x: round(100 * float(x), 2)
    ap = mean_ap(preds, targets, len(classes))
    by_size = {}
    for low, high in ((0, .1), (.1, .2), (.2, .4), (.4, 1.01)):
        sides = [area(t["boxes"]).sqrt() / size for t in targets]
        some = [dict(t, difficult=t["difficult"] | (s < low) | (s >= high)) for t,
                s in zip(targets, sides)]
        by_size[f"{low:.0%}-{min(high, 1):.0%}"] = percent(mean_ap(preds, some, len(classes)).map)
    return dict(map50=percent(ap.map),
                map50_11pt=percent(mean_ap(preds, targets, len(classes), style="11pt").map),
                map_coco=percent(mean_ap(preds, targets, len(classes), style="coco").map),
                ap50={c: percent(a) for c, a in zip(classes, ap.ap)}, by_size=by_size)


def run(rung, seed, data, s):
    "Train and score one rung."
    model, loss = make(data, s)
    tfms = partial(augment,
                   **{k: s[k] for k in ("flip", "color", "crop", "overlap", "out", "four")})
    learn = fast_learner(data, model, loss, bs=s["bs"], tfms=tfms, seed=seed)
    if not s["whole"]: learn.freeze_to(1)
    cbs = ([Unscored()] + ([EMA(s["ema"])] if s["ema"] else [])
           + ([Grow(s["start"], s["size"])] if s["start"] else []))
    start = time.time()
    with learn.no_bar(), learn.no_logging():
        one_cycle(learn, s["epochs"], s["lr"], flat=s["schedule"] == "flat", cbs=cbs)
        seconds = time.time() - start
        preds, targets = learn.get_preds()
        result = dict(rung=rung, name=RUNGS[rung][0], on=RUNGS[rung][1], seed=seed,
                      **scores(preds, targets, data.classes, s["size"]))
        if rung in MIRRORED:
            learn.model = Flipped(model)
            result["mirrored"] = scores(*learn.get_preds(), data.classes, s["size"])
    return result | dict(train_seconds=round(seconds), settings=s, train_pictures=len(data.train),
                         valid_pictures=len(data.valid),
                         machine=dict(cores=os.cpu_count(), threads=torch.get_num_threads(),
                                      torch=torch.__version__.split("+")[0],
device=str(learn.dls.device), python=platform.python_version()))


def table():
    for rung, (name, on, changes) in RUNGS.items():
        files = sorted(RESULTS.glob(f"{rung}-*.json"))
        found = [json.loads(f.read_text())["map50"] for f in files]
        print(f"{rung:10} {name:24} on {on or '-':8} "
              f"{', '.join(f'{k}={v}' for k, v in changes.items()):32} {found}")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("rungs", nargs="*", help="default: all of them")
    p.add_argument("--data", default="VOC2012-animals", help="a folder, or the name of one where "
                   "data lives")
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--list", action="store_true")
    p.add_argument("--tune", nargs="+", metavar="NAME=VALUE", help="settings to try, on a fifth of "
                   "the training split")
    args = p.parse_args()
    if args.list: return table()
    for rung in args.rungs:
        if rung not in RUNGS: p.error(f"there is no rung {rung!r}; there are {', '.join(RUNGS)}")
    data = get_data(args.data if Path(args.data).exists() else data_root() / args.data,
                    classes=ANIMALS)
    if args.tune: data = hold_out(data)
    for seed in args.seeds:
        for rung in args.rungs or RUNGS:
            file = RESULTS / f"{rung}-{seed}.json"
            if file.exists() and not args.tune: continue
            s = settings(rung)
            for change in args.tune or ():
                key, _, value = change.partition("=")
                if key not in s: p.error(f"there is no setting {key!r}; there are {', '.join(s)}")
                s[key] = json.loads(value if value[0] != "." else f"0{value}")
            print(rung, seed, *(args.tune or ()), flush=True)
            result = run(rung, seed, data, s)
            print(f"  {result['map50']}  {result['ap50']}  {result['train_seconds']} s",
                  result.get("mirrored", {}).get("map50", ""), flush=True)
            if args.tune: continue
            RESULTS.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1) + "\n")
            part.replace(file)


if __name__ == "__main__": main()
