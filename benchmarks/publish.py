"""Makes a detector that comes with the course out of a finished run: the weights in half
precision, and beside them a card that says what they learned from, how good they are, and at
what they are bad.

course_train --data data/VOC2012-animals --classes cat,cow,dog,horse,person,sheep
--size 320 --epochs 16 --out RUN                          # all on one line
python benchmarks/publish.py RUN animals --data data/VOC2012-animals

The card's numbers are those of the file as it is published, on the held-out pictures of the data.
"""
import argparse, json
from pathlib import Path

import torch

from course_lib.data import get_data
from course_lib.detect import predict
from course_lib.files import write_json
from course_lib.machine import data_root
from course_lib.metrics import KINDS, error_kinds, mean_ap
from course_lib.saving import WEIGHTS, load_detector, read_checkpoint, write_whole

TERMS = """The photographs are those of PASCAL VOC 2012 ([Everingham and others](
http://host.robots.ox.ac.uk/pascal/VOC/)). They come from flickr, and their use must respect
[flickr's terms](https://www.flickr.com/help/terms); the rights stay with those who took them. None
of them is passed on here: the file holds weights, names and anchors. The body began with the
ImageNet weights of EfficientNet-Lite0 (Apache 2.0), and the file has the course's licence."""


def halve(run, name):
    "The run's detector as a file of the package, its floats with 16 bits."
    state = read_checkpoint(run / "detector.pth")
    weights = {k: v.half() if v.is_floating_point() else v for k, v in state["model"].items()}
    assert all(v.isfinite().all() for v in weights.values() if v.is_floating_point())
    write_whole(state | dict(model=weights), WEIGHTS / f"{name}.pth")


def scores(name, data):
    "What the published file finds in the held-out pictures."
    model, classes = load_detector(name)
    found = predict(model, data.valid, score=.01)
    there = [dict(boxes=r.boxes, labels=r.labels, difficult=r.difficult) for r in data.valid]
    result, coco = (mean_ap(found, there, len(classes), style=style) for style in ("area", "coco"))
    sure = [{k: v[one["scores"] > .3] for k, v in one.items()} for one in found]
    kinds = error_kinds(sure, there, len(classes))
    counts = torch.bincount(torch.cat([k["kind"] for k in kinds]), minlength=len(KINDS)).tolist()
    sizes = {"under a tenth": (0, .1), "a tenth to a quarter": (.1, .25),
             "a quarter to a half": (.25, .5), "over a half": (.5, 2)}
    missed = torch.cat([k["missed"] for k in kinds])
    side = torch.cat([((r.boxes[:, 2:] - r.boxes[:, :2]).prod(1) / (r.size[0] * r.size[1])).sqrt()
                      for r in data.valid])
    counted = ~torch.cat([r.difficult for r in data.valid])
    by_size = {}
    for label, (low, high) in sizes.items():
        these = counted & (side >= low) & (side < high)
        by_size[label] = (int(these.sum()), round(100 * missed[these].float().mean().item()))
    return dict(map50=round(100 * result.map, 1), map_coco=round(100 * coco.stats[0].item(), 1),
                ap50={c: round(100 * ap, 1) for c, ap in zip(classes, result.ap.tolist())},
                errors=dict(zip(KINDS, counts)), missed_by_size=by_size)


def card(name, run, result, source):
    "The text beside the weights."
    s, worst = run["settings"], sorted(result["ap50"], key=result["ap50"].get)[:2]
    wrong = {k: n for k, n in result["errors"].items() if k not in ("right", "ignored")}
    table = "\n".join(f"| {c} | {ap:.1f} |" for c, ap in result["ap50"].items())
    sizes = "\n".join(f"| {k} of the picture's side | {n:,} | {share}% |"
                      for k, (n, share) in result["missed_by_size"].items())
    return f"""# {name}

A detector that comes with the course: `load_detector("{name}")`, or `course_predict {name}
PICTURE`.
It knows {len(result["ap50"])} things: {", ".join(result["ap50"])}.

**What it learned from.** {run["train_pictures"]:,} photographs of PASCAL VOC 2012's official train
split that show animals and people. `benchmarks/data/make_animals.py` makes the set from anybody's
own VOC 2012.

**How.** The recipe of lesson 13: {s["epochs"]} epochs at {s["size"]} px, batches of {s["bs"]}, one
run
with seed {s["seed"]}. It can be made again in one line:

    course_train --data data/{source} --classes {",".join(result["ap50"])} --size {s["size"]} \
--epochs {s["epochs"]} --out RUN && python benchmarks/publish.py RUN {name} --data data/{source}

**How good it is.** On {run["valid_pictures"]:,} photographs of the official val split, none of
which it
learned from, difficult objects left out: mAP {result["map50"]:.1f} at an IoU of .5 (area under the
curve), and {result["map_coco"]:.1f} as COCO counts. The same pictures were scored after each
epoch; no
setting was chosen by them.

| class | AP at an IoU of .5 |
| --- | ---: |
{table}

**What it is bad at.** Its weakest classes are {worst[0]} and {worst[1]}. Small objects are what it
misses
most at the usual threshold of .3. (Missed means that there is no answer for the object, not even
one
with a poor box or a wrong name.)

| side of the object | objects | missed |
| --- | ---: | ---: |
{sizes}

Of its answers above .3 on those pictures {result["errors"]["right"]:,} are right. The others are
wrong
for these reasons: {", ".join(f"{k} {n:,}" for k, n in sorted(wrong.items(), key=lambda x: -x[1]))}.
It knows nothing but its {len(result["ap50"])} classes, and may call a goat a sheep or a statue a
person.
Its photographs are from before 2012, chosen by the makers of VOC from what people had put on
flickr,
and nobody has measured whom or what it misses elsewhere. It is made for learning, and not for
decisions about anybody.

**Terms.** {" ".join(TERMS.replace("(" + chr(10), "(").split())}
"""


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, help="a folder that course_train wrote")
    p.add_argument("name", help="of the detector in the package")
    p.add_argument("--data", default="VOC2012-animals", help="as in course_train, or a "
                   "folder's name under the data root")
    args = p.parse_args()
    run = json.loads((args.run / "run.json").read_text())
    source = args.data if Path(args.data).exists() else data_root() / args.data
    halve(args.run, args.name)
    result = scores(args.name, get_data(source, classes=run["classes"]))
    (WEIGHTS / f"{args.name}.md").write_text(card(args.name, run, result, Path(args.data).name))
    kept = {k: run[k] for k in ("settings", "machine", "train_pictures", "valid_pictures")}
    seconds = round(sum(row["seconds"] for row in run["epochs"]), 1)
    result |= kept | dict(data=Path(args.data).name, train_seconds=seconds)
    write_json(result, Path(__file__).parent / "results" / f"{args.name}.json")
    print(json.dumps(result, indent=1))
