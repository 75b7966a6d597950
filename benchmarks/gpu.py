"""What this course does on a GPU, measured in one run of under eight minutes, so that an hour on a
rented card, or ten minutes on a borrowed one, are used well.

    python benchmarks/gpu.py --pack FOLDER --photos VOC2012-animals   # here: what must be carried
    python benchmarks/gpu.py --setup FOLDER                           # there: unpack and install
    python benchmarks/gpu.py --packed FOLDER --out OUT                # there: measure
    python benchmarks/gpu.py --out OUT --data FOLDER_WITH_PHOTOS      # with everything installed
    python benchmarks/gpu.py --out OUT --device cpu --tiny            # the rehearsal, a minute

Nothing is downloaded while it measures, and nbs/ may be missing. The parts, in order of worth:

  agree     the library gives on the GPU what it gives on the CPU (transforms, match, losses,
            detections, a step), and nothing in a step makes the host wait for the GPU
  speedrun  JPEG files to mAP at 288 px, phases apart, and the seconds to 65, 70 and 72 mAP
  step      a training step beside torchvision's RetinaNet on the same backbone, 32 and 128
            pictures of 224 px: pictures a second, kernel launches, waits, peak memory; float32,
            bf16, compiled, and captured as one CUDA graph
  loss      match and loss beside torchvision's SSD and RetinaNet, 189 to 20,000 anchors
  predict   pictures a second of the detector that comes with the course: float32, bf16,
            captured, compiled, from files, and ONNX Runtime's CUDA provider where there is one
  lessons   peak memory and seconds an epoch of the lessons' models, on pocket, which is drawn
            there

A part is made of units. OUT/gpu-PART.json is written after each unit, whole or not at all, with
what was predicted beside what was found. What is there already, from a card of the same name, is
not measured again, so the same command goes on after whatever stopped it, and --again PART
measures a part anew. A unit that fails is kept with its error and traceback, and the next one
follows; one that kills its process or leaves the GPU unusable costs a new process, and no more.
Every part has a time limit, to which is added what the parts before it did not need. A unit that
would not fit into the time left is left out and named: call again for it. OUT/gpu.log has what
the processes said.

How time is measured. Steps and calls are warmed up before. A step is the time between two CUDA
events, one before each step of a queue of steps, so the host's work is hidden where the GPU is
the slower one, and seen where it is not; a call of `loss` and `predict` begins and ends with a
synchronisation. Numbers are medians. Launches, copies to the host and synchronisations are those
that the profiler sees in one step, less what it sees in none; `busy` is the share of the step in
which a kernel ran.

How `speedrun` finds the seconds to an mAP without stopping to look. Every epoch ends with a
synchronisation and a copy of the averaged weights, on the GPU, which takes a millisecond. When
training is over, these copies are scored, those that bisection asks for: the averaged weights of
a run get better from epoch to epoch, but for a little noise. `seconds_to` counts from the first
line of this file to the end of that epoch (imports, annotations, decoding, network, training);
`scoring`, one look at the held-out pictures, is stated apart. One number is not in there: a run
that is planned to stop at that mAP gets there sooner, since its rate falls sooner. This is why
there are several lengths of run. AP at an IoU of .5, area under the curve, difficult objects
ignored, six classes, 1,697 photographs to learn from and 1,329 to be judged by; each setting is a
process of its own. Photographs packed at 288 px are a little softer than the 400 px ones.
"""
import time
START = time.perf_counter()
import argparse, gc, hashlib, json, os, platform, queue, signal, subprocess, sys, threading
import traceback
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
# seconds that each part may take, and what the parts before it have left of theirs
PARTS = dict(agree=60, speedrun=145, step=115, loss=35, predict=50, lessons=60)

