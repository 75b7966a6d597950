"""What a training step without a GPU costs: the backbone's forward and backward pass in three
set-ups, side by side.

    python benchmarks/timings/bench_cpu_step.py        # writes benchmarks/results/cpu_step.json

`plain` is PyTorch as it comes; `channels_last` is what `backbone` and `dataloaders` use;
`keep_memory` adds what `dataloaders` does on a CPU. Each runs in a process of its own, in turn,
several times; the ratios are medians of turns. Expected before measuring: channels_last helps
most (depthwise convolutions), keep_memory saves the page faults of some hundred megabytes a
step, which cost more on virtual machines.
"""
import json, os, statistics, subprocess, sys, time
from pathlib import Path

SETUPS = ["plain", "channels_last", "keep_memory"]


def one(setup, size, steps=4, batch=16):
    "Pictures a second in this process."
    import torch
    from course_lib.learn import backbone, keep_memory
    layout = torch.contiguous_format if setup == "plain" else torch.channels_last
    if setup == "keep_memory": keep_memory()
    torch.manual_seed(0)
    body, x = (backbone().train().to(memory_format=layout),
               torch.rand(batch, 3, size, size).to(memory_format=layout))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        body(x).mean().backward()
        times.append(time.perf_counter() - start)
    return batch / statistics.median(times[1:])


if __name__ == "__main__":
    if len(sys.argv) == 3: print(one(sys.argv[1], int(sys.argv[2])))
    else:
        import torch
        result = dict(cores=os.cpu_count(), torch=torch.__version__.split("+")[0], batch=16,
                      pictures_per_second={}, times_plain={})
        for size in (128, 224):
            turns = [{s: float(subprocess.run([sys.executable, "-W", "ignore", __file__, s,
                                               str(size)], check=True, capture_output=True,
                                              text=True).stdout.split()[-1]) for s in SETUPS}
                     for _ in range(3)]
            result["pictures_per_second"][size] = {s: round(statistics.median(t[s] for t in turns),
                                                            1) for s in SETUPS}
            result["times_plain"][size] = {
                s: round(statistics.median(t[s] / t["plain"] for t in turns), 2) for s in SETUPS}
        (Path(__file__).resolve().parents[1] / "results" / "cpu_step.json").write_text(
            json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))
