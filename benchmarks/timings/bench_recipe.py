"""The recipe beside torchvision's RetinaNet: the same photographs, backbone, machine and threads,
at equal epochs, at equal time, and in a tenth of the time.

    # first the yardstick, 8 epochs at 224 px
    python benchmarks/experiments/many_objects.py --data VOC2012-animals --models torchvision
    python benchmarks/timings/bench_recipe.py  # writes benchmarks/results/recipe.json

`tenth`: 160 px, in a tenth of the yardstick's training time. `equal`: 224 px, the yardstick's 8
epochs. `full`: 224 px, its training time. The number of epochs that fits is worked out from ten
steps of ours, timed at the start. Ten steps of torchvision's are timed before and after every
run, so that a machine whose speed has changed since the yardstick was measured shows. All are
the model and settings of `course_train` (pyramid, ATSS, GIoU, mirror images, crop, colour,
averaged weights, one cycle), scored once, at the end, on the official val split. `ssd` trains
torchvision's SSD head on the same backbone, for scale.
"""
import argparse, json, os, sys, time
from pathlib import Path

import course_lib.machine  # before fastai
import torch
sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))
import bench_step, ladder  # noqa: E402
from course_lib.data import data_root, get_data

HERE = Path(__file__).resolve().parents[1] / "results"
OURS = dict(ladder.START, net="pyramid", loss="focal", assign="atss", boxes="giou", flip=.5,
            crop=.5, color=.2, ema=.99)


def speed(setup, size, steps=10):
    "Pictures a second."
    step = bench_step.make_step(setup, size, "cuda" if torch.cuda.is_available() else "cpu")
    for _ in range(2): step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available(): torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return bench_step.BATCH / sorted(times)[steps // 2]


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", help="of tenth, equal, full; default: all")
    p.add_argument("--data", default="VOC2012-animals", help="a folder, or the name of one where "
                   "data lives")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    data = get_data(args.data if Path(args.data).exists() else data_root() / args.data,
                    classes=ladder.ANIMALS)
    stored = json.loads((HERE / "many_objects.json").read_text())
    stored = stored.get("VOC2012-animals", {}).get("torchvision")
    if not stored:
        p.error("the yardstick is missing: python benchmarks/experiments/many_objects.py --data "
                "VOC2012-animals --models torchvision")
    out = HERE / "recipe.json"
    results = json.loads(out.read_text()) if out.exists() else {}
    results["torchvision"] = {k: stored[k] for k in ("map50", "map50_11pt", "map_coco", "ap50",
                                                     "train_seconds", "settings", "machine")}
    for name in args.runs or ("tenth", "equal", "full"):
        size = 160 if name == "tenth" else 224
        theirs, ours = speed("torchvision", 224), speed("ours", size)
        seconds = stored["train_seconds"] / (10 if name == "tenth" else 1)
        epochs = (stored["settings"]["torchvision_epochs"] if name == "equal"
                  else max(1, int(seconds * ours / len(data.train))))
        print(f"{name}: torchvision {theirs:.1f} pictures/s, ours {ours:.1f} at {size} px; "
              f"{epochs} epochs", flush=True)
        result = ladder.run("best", args.seed, data, dict(OURS, size=size, epochs=epochs))
        for key in ("rung", "name", "on"): result.pop(key)
        result["share_of_torchvisions_seconds"] = round(result["train_seconds"]
                                                        / stored["train_seconds"], 3)
        result["torchvision_pictures_per_second"] = dict(before=round(theirs, 1),
                                                         after=round(speed("torchvision", 224), 1))
        results[name] = result
        print(name, result["map50"], result["mirrored"]["map50"], result["train_seconds"], "s",
              result["torchvision_pictures_per_second"], flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__": main()