# Written before the first run on a GPU, for one of the size of an H100 with 16 processor cores.
PREDICTED = dict(
    agree="Every unit agrees: matches are equal but for at most 1 anchor in 10,000 (sums are "
          "rounded in another order), losses and gradients to 1e-4 in float32 without TF32, the "
          "bf16 loss to 2%, mAP to half a point. No wait in a step and none in an epoch.",
    speedrun="64 x 24: 73 to 75 mAP after 30 to 40 s in all, of which imports 6 to 10, decoding 2 "
             "to 4, network 3 to 6, training 13 to 18 (648 steps of 20 to 27 ms, which the host "
             "needs to launch them), scoring 3 to 5. 65 mAP a third of the way through training, "
             "70 after half, 72 after two thirds. 64 x 8: 70 to 72 mAP, 5 to 6 s of training. On "
             "two CPU cores 8 epochs at 320 px gave 71.8 in 681 s: 20 times less here.",
    step="Ours at 32: 1,200 to 1,600 launches in float32, a quarter more in bf16, no wait; "
         "torchvision's: 6,000 to 8,000 launches, 250 waits (8 a picture). So 3 to 4 times its "
         "pictures a second at 32 and 5 to 7 at 128, where its launches grow with the batch and "
         "ours do not. The host is the bottleneck at 32 (busy under .5): bf16 gains nothing "
         "there, compiling a half, a captured graph doubles or trebles it. At 128 the GPU is: "
         "bf16 gains a half. Peak memory of ours half of torchvision's. 30 objects a picture add "
         "300 launches, since on a GPU strongest_first takes a round for each padded slot.",
    loss="Ours does not depend on the number of pictures in calls: 2 to 4 ms for forward and "
         "backward up to 8,732 anchors, torchvision's 40 to 80 ms: 15 to 25 times. At 20,000 "
         "anchors both move more bytes: 10 times.",
    predict="One picture 8 to 12 ms eager, which is all launches, 2 ms captured; 32 pictures 2,500 "
            "a second eager, 6,000 captured; from files 16 times fewer than that (decoding, one "
            "thread).",
    lessons="No lesson needs more than 2 GB; an epoch on pocket takes 2 to 4 s with loader "
            "processes and under 1 s from memory, so any lesson trains in under a minute.")


# ---------------------------------------------------------------- files

def write(content, path):
    "A JSON file, whole or not at all."
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def read(path):
    try: return json.loads(path.read_text())
    except (OSError, ValueError): return {}


def library():
    "A name for the state of the code that was measured."
    digest = hashlib.sha256()
    for file in sorted((HERE.parent / "course_lib").glob("*.py")): digest.update(file.read_bytes())
    return digest.hexdigest()[:10]


def environment(packed):
    "Variables for the processes that measure: where code, data and carried packages are."
    env, path = dict(os.environ), [HERE.parent, HERE]
    if packed:
        path.insert(0, packed / "site")
        env["COURSE_DATA"] = str(packed / "data")
    env["PYTHONPATH"] = os.pathsep.join([*map(str, path), *filter(None, [env.get("PYTHONPATH")])])
    return env | dict(HF_HUB_OFFLINE="1", MPLBACKEND="agg", PYTHONUNBUFFERED="1")


# ---------------------------------------------------------------- the process in charge

class Stopped(Exception): "A process that measures has ended before its time."


def follow_lines(process, until):
    """Print what the worker prints until it ends; Stopped with the part and the unit that it was
    at, and the reason, if it is not over in time or dies."""
    lines, part, unit, end = queue.Queue(), None, None, until
    def feed():
        for line in process.stdout: lines.put(line)
        lines.put(None)
    threading.Thread(target=feed, daemon=True).start()
    while True:
        try: line = lines.get(timeout=.2)
        except queue.Empty: line = ""
        if line is None: break
        if line.startswith("@part "):
            part, unit, end = line.split()[1], None, float(line.split()[2])
        elif line.startswith("@unit "): unit = line[6:].strip()
        elif line: print(line, end="", flush=True)
        if time.monotonic() > end + 2:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise Stopped(part, unit, "stopped: the time was over", False)
    code = process.wait()
    if code: raise Stopped(part, unit, f"its process ended with code {code}", True)


