"""Time `pairwise_iou` beside `torchvision.ops.box_iou`, and write `results/boxes.json`.

Run with `python benchmarks/timings/bench_boxes.py` (about half a minute on a laptop CPU). Each
repeat
times both functions one after the other, in alternating order, so that a machine that slows
down slows both. Reported: medians, and the median of the ratios ours / torchvision of each
repeat (below 1: ours is faster). Measured with PyTorch's default number of threads and with
one. On a machine that has other work to do only the latter means much: each operation on
several threads ends with a wait for the slowest, and ours is more operations. The load before
the start is written down.

Predicted before this script ran for the first time, after having timed drafts of the function
by hand: torchvision makes tables [N, M, 2], whose two columns it then reads with a stride; ours
makes more tables, but dense ones [N, M], three of them changed in place. For a small table (189
x 20) the time is the overhead of the calls, of which ours has more: ratio 0.8 to 1.1. For
larger ones memory decides: 0.6 to 0.9. For 32 pictures torchvision is called once for each:
with 189 anchors ours saves most of that overhead, 0.1 to 0.3; with 8,732 anchors our tables (22
MB each) leave the cache and torchvision's do not, 0.6 to 1.0. Newer versions of torchvision
also take a batch: then its tables leave the cache, too, and the ratio should be that of the
larger single pictures, 0.5 to 0.9.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import torchvision

from course_lib.boxes import pairwise_iou

PREDICTED = {"189 x 20": [.8, 1.1], "1890 x 50": [.6, .9], "8732 x 20": [.6, .9],
             "32 pictures, 189 x 20, torchvision in a loop": [.1, .3], "32 pictures, 8732 x 20, "
             "torchvision in a loop": [.6, 1.0],
             "32 pictures, 189 x 20, torchvision batched": [.6, .9], "32 pictures, 8732 x 20, "
             "torchvision batched": [.5, .8]}


def random_boxes(*shape):
    "Boxes with sides of 8 to 128 pixels, centred in a picture of 256 x 256."
    centre, size = torch.rand(*shape, 2) * 256, 8 + torch.rand(*shape, 2) * 120
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def looped(a, b):
    "torchvision, one picture after the other."
    return torch.stack([torchvision.ops.box_iou(a, boxes) for boxes in b])


def compare(a, b, repeats, theirs):
    "Median microseconds of ours and torchvision's, and the median of the ratios."
    torch.testing.assert_close(pairwise_iou(a, b), theirs(a, b))
    functions, times = ({"ours": pairwise_iou, "torchvision": theirs},
                        {"ours": [], "torchvision": []})
    for i in range(repeats):
        for name in sorted(functions, reverse=i % 2 == 1):
            start = time.perf_counter()
            functions[name](a, b)
            times[name].append(time.perf_counter() - start)
    ratios = [x / y for x, y in zip(times["ours"], times["torchvision"])]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {"ours_us": round(1e6 * statistics.median(times["ours"])),
            "torchvision_us": round(1e6 * statistics.median(times["torchvision"])),
            "ratio": round(statistics.median(ratios), 2),
            "ratio_quartiles": [round(low, 2), round(high, 2)], "repeats": repeats}


def main(out):
    torch.manual_seed(42)
    batched = torchvision.ops.box_iou
    cases = [((189,), (20,), 1000, batched), ((1890,), (50,), 600, batched),
             ((8732,), (20,), 400, batched),
             ((189,), (32, 20), 200, looped), ((8732,), (32, 20), 40, looped),
             ((189,), (32, 20), 200, batched), ((8732,), (32, 20), 40, batched)]
    results, default, busy = {}, torch.get_num_threads(), os.getloadavg()[0]
    for threads in (default, 1):
        torch.set_num_threads(threads)
        rows = results["1 thread" if threads == 1 else f"{threads} threads (default)"] = {}
        for name, (a, b, repeats, theirs) in zip(PREDICTED, cases):
            a, b = random_boxes(*a), random_boxes(*b)
            compare(a, b, max(4, repeats // 20), theirs)
            r = rows[name] = compare(a, b, repeats, theirs) | {"predicted_ratio": PREDICTED[name]}
            print(f"{threads} threads  {name:46} ours {r['ours_us']:>7} us   torchvision "
                  f"{r['torchvision_us']:>7} us   ratio {r['ratio']}")
    report = {"what": "pairwise_iou beside torchvision.ops.box_iou; ratio = ours / torchvision, "
              "below 1 is faster",
              "machine": {"processor": platform.machine(), "cpus": os.cpu_count(),
                          "default_threads": default, "load_before": round(busy, 2),
                          "device": "cpu"},
              "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__,
                           "python": platform.python_version()},
              "results": results}
    Path(out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = Path(__file__).resolve().parents[1] / "results"
    parser.add_argument("--out", default=results / "boxes.json",
                        help="where to write the JSON")
    main(parser.parse_args().out)
