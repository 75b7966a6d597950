"""Time `mean_ap` (COCO style) beside faster-coco-eval and pycocotools, and write
`results/map.json`.

Run with `python benchmarks/timings/bench_map.py` (a few minutes on a laptop CPU). It needs `pip
install
faster-coco-eval pycocotools`. All start from the same thing, which a training loop has in hand:
for each picture a dict of tensors for its detections and one for its objects. The whole path is
the time from there to the twelve numbers. The peers want lists of dicts in COCO's form, so
their path has three parts: `convert` (tensors to those lists, with one `tolist()` for each
tensor), `index` (`COCO(...)`, `loadRes`) and `evaluate` (`evaluate`, `accumulate`,
`summarize`). Ours has `read` (check, concatenate, sort) and `evaluate`, the rest. Whoever has
files in COCO's form already saves `convert`: compare ours with `index` + `evaluate` then. Each
repeat times all, one after the other, in alternating order. Reported: medians of seconds, and
of the ratios ours / faster-coco-eval of each repeat (below 1: ours is faster). Everything on
one thread: faster-coco-eval uses one for boxes.

Predicted before this script ran for the first time, knowing one timing of ours by hand (1.6 s
for the largest case) and none of the peers: whole path ours / faster-coco-eval .05 to .3,
evaluation alone .1 to .8; time grows in proportion to pictures and to detections, and hardly
with classes.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from course_lib import metrics


def generate(pictures, detections, classes, seed=42):
    """0 to 14 objects a picture, and guesses around them: 40% near, the others far; half of them
    with the right class."""
    g, preds, targets = torch.Generator().manual_seed(seed), [], []
    for _ in range(pictures):
        n = int(torch.randint(15, (1,), generator=g))
        corner, size = (torch.rand(n, 2, generator=g) * 400,
                        16 * 2 ** (torch.rand(n, 2, generator=g) * 4))
        boxes, labels = (torch.cat([corner, corner + size], 1),
                         torch.randint(classes, (n,), generator=g))
        k = torch.randint(max(n, 1), (detections,), generator=g)
        around, right = ((boxes[k], labels[k]) if n
                         else (torch.tensor([[50., 50, 150, 150]]).repeat(detections, 1),
                               torch.zeros(detections).long()))
        far = torch.where(torch.rand(detections, 1, generator=g) < .6, .8, .12)
        guess = (around + far * (torch.rand(detections, 4, generator=g) * 2 - 1)
                 * (around[:, 2:] - around[:, :2]).repeat(1, 2))
        guess = torch.cat([torch.minimum(guess[:, :2], guess[:, 2:]),
                           torch.maximum(guess[:, :2], guess[:, 2:]) + 1], 1)
        named = torch.where(torch.rand(detections, generator=g) < .5, right,
                            torch.randint(classes, (detections,), generator=g))
        preds.append(dict(boxes=guess, scores=torch.rand(detections, generator=g), labels=named))
        targets.append(dict(boxes=boxes, labels=labels))
    return preds, targets


def in_coco_form(preds, targets, classes):
    "The same as lists of dicts."
    truth, results = [], []
    for i, (p, t) in enumerate(zip(preds, targets)):
        for (x0, y0, x1, y1), label in zip(t["boxes"].double().tolist(), t["labels"].tolist()):
            truth.append(dict(id=len(truth) + 1, image_id=i, category_id=label,
                              bbox=[x0, y0, x1 - x0, y1 - y0], area=(x1 - x0) * (y1 - y0),
                              iscrowd=0))
        for (x0, y0, x1, y1), label, score in zip(p["boxes"].double().tolist(),
                                                  p["labels"].tolist(), p["scores"].tolist()):
            results.append(dict(image_id=i, category_id=label, bbox=[x0, y0, x1 - x0, y1 - y0],
                                score=score))
    images = [dict(id=i, width=640, height=640) for i in range(len(targets))]
    return dict(images=images, annotations=truth,
                categories=[dict(id=c, name=str(c)) for c in range(classes)]), results


def theirs(coco, evaluation, preds, targets, classes):
    "Twelve numbers of a peer, and seconds of each part."
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        truth, results = in_coco_form(preds, targets, classes)
        converted = time.perf_counter()
        gt = coco()
        gt.dataset = truth
        gt.createIndex()
        e = evaluation(gt, gt.loadRes(results), "bbox")
        indexed = time.perf_counter()
        e.evaluate(), e.accumulate(), e.summarize()
        end = time.perf_counter()
    return (np.asarray(e.stats)[:12], dict(convert=converted - start, index=indexed - converted,
                                           evaluate=end - indexed, whole=end - start))


def ours(preds, targets, classes):
    "Our twelve numbers, and seconds of each part."
    spent, read = [], metrics._read
    def timed(*args, **kwargs):
        start = time.perf_counter()
        value = read(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return value
    metrics._read = timed
    try:
        start = time.perf_counter()
        stats = metrics.mean_ap(preds, targets, classes, style="coco").stats.numpy()
        whole = time.perf_counter() - start
    finally: metrics._read = read
    return stats, dict(read=spent[0], evaluate=whole - spent[0], whole=whole)


def compare(pictures, detections, classes, repeats, slow):
    "Medians of seconds and of ratios, for one case."
    from faster_coco_eval import COCO, COCOeval_faster
    preds, targets = generate(pictures, detections, classes)
    programs = {"ours": lambda: ours(preds, targets, classes),
                "faster-coco-eval": lambda: theirs(COCO, COCOeval_faster, preds, targets, classes)}
    if slow:
        from pycocotools.coco import COCO as slow_coco
        from pycocotools.cocoeval import COCOeval as slow_evaluation
        programs["pycocotools"] = lambda: theirs(slow_coco, slow_evaluation, preds, targets,
                                                 classes)
    times, stats = {name: [] for name in programs}, {}
    for k in range(repeats):
        for name in sorted(programs, reverse=k % 2 == 1):
            if name == "pycocotools" and k > 0: continue
            stats[name], seconds = programs[name]()
            times[name].append(seconds)
    worst = max(float(np.abs(stats["ours"] - s).max()) for s in stats.values())
    assert worst < 1e-6, f"our numbers differ from a peer's by {worst}"
    middle = {name: {part: round(statistics.median(t[part] for t in rows), 3) for part in rows[0]}
              for name, rows in times.items()}
    pairs = list(zip(times["ours"], times["faster-coco-eval"]))
    ratio = {"whole": [a["whole"] / b["whole"] for a, b in pairs],
             "evaluate": [a["evaluate"] / b["evaluate"] for a, b in pairs],
             "ours whole / theirs index + evaluate": [a["whole"] / (b["index"] + b["evaluate"])
                                                      for a, b in pairs]}
    return {"pictures": pictures, "detections": detections, "classes": classes, "seconds": middle,
            "largest_difference": worst,
            "ratio_ours_to_faster_coco_eval": {part: round(statistics.median(r), 3) for part,
                                               r in ratio.items()}, "repeats": repeats}


def main(out):
    torch.set_num_threads(1)
    busy = os.getloadavg()[0]
    ours(*generate(50, 100, 20), 20)
    cases = {"goal": [(5000, 100, 20, 3, False)],
             "pictures": [(n, 100, 20, 3, n == 500) for n in (500, 1000, 2000)],
             "detections": [(1000, n, 20, 3, False) for n in (10, 30, 100, 300)],
             "classes": [(1000, 100, n, 3, False) for n in (1, 5, 20, 80)]}
    results = {}
    for name, rows in cases.items():
        results[name] = []
        for row in rows:
            r = compare(*row)
            results[name].append(r)
            print(f"{name:11} {r['pictures']:>5} pictures {r['detections']:>4} detections "
                  f"{r['classes']:>3} classes  " +
                  "  ".join(f"{k} {v['whole']:.2f} s (evaluate {v['evaluate']:.2f})" for k,
                            v in r["seconds"].items())
                  + f"  ratio {r['ratio_ours_to_faster_coco_eval']['whole']}", flush=True)
    report = {"what": "mean_ap(style='coco') beside faster-coco-eval and pycocotools: seconds, "
              "medians; ratio = ours / faster-coco-eval, below 1 is faster",
              "predicted_for_the_goal": {"whole": [.05, .3], "evaluate": [.1, .8]},
              "machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "threads": 1,
                          "load_before": round(busy, 2), "device": "cpu"},
              "versions": {"python": platform.python_version(),
                           **{p: version(p) for p in ("torch", "numpy", "faster-coco-eval",
                                                      "pycocotools")}},
              "results": results}
    Path(out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = Path(__file__).resolve().parents[1] / "results"
    parser.add_argument("--out", default=results / "map.json",
                        help="where to write the JSON")
    main(parser.parse_args().out)