def conduct(args):
    "Start the process that measures, again where it dies, until all parts had their turn."
    until, left, skip, tries = time.monotonic() + args.budget, list(args.parts), [], 0
    log = args.out / "gpu.log"
    while left and tries < 8 and time.monotonic() < until:
        tries += 1
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--worker", *left,
                   "--skip", *skip, "--until", str(until), "--out", str(args.out),
                   "--device", args.device or "", *["--tiny"] * args.tiny,
                   *(["--data", args.data] if args.data else [])]
        with log.open("ab") as errors:
            begin = errors.tell()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True,
                                       start_new_session=True, env=environment(args.packed))
            try: follow_lines(process, until)
            except Stopped as stop: part, unit, why, again = stop.args
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            else: break
        said = log.read_bytes()[begin:].decode(errors="replace")[-3000:]
        if part is None:
            print(f"Nothing could be measured: {why}.\n{said}")
            return False
        file = args.out / f"gpu-{part}.json"
        report = read(file)
        name = unit or "making ready"
        if report and name not in report["failed"]:
            report["failed"][name] = dict(error=why, said=said)
            print(f"  {name}: {why}", flush=True)
        if report: write(report, file)
        left = left[left.index(part) + (0 if again and unit else 1):]
        skip.append(f"{part}/{unit}")
    return summary(args)


def summary(args):
    "Print what is there now; True if nothing is missing."
    whole = True
    for part in args.parts:
        report = read(args.out / f"gpu-{part}.json")
        whole &= report.get("complete", False)
        print(f"\n{part}: " + (f"{len(report['results'])} of {len(report['units'])} units, "
                               f"{report['machine']['device']}" if report else "not measured"))
        for name, row in report.get("results", {}).items():
            some = {k: v for k, v in row.items() if isinstance(v, (int, float, str, bool))
                    and k != "code"}
            some |= {k: row[k] for k in ("phases", "seconds_to") if k in row}
            print(f"  {name}: " + ", ".join(f"{k} {v}" for k, v in some.items())[:400])
        for kind in ("failed", "left_out"):
            for name, row in report.get(kind, {}).items():
                print(f"  {name}: {kind.replace('_', ' ')}: "
                      f"{row['error'] if kind == 'failed' else row}"[:300])
    if args.packed:
        import carry
        carry.bytes_of(args.packed)
    return whole


# ---------------------------------------------------------------- the process that measures

def machine(device):
    "What the numbers were measured on."
    import fastai, timm, torch, torchvision
    from course_lib.machine import cpu_count
    row = dict(device=device, cores=cpu_count(), threads=torch.get_num_threads(),
               torch=torch.__version__, torchvision=torchvision.__version__,
               fastai=fastai.__version__, timm=timm.__version__,
               python=platform.python_version(), cuda=torch.version.cuda)
    if device == "cpu": return row
    try:
        driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version",
                                 "--format=csv,noheader"], capture_output=True, text=True,
                                timeout=20).stdout.split()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired): driver = None
    about = torch.cuda.get_device_properties(0)
    return row | dict(device=torch.cuda.get_device_name(), driver=driver,
                      memory_gb=round(about.total_memory / 2**30, 1),
                      multiprocessors=about.multi_processor_count,
                      capability=f"{about.major}.{about.minor}",
                      cudnn=torch.backends.cudnn.version(),
                      tf32=dict(convolutions=torch.backends.cudnn.allow_tf32,
                                products=torch.backends.cuda.matmul.allow_tf32),
                      cudnn_tries=torch.backends.cudnn.benchmark)


def ready(args):
    "What every unit is told, when all that it needs is imported."
    import gpu_parts
    there = gpu_parts.torch.cuda.is_available()
    if not (there or args.device or args.tiny):
        sys.exit("PyTorch finds no GPU here. --tiny rehearses without one, and --device cpu "
                 "measures the processor.")
    if args.tiny: gpu_parts.torch.set_num_threads(1)
    device = args.device or ("cuda" if there else "cpu")
    return SimpleNamespace(device=device, tiny=args.tiny, out=args.out, until=args.until,
                           data=args.data, skip=args.skip, units=gpu_parts.UNITS,
                           torch=gpu_parts.torch, code=library())


def worker(args):
    "Measure the parts named, in this process."
    s = ready(args)
    s.end = time.monotonic()
    s.machine = machine(s.device) | dict(start_seconds=round(time.perf_counter() - START, 2))
    print(f"{s.machine['device']}, torch {s.machine['torch']}: ready after "
          f"{s.machine['start_seconds']} s", flush=True)
    for part in args.worker:
        s.end = min(s.until, max(s.end, time.monotonic()) + PARTS[part] * (3 if s.tiny else 1))
        measure(part, s)


