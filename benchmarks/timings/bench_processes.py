"""The same detector trained by one process and by two: is its mAP the same, within the spread over
seeds?

    python benchmarks/timings/bench_processes.py  # writes benchmarks/results/processes.json

Both by the command: `course_train`, and `torchrun --nproc-per-node 2 --no-python course_train`
with half the batch in each process, so that a step has as many pictures; two CPU processes talk
over gloo, GPUs over NCCL. Each process of two sees half of the pictures of an epoch, in batches
of its own, whose means and variances it keeps to itself; so equal results are not to be
expected, equal scores are. On the CPU all runs together have as many threads as there are
cores. A run that is in the results already is not repeated.
"""
import argparse, json, os, shutil, statistics, subprocess, sys, tempfile
from pathlib import Path

import course_lib.machine
from course_lib.data import data_root
from course_lib.recipe import write_json

OUT = Path(__file__).resolve().parents[1] / "results" / "processes.json"


def train(processes, seed, args, folder):
    "The run's JSON."
    data = (args.data if Path(args.data).exists() or args.data == "pocket"
            else str(data_root() / args.data))
    here = Path(sys.executable).parent
    command = [str(here / "course_train"), "--data", data, "--size", str(args.size), "--epochs",
               str(args.epochs), "--bs", str(32 // processes), "--seed", str(seed), "--out",
               str(folder)]
    if "animals" in args.data: command += ["--classes", "cat,cow,dog,horse,person,sheep"]
    if processes > 1:
        command = [str(here / "torchrun"), "--nproc-per-node", str(processes), "--no-python",
                   *command]
    env = (os.environ | dict(OMP_NUM_THREADS=str(max(1, os.cpu_count() // processes)),
                             PYTHONWARNINGS="ignore"))
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr[-2000:])
    return json.loads((folder / "run.json").read_text())


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="VOC2012-animals", help="a folder, the name of one where data "
                   "lives, or pocket")
    p.add_argument("--size", type=int, default=128)
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = p.parse_args()
    results = json.loads(OUT.read_text()) if OUT.exists() else {}
    ours = results.setdefault(Path(args.data).name, {})
    for seed in args.seeds:
        for processes in (1, 2):
            key = f"{processes}-{seed}"
            if key not in ours:
                folder = Path(tempfile.mkdtemp())
                run = train(processes, seed, args, folder)
                shutil.rmtree(folder)
                ours[key] = dict(processes=processes, seed=seed,
                                 map50=round(100 * run["epochs"][-1]["map"], 2),
                                 seconds=round(sum(e["seconds"] for e in run["epochs"])),
                                 size=args.size, epochs=args.epochs, machine=run["machine"])
                write_json(results, OUT)
            print(key, ours[key]["map50"], ours[key]["seconds"], "s", flush=True)
    for processes in (1, 2):
        found = [r["map50"] for r in ours.values() if r["processes"] == processes]
        print(f"{processes}: mean {statistics.mean(found):.1f}, {min(found)} to {max(found)}")


if __name__ == "__main__": main()
