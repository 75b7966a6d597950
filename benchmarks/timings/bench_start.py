"""What lesson 00 trains, with three seeds, and what its exercises come to.

    python benchmarks/timings/bench_start.py        # writes benchmarks/results/start.json

`page` is the training of the page: seconds from the call of `train` to its end, mAP@.5 on the
300
held-out pictures of pocket, in percent, that of each class, and that of the answers that are
surer than .5. `small` is the second exercise.
"""
import json, tempfile, time
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
from course_lib.data import get_data
from course_lib.machine import cpu_count
from course_lib.recipe import train

OUT = Path(__file__).resolve().parents[1] / "results" / "start.json"
RUNS = dict(page=dict(size=128, epochs=6), small=dict(size=96, epochs=4))


def measure(data, settings, seed):
    start = time.perf_counter()
    learn = train(data, tempfile.mkdtemp(), seed=seed, watch=3, **settings)
    seconds = time.perf_counter() - start
    scored = learn.evaluate()
    return dict(seed=seed, **settings, seconds=round(seconds, 1),
                map=round(100 * float(scored.map), 1),
                map_surer_than_half=round(100 * float(learn.evaluate(score=.5).map), 1),
                ap={name: round(100 * float(ap), 1)
                    for name, ap in zip(learn.classes, scored.ap)})


if __name__ == "__main__":
    data, results = get_data("pocket"), dict(cores=cpu_count())
    for name, settings in RUNS.items():
        results[name] = []
        for seed in range(3):
            results[name].append(measure(data, settings, seed))
            print(name, results[name][-1], flush=True)
            OUT.write_text(json.dumps(results, indent=1) + "\n")