def measure(part, s):
    "All units of a part that are not measured yet."
    file = s.out / f"gpu-{part}.json"
    report = read(file)
    same = (report.get("machine", {}).get("device") == s.machine["device"]
            and report.get("tiny") == s.tiny)
    if same and report.get("complete"): return print(f"{part}: measured before", flush=True)
    if not same: report = dict(part=part, tiny=s.tiny, complete=False, results={}, failed={})
    report |= dict(machine=s.machine, predicted=PREDICTED[part], units=[], left_out={})
    # what failed in this run stays failed, what failed in an earlier one has another chance
    report["failed"] = {k: v for k, v in report["failed"].items() if f"{part}/{k}" in s.skip}
    write(report, file)
    print(f"@part {part} {s.end}\n{part}:", flush=True)
    try: units = s.units[part](s)
    except Exception as error: return failed(report, file, "making ready", error, s)
    report["units"] = list(units)
    for name, (need, unit) in units.items():
        if name in report["results"] or f"{part}/{name}" in s.skip: continue
        left = s.end - time.monotonic()
        if left < (0 if s.tiny else need):
            report["left_out"][name] = f"{left:.0f} s were left, and it takes about {need}"
            continue
        print(f"@unit {name}", flush=True)
        begin = time.perf_counter()
        try: row = unit()
        except Exception as error: failed(report, file, name, error, s)
        else:
            seconds = round(time.perf_counter() - begin, 2)
            report["results"][name] = row | dict(unit_seconds=seconds, code=s.code)
            print(f"  {name}: {seconds} s", flush=True)
        tidy(s)
        report["complete"] = set(report["units"]) == set(report["results"])
        write(report, file)
    write(report, file)


def failed(report, file, name, error, s):
    "Keep an error; end the process where the GPU can't be used any more."
    said = "".join(traceback.format_exception(error))[-4000:]
    report["failed"][name] = dict(error=f"{type(error).__name__}: {str(error)[:500]}",
                                  traceback=said)
    print(f"  {name}: FAILED: {type(error).__name__}: {str(error)[:200]}", flush=True)
    write(report, file)
    lost = isinstance(error, getattr(s.torch, "AcceleratorError", ())) or "CUDA error" in str(error)
    if lost: os._exit(3)


def tidy(s):
    "Leave nothing of a unit to the next one."
    gc.collect()
    if s.device != "cuda": return
    s.torch.cuda.set_sync_debug_mode("default")
    s.torch.cuda.empty_cache()
    s.torch.cuda.reset_peak_memory_stats()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="folder for the JSON files")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--again", nargs="+", choices=PARTS, default=[], help="measure these anew")
    p.add_argument("--budget", type=float, default=475, help="seconds for everything")
    p.add_argument("--device", default=None, help="cuda or cpu; default: the GPU if there is one")
    p.add_argument("--tiny", action="store_true", help="the rehearsal: tiny sizes, drawn pictures")
    p.add_argument("--data", help="the photographs, in VOC's layout; default: VOC2012-animals "
                   "where data lives")
    p.add_argument("--packed", type=Path, help="a folder that --pack made and --setup unpacked")
    p.add_argument("--pack", type=Path, metavar="FOLDER", help="make a folder to be carried to a "
                   "machine without a network")
    p.add_argument("--setup", type=Path, metavar="FOLDER", help="there: unpack and install it")
    import carry
    carry.arguments(p)
    for name, kind in (("--until", float), ("--one", str)):
        p.add_argument(name, type=kind, help=argparse.SUPPRESS)
    p.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    p.add_argument("--skip", nargs="*", default=[], help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.pack: return carry.pack(args, p)
    if args.setup: return carry.set_up(args.setup)
    if not args.out: p.error("--out is missing: the folder for the results")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data: args.data = str(Path(args.data).resolve())
    if args.one:
        s = ready(args)
        import gpu_parts
        return gpu_parts.one_speedrun(args.one, START, s)
    if args.worker: return worker(args)
    if args.packed:
        args.packed = args.packed.resolve()
        if not (args.packed / "data").is_dir(): carry.set_up(args.packed)
    for part in args.again: (args.out / f"gpu-{part}.json").unlink(missing_ok=True)
    sys.exit(0 if conduct(args) else 1)


if __name__ == "__main__": main()
