"""Time `detections` beside what torchvision's SSD and RetinaNet do after their network, and write
`results/detect.json`.

Run with `python benchmarks/timings/bench_detect.py` (about a minute on a quiet laptop CPU). A
batch of
32 pictures of 128 px with 20 classes; the offsets, anchors and logits are the same for all, and
so are the limits: scores above .05, at most 400 candidates a picture into NMS at an IoU of .5,
at most 100 out. RetinaNet's `postprocess_detections` gets all anchors as one level, and must
give the same answers as ours (checked before timing). SSD's has another rule: a softmax over
the classes and a background column (here of zeros), and its limit is one for each class, so it
gets 400 / 20 = 20. Its answers differ, and it is there for scale.

Two distributions of logits: "trained", a few confident answers (3 objects of 6 answers each)
over a sure background, and "untrained", logits around 0, where nearly every answer is above
.05. Each repeat times all three, in turning order, so that a machine that slows down slows all.
Reported: medians, and the median of the ratios ours / theirs of each repeat (below 1: ours is
faster), with quartiles. With one thread and with two. The load before the start is written
down.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torchvision
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from course_lib.anchors import VARIANCES, make_anchors
from course_lib.detect import detections

B, C, SIZE, SCORE, IOU, CANDIDATES, TOP = 32, 20, 128, .05, .5, 400, 100
CODER = BoxCoder(weights=tuple(1 / v for v in VARIANCES for _ in range(2)))
RULES = dict(score_thresh=SCORE, nms_thresh=IOU, detections_per_img=TOP, box_coder=CODER)
SIZES = {189: 40, 1890: 30, 8732: 10}


def retinanet(offsets, logits, anchors):
    rules = SimpleNamespace(topk_candidates=CANDIDATES, **RULES)
    return RetinaNet.postprocess_detections(rules, dict(cls_logits=[logits],
                                                        bbox_regression=[offsets]), [[anchors]] * B,
                                            [(SIZE, SIZE)] * B)


def ssd(offsets, logits, anchors):
    """The background's column, whose logits are 0, is part of the head's output there: `logits`
    must have it, `[B,A,1+C]`."""
    rules = SimpleNamespace(topk_candidates=CANDIDATES // C, **RULES)
    return SSD.postprocess_detections(rules, dict(cls_logits=logits, bbox_regression=offsets),
                                      [anchors] * B, [(SIZE, SIZE)] * B)


def ours(offsets, logits, anchors):
    return detections((offsets, logits), anchors, SIZE, SCORE, IOU, CANDIDATES, TOP)


def example(n, kind):
    "Offsets, logits and `n` anchors: those of the course, or as many at random."
    g = torch.Generator().manual_seed(n)
    centre, side = torch.rand(n, 2, generator=g) * SIZE, 10 + 60 * torch.rand(n, 2, generator=g)
    anchors = (make_anchors(SIZE) if n == 189 else torch.cat([centre - side / 2, centre + side / 2],
                                                             1))
    offsets, logits = torch.randn(B, n, 4, generator=g), torch.randn(B, n, C, generator=g)
    if kind == "untrained": return offsets, logits * .5, anchors
    logits = logits * .8 - 6
    for picture in range(B):
        for _ in range(3):
            logits[picture, torch.randint(n, (6,), generator=g),
                   torch.randint(C, (1,), generator=g)] = torch.randn(6, generator=g) + 1
    return offsets, logits, anchors


def same(a, b):
    "Raise unless two lists of detections are the same."
    for x, y in zip(a, b, strict=True):
        for key in ("boxes", "scores", "labels"):
            torch.testing.assert_close(x[key], y[key], rtol=1e-5, atol=1e-4)


def compare(n, kind, repeats):
    "Median milliseconds of the three, and the medians of the ratios."
    offsets, logits, anchors = example(n, kind)
    with_background = torch.cat([torch.zeros(B, n, 1), logits], 2)
    calls = {"ours": lambda: ours(offsets, logits, anchors),
             "retinanet": lambda: retinanet(offsets, logits, anchors),
             "ssd": lambda: ssd(offsets, with_background, anchors)}
    answers = {name: call() for name, call in calls.items()}
    same(answers["ours"], answers["retinanet"])
    times, names = {name: [] for name in calls}, list(calls)
    for i in range(repeats):
        for name in names[i % 3:] + names[:i % 3]:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    row = {f"{name}_ms": round(1e3 * statistics.median(t), 2) for name, t in times.items()}
    for name in names[1:]:
        ratios = [x / y for x, y in zip(times["ours"], times[name])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row |= {f"ratio_{name}": round(middle, 2),
                f"ratio_{name}_quartiles": [round(low, 2), round(high, 2)]}
    found = {name: sum(len(x["boxes"]) for x in a) / B for name, a in answers.items()}
    return (row
            | {"answers_above_threshold_a_picture": round((logits.sigmoid() > SCORE).sum().item()
                                                          / B, 1),
               "detections_a_picture": {k: round(v, 1) for k, v in found.items()},
               "repeats": repeats})


def main(out):
    results, default, busy = {}, torch.get_num_threads(), os.getloadavg()[0]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rows = results[f"{threads} thread{'s' * (threads > 1)}"] = {}
        for n, repeats in SIZES.items():
            for kind in ("trained", "untrained"):
                compare(n, kind, 3)
                r = rows[f"{n} anchors, {kind}"] = compare(n, kind, repeats)
                print(f"{threads} threads  {n:>5} {kind:10} ours {r['ours_ms']:>8} ms   RetinaNet "
                      f"{r['retinanet_ms']:>8} ms   SSD {r['ssd_ms']:>8} ms   ratios "
                      f"{r['ratio_retinanet']} {r['ratio_ssd']}", flush=True)
    report = {"what": "detections of a batch of 32 beside torchvision's postprocess_detections; "
              "ratio = ours / torchvision, below 1 is faster",
              "machine": {"processor": platform.machine(), "cpus": os.cpu_count(),
                          "default_threads": default, "load_before": round(busy, 2),
                          "device": "cpu"},
              "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__,
                           "python": platform.python_version()},
              "rules": dict(classes=C, score=SCORE, iou=IOU, candidates=CANDIDATES, top=TOP,
                            ssd_candidates_a_class=CANDIDATES // C), "results": results}
    Path(out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = Path(__file__).resolve().parents[1] / "results"
    parser.add_argument("--out", default=results / "detect.json",
                        help="where to write the JSON")
    main(parser.parse_args().out)
