"""From JPEG files to the final mAP: how many seconds the recipe takes, phase by phase, and how
they grow with pictures and size.

    python benchmarks/speedrun.py                                     # 320 px, 8 epochs of
        VOC2012-animals, and the short runs that show how time grows
    python benchmarks/speedrun.py --runs ten-160 ten-224 ten-320      # what ten minutes buy,
        everything included, at three sizes
    python benchmarks/speedrun.py --data voc0712 --epochs 24 --runs whole --split test       #
        for who has a GPU and an hour: VOC07+12, scored on VOC07's test split

A process of its own for each run, nothing cached between them but what the operating system
    keeps of the files. The phases:
  imports      Python and its libraries
  annotations  boxes and names of all pictures
  pictures     every JPEG decoded and resized, once; bytes kept in memory, on the GPU where there
      is one
  network      model, ImageNet weights, optimiser, and the first batch (on a GPU: its libraries
      start here; with --compiled: compiling)
  training     the epochs, without a look at the held-out pictures
  scoring      detections in all held-out pictures, and their mAP

`whole` is the run that counts: --size, --epochs and all pictures. `half` and `quarter` are one
epoch with a part of the pictures, `160` to `320` one epoch at that size; their mAP says nothing
and is not kept. `ten-SIZE` trains for as many epochs as fit in ten minutes, by the time that
the run SIZE took before. From `whole` follows what VOC07+12 (16,551 pictures to train on, 4,952
to score) would take with as many epochs: annotations, pictures, training and scoring grow with
their pictures, the rest is a constant. It is a prediction. Expected before measuring, on two
CPU cores: training takes over nine tenths of `whole`; time grows with the area of the picture.

Writes benchmarks/results/speedrun.json (on a GPU: speedrun_cuda.json).
"""
import time
START = time.perf_counter()
import argparse, json, subprocess, sys
from pathlib import Path

import course_lib.machine  # before fastai
import torch
sys.path.append(str(Path(__file__).resolve().parent / "experiments"))
import ladder  # noqa: E402
from fastai.callback.core import Callback, CancelValidException
from course_lib.data import Data, data_root, get_data
from course_lib.fast import memory_loaders
from course_lib.fpn import RetinaNet
from course_lib.metrics import mean_ap
from course_lib.recipe import EMA, Half, fast_learner, machine, one_cycle, write_json

SIZES = ("160", "192", "224", "256", "320")
VOC0712 = dict(train=16551, scored=4952)


class Clock:
    "Seconds since the last time that it was asked, by name of the phase."
    def __init__(self, device): self.device, self.last, self.phases = device, START, {}
    def __call__(self, phase):
        if self.device == "cuda": torch.cuda.synchronize()
        now = time.perf_counter()
        self.phases[phase], self.last = round(now - self.last, 2), now


class Unvalidated(Callback):
    "No look at the held-out pictures; after `EMA`, which exchanges the weights before and after."
    order = 60
    def before_validate(self): raise CancelValidException()


def one(args):
    "One run in this process."
    clock = Clock(args.device)
    clock("imports")
    data = get_data(args.data if Path(args.data).exists()
                    or args.data in ("voc2007", "voc0712", "pocket") else data_root() / args.data,
                    classes=ladder.ANIMALS if "animals" in args.data else None)
    if args.split == "test": data = Data(data.train, data.test, data.test, data.classes)
    data = Data(data.train[:round(len(data.train) * args.share)], data.valid, data.test,
                data.classes)
    clock("annotations")
    dls = memory_loaders(data, args.size, device=args.device)
    clock("pictures")
    model = RetinaNet(len(data.classes), args.size)
    learn = fast_learner(data, model, dls=dls)
    learn.freeze_to(1)
    if args.compiled: model.compile(dynamic=False)
    half = [Half()] if args.device == "cuda" and torch.cuda.is_bf16_supported() else []
    images, *truth = next(iter(dls.train))
    with torch.autocast(args.device, torch.bfloat16, enabled=bool(half)):
        pred = model.train()(images)
    learn.loss_func(pred, *truth).backward()
    learn.opt.zero_grad()
    clock("network")
    with learn.no_bar(), learn.no_logging():
        one_cycle(learn, args.epochs, cbs=[Unvalidated(), EMA(.99), *half])
        clock("training")
        preds, targets = learn.get_preds()
        ap = mean_ap(preds, targets, len(data.classes))
        clock("scoring")
    return dict(size=args.size, epochs=args.epochs, train_pictures=len(data.train),
                scored_pictures=len(data.valid), compiled=args.compiled,
                seconds=clock.phases, total_seconds=round(sum(clock.phases.values()), 1),
                map50=round(100 * float(ap.map), 2), machine=machine())


def predict(run):
    "Seconds for VOC07+12 at the size and with the epochs of a run."
    s, more = run["seconds"], VOC0712["train"] / run["train_pictures"]
    pictures = (s["pictures"] * (VOC0712["train"] + VOC0712["scored"])
                / (run["train_pictures"] + run["scored_pictures"]))
    return dict(VOC0712, size=run["size"], epochs=run["epochs"],
                seconds=round(s["imports"] + s["network"] + pictures
                              + (s["annotations"] + s["training"]) * more
+ s["scoring"] * VOC0712["scored"] / run["scored_pictures"]))


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="VOC2012-animals", help="a folder, the name of one where data "
                   "lives, or a name for get_data")
    p.add_argument("--size", type=int, default=320)
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--runs", nargs="+", choices=("whole", "half", "quarter", *SIZES,
                                                 *(f"ten-{s}" for s in SIZES)),
                   default=["whole", "half", "quarter", *SIZES])
    p.add_argument("--split", choices=("valid", "test"), default="valid", help="what is scored")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--compiled", action="store_true")
    p.add_argument("--share", type=float, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.share: return print(json.dumps(one(args)))
    out = (Path(__file__).parent / "results" / ("speedrun.json" if args.device == "cpu"
                                                else f"speedrun_{args.device}.json"))
    results = json.loads(out.read_text()) if out.exists() else {}
    for name in args.runs:
        share = dict(half=.5, quarter=.25).get(name, 1)
        size, epochs = ((int(name.removeprefix("ten-")) if name[-1].isdigit() else args.size),
                        (args.epochs if name == "whole" else 1))
        if name.startswith("ten-"):
            before = results.get(args.data, {}).get(str(size))
            if not before:
                p.error(f"{name} needs to know what an epoch takes: --runs {size} {name}")
            epochs = int((585 - before["total_seconds"] + before["seconds"]["training"])
                         / before["seconds"]["training"])
        command = [sys.executable, "-W", "ignore", __file__, "--share", str(share), "--data",
                   args.data, "--size", str(size), "--epochs", str(epochs),
                   "--split", args.split, "--device", args.device] + ["--compiled"] * args.compiled
        run = json.loads(subprocess.run(command, check=True, capture_output=True,
                                        text=True).stdout.splitlines()[-1])
        if epochs == 1: run.pop("map50")
        key = name + (", compiled" if args.compiled else "")
        results.setdefault(args.data, {})[key] = run
        if name == "whole": results[args.data][f"{key}: predicted for VOC07+12"] = predict(run)
        write_json(results, out)
        print(key, json.dumps(run["seconds"]), run["total_seconds"], "s", run.get("map50", ""),
              flush=True)


if __name__ == "__main__": main()
